"""A training step on several GPUs or machines: memory of a rank, bytes that travel, and the time that both take.

As `nybble finetune` does it under torchrun: DDP has the whole model in every process and sums the gradients of what is
trained; FSDP2 has a part of every parameter in every process, gathers a layer before its forward and before its
backward pass, and reduces the gradients to parts. Packed weights travel as the bytes that they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .choose import Plan
from .memory import Estimate, Line, estimate, moments, peak_of
from .shapes import Shape
from .work import TABLES, Work, adapted, packed_bytes, trained_count

SHARDINGS = ("fsdp", "ddp")
#: Layers whose weights a rank holds whole in the backward pass: the one at work and the next, which is on its way.
GATHERED_LAYERS = 2
#: gloo's threads and the code of FSDP2 on the CPU, beside what a process alone has: measured on a model whose tensors
#: are subtracted. NCCL's buffers have not been measured; what CUDA_CONTEXT assumes is to hold them.
GROUP = 5_000_000


@dataclass(frozen=True)
class Cluster:
    """What a step runs on.

    Attributes:
        ranks: processes, one a GPU. sharding: "fsdp" or "ddp".
        flops: that a rank reaches in the products of training, a second. bandwidth: bytes a second that a rank sends
            and receives at once, with all others doing the same.

    Raises ValueError, naming the field.
    """

    ranks: int = 8
    sharding: str = "fsdp"
    flops: float = 400e12
    bandwidth: float = 50e9

    def __post_init__(self) -> None:
        if isinstance(self.ranks, bool) or not isinstance(self.ranks, int) or self.ranks < 1:
            raise ValueError(f"ranks must be an integer of at least 1, got {self.ranks!r}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        for name in ("flops", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Step:
    """One step of all ranks.

    Attributes:
        cluster: on what. rank: memory of a rank. gathered, reduced: bytes of the whole tensors that are gathered, and
            of the gradients that are reduced. received: bytes that each rank receives. operations: of a rank.
        computing, sending: seconds of each; the step takes the longer one where they overlap wholly, and the sum where
            they do not at all. tokens: of all ranks.
    """

    cluster: Cluster
    rank: Estimate
    gathered: int
    reduced: int
    received: int
    operations: float
    computing: float
    sending: float
    tokens: int

    @property
    def least(self) -> float:
        """Seconds where sending hides behind computing, or the other way round."""
        return max(self.computing, self.sending)

    @property
    def most(self) -> float:
        """Seconds where nothing overlaps."""
        return self.computing + self.sending

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "ranks": self.cluster.ranks,
            "sharding": self.cluster.sharding,
            "bytes_of_a_rank": self.rank.total,
            "gathered": self.gathered,
            "reduced": self.reduced,
            "received_by_a_rank": self.received,
            "operations": self.operations,
            "seconds": [self.least, self.most],
            "tokens": self.tokens,
        }


def scaled_rows(found: Plan, cluster: Cluster) -> dict[str, Step]:
    """Steps of every way of a plan that trains, with checkpointing, by the way's key; memory is that of one rank."""
    return {
        row.way.key: scaled_step(found.shape, row.way.method, row.way.base, found.work, cluster)
        for row in found.rows
        if row.checkpointed is not None
    }


def scaled_step(shape: Shape, method: str, base: str, work: Work, cluster: Cluster, checkpointing: bool = True) -> Step:
    """A training step of `work` (batch rows on every rank) on a cluster.

    Raises ValueError for a method that trains nothing, or that does not go with the base.
    """
    if method == "inference":
        raise ValueError("method is 'inference', which has no training step")
    gathered, reduced = traffic(shape, method, base, work, cluster)
    share = (cluster.ranks - 1) / cluster.ranks
    # A ring's all-reduce is a reduction to parts and a gathering of these: each rank receives both.
    received = round(share * (gathered + reduced * (2 if cluster.sharding == "ddp" else 1)))
    operations = step_operations(shape, method, work, checkpointing)
    if cluster.sharding == "ddp":
        rank = estimate(shape, method, base, work, checkpointing)
    else:
        rank = _sharded(shape, method, base, work, checkpointing, cluster)
    return Step(
        cluster,
        rank,
        gathered,
        reduced,
        received,
        operations,
        operations / cluster.flops,
        received / cluster.bandwidth,
        cluster.ranks * work.batch * work.seq,
    )


def traffic(shape: Shape, method: str, base: str, work: Work, cluster: Cluster) -> tuple[int, int]:
    """(bytes gathered, bytes reduced) in a step, of whole tensors.

    FSDP2: every layer twice, the embedding, the head and the last norm once. What is reduced is the fp32 gradient of
    what is trained.
    """
    trained = 4 * trained_count(shape, method, work)
    if cluster.sharding == "ddp" or cluster.ranks == 1:
        return 0, trained if cluster.ranks > 1 else 0
    layers, embedding, outer = _units(shape, method, base, work)
    return 2 * layers + embedding + outer, trained


def _units(shape: Shape, method: str, base: str, work: Work) -> tuple[int, int, int]:
    """Bytes of all layers with what is trained in them, of the embedding's unit, and of the outermost parameters."""
    size = 4 if base == "fp32" else 2
    table = size * shape.embedding
    tables = table * (1 if shape.tied or not shape.head else 2)
    norm = size * shape.hidden  # the last one
    inside = size * shape.parameters - tables - norm
    if base == "nf4":
        weights, scales = packed_bytes(shape)
        # The tables of codes are buffers, which every rank has whole.
        buffers = TABLES * sum(m.count for m in shape.matrices if m.quantizable)
        inside += weights + scales - buffers - size * shape.packed
    if method in ("lora", "dora", "bottleneck", "prefix"):
        inside += 4 * trained_count(shape, method, work)
    if shape.tied or not shape.head:  # a tied embedding stays with the head
        return inside, 0, table + norm
    return inside, table, table + norm


def step_operations(shape: Shape, method: str, work: Work, checkpointing: bool) -> float:
    """Multiplications and additions of a rank's step: 2 a weight and token forward, 2 for the gradient of the inputs,
    2 for that of trained weights, and 2 where checkpointing computes a layer again; causal attention likewise."""
    tokens = work.batch * work.seq
    active = sum(m.weights for m in shape.matrices if m.plain)
    if shape.experts:  # ffn is what acts on a token
        active += 3 * shape.hidden * shape.ffn * shape.layers
    passes = 2 + (1 if method == "full" else 0) + (1 if checkpointing else 0)
    head = 2 * shape.embedding * (3 if method == "full" else 2) if shape.head else 0
    # Scores and weighted values, half of them under the diagonal; their gradients are twice as many.
    attention = 2 * shape.layers * shape.queries * work.seq * (3 + (1 if checkpointing else 0))
    side = 0
    if method in ("lora", "dora"):
        side = 6 * sum(work.rank * (m.in_features + m.out_features) * m.count for m in adapted(shape))
    return float(tokens) * (2 * active * passes + head + attention + side)


#: Parts of which every rank has its share.
_CUT = ("weights", "scales", "adapters", "gradients", "optimizer")


def _sharded(shape: Shape, method: str, base: str, work: Work, checkpointing: bool, cluster: Cluster) -> Estimate:
    """The memory of a rank: parts of what is stored, whole what is at work."""
    ranks = cluster.ranks
    layers, _, outer = _units(shape, method, base, work)
    own = layers // shape.layers
    whole = [Line("workspace", "head and last norm, gathered for the whole step", outer)]
    if work.device == "cpu":
        whole.append(Line("runtime", "gloo's threads, FSDP2's code (measured)", GROUP))
    last = Line("workspace", f"the last of {shape.layers} layers, as it was gathered", own)
    backward = [Line("workspace", f"{GATHERED_LAYERS} of {shape.layers} layers, gathered", GATHERED_LAYERS * own)]
    if method == "full":
        backward.append(Line("gradients", "a layer's, before they are reduced to parts", own))
    found = {}
    for name, lines in moments(shape, method, base, work, checkpointing).items():
        cut = [
            replace(line, formula=f"({line.formula}) / {ranks}", bytes=-(-line.bytes // ranks))
            if line.part in _CUT
            else line
            for line in lines
        ]
        gathered = [last] if name == "loss" else backward  # in the loss no layer is at work
        found[name] = cut if name == "optimizer step" else [*cut, *gathered, *whole]
    return peak_of(found, shape, method, base, work, checkpointing)
