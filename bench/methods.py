"""Every method of fine-tuning on real models and texts, side by side.

python bench/methods.py verses|glosses|mixed|resume|all [--work DIR] [--json FILE] [--wordnet FILE]

verses    SmolLM2 on verses of the King James Bible: held-out perplexity after equal tokens, memory, speed
glosses   MiniLM on WordNet's glosses: which of 45 classes of meaning does a gloss describe?
mixed     three adapters in one run on SmolLM2, each on a book of its own, beside three runs
resume    QLoRA runs on SmolLM2 killed with SIGKILL: does the same call come to the same bytes?

Every method runs in a process of its own, so that its memory can be told. Learning rates are usual ones of each
method, not searched for; `--sweep` tries others beside them. --wordnet: directory with data.noun of Debian's package
wordnet-base.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from checkpoints import run

import nybble
from nybble.demo import bible, smollm2

Row = dict[str, object]
ROOT = Path(__file__).resolve().parents[1]
CAMPAIGN = ROOT / "tests" / "training" / "kill_campaign.py"
WORKER = Path(__file__).with_name("methods_worker.py")

# Method -> learning rates to try, the one that is used first.
VERSES = {
    "full": (2e-5, 1e-4, 5e-5),
    "LoRA": (1e-3, 2e-3, 5e-4),
    "QLoRA": (1e-3, 2e-3, 5e-4),
    "QLoRA, calibrated": (1e-3, 2e-3, 5e-4),
    "DoRA": (1e-3, 2e-3, 5e-4),
    "bottleneck": (1e-3, 2e-3, 5e-4),
    "prefix": (1e-2, 3e-2, 3e-3),
    "prompt": (3e-2, 1e-1, 1e-2),
}
GLOSSES = {
    "full": (5e-4, 1e-3, 1e-4),
    "LoRA": (1e-3, 2e-3, 5e-4),
    "QLoRA": (1e-3, 2e-3, 5e-4),
    "bottleneck": (1e-3, 2e-3, 5e-4),
    "prefix": (3e-3, 1e-2, 1e-3),
    "prompt": (1e-2, 3e-2, 3e-3),
    "probe": (1e-2, 3e-2, 3e-3),
}


def smollm2_directories(args: argparse.Namespace) -> dict[str, str]:
    """SmolLM2 in bf16 and NF4."""
    plain, packed = args.work / "smollm2-bf16", args.work / "smollm2-nf4"
    if not plain.exists():
        smollm2.write_checkpoint(plain)
    if not packed.exists():
        nybble.quantize(plain, packed, nybble.QuantConfig())
    return {"bf16": str(plain), "nf4": str(packed)}


def worker(task: str, method: str, lr: float, **options: object) -> Row:
    """One method in a process of its own."""
    job = json.dumps({"task": task, "method": method, "lr": lr, **options})
    done = subprocess.run([sys.executable, str(WORKER), job], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(task: str, methods: dict[str, tuple[float, ...]], args: argparse.Namespace, **options: object) -> list[Row]:
    """A row a method."""
    rows = []
    for method, rates in methods.items():
        if args.only and method not in args.only:
            continue
        for lr in rates if args.sweep else rates[:1]:
            rows.append(worker(task, method, lr, **options))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def verses(args: argparse.Namespace) -> list[Row]:
    """Perplexity of verses that were not trained on. The calibrated base is rounded by texts that are trained on."""
    directories = smollm2_directories(args)
    calibrated = args.work / "smollm2-nf4-calibrated"
    if not (calibrated / "model.safetensors").exists():  # else what an interrupted call left: it goes on
        texts = [chapter for book in bible.TRAINING_BOOKS for chapter in bible.chapters(book)]
        nybble.quantize(directories["bf16"], calibrated, nybble.QuantConfig(), calibration=texts)
    return compare("verses", VERSES, args, steps=args.steps, calibrated=str(calibrated), **directories)


def glosses(args: argparse.Namespace) -> list[Row]:
    """Accuracy on glosses that were not trained on."""
    if args.wordnet is None:
        print("glosses: left out, --wordnet is not given")
        return []
    return compare("glosses", GLOSSES, args, wordnet=str(args.wordnet), examples=args.examples)


def mixed(args: argparse.Namespace) -> list[Row]:
    """Three adapters side by side, and each alone."""
    return worker("mixed", "LoRA", 1e-3, **smollm2_directories(args))["rows"]  # type: ignore[return-value]  # JSON


def resume(args: argparse.Namespace) -> list[Row]:
    """Runs with 8-bit AdamW and packed verses, killed anywhere."""
    model = smollm2_directories(args)["nf4"]
    folder = args.work / "killed"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(CAMPAIGN), model, str(folder), str(args.kills)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(done.stdout.splitlines()[-1])]


COMMANDS = {"verses": verses, "glosses": glosses, "mixed": mixed, "resume": resume}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, help="directory with WordNet's data files")
    parser.add_argument("--steps", type=int, default=100, help="of verses: 1,024 tokens each")
    parser.add_argument("--examples", type=int, default=20_000, help="of glosses: trained on, once")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="all learning rates, not only the best")
    parser.add_argument("--only", nargs="*", help="only these methods")
    run(COMMANDS, parser)


if __name__ == "__main__":
    main()
