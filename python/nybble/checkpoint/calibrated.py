"""Tasks that write calibrated weights: `calibration` makes them, a block at a time, as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration import Calibration
from ..calibration.calibrate import Calibrator
from ..calibration.config import Text, identity
from ..calibration.rounding import Rounded, plain_rule
from ..tensor import QuantTensor
from . import bnb
from .files import Source, TensorInfo
from .report import TensorReport
from .select import Selection
from .slabs import CHUNK, FLOAT_DTYPES, ErrorSums
from .task import Output, StoppedError, Task
from .writer import tensor_bytes


class Calibrated:
    """The calibrated part of a run.

    Attributes:
        identity: what decides the codes, beside the source and the configuration.
        notes: for the report.
        kept: gives the tensors of a weight that an earlier run has written (`Job.kept`).
    """

    kept: Callable[[str], dict[str, bytes]]

    def __init__(self, source: Source, selection: Selection, calibration: Calibration | Text) -> None:
        settings = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
        windows = settings.windows(source.root)
        self._source, self._selection = source, selection
        self._dtypes = {name: _dtype(source.tensors[name]) for name in selection.settings}
        self._calibrator = Calibrator(source, selection, windows, settings.rounding, self._dtypes)
        self.identity = identity(windows, settings.rounding)
        self._failed = False
        self.notes: list[str] = []
        whole = isinstance(settings.data, Tensor) and settings.data.dim() == 2
        if windows.shape[0] < settings.samples and not whole:
            self.notes.append(
                f"calibrated on {windows.shape[0]} windows of {settings.seq} tokens, the text has no more "
                f"({settings.samples} asked for)"
            )
        left = [name for name in selection.settings if name not in self._calibrator.blocks]
        for name in left:
            if selection.settings[name].is_learned:
                selection.settings[name] = plain_rule(selection.settings[name])
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            self.notes.append(f"{left[0]}{more} rounded without calibration: not a linear layer of a block")

    def tasks(self) -> dict[str, Task]:
        """The tasks of the calibrated weights, in the order in which they must be done."""
        return {name: self._task(self._source.tensors[name]) for name in self._calibrator.order}

    def unreached(self, results: Sequence[Mapping[str, Any]]) -> list[str]:
        """A note on the weights that no sample reached (an expert that no token was sent to), given the results."""
        rows = [row for row in results if row.get("name") in self._calibrator.blocks and row["output_error"] is None]
        if not rows:
            return []
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        return [f"{rows[0]['name']}{more} rounded by the plain rule: no sample reached it, more text may"]

    def _task(self, info: TensorInfo) -> Task:
        slots = bnb.slots_for(info.name, info.shape, self._selection.settings[info.name])

        def run(out: Output) -> dict[str, Any]:
            weight, made = self._take(info.name)
            state = made.tensor.state()
            for slot in slots:
                value = state[_key(info.name, slot.name)]
                if slot.shape is None:
                    out.text(slot.name, bytes(value.tolist()).decode())
                else:
                    out.append(slot.name, tensor_bytes(value.contiguous()))
            payload = sum(s.nbytes for s in slots if s.shape is not None and not s.name.endswith("quant_map"))
            return _report(info, weight, made, 8 * payload / info.numel).to_dict()

        return Task(info.name, slots, info.nbytes, run, fixed=self._calibrator.nbytes)

    def _take(self, name: str) -> tuple[Tensor, Rounded]:
        if self._failed:  # the pool had begun this task before it learned of the other's error
            raise StoppedError
        try:
            return self._calibrator.take(name, self._earlier)
        except BaseException:
            self._failed = True
            raise

    def _earlier(self, name: str) -> QuantTensor:
        """A weight of an earlier block, as an earlier run has written it."""
        config = self._selection.settings[name]
        found = self.kept(name)
        state: dict[str, Tensor] = {}
        for slot in bnb.slots_for(name, self._source.tensors[name].shape, config):
            raw = torch.frombuffer(bytearray(found[slot.name]), dtype=torch.uint8)
            key = _key(name, slot.name)
            kind = {"F32": torch.float32, "I8": torch.int8}.get(slot.dtype)
            value = raw if kind is None else raw.view(kind)
            state[key] = value if slot.shape is None else value.view(slot.shape)
        return QuantTensor.from_state(state, name, self._dtypes[name])


def _key(name: str, slot: str) -> str:
    """The key inside the module: "weight.absmax", "SCB"."""
    return slot.removeprefix(bnb.prefix_of(bnb.module_of(name)))


def _dtype(info: TensorInfo) -> torch.dtype:
    stored = FLOAT_DTYPES.get(info.dtype, torch.bfloat16)
    return torch.float32 if stored == torch.float64 else stored


def _report(info: TensorInfo, weight: Tensor, made: Rounded, bits: float) -> TensorReport:
    errors = ErrorSums()
    exact, decoded = weight.reshape(-1), made.tensor.dequantize(torch.float32).view(-1)
    for at in range(0, info.numel, CHUNK):
        errors.add(exact[at : at + CHUNK], decoded[at : at + CHUNK])
    tensor = made.tensor
    return TensorReport(
        info.name, info.shape, tensor.format, tensor.block_size, bits, *errors.figures(), made.error, made.error_plain
    )
