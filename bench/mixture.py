"""Experts one at a time on their packed bytes, beside transformers' grouped products with decoded ones.

python bench/mixture.py [--rounds N]

Random mixtures of 75 M (Mixtral's build: 8 experts, 2 act) and 89 M parameters (Qwen3's: 16, 4 act), NF4 and bf16: one
token and 64 through the model, and steps of LoRA on 4 x 256 tokens, in one process and in turns; medians. Memory is
that of a process of its own, above what it holds before the first step. Without gradients both do the same in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nybble
from nybble.nn import mixture
from nybble.training.methods import Method, apply

SMALL: dict[str, Any] = {
    "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
BUILDS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 1024, "num_hidden_layers": 5, "num_local_experts": 8},
    "qwen3_moe": {
        "intermediate_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 6, "num_experts": 16,
        "num_experts_per_tok": 4, "head_dim": 64,
    },
}  # fmt: skip
WAYS = (mixture.NAME, "grouped_mm")
BATCH, SEQ, STEPS = 4, 256, 5


def prepare(directory: Path) -> dict[tuple[str, str], Path]:
    """The models, in bf16 and NF4, by build and base."""
    import transformers

    for kind, sizes in BUILDS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SMALL, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.to(torch.bfloat16).save_pretrained(directory / kind / "bf16")
        nybble.quantize(directory / kind / "bf16", directory / kind / "nf4", nybble.QuantConfig())
    return {(kind, base): directory / kind / base for kind in BUILDS for base in ("nf4", "bf16")}


def loaded(path: Path, way: str) -> Any:
    model: Any = nybble.load(path)
    model.config._experts_implementation_internal = way
    return model


def seconds(run: Any, times: int) -> float:
    run()
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times


def step_seconds(model: Any) -> float:
    """A step of LoRA: the median of all but the first."""
    apply(model, Method("lora", rank=16))
    ends: list[float] = []
    ids = torch.randint(model.config.vocab_size, (BATCH * SEQ * STEPS + 1,))
    config = nybble.TrainConfig(steps=STEPS, batch_size=BATCH, seq_len=SEQ)
    nybble.finetune(model, ids, config, show=False, on_step=lambda *_: ends.append(time.perf_counter()))
    return statistics.median(b - a for a, b in pairwise(ends))


def peak_of_steps(path: str, way: str) -> int:
    """Bytes above what the process holds before its first step; what is held, not what glibc's heap makes of it."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))

    model = loaded(Path(path), way)
    apply(model, Method("lora", rank=16))
    before = resident("VmRSS")
    ids = torch.randint(model.config.vocab_size, (BATCH * SEQ * STEPS + 1,))
    config = nybble.TrainConfig(steps=STEPS, batch_size=BATCH, seq_len=SEQ, low_memory=True)
    nybble.finetune(model, ids, config, show=False)
    return resident("VmHWM") - before


def measured(path: Path, way: str) -> int:
    command = [sys.executable, __file__, "--worker", json.dumps([str(path), way])]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(peak_of_steps(*json.loads(args.worker)))
        return
    table = Table(title=f"{WAYS[0]} ({WAYS[1]})")
    for column in ("model", "weights", "1 token, ms", "64 tokens, ms", "step, s", "memory of steps, MB"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as temporary:
        for (kind, base), path in prepare(Path(temporary)).items():
            found: dict[tuple[str, str], list[float]] = defaultdict(list)
            for number in range(args.rounds):
                for way in WAYS[:: -1 if number % 2 else 1]:
                    model = loaded(path, way)
                    ids = torch.randint(model.config.vocab_size, (1, 64))
                    with torch.inference_mode():
                        found["one", way].append(seconds(lambda model=model, ids=ids: model(ids[:, :1]), 10) * 1e3)
                        found["many", way].append(seconds(lambda model=model, ids=ids: model(ids), 3) * 1e3)
                    found["step", way].append(step_seconds(model))
            for way in WAYS:
                found["memory", way].append(measured(path, way) / 1e6)
            medians = {key: statistics.median(values) for key, values in found.items()}
            cells = [
                f"{medians[what, WAYS[0]]:{form}} ({medians[what, WAYS[1]]:{form}})"
                for what, form in (("one", ".1f"), ("many", ".0f"), ("step", ".2f"), ("memory", ".0f"))
            ]
            table.add_row(kind, base, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
