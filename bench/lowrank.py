"""How low-rank fine-tuning is, on real models and texts.

python bench/lowrank.py full --out DIR [--seconds S]

full       SmolLM2, every weight trained on verses of the King James Bible; then the rank of what changed, and the
           perplexity of the held-out 1 John with that change cut to a LoRA of rank 4, 16, 64 and 256
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import nybble
from nybble import nn as layers
from nybble.cli.shared import load_tokenizer
from nybble.demo import bible, smollm2
from nybble.training import finetune

STEPS, BATCH, SEQ_LEN, LR = 96, 4, 256, 1e-4


def tuned(args: argparse.Namespace) -> tuple[Path, Path]:
    """(SmolLM2 in bf16, the same with every weight trained in fp32); goes on where an earlier call ended."""
    base, run = args.out / "smollm2-bf16", args.out / "full"
    if not base.exists():
        smollm2.write_checkpoint(base)
    if (run / "adapter").exists() and not (run / "run.json").exists():  # there while a run is not finished
        return base, run / "adapter"
    model, tokenizer = nybble.load(base, dtype=torch.float32), load_tokenizer(base)
    layers.train_all(model)
    started = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        if args.seconds and time.monotonic() - started > args.seconds:
            os.kill(os.getpid(), signal.SIGINT)  # the run ends after this step, and the next call goes on

    def save(trained: Any, directory: Path) -> None:
        trained.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    config = nybble.TrainConfig(
        steps=STEPS, batch_size=BATCH, seq_len=SEQ_LEN, lr=LR, warmup_steps=5, log_every=8, save_every=STEPS,
        keep_checkpoints=1, out_dir=run,
    )  # fmt: skip
    documents = bible.training_documents()
    report = finetune(model, documents, config, tokenizer=tokenizer, save=save, on_step=on_step)
    if report.interrupted:
        print("not done yet: the same command goes on")
        sys.exit(75)
    return base, run / "adapter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["full"])
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints, figures and plots")
    parser.add_argument("--seconds", type=float, help="end training after so long; the same command goes on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(tuned(args))


if __name__ == "__main__":
    main()
