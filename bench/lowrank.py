"""How low-rank fine-tuning is, on real models and texts.

python bench/lowrank.py full --out DIR [--seconds S]
python bench/lowrank.py rounding --out DIR [--seconds S]
python bench/lowrank.py intrinsic --out DIR --wordnet DIR [--head trained] [--seconds S]

full       SmolLM2, every weight trained on 96 steps of 1,024 tokens of the King James Bible; the singular values of
           what changed (rank.json, rank.svg); the perplexity of 1 John, which is held out, of the model before and
           after, and of the one before with the change as a LoRA of rank 4, 16, 64 and 256
rounding   the same run stored in bf16: what of the difference rounding is; and how near the edge that `nybble rank`
           tells comes to the largest singular value of simulated rounding, beside that of one variance for all
intrinsic  MiniLM on WordNet's glosses, which of four parts of speech a gloss describes: accuracy by the dimension of a
           random subspace, beside full fine-tuning and a linear probe (intrinsic.json, intrinsic.svg)

They go on where an earlier call with the same --out ended. --seconds: begin nothing new after so long, and say so with
exit status 75. --wordnet: directory with the data files of Debian's package wordnet-base.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from nybble.planning.intrinsic import JSON_NAME as INTRINSIC_JSON
from nybble.planning.intrinsic import IntrinsicConfig, IntrinsicReport, intrinsic
from nybble.planning.noise import spacing
from nybble.planning.rank import JSON_NAME, rank
from nybble.training import TextClassifier, finetune, perplexity
from nybble.training.data import Labelled

STEPS, BATCH, SEQ_LEN, LR = 96, 4, 256, 1e-4
RANKS = (4, 16, 64, 256)
WINDOW = 512
#: Of each part of speech; tokens of a text.
TEXTS, HELD_OUT, MAX_LENGTH = 300, 250, 12
#: Numbers of WordNet's lexicographer files: adjectives, adverbs, nouns, verbs.
PARTS = {"a": (0, 1, 44), "r": (2,), "n": tuple(range(3, 29)), "v": tuple(range(29, 44))}
#: The middle first, so that an unfinished sweep tells most.
DIMS = (1_000, 10_000, 100, 100_000, 10)
#: With --said the scales of the blocks are counted in d, so 10 is too few.
SAID_DIMS = DIMS[:-1]
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


def gloss_parts(directory: Path, each: int, held_out: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(texts to train on, held-out texts) with the part of speech that each describes, as many of every one."""
    from methods_worker import gloss_rows

    parts: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
    for gloss, number in gloss_rows(directory):
        part = next(name for name, numbers in PARTS.items() if int(number) in numbers)
        parts[part].append((gloss, part))
    train = [rows[i] for i in range(each) for rows in parts.values()]
    return train, [rows[-1 - i] for i in range(held_out) for rows in parts.values()]


def only_used(encoder: Any, *parts: Labelled) -> list[Labelled]:
    """Leave of the encoder's word embeddings, in place, those of tokens that occur: the others move nothing."""
    table = encoder.embeddings.word_embeddings
    used = torch.cat([torch.tensor([parts[0].pad]), *(part.ids for part in parts)]).unique()
    encoder.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(
        table.weight.detach()[used.long()], freeze=False, padding_idx=int((used == parts[0].pad).nonzero())
    )
    encoder.config.vocab_size = len(used)
    return [
        dataclasses.replace(
            part,
            ids=torch.searchsorted(used, part.ids).int(),
            pad=int((used == part.pad).nonzero()),
        )
        for part in parts
    ]


def take_over(source: Path, folder: Path) -> None:
    """Full fine-tuning and the head alone are the same with and without SAID: what one sweep has, the other need not
    train again."""
    if (folder / INTRINSIC_JSON).exists() or not (source / INTRINSIC_JSON).exists():
        return
    report = IntrinsicReport.read(source / INTRINSIC_JSON)
    report.settings |= {"structure": True, "scale_lr": IntrinsicConfig.scale_lr}
    report.complete = False
    report.runs = [run for run in report.runs if not run.dims]
    report.trials = [trial for trial in report.trials if report.run(trial.name) is not None]
    report.write(folder)


def sweep(args: argparse.Namespace) -> None:
    """Which part of speech a gloss describes."""
    from methods_worker import minilm

    if args.wordnet is None:
        sys.exit("intrinsic: --wordnet is needed")
    encoder, tokenizer = minilm()
    rows = gloss_parts(args.wordnet, TEXTS, HELD_OUT)
    names = tuple(sorted(PARTS))
    train, test = only_used(encoder, *(Labelled.read(part, tokenizer, MAX_LENGTH, names) for part in rows))
    config = IntrinsicConfig(
        epochs=args.epochs, batch_size=16, step=args.step, head=args.head, structure=args.said,
        tune_epochs=args.tune_epochs,
    )  # fmt: skip
    folder = args.out / f"intrinsic-{args.head}{'-said' if args.said else ''}"
    about = {"model": "all-MiniLM-L6-v2", "data": "WordNet 3.0, part of speech of a gloss", "max_length": MAX_LENGTH}
    dims = tuple(args.dims or (SAID_DIMS if args.said else DIMS))
    if args.said:
        take_over(args.out / f"intrinsic-{args.head}", folder)
    report: IntrinsicReport = intrinsic(
        TextClassifier(encoder, len(names)), train, test, folder, config, dims=dims, seconds=args.seconds,
        progress=lambda name, done, total: print(f"{done} of {total} {name}", file=sys.stderr, flush=True),
        about={**about, "machine": harness.machine()},
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
    parser.add_argument("--dims", type=int, nargs="*")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--tune-epochs", type=float, default=0.5, help="of every trial of a learning rate")
    parser.add_argument("--step", type=float, default=IntrinsicConfig.step)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(harness.machine_line())
    {"full": full, "rounding": rounding, "intrinsic": sweep}[args.command](args)


if __name__ == "__main__":
    main()
