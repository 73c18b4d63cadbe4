"""A process that trains a few steps and tells how much memory it took: what predictions are held against.

python measured_step.py JOB      JOB: JSON of `model` (a directory), `method`, `base`, `batch` (of this process),
    `seq`, `checkpointing`, `optimizer`, `rank`, `steps`, `low_memory`

With WORLD_SIZE in the environment it is one of several processes, with FSDP2.

Prints a line of JSON: the peak above what the process held after its imports, in bytes, and the CPU's seconds. Pages
of the mapped checkpoint that were read count as held.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train; returns the peak above the imports, and the seconds of all cores together."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  # imports count as imports

    import nybble
    from nybble.training import loop  # noqa: F401  # likewise
    from nybble.training.distributed import sharded  # noqa: F401  # likewise
    from nybble.training.methods import Method, apply

    imports = resident("VmRSS")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": None}[job["base"]]
    model: Any = nybble.load(job["model"], dtype=dtype)
    method = job["method"]
    apply(model, Method(method, **({"rank": job["rank"]} if method in ("lora", "dora") else {})))
    batch, seq, steps = job["batch"] * world, job["seq"], job["steps"]
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch * seq * steps + 1,))
    config = nybble.TrainConfig(
        steps=steps,
        batch_size=batch,
        seq_len=seq,
        gradient_checkpointing=job["checkpointing"],
        optimizer=job["optimizer"],
        low_memory=job["low_memory"],
        parallel="fsdp" if world > 1 else "none",
    )
    started = time.process_time()
    nybble.finetune(model, ids, config, show=False)
    found = {"peak": resident("VmHWM") - imports, "cpu": time.process_time() - started}
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
