"""A process of several that fine-tune one model together, and that measures itself.

python bench/distributed_worker.py JOB OUT      JOB: JSON, see `Job`; RANK and WORLD_SIZE are set, unless it is alone

Writes OUT/RANK.json: losses, hashes of the packed bytes before and after, memory, and bytes sent a step.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from finetune_worker import stream
from transformers import LlamaForCausalLM  # noqa: F401  # imports count as imports

import nybble
from nybble.nn.full import train_all
from nybble.training import loop  # noqa: F401  # likewise
from nybble.training.distributed import sharded  # likewise


@dataclass(frozen=True)
class Job:
    """parallel: "none", "ddp" or "fsdp"; method: "lora" over `model`, or "full"; dtype, low_memory: of TrainConfig."""

    parallel: str
    method: str
    model: str
    adapter: str
    tokens: str
    steps: int
    batch_size: int
    seq_len: int
    dtype: str
    low_memory: bool


def memory() -> dict[str, int]:
    """Bytes: of its own (anonymous), and its share of what it has in common with others (Pss)."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in rollup if line.endswith("kB")}
    return {"own": found["Anonymous"], "share": found["Pss"]}


class Peaks(threading.Thread):
    """The most of each kind of memory, read every 50 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.imports = memory()
        self.most: Counter[str] = Counter()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            for name, value in memory().items():
                self.most[name] = max(self.most[name], value)

    def above_imports(self) -> dict[str, int]:
        self._over.set()
        self.join()
        return {name: value - self.imports[name] for name, value in self.most.items()}


class Sent:
    """Counts the bytes of collectives: what is gathered, what is reduced to parts, what is reduced for all."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.steps: list[dict[str, int]] = []
        # Newer versions of torch call the first ones by other names.
        for name in ("all_gather_into_tensor", "all_gather_single"):
            self._watch(name, "gathered", 0, "output_tensor")
        for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
            self._watch(name, "reduced", 1, "input")
        self._watch("all_reduce", "reduced for all", 0, "tensor")

    def _watch(self, name: str, kind: str, place: int, keyword: str) -> None:
        """Of a function's arguments the whole is counted: what comes out of a gathering, what goes into a reduction."""
        own = getattr(dist, name, None)

        def watched(*args: Any, **kwargs: Any) -> Any:
            whole = args[place] if len(args) > place else kwargs[keyword]
            self.bytes[kind] += whole.numel() * whole.element_size()
            return own(*args, **kwargs)

        if own is not None:
            setattr(dist, name, watched)

    def step(self) -> None:
        self.steps.append(dict(self.bytes))
        self.bytes.clear()


def packed_hash(model: Any) -> str:
    """SHA-256 of the bytes of all packed weights and scales, in order; brought together, one by one, if sharded."""
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, nybble.QuantLinear):
            for tensor in (module.weight, module.absmax, module.nested_absmax):
                whole: Any = tensor
                whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
                digest.update(whole.detach().view(torch.uint8).numpy())
    return digest.hexdigest()


def expected(model: Any, size: int) -> dict[str, int]:
    """Bytes a step by the formula: each unit's parameters, padded to whole parts, are gathered before its forward and
    before its backward, the outermost ones once; the gradients of the trained ones are reduced, in fp32."""

    def padded(parameter: Any) -> int:
        rows = -(-parameter.shape[0] // size) * size
        return rows * (parameter.numel() // max(1, parameter.shape[0])) * parameter.element_size()

    units = sharded._units(model)
    inside = {id(p) for unit in units for p in unit.parameters()}
    outer = [p for p in model.parameters() if id(p) not in inside]
    # The gradient of an embedding needs no weight.
    twice = [1 if isinstance(unit, torch.nn.Embedding) else 2 for unit in units]
    gathered = sum(n * sum(map(padded, unit.parameters())) for n, unit in zip(twice, units, strict=True))
    reduced = sum(padded(p) for p in model.parameters() if p.requires_grad)
    return {"gathered": gathered + sum(map(padded, outer)), "reduced": reduced}


def main() -> None:
    job, out = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    peaks, sent = Peaks(), Sent()
    peaks.start()
    if job.parallel != "none":
        dist.init_process_group("gloo")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    full = job.method == "full"
    # fp32 is no autocast: what is not packed is then to be fp32 itself.
    model = nybble.load(job.model, dtype=torch.float32 if full or job.dtype == "fp32" else None)
    if full:
        train_all(model)
    else:
        nybble.load_adapter(model, job.adapter)
    formula = expected(model, size)
    config = nybble.TrainConfig(
        steps=job.steps,
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        lr=1e-3 if job.method == "lora" else 1e-4,
        warmup_steps=0,
        min_lr_ratio=1.0,
        dtype=job.dtype,
        parallel=job.parallel,
        low_memory=job.low_memory,
    )
    rows = torch.load(job.tokens)[:, : job.seq_len + 1].contiguous()
    before: list[str] = []

    def on_step(step: int, loss: float) -> None:
        sent.step()

    def hashed() -> str:
        return "" if full else packed_hash(model)

    before.append(hashed())
    report = nybble.finetune(model, stream(rows), config, show=False, on_step=on_step)
    found = {"memory": peaks.above_imports(), "losses": report.losses, "hashes": [before[0], hashed()]}
    found |= {"sent": sent.steps[-1], "formula": formula, "seconds": report.seconds / job.steps}
    (out / f"{rank}.json").write_text(json.dumps(found))
    if job.parallel != "none":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
