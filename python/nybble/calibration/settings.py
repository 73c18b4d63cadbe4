"""`Rounding`: how codes are picked once the moments are known. Imports nothing, for the command line's help."""

from __future__ import annotations

from dataclasses import dataclass

# What `Calibration` takes of a text unless told otherwise: windows, and tokens in each.
SAMPLES, SEQ = 16, 512


@dataclass(frozen=True)
class Rounding:
    """How codes are picked once the moments are known.

    Attributes:
        damping: share of the mean of H's diagonal that is added to the diagonal.
        act_order: columns with large inputs first (GPTQ's `desc_act`), else from left to right. Scales stay those of
            the file's blocks, so it costs nothing at run time.
        sweeps: of coordinate descent over all columns, after the first pass and after each refit; 0 for none.
        refits: times that the scales are fitted anew to the codes (least squares in H) and the codes to the scales.
    """

    damping: float = 0.1
    act_order: bool = True
    sweeps: int = 3
    refits: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.damping, (int, float)) and not isinstance(self.damping, bool)
        if not (number and 0 < self.damping <= 1):
            raise ValueError(f"damping is {self.damping!r}; it must be a number above 0, at most 1")
        if not isinstance(self.act_order, bool):
            raise ValueError(f"act_order is {self.act_order!r}; it must be True or False")
        for name in ("sweeps", "refits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, 0 or more")
