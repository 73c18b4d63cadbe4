"""How low-rank fine-tuning is, on real models and texts.

python bench/lowrank.py full --out DIR [--seconds S]
python bench/lowrank.py rounding --out DIR [--seconds S]
python bench/lowrank.py intrinsic --out DIR --wordnet DIR [--head trained] [--seconds S]

full       SmolLM2, every weight trained on 96 steps of 1,024 tokens of the King James Bible; the singular values of
           what changed (rank.json, rank.svg); the perplexity of 1 John, which is held out, of the model before and
           after, and of the one before with the change as a LoRA of rank 4, 16, 64 and 256
rounding   the same run stored in bf16: what of the difference rounding is; and how near the edge that `nybble rank`
           tells comes to the largest singular value of simulated rounding, beside that of one variance for all
intrinsic  MiniLM on WordNet's glosses, which of 45 classes of meaning a gloss describes: accuracy by the dimension of
           a random subspace, beside full fine-tuning and a linear probe (intrinsic.json, intrinsic.svg)

They go on where an earlier call with the same --out ended. --seconds: begin nothing new after so long, and say so with
exit status 75. --wordnet: directory with the data files of Debian's package wordnet-base.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import nybble
from nybble import nn as layers
from nybble.checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from nybble.cli.shared import load_tokenizer
from nybble.demo import bible, smollm2
from nybble.planning.extract import extract
from nybble.planning.intrinsic import IntrinsicConfig, IntrinsicReport, intrinsic
from nybble.planning.noise import spacing
from nybble.planning.rank import JSON_NAME, rank
from nybble.training import TextClassifier, finetune, perplexity
from nybble.training.data import Labelled

STEPS, BATCH, SEQ_LEN, LR = 96, 4, 256, 1e-4
RANKS = (4, 16, 64, 256)
WINDOW = 512
TEXTS, HELD_OUT, MAX_LENGTH = 1500, 1500, 64
#: The middle first, so that an unfinished sweep tells most.
DIMS = (10_000, 100_000, 1_000, 1_000_000, 100, 30_000, 3_000, 10, 300)
UNFINISHED = 75


class Clock:
    """Ends the call where its time is up."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def check(self) -> None:
        """To be called between pieces of work."""
        if self.over:
            print("not done yet: the same command goes on")
            sys.exit(UNFINISHED)


def tuned(out: Path, clock: Clock) -> tuple[Path, Path]:
    """(SmolLM2 in bf16, the same with every weight trained in fp32)."""
    base, run = out / "smollm2-bf16", out / "full"
    if not base.exists():
        smollm2.write_checkpoint(base)
    if (run / "adapter").exists() and not (run / "run.json").exists():  # there while a run is not finished
        return base, run / "adapter"
    model, tokenizer = nybble.load(base, dtype=torch.float32), load_tokenizer(base)
    layers.train_all(model)

    def on_step(step: int, loss: float) -> None:
        if clock.over:
            os.kill(os.getpid(), signal.SIGINT)  # the run ends after this step, and the next call goes on

    def save(trained: Any, directory: Path) -> None:
        trained.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    config = nybble.TrainConfig(
        steps=STEPS, batch_size=BATCH, seq_len=SEQ_LEN, lr=LR, warmup_steps=5, log_every=8, save_every=STEPS,
        keep_checkpoints=1, out_dir=run,
    )  # fmt: skip
    finetune(model, bible.training_documents(), config, tokenizer=tokenizer, save=save, on_step=on_step)
    clock.check()
    return base, run / "adapter"


def full(args: argparse.Namespace) -> None:
    """The three parts, each kept when it is done."""
    clock = Clock(args.seconds)
    base, after = tuned(args.out, clock)
    if not (args.out / "rank" / JSON_NAME).exists():
        report = rank(base, after)
        report.write(args.out / "rank")
        Console(width=140).print(report.table())
    clock.check()
    path = args.out / "full.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for what, make in contestants(base, after, args.out).items():
        if any(row["what"] == what for row in rows):
            continue
        clock.check()
        rows.append({"what": what, **make()})
        content = {"machine": harness.machine(), "steps": STEPS, "tokens": STEPS * BATCH * SEQ_LEN, "lr": LR}
        path.write_text(json.dumps({**content, "rows": rows}, indent=2) + "\n")
        print(json.dumps(rows[-1]), flush=True)


def rounding(args: argparse.Namespace) -> None:
    """The table of the change stored in bf16, and edges over the largest singular values of drawn rounding errors."""
    base, after = tuned(args.out, Clock(args.seconds))
    stored = args.out / "full-bf16"
    stored.mkdir(exist_ok=True)
    weights = {name: value.bfloat16() for name, value in load_file(after / "model.safetensors").items()}
    save_file(weights, stored / "model.safetensors", {"format": "pt"})
    report = rank(base, stored)
    report.write(args.out / "rank-bf16")
    Console(width=140).print(report.table())
    print("\n".join(report.notes))
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for row in report.layers[::10]:
        if row.noise_edge is None or max(row.shape) > 4096:
            continue
        step = spacing(weights[row.name].double(), torch.bfloat16)
        errors = step * (torch.rand(row.shape, generator=generator, dtype=torch.float64) - 0.5)
        largest = float(torch.linalg.matrix_norm(errors, 2))
        one = float(step.square().mean() / 12) ** 0.5 * sum(side**0.5 for side in row.shape)
        ratios.append((row.noise_edge / largest, one / largest))
    for what, values in zip(
        ("nybble's", "one variance for all (Marchenko-Pastur)"), zip(*ratios, strict=True), strict=True
    ):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"edge / largest of simulated rounding, {what}: {low:.2f} to {high:.2f}, median {middle:.2f}")


def contestants(base: Path, after: Path, out: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is judged by its perplexity."""
    largest = out / f"rank-{RANKS[-1]}-others"

    def extracted(r: int, others: bool) -> dict[str, Any]:
        if not (largest / CONFIG_NAME).exists():
            extract(base, after, largest, RANKS[-1], save_others=True, method="gram").write(out / "extract.json")
        folder = out / f"rank-{r}{'-others' if others else ''}"
        if folder != largest:
            cut(largest, folder, r, others)
        kept, changed = energies(json.loads((out / "rank" / JSON_NAME).read_text()), r)
        parameters = sum(layer.r * sum(layer.shape) for layer in read_adapter(folder).layers.values())
        return {"parameters": parameters, "energy kept": kept / changed, "perplexity": judged(base, base, folder)}

    result: dict[str, Callable[[], dict[str, Any]]] = {
        "before": lambda: {"perplexity": judged(base, base)},
        "every weight trained": lambda: {"perplexity": judged(after, base)},
    }
    for r in RANKS:
        result[f"LoRA of rank {r}"] = lambda r=r: extracted(r, False)
    for r in RANKS[-2:]:
        result[f"LoRA of rank {r}, embedding and norms in full"] = lambda r=r: extracted(r, True)
    return result


def cut(source: Path, folder: Path, r: int, others: bool) -> None:
    """The adapter that `nybble extract` writes for a lower rank: its factors are the first of the larger one's."""
    config = json.loads((source / CONFIG_NAME).read_text())
    pattern = {path: rank for path, rank in config["rank_pattern"].items() if rank < r}
    config |= {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern}
    tensors = {}
    for name, value in load_file(source / WEIGHTS_NAME).items():
        if name.endswith(("lora_A.weight", "lora_B.weight")):
            tensors[name] = (value[:r] if name.endswith("A.weight") else value[:, :r]).contiguous()
        elif others:
            tensors[name] = value
    if not others:
        config["modules_to_save"] = None
    write_adapter(folder, config, tensors)


def energies(report: dict[str, Any], r: int) -> tuple[float, float]:
    """(what rank r keeps, the whole) of the squared changes of the linear layers."""
    kept = changed = 0.0
    for row in report["layers"]:
        if row["kind"] != "embed_tokens":
            kept += sum(value**2 for value in row["singular_values"][:r])
            changed += row["norm"] ** 2
    return kept, changed


def judged(directory: Path, base: Path, adapter: Path | None = None) -> float:
    """Perplexity of 1 John, with weights in fp32."""
    model = nybble.load(directory, dtype=torch.float32)
    if adapter is not None:
        nybble.load_adapter(model, adapter)
    tokens = torch.tensor(load_tokenizer(base).encode(bible.held_out_text()))
    return perplexity(model, tokens, WINDOW, batch_size=2)


def sweep(args: argparse.Namespace) -> None:
    """The glosses of methods.py, fewer of them."""
    from methods_worker import gloss_rows, minilm

    if args.wordnet is None:
        sys.exit("intrinsic: --wordnet is needed")
    encoder, tokenizer = minilm()
    rows = gloss_rows(args.wordnet)
    names = tuple(sorted({label for _, label in rows}))
    train, test = (Labelled.read(part, tokenizer, MAX_LENGTH, names) for part in (rows[:TEXTS], rows[-HELD_OUT:]))
    config = IntrinsicConfig(epochs=args.epochs, dtype="bf16", step=args.step, head=args.head, structure=args.said)
    folder = args.out / f"intrinsic-{args.head}{'-said' if args.said else ''}"
    report: IntrinsicReport = intrinsic(
        TextClassifier(encoder, len(names)), train, test, folder, config, dims=tuple(args.dims), seconds=args.seconds,
        progress=lambda name, done, total: print(f"{done} of {total} {name}", file=sys.stderr, flush=True),
    )  # fmt: skip
    console = Console(width=140)
    console.print(report.table())
    for reading in report.readings():
        console.print(reading)
    if not report.complete:
        sys.exit(UNFINISHED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["full", "rounding", "intrinsic"])
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints, figures and plots")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long; the same command goes on")
    parser.add_argument("--wordnet", type=Path, help="directory with WordNet's data files")
    parser.add_argument("--head", default="subspace", choices=["subspace", "trained"], help="see nybble intrinsic")
    parser.add_argument("--said", action="store_true", help="a scale for every block (nybble intrinsic --structure)")
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--step", type=float, default=IntrinsicConfig.step)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(harness.machine_line())
    {"full": full, "rounding": rounding, "intrinsic": sweep}[args.command](args)


if __name__ == "__main__":
    main()
