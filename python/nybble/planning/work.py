"""What is planned for: a method, what it trains, and the sizes of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from ..formats import NESTED_BLOCK_SIZE
from ..training.optim import MIN_8BIT_SIZE
from .shapes import Matrix, Shape

METHODS = ("inference", "prompt", "prefix", "bottleneck", "lora", "dora", "full")
BASES = ("nf4", "bf16", "fp32")
OPTIMIZERS = ("adamw", "adamw8bit", "lion", "sgd")
DEVICES = ("cpu", "cuda", "unified")
#: Bytes of an activation: training computes under autocast to bf16.
ACTIVATION = 2
#: Elements that share a scale: of NF4 weights, and of 8-bit moments.
WEIGHT_BLOCK, MOMENT_BLOCK = 64, 256
#: Bytes of a quantized layer's codebook, map of its scales and their offset: 16, 256 and 1 of fp32.
TABLES = 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Work:
    """The sizes of a step; what `nybble finetune` is called with.

    Attributes:
        batch: rows of a forward pass. seq: tokens of a row. rank: of LoRA and DoRA. size: of bottlenecks. tokens:
            virtual ones, of prefixes and prompts. optimizer: one of OPTIMIZERS. loss_chunk: tokens whose logits exist
            at once. device: one of DEVICES. fused: on the CPU, nybble's kernels in place of the model's own code.
            matrix_unit: the CPU has AMX, where products of LoRA's factors and attention's forward pass are torch's.
            widened: the CPU has no instructions for bf16, and products are computed in fp32, a piece at a time.

    Raises ValueError, naming the field, what came and what is allowed.
    """

    batch: int = 1
    seq: int = 2048
    rank: int = 16
    size: int = 64
    tokens: int = 20
    optimizer: str = "adamw"
    loss_chunk: int = 256
    device: str = "cpu"
    fused: bool = True
    matrix_unit: bool = False
    widened: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} must be an integer of at least 1, got {value!r}")
        for name, allowed in (("optimizer", OPTIMIZERS), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def kernels(self) -> bool:
        """Whether nybble's fused kernels run: on the CPU only."""
        return self.fused and self.device == "cpu"


def check_method(method: str, base: str) -> None:
    """Raises ValueError unless the method works over such a base."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    if (method == "full") != (base == "fp32"):
        raise ValueError(f"base is {base!r} with method {method!r}; full trains fp32 weights, all others nf4 or bf16")


# ---- what is trained -------------------------------------------------------------------------------------------------


def trained_tensors(shape: Shape, method: str, work: Work) -> list[tuple[int, int]]:
    """(elements, how many) of the trained tensors, as `nybble finetune` makes them."""
    if method == "inference":
        return []
    if method == "full":
        whole = [(m.out_features * m.in_features, m.count) for m in shape.matrices]
        tables = [(shape.embedding, 1 if shape.tied or not shape.head else 2)]
        small = shape.parameters - sum(n * count for n, count in (*whole, *tables))
        return [*whole, *tables, (shape.hidden, small // shape.hidden), (small % shape.hidden, 1)]
    if method == "prompt":
        return [(work.tokens * shape.hidden, 1)]
    if method == "prefix":
        return [(2 * work.tokens * shape.keys, shape.layers)]
    if method == "bottleneck":  # Houlsby's places: two a layer
        places = 2 * shape.layers
        return [(work.size * shape.hidden, 2 * places), (work.size, places), (shape.hidden, places)]
    found: list[tuple[int, int]] = []
    for m in adapted(shape):
        found += [(work.rank * m.in_features, m.count), (work.rank * m.out_features, m.count)]
        if method == "dora":
            found.append((m.out_features, m.count))
    return found


def adapted(shape: Shape) -> Iterator[Matrix]:
    """The layers that LoRA stands beside."""
    return (m for m in shape.matrices if m.plain)


def trained_count(shape: Shape, method: str, work: Work) -> int:
    """Parameters that are trained."""
    return sum(elements * count for elements, count in trained_tensors(shape, method, work))


def optimizer_bytes(tensors: list[tuple[int, int]], optimizer: str) -> int:
    """Bytes of the optimizer's state for such tensors."""
    total = 0
    for elements, count in tensors:
        if optimizer == "adamw8bit" and elements >= MIN_8BIT_SIZE:
            total += count * 2 * (elements + 4 * -(-elements // MOMENT_BLOCK))
        else:
            total += count * elements * {"adamw": 8, "adamw8bit": 8, "lion": 4, "sgd": 0}[optimizer]
    return total


# ---- a quantized base ------------------------------------------------------------------------------------------------


def packed_bytes(shape: Shape) -> tuple[int, int]:
    """(packed weights, their scales) of the matrices that are quantized to NF4 with double quantization."""
    weights = scales = 0
    for m in shape.matrices:
        if m.quantizable:
            elements = m.out_features * m.in_features
            blocks = -(-elements // WEIGHT_BLOCK)
            weights += m.count * -(-elements // 2)
            # a byte a block, and fp32 for every 256 of these
            scales += m.count * (blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + TABLES)
    return weights, scales
