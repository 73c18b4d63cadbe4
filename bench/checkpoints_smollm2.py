"""What checkpoints.py measures on a real model, SmolLM2-135M: interruptions, interoperation, merging, an answer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from checkpoints_worker import Worker

import nybble
from nybble.cli.shared import load_model
from nybble.demo import bible, demo, smollm2
from nybble.training.evaluate import perplexity

ROOT = Path(__file__).parent.parent
CAMPAIGN = ROOT / "tests" / "checkpoint" / "kill_campaign.py"
EXAMPLE = ROOT / "examples" / "gguf_llamacpp.py"
#: How adapters are merged in the README's table: what it says there, and the arguments.
MERGES = {
    "merged, bf16": {"to": "bf16"},
    "merged onto the original 16-bit weights (`--onto`), bf16": {"to": "bf16", "onto": True},
    "merged onto the original weights, NF4": {"to": "nf4", "onto": True},
    "merged onto the dequantized base, NF4: nearest codes": {"to": "nf4"},
    "the same with `--search mse`": {"to": "nf4", "search": "mse"},
    "the same with `--absorb`": {"to": "nf4", "absorb": True},
}
Row = dict[str, object]


def checkpoints(work: Path) -> tuple[Path, Path]:
    """SmolLM2 in bf16 and in NF4."""
    plain, quantized = work / "smollm2-bf16", work / "smollm2-nf4"
    if not plain.exists():
        smollm2.write_checkpoint(plain)
    if not quantized.exists():
        nybble.quantize(plain, quantized)
    return plain, quantized


def kill(args: argparse.Namespace) -> list[Row]:
    """The tests' campaign on SmolLM2: a child dies before a step on the disk, another one goes on."""
    plain, quantized = checkpoints(args.work)
    adapter = random_adapter(quantized, args.work / "random-adapter")
    shared = {"dst": "{out}", "max_shard_size": 40_000_000}
    runs = {
        "quantize": ("nybble.checkpoint.stream:quantize", {"src": str(plain), **shared}),
        "merge": ("nybble.checkpoint.merging:merge", {"base": str(quantized), "adapter": str(adapter), **shared}),
    }
    rows = []
    for what, (function, keywords) in runs.items():
        folder = args.work / f"killed-{what}"
        command = [sys.executable, CAMPAIGN, function, json.dumps(keywords), folder, args.kills]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        shutil.rmtree(folder, ignore_errors=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        result = json.loads(done.stdout)
        same = f"{result['same']} of {result['points']} byte-identical"
        steps = ", ".join(f"{count} {kind}" for kind, count in result["steps"].items())
        rows.append({"what": what, "after a kill and the same call": same, "steps of a run": steps})
    return rows


def random_adapter(base: Path, out: Path) -> Path:
    """A LoRA over all linear layers that changes them."""
    if not out.exists():
        model = nybble.load(base)
        torch.manual_seed(0)
        nybble.add_lora(model, nybble.LoRAConfig(r=16, alpha=32, target="all-linear"))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.01)
        nybble.save_adapter(model, out)
    return out


def interop(args: argparse.Namespace) -> list[Row]:
    """Directories written by each tool, read by each; bitsandbytes in a process where nybble is not registered."""
    plain, by_nybble = checkpoints(args.work)
    by_theirs = args.work / "smollm2-bitsandbytes"
    shutil.rmtree(by_theirs, ignore_errors=True)
    with Worker("bitsandbytes") as worker:
        worker("quantize", plain, by_theirs)
    rows = []
    for writer, directory in (("nybble", by_nybble), ("bitsandbytes", by_theirs)):
        for reader in ("nybble", "bitsandbytes"):
            with Worker(reader) as worker:
                worker("load", directory)
                row = {
                    "written by": writer,
                    "read by": reader,
                    "its own bf16": worker("perplexity", plain)["perplexity"],
                }
                worker("load", directory)
                digest = worker("in_fp32")["sha256"]
                row["decoded to fp32"] = worker("perplexity", plain)["perplexity"]
            rows.append({**row, "decoded weights, sha256": digest[:16]})
    return rows


def trained(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """(bf16, NF4, adapter) of the demo, which is run if no directory of it is given."""
    base = args.base or args.work / "demo"
    if not base.exists():
        demo.run(base)
    return base / "smollm2-bf16", base / "smollm2-nf4", args.adapter or base / "lora" / "adapter"


def merge(args: argparse.Namespace) -> list[Row]:
    """Perplexity on 1 John before and after each kind of merge."""
    plain, base, adapter = trained(args)
    rows = [{"what": "bf16, no adapter", "perplexity": measured(plain)}]
    rows += [{"what": "NF4 base, no adapter", "perplexity": measured(base)}]
    rows += [{"what": "adapter on the NF4 base", "perplexity": measured(base, adapter)}]
    for what, options in MERGES.items():
        out = args.work / "merged"
        shutil.rmtree(out, ignore_errors=True)
        settings = {**options, "onto": plain} if "onto" in options else options
        nybble.merge(base, adapter, out, **settings)
        rows.append({"what": what, "perplexity": measured(out)})
        shutil.rmtree(out)
    return rows


def measured(directory: Path, adapter: Path | None = None) -> float:
    """Perplexity as `nybble eval` and `nybble merge --text` measure it."""
    model, tokenizer = load_model(directory, adapter)
    return perplexity(model, tokenizer.encode(bible.held_out_text()), demo.WINDOW)


def answer(args: argparse.Namespace) -> list[Row]:
    """The adapter merged onto the original weights, as F16 and Q8_0, goes on with a prompt and answers a question."""
    plain, base, adapter = trained(args)
    example = module_at(EXAMPLE)
    out = args.work / "merged-bf16"
    shutil.rmtree(out, ignore_errors=True)
    nybble.merge(base, adapter, out, onto=plain)
    chat, _, _ = example.in_transformers(out, 1)
    rows = []
    for kind in ("f16", "q8_0"):
        path = args.work / f"merged.{kind}.gguf"
        path.unlink(missing_ok=True)
        nybble.export_gguf(out, path, kind)
        for shown, prompt in ((demo.PROMPT, demo.PROMPT), (example.QUESTION, chat)):
            _, text = example.in_llama_cpp(path, prompt, 40)
            rows.append({"file": f"{kind}, {path.stat().st_size / 1e6:.0f} MB", "prompt": shown, "llama.cpp": text})
    return rows


def module_at(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
