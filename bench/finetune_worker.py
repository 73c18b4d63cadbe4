"""A process that fine-tunes one model in one way, as many steps at a time as finetune.py asks for, and measures itself.

python bench/finetune_worker.py JOB      JOB: JSON, see `Job`

Each line of stdin is a number of steps; each is answered by a line of JSON: the steps' seconds and losses, and the
memory that the process held at most (VmHWM) beside what it held after its imports.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """tool: "nybble", or "peft" (transformers, PEFT, bitsandbytes); base: "nf4" or "bf16"."""

    tool: str
    base: str
    checkpointing: bool
    model: str
    """Directory of the bf16 checkpoint; for nybble and nf4, of the quantized one."""
    adapter: str
    """Directory of the adapter with which both tools start."""
    tokens: str
    """File of a torch tensor int64 [rows, seq_len + 1]."""
    batch_size: int = 4
    lr: float = 1e-3
    options: dict[str, Any] | None = None
    """Further fields of nybble's TrainConfig."""
    compute: str = "bf16"
    """Of peft: "bf16", with autocast, or "fp32", with fp32 base weights where they are not 4-bit."""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


class Steps:
    """Answers stdin; the training run calls `done` after each step and waits in it when none is left to do."""

    def __init__(self, imports: int) -> None:
        self.imports = imports
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.left = self._asked()
        self.started = time.perf_counter()

    def _asked(self) -> int:
        line = sys.stdin.readline()
        if not line.strip():
            raise SystemExit(0)
        return int(line)

    def done(self, step: int, loss: float) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.losses.append(loss)
        self.left -= 1
        if not self.left:
            memory = {"imports": self.imports, "peak": resident("VmHWM")}
            print(json.dumps({"seconds": self.seconds, "losses": self.losses, **memory}), flush=True)
            self.losses, self.seconds = [], []
            self.left = self._asked()
        self.started = time.perf_counter()


def nybble(job: Job) -> Callable[[Steps], None]:
    """nybble's own loop over its own layers."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  # imports count as imports

    import nybble
    from nybble.training import loop  # noqa: F401  # imports count as imports

    def run(steps: Steps) -> None:
        model = nybble.load(job.model) if job.base == "nf4" else nybble.load(job.model, dtype=torch.bfloat16)
        nybble.load_adapter(model, job.adapter)
        rows = torch.load(job.tokens)
        config = nybble.TrainConfig(
            steps=1_000_000,
            batch_size=job.batch_size,
            seq_len=rows.shape[1] - 1,
            lr=job.lr,
            warmup_steps=0,
            min_lr_ratio=1.0,
            gradient_checkpointing=job.checkpointing,
            **(job.options or {}),
        )
        nybble.finetune(model, stream(rows), config, show=False, on_step=steps.done)

    return run


def stream(rows: Any) -> Any:
    """The rows end to end as nybble packs them again: neighbours share a token."""
    import torch

    return torch.cat([rows[:, :-1].flatten(), rows[-1, -1:]])


def peft(job: Job) -> Callable[[Steps], None]:
    """transformers + PEFT + bitsandbytes, as their documentation trains."""
    import torch
    from bitsandbytes.nn import Linear4bit  # noqa: F401  # imports count as imports
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM  # noqa: F401  # likewise

    def run(steps: Steps) -> None:
        compute = torch.bfloat16 if job.compute == "bf16" else torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
        options = {"quantization_config": quantization} if job.base == "nf4" else {}
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=compute, **options)
        if job.base == "nf4":
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=job.checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
        elif job.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
        rows, order = torch.load(job.tokens), Order(job)
        for step in range(1, 1_000_000):
            batch = rows[order(step, len(rows))]
            with torch.autocast("cpu", torch.bfloat16, enabled=job.compute == "bf16"):
                targets = batch[:, 1:].contiguous()
                loss = model(input_ids=batch[:, :-1], labels=targets, shift_labels=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps.done(step, float(loss.detach()))

    return run


class Order:
    """nybble's order of the rows for seed 0, so that both tools see the same batches."""

    def __init__(self, job: Job) -> None:
        self.count = job.batch_size

    def __call__(self, step: int, rows: int) -> Any:
        import torch

        positions = range((step - 1) * self.count, step * self.count)
        orders: dict[int, Any] = {}
        for epoch in {p // rows for p in positions}:
            orders[epoch] = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
        return torch.stack([orders[p // rows][p % rows] for p in positions])


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    run = {"nybble": nybble, "peft": peft}[job.tool](job)
    run(Steps(resident("VmRSS")))


if __name__ == "__main__":
    main()
