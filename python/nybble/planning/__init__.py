"""Before and after training: what fits where, and how low-rank what was learned is."""

from .choose import Plan, Row, plan
from .machine import Memory
from .memory import Estimate, Line, estimate
from .shapes import BUILT_IN, Matrix, Shape, find_shape, shape_of
from .work import Work

__all__ = [
    "BUILT_IN",
    "Estimate",
    "Line",
    "Matrix",
    "Memory",
    "Plan",
    "Row",
    "Shape",
    "Work",
    "estimate",
    "find_shape",
    "plan",
    "shape_of",
]
