"""Before and after training: what fits where, and how low-rank what was learned is."""

from .choose import Plan, Row, plan
from .machine import Memory
from .memory import Estimate, Line, estimate
from .scaling import Cluster, Step, scaled_rows, scaled_step
from .shapes import BUILT_IN, Matrix, Shape, find_shape, shape_of
from .work import Work

__all__ = [
    "BUILT_IN",
    "Cluster",
    "Estimate",
    "Line",
    "Matrix",
    "Memory",
    "Plan",
    "Row",
    "Shape",
    "Step",
    "Work",
    "estimate",
    "find_shape",
    "plan",
    "scaled_rows",
    "scaled_step",
    "shape_of",
]
