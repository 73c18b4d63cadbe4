"""A weight in pieces: readers that decode any range of its elements, and sinks that store or quantize them.

Elements are counted in row-major order. Readers give any range; sinks take consecutive ranges that begin at multiples
of their `step`, so what they write does not depend on how large the pieces are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import backends
from ..errors import CheckpointError, LayoutError, NonFiniteError, UnsupportedDtypeError
from ..formats import NESTED_BLOCK_SIZE, QuantConfig, dynamic_map
from ..tensor import QuantTensor, quant_state_text
from . import bnb
from .files import DTYPE_NAMES, TORCH_DTYPES, TensorInfo, read_range, read_tensor
from .report import TensorReport
from .task import Output
from .writer import Slot, tensor_bytes

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
# Elements compared at a time, fixed so that the figures do not depend on the pieces: 512 KB of fp32, which stay in
# cache; a multiple of every block size.
CHUNK = 1 << 17


class Reader(Protocol):
    """Decodes ranges of a weight.

    Attributes:
        name: for messages. shape: of the weight. dtype: what the weight is said to be of. bytes_per_element: that
            `read` holds at once. fixed: bytes held all the time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes_per_element: float
    fixed: int

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start to stop, 1-D, in a floating dtype that holds them exactly; valid until the next call."""
        ...


class PlainReader:
    """A tensor stored in fp64, fp32, fp16 or bf16."""

    def __init__(self, info: TensorInfo) -> None:
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} has dtype {info.dtype}, not a plain float")
        self._info, self.name, self.shape = info, f"{info.name} ({info.path})", info.shape
        self._stored = FLOAT_DTYPES[info.dtype]
        self.dtype = torch.float32 if self._stored == torch.float64 else self._stored
        self.bytes_per_element: float = self._stored.itemsize + (4 if self._stored == torch.float64 else 0)
        self.fixed = 0
        self._buffer = Buffer()

    def read(self, start: int, stop: int) -> Tensor:
        size = self._stored.itemsize
        raw = self._buffer.take((stop - start) * size)
        read_range(self._info, start * size, raw.numpy().data)
        values = raw.view(self._stored)
        return values.float() if self._stored == torch.float64 else values


class ScaledReader:
    """A tensor stored in fp8 with scales beside it: value = element * scale.

    Scales are one for all, one a row ([N] or [N, 1]), or one a tile of `tile` rows and columns.
    """

    def __init__(
        self, info: TensorInfo, scale: TensorInfo | None, tile: tuple[int, int], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._info, self.name, self.shape, self.dtype = info, f"{info.name} ({info.path})", info.shape, dtype
        self._stored, self._tile = FP8_DTYPES[info.dtype], tile
        self._columns = info.shape[-1] if info.shape else 1
        self._scale = None if scale is None else self._checked(scale)
        self.fixed = 0 if self._scale is None else 4 * self._scale.numel()
        self.bytes_per_element: float = 1 + 4 + 4
        self._raw, self._values = Buffer(), Buffer()

    def _checked(self, scale: TensorInfo) -> Tensor:
        rows = self._info.numel // max(1, self._columns)
        tiles = (math.ceil(rows / self._tile[0]), math.ceil(self._columns / self._tile[1]))
        values = read_tensor(scale).float()
        if len(scale.shape) == 3 and self._info.shape[-2] % self._tile[0] == 0:  # tiles of each expert's matrix
            values = values.flatten(0, 1)
        if scale.shape in {(), (1,), (1, 1)}:
            values = values.reshape(1, 1)
            self._tile = (max(1, rows), max(1, self._columns))
        elif scale.shape in {(rows,), (rows, 1)}:
            values = values.reshape(rows, 1)
            self._tile = (1, max(1, self._columns))
        elif tuple(values.shape) != tiles:
            raise CheckpointError(
                f"{scale.path}: tensor {scale.name!r} has shape {list(scale.shape)}; for {self._info.name!r} "
                f"{list(self._info.shape)} it must be one number, [{rows}], [{rows}, 1] or {list(tiles)}"
            )
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{scale.path}: tensor {scale.name!r} holds NaN or infinity")
        return values

    def read(self, start: int, stop: int) -> Tensor:
        width = self._columns
        first, last = start // width, -(-stop // width)
        raw = self._raw.take((last - first) * width)
        read_range(self._info, first * width, raw.numpy().data)
        values = self._values.take(4 * raw.numel()).view(torch.float32).view(last - first, width)
        values.copy_(raw.view(self._stored).view(last - first, width))
        if self._scale is not None:
            rows = torch.arange(first, last) // self._tile[0]
            for column in range(self._scale.shape[1]):
                part = values[:, column * self._tile[1] : (column + 1) * self._tile[1]]
                part.mul_(self._scale[rows, column, None])
        return values.view(-1)[start - first * width : stop - first * width]


class QuantizedReader:
    """A 4-bit or int8 weight in bitsandbytes' layout, dequantized to fp32."""

    def __init__(self, members: Mapping[str, TensorInfo], dtype: torch.dtype | None = None) -> None:
        info = members["weight"]
        self._members, self.name = members, f"{info.name} ({info.path})"
        # Everything small is read now; the codes and the scales of blocks are checked for their sizes only.
        large = {"weight", "weight.absmax"} if "SCB" not in members else {"weight"}
        state = {
            key: torch.empty(member.shape, dtype=_stored_dtype(member), device="meta")
            if key in large
            else read_tensor(member)
            for key, member in members.items()
        }
        self._whole = QuantTensor.from_state(state, self.name, dtype)
        if self._whole.is_nested:  # the offset went where the codes are
            key = next(key for key in state if key.startswith("weight.quant_state."))
            offset = float(json.loads(bytes(state[key].tolist()))["nested_offset"])
            self._whole.nested_offset = torch.tensor(offset, dtype=torch.float32)
            if not math.isfinite(self._whole.nested_offset):
                raise LayoutError(f"{self.name}: its nested_offset is {offset}, which is not finite")
        self.shape, self.dtype = self._whole.shape, self._whole.dtype
        self.fixed = self._whole.nbytes // NESTED_BLOCK_SIZE + 4 * (self.shape[0] if "SCB" in members else 0)
        self.bytes_per_element: float = 1 + 4 + 4
        self._raw, self._values = Buffer(), Buffer()

    @property
    def config(self) -> QuantConfig:
        """The format that the weight is in."""
        whole = self._whole
        if whole.codebook is None:
            return QuantConfig(format="int8", double_quant=False)
        codes: Any = whole.format if whole.format != "custom" else whole.codebook.tolist()
        return QuantConfig(format=codes, block_size=whole.block_size, double_quant=whole.is_nested)

    def read(self, start: int, stop: int) -> Tensor:
        if self._whole.codebook is None:
            return self._rows(start, stop)
        size, numel = self._whole.block_size, self._whole.numel
        first, last = start // size, -(-stop // size)
        end = min(last * size, numel)
        packed = self._bytes("weight", first * size // 2, -(-end // 2))
        piece = QuantTensor(
            packed.view(-1, 1), self._absmax(first, last), self._whole.codebook, size, (end - first * size,),
            torch.float32, self._whole.format,
        )  # fmt: skip
        values = self._values.take(4 * piece.numel).view(torch.float32)
        piece.dequantize(out=values)
        return values[start - first * size : stop - first * size]

    def _absmax(self, first: int, last: int) -> Tensor:
        whole = self._whole
        if not whole.is_nested:
            info = self._members["weight.absmax"]
            scales = torch.empty(last - first, dtype=torch.float32)
            read_range(info, 4 * first, tensor_bytes(scales))
        else:
            low = first // NESTED_BLOCK_SIZE
            codes = torch.empty(last - low * NESTED_BLOCK_SIZE, dtype=torch.uint8)
            read_range(self._members["weight.absmax"], low * NESTED_BLOCK_SIZE, tensor_bytes(codes))
            assert whole.nested_absmax is not None and whole.nested_map is not None
            nested = whole.nested_absmax[low : -(-last // NESTED_BLOCK_SIZE)]
            decoded = backends.of(codes).nested_dequantize(
                codes, nested, whole.nested_map, whole.nested_offset, NESTED_BLOCK_SIZE
            )
            scales = decoded[first - low * NESTED_BLOCK_SIZE :]
        if not bool(torch.isfinite(scales).all()):
            raise LayoutError(f"{self.name}: its scales hold NaN or infinity")
        return scales

    def _rows(self, start: int, stop: int) -> Tensor:
        width = self.shape[1]
        first, last = start // width, -(-stop // width)
        codes = self._bytes("weight", first * width, last * width).view(torch.int8).view(last - first, width)
        piece = QuantTensor(
            codes, self._whole.absmax[first:last], None, 0, (last - first, width), torch.float32, "int8"
        )
        values = self._values.take(4 * codes.numel()).view(torch.float32).view(last - first, width)
        piece.dequantize(out=values)
        return values.view(-1)[start - first * width : stop - first * width]

    def _bytes(self, member: str, start: int, stop: int) -> Tensor:
        raw = self._raw.take(stop - start)
        read_range(self._members[member], start, raw.numpy().data)
        return raw


class Sink(Protocol):
    """Takes the elements of a weight, in order, and writes them.

    Attributes:
        step: elements; `put` begins at a multiple of it. bytes_per_element, fixed: see `Reader`.
        again: after `finish`, `compare` must see all elements once more, for the report.
    """

    step: int
    bytes_per_element: float
    fixed: int
    again: bool

    def put(self, start: int, values: Tensor) -> None: ...

    def finish(self) -> None: ...

    def compare(self, start: int, values: Tensor) -> None: ...

    def report(self) -> TensorReport | None: ...


class PlainSink:
    """Stores a weight in fp32, fp16 or bf16."""

    step, fixed, again = CHUNK, 0, False

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self._name, self._dtype = name, dtype
        self.bytes_per_element: float = dtype.itemsize

    def slots(self, shape: tuple[int, ...]) -> list[Slot]:
        return [Slot(self._name, DTYPE_NAMES[self._dtype], shape)]

    def open(self, out: Output) -> None:
        self._out = out

    def put(self, start: int, values: Tensor) -> None:
        stored = values.to(self._dtype)
        if stored.dtype != values.dtype and not bool(torch.isfinite(stored).all()):
            index = start + int((~torch.isfinite(stored)).to(torch.uint8).argmax())
            raise NonFiniteError(self._name, index, 1, f"flat index {index} is not finite in {self._dtype}")
        self._out.append(self._name, tensor_bytes(stored))

    def finish(self) -> None:
        return

    def compare(self, start: int, values: Tensor) -> None:
        return

    def report(self) -> None:
        return None


class QuantSink:
    """Quantizes a weight to `config`'s format, bit for bit as `QuantTensor.quantize` would do the whole of it."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, config: QuantConfig, where: str = ""
    ) -> None:
        self._name, self._where, self._shape, self._dtype, self._config = name, where or name, shape, dtype, config
        self._numel = math.prod(shape)
        self._codes = config.codebook
        self._errors = ErrorSums()
        if config.is_4bit:
            blocks = math.ceil(self._numel / config.block_size)
            self.step = CHUNK
            self.bytes_per_element: float = 0.5 + 4 / config.block_size
            # The scales in fp32 and in 8 bits, and what taking their mean and differences needs for a moment.
            self.fixed = blocks * (24 if config.double_quant else 4) + 4 * CHUNK * 4
            self.again = config.double_quant
        else:
            if len(shape) != 2:
                raise CheckpointError(f"{self._where}: the int8 layout takes matrices, the shape is {list(shape)}")
            self.step = shape[1] * max(1, CHUNK // max(1, shape[1]))
            self.bytes_per_element = 1 + 2 + 4 / max(1, shape[1])
            self.fixed = 8 * shape[0] + 4 * max(CHUNK, shape[1]) * 4
            self.again = False

    def slots(self) -> list[Slot]:
        return bnb.slots_for(self._name, self._shape, self._config)

    def open(self, out: Output) -> None:
        self._out = out
        size = math.ceil(self._numel / self._config.block_size) if self._config.is_4bit else self._shape[0]
        self._absmax = torch.empty(size, dtype=torch.float32)
        self._last: tuple[int, Tensor] | None = None

    def put(self, start: int, values: Tensor) -> None:
        config = self._config
        backend = backends.of(values)
        try:
            if self._codes is None:
                rows = values.view(-1, self._shape[1])
                packed, scales = backend.quantize_int8(rows, self._where)
                first = start // self._shape[1]
            else:
                packed, scales = backend.quantize_4bit(
                    values, self._codes, config.block_size, config.search, self._where
                )
                first = start // config.block_size
        except NonFiniteError as error:
            index = start + error.index
            detail = f"the value at flat index {index}, row-major in {list(self._shape)}, is not finite"
            if self._codes is None:
                detail = detail.replace("finite", "finite in fp16, which int8 goes through")
            raise NonFiniteError(self._where, index, error.count, detail) from error
        self._absmax[first : first + scales.numel()] = scales
        name = self._name
        self._out.append(name, tensor_bytes(packed))
        if self._codes is None:
            for row in range(0, packed.shape[0], max(1, CHUNK // self._shape[1])):
                part = slice(row, row + max(1, CHUNK // self._shape[1]))
                piece = QuantTensor(
                    packed[part], scales[part], None, 0, tuple(packed[part].shape), torch.float32, "int8"
                )
                self._errors.add(rows[part].reshape(-1), piece.dequantize(torch.float32).view(-1))
        elif not config.double_quant:
            self._compare(values, packed, scales)
        elif start == 0 and values.numel() == self._numel:
            self._last = (start, packed)  # all in one piece: spares reading it back

    def finish(self) -> None:
        """Write the scales and what describes them."""
        name, config, out = self._name, self._config, self._out
        if self._codes is None:
            owner = bnb.module_of(name)
            out.append(f"{bnb.prefix_of(owner)}SCB", tensor_bytes(self._absmax))
            out.append(f"{bnb.prefix_of(owner)}weight_format", bytes(1))
            return
        out.append(f"{name}.quant_map", tensor_bytes(self._codes))
        offset = None
        if config.double_quant:
            backend = backends.of(self._absmax)
            codes, nested, scalar = backend.nested_quantize(self._absmax)
            out.append(f"{name}.absmax", tensor_bytes(codes))
            out.append(f"{name}.nested_absmax", tensor_bytes(nested))
            out.append(f"{name}.nested_quant_map", tensor_bytes(dynamic_map()))
            offset = scalar.item()
            self._absmax = backend.nested_dequantize(codes, nested, dynamic_map(), scalar, NESTED_BLOCK_SIZE)
        else:
            out.append(f"{name}.absmax", tensor_bytes(self._absmax))
        text_slot = next(slot.name for slot in self.slots() if slot.shape is None)
        text = quant_state_text(config.format_name, config.block_size, self._dtype, self._shape, offset)
        out.text(text_slot, text)

    def compare(self, start: int, values: Tensor) -> None:
        """The same elements again, against what was stored."""
        if self._last is not None:
            packed = self._last[1]
        else:
            packed = torch.empty(-(-values.numel() // 2), 1, dtype=torch.uint8)
            self._out.read_into(self._name, start // 2, tensor_bytes(packed))
        first = start // self._config.block_size
        self._compare(values, packed, self._absmax[first : first + -(-values.numel() // self._config.block_size)])

    def _compare(self, values: Tensor, packed: Tensor, scales: Tensor) -> None:
        size = self._config.block_size
        decoded = torch.empty(min(CHUNK, values.numel()), dtype=torch.float32)
        for at in range(0, values.numel(), CHUNK):
            exact = values[at : at + CHUNK]
            count = exact.numel()
            piece = QuantTensor(
                packed[at // 2 : at // 2 + -(-count // 2)], scales[at // size : at // size + -(-count // size)],
                self._codes, size, (count,), torch.float32, self._config.format_name,
            )  # fmt: skip
            self._errors.add(exact, piece.dequantize(out=decoded[:count]))

    def report(self) -> TensorReport:
        payload = sum(
            slot.nbytes
            for slot in self.slots()
            if slot.shape is not None and not slot.name.endswith(("quant_map", "weight_format"))
        )
        config = self._config
        return TensorReport(
            self._name, self._shape, config.format_name, config.block_size if config.is_4bit else 0,
            8 * payload / self._numel, *self._errors.figures(),
        )  # fmt: skip


class ErrorSums:
    """||x - y||, ||x|| and the largest |x - y|, summed in double precision over chunks whose bounds are fixed."""

    def __init__(self) -> None:
        self._difference = self._norm = self._largest = 0.0
        self._exact = torch.empty(0)

    def add(self, exact: Tensor, decoded: Tensor) -> None:
        """One more chunk; `decoded`, fp32, is overwritten with the difference."""
        if not exact.numel():
            return
        if self._exact.numel() < exact.numel():
            self._exact = torch.empty(exact.numel(), dtype=torch.float32)
        x = self._exact[: exact.numel()].copy_(exact)
        norm = float(torch.linalg.vector_norm(x))
        decoded.sub_(x)
        difference = float(torch.linalg.vector_norm(decoded))
        if not (1e-15 < norm < 1e18) or 0 < difference < 1e-15:  # squares leave the range of fp32
            norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
            difference = float(torch.linalg.vector_norm(decoded, dtype=torch.float64))
        self._norm += norm * norm
        self._difference += difference * difference
        low, high = torch.aminmax(decoded)  # ten times as fast as a norm of infinite order
        self._largest = max(self._largest, -float(low), float(high))

    def figures(self) -> tuple[float, float]:
        """(||x - y|| / ||x||, or 0 for all zeros; the largest |x - y|)."""
        return (self._difference / self._norm) ** 0.5 if self._norm else 0.0, self._largest


class Buffer:
    """Memory that is used again for the next piece: fresh pages for each would be as slow as the work on them."""

    def __init__(self) -> None:
        self._data = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        if self._data.numel() < size:
            self._data = torch.empty(0, dtype=torch.uint8)
            self._data = torch.empty(size, dtype=torch.uint8)
        return self._data[:size]


def _stored_dtype(info: TensorInfo) -> torch.dtype:
    if info.dtype not in TORCH_DTYPES:
        raise UnsupportedDtypeError(f"{info.path}: tensor {info.name!r} has dtype {info.dtype}")
    return TORCH_DTYPES[info.dtype]


def copy(info: TensorInfo, out: Output, name: str | None = None) -> dict[str, Any]:
    """Move a tensor's bytes as they are, under a new `name` if one is given."""
    raw = torch.empty(min(info.nbytes, out.room), dtype=torch.uint8)
    for start in range(0, info.nbytes, max(1, raw.numel())):
        piece = raw[: min(raw.numel(), info.nbytes - start)]
        read_range(info, start, piece.numpy().data)
        out.append(name or info.name, tensor_bytes(piece))
        out.advance(piece.numel())
    return {}


def least_memory(reader: Reader, sink: Any) -> tuple[int, int]:
    """(bytes held all the time, bytes of the smallest piece) of moving a weight from `reader` to `sink`."""
    numel = math.prod(reader.shape)
    per = reader.bytes_per_element + sink.bytes_per_element
    row = reader.shape[-1] if reader.shape else 1
    return int(reader.fixed + sink.fixed), int((min(sink.step, numel) + 2 * row) * per) + (1 << 16)


def pump(reader: Reader, sink: Any, out: Output, nbytes: int) -> dict[str, Any]:
    """Move a whole weight from `reader` to `sink`, about `out.room` bytes at a time.

    Args:
        nbytes: what the weight counts for in the progress.

    Returns:
        The sink's report as a dict, empty if it has none.
    """
    numel = math.prod(reader.shape)
    row = reader.shape[-1] if reader.shape else 1
    per = reader.bytes_per_element + sink.bytes_per_element
    size = max(sink.step, int((out.room - (1 << 16)) / per - 2 * row) // sink.step * sink.step)
    sink.open(out)
    for start in range(0, numel, size):
        stop = min(start + size, numel)
        values = reader.read(start, stop)
        sink.put(start, values)
        out.advance(nbytes * stop // numel - nbytes * start // numel)
    sink.finish()
    if sink.again:
        for start in range(0, numel, size):
            if size < numel:  # one piece is still in memory
                values = reader.read(start, min(start + size, numel))
            sink.compare(start, values)
            out.advance(0)
    report = sink.report()
    return {} if report is None else report.to_dict()
