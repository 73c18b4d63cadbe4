"""Fine-tune again and again, each time killed at another moment, and go on; for test_interrupted_runs.py and bench.

python tests/training/kill_campaign.py MODEL FOLDER POINTS [OPTIONS]

MODEL: a checkpoint directory with a tokenizer, or "tiny" for a random Llama over bytes. OPTIONS: JSON, fields of
TrainConfig. Each run counts what it does (backward passes, optimizer steps, writes, syncs, renames) and kills itself
with SIGKILL at the given one. Then the same call is made again. Compared with a run that was not interrupted: adapter/,
the losses in metrics.jsonl, and the last checkpoint, which holds parameters, optimizer state and losses, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nybble
from nybble.checkpoint import writer
from nybble.demo import bible
from nybble.training import finetune, loop, optimization
from nybble.training.run_directory import RunDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))
from killed import Steps, in_child

OPTIONS = {
    "steps": 12,
    "batch_size": 2,
    "seq_len": 96,
    "lr": 1e-3,
    "warmup_steps": 2,
    "packing": "documents",
    "optimizer": "adamw8bit",
    "save_every": 3,
    "eval_every": 4,
    "val_fraction": 0.05,
    "ema_decay": 0.9,
    "keep_best": True,
    "plot": False,
}


def counted(kind: str = "", die_at: int = -1) -> Steps:
    """Count what the run does, by its kind; number `die_at` of `kind` is the last moment of this process."""
    steps = Steps(("backward", "optimizer", "write", "fsync", "replace"), kind, die_at)
    torch.Tensor.backward = steps.before("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    optimization.RunningMean.update = steps.before(  # type: ignore[method-assign]
        "optimizer", optimization.RunningMean.update
    )
    writer.write_all = steps.before("write", writer.write_all, is_write=True)
    os.fsync, os.replace = steps.before("fsync", os.fsync), steps.before("replace", os.replace)
    RunDirectory.finish = lambda self: None  # type: ignore[method-assign]  # its last checkpoint is compared too
    return steps


def train(model_name: str, out: Path, options: dict[str, Any]) -> None:
    """One run: QLoRA with dropout, and several documents packed into a row."""
    torch.set_num_threads(1 if model_name == "tiny" else torch.get_num_threads())
    if model_name == "tiny":
        from tiny import ByteTokenizer, llama

        tokenizer: Any = ByteTokenizer()
        model = llama()
        nybble.quantize_(model, nybble.QuantConfig())
        documents = [f"{'abcdefgh'[i % 8] * (i % 7 + 1)} number {i} of many, {i * i}." for i in range(200)]
    else:
        from transformers import AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(model_name), nybble.load(model_name)
        documents = [
            verse for book in ("Mark", "James") for chapter in bible.chapters(book) for verse in chapter.split(". ")
        ]
    torch.manual_seed(0)
    nybble.add_lora(model, r=8, alpha=16, dropout=0.1)
    config = nybble.TrainConfig(out_dir=out, **options)
    finetune(model, documents, config, tokenizer=tokenizer, show=False)


def outcome(out: Path) -> dict[str, str]:
    """Hashes of what must not depend on an interruption."""
    last = max((out / "checkpoints").iterdir())
    files = [*sorted((out / "adapter").iterdir()), *sorted((out / "best").iterdir()), last / "state.safetensors"]
    result = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("kind", "step", "loss", "lr", "grad_norm", "tokens", "perplexity")
    result["metrics"] = json.dumps([{k: row[k] for k in kept if k in row} for row in rows if row["kind"] != "config"])
    return result


def main() -> None:
    model, folder, points = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    options = {**OPTIONS, **(json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})}
    assert loop is not None
    __import__("transformers").AutoConfig.for_model("llama")

    def run(out: Path) -> Callable[[], None]:
        return lambda: train(model, out, options)

    status, did = in_child(run(folder / "whole"), counted)
    assert status == 0, (status, did)
    whole = outcome(folder / "whole")
    draw = random.Random(0)
    kinds = list(did)
    chosen = [(kinds[i % len(kinds)], draw.randint(1, did[kinds[i % len(kinds)]])) for i in range(points)]
    same = 0
    for kind, number in chosen:
        out = folder / f"{kind}{number}"
        status, _ = in_child(run(out), partial(counted, kind, number))
        assert status == -signal.SIGKILL, (kind, number, status)
        status, _ = in_child(run(out), counted)
        assert status == 0, f"killed at {kind} {number}: the same call does not go on"
        found = outcome(out)
        differ = [name for name in whole if found.get(name) != whole[name]]
        same += not differ
        print(f"killed at {kind} {number}: {'the same' if not differ else f'differs in {differ}'}", file=sys.stderr)
        shutil.rmtree(out)
    print(json.dumps({"did": did, "points": len(chosen), "same": same, "losses": len(whole["metrics"])}))


if __name__ == "__main__":
    main()
