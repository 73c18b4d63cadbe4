"""What `nybble plan` predicts beside what a step takes: SHOW of planning, and the tables of docs/scaling.md.

python bench/plan.py table|measured|families|scaling|all [--keep DIR] [--seconds N]

table     Llama-3.1-8B on a machine of 24 GB
measured  the Llama of 170 M parameters of finetune.py: predictions beside peaks, each of a process of its own; once
          with --low-memory (what is held), once with glibc's heap as a run has it by default
families  small random models of many builds, LoRA over NF4 with and without checkpointing
scaling   Llama-3.1-70B and 405B on 8, 16 and 64 GPUs

What has been measured is kept in DIR and not measured again; --seconds: begin no further measurement after so many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from finetune import prepare
from rich.console import Console
from rich.table import Table

import nybble
import nybble.cli.plan as command
from nybble.backends.products import emulated
from nybble.planning import BUILT_IN, Cluster, Work, estimate, find_shape, plan, scaled_step

WORKER = Path(__file__).resolve().parents[1] / "tests" / "planning" / "measured_step.py"
# method, base, batch, seq, checkpointing, optimizer, rank
CONFIGURATIONS = (
    ("lora", "nf4", 4, 256, False, "adamw", 16),
    ("lora", "nf4", 4, 256, True, "adamw", 16),
    ("lora", "bf16", 4, 256, False, "adamw", 16),
    ("lora", "bf16", 4, 256, True, "adamw", 16),
    ("lora", "nf4", 2, 1024, True, "adamw8bit", 64),
    ("dora", "bf16", 4, 256, False, "adamw", 16),
    ("bottleneck", "nf4", 4, 256, False, "adamw", 16),
    ("prefix", "nf4", 4, 256, False, "adamw", 16),
    ("prompt", "nf4", 4, 256, True, "adamw", 16),
    ("full", "fp32", 1, 256, False, "adamw", 16),
    ("full", "fp32", 4, 256, True, "adamw8bit", 16),
)
SIZES: dict[str, Any] = {
    "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 7, "num_attention_heads": 10,
    "num_key_value_heads": 5, "vocab_size": 8192, "max_position_embeddings": 2048, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
MIXTURE = {**SIZES, "hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
#: What `families` measures: model types of transformers, and what their configurations have beside SIZES or MIXTURE.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "qwen3": {**SIZES, "head_dim": 64},
    "phi3": SIZES,
    "gemma2": {**SIZES, "head_dim": 64, "vocab_size": 16384},
    "gemma3_text": {**SIZES, "head_dim": 64, "layer_types": ["full_attention"] * 7},
    "granite": SIZES,
    "cohere": SIZES,
    "olmo2": SIZES,
    "starcoder2": SIZES,
    "stablelm": SIZES,
    "gpt_neox": {**SIZES, "intermediate_size": 2560},
    "opt": {**SIZES, "ffn_dim": 2560, "word_embed_proj_dim": 640, "bos_token_id": 0},
    "mixtral": {**MIXTURE, "intermediate_size": 1024, "num_local_experts": 8},
    "qwen2_moe": {
        **MIXTURE, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **MIXTURE, "moe_intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 64,
    },
    "olmoe": {**MIXTURE, "intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 4},
    "gpt_oss": {
        **MIXTURE, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64,
        "layer_types": ["full_attention"] * 5,
    },
    "deepseek_v3": {
        **MIXTURE, "intermediate_size": 1024, "moe_intermediate_size": 256, "n_routed_experts": 16, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 128, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
#: Bytes a second that a rank is assumed to receive: within a node, and between nodes by a network card for every GPU.
BANDWIDTH = {8: 300e9, 16: 50e9, 64: 50e9}
FIELDS = ("method", "base", "batch", "seq", "checkpointing", "optimizer", "rank")


def table(args: argparse.Namespace) -> None:
    """The table that people choose by."""
    found = plan("Llama-3.1-8B", 24e9)
    command.show(found, [found.row("qlora")])


def families(args: argparse.Namespace) -> None:
    """Predicted, measured, error in %: 4 x 256 tokens, and 2 x 384 with checkpointing."""
    import transformers

    shown = Table(title="LoRA r = 16 over NF4: predicted, measured MB above the imports")
    for column in ("build", "parameters", "4 x 256", "2 x 384, checkpointing"):
        shown.add_column(column)
    for kind, sizes in FAMILIES.items():
        if time.perf_counter() - args.started > args.seconds:
            print("more is to be measured: call again with the same --keep")
            break
        directory: Path = args.keep / "families" / kind
        if not (directory / "nf4" / "config.json").exists():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **sizes)
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.to(torch.bfloat16).save_pretrained(directory / "bf16")
            nybble.quantize(directory / "bf16", directory / "nf4", nybble.QuantConfig())
        shape, cells = find_shape(directory / "bf16"), []
        for batch, seq, checkpointing in ((4, 256, False), (2, 384, True)):
            held, _ = _measure(("lora", "nf4", batch, seq, checkpointing, "adamw", 16), True, directory)
            work = Work(batch=batch, seq=seq, rank=16, **_cpu())
            predicted = estimate(shape, "lora", "nf4", work, checkpointing).above_imports
            cells.append(f"{predicted / 1e6:.0f} {held / 1e6:.0f} {predicted / held - 1:+.1%}")
        shown.add_row(kind, f"{shape.parameters / 1e6:.0f} M", *cells)
    Console(width=100).print(shown)


def _cpu() -> dict[str, bool]:
    return {"matrix_unit": nybble.active_isa() == "amx", "widened": emulated(torch.bfloat16)}


def _measure(configuration: tuple[Any, ...], low_memory: bool, directory: Path) -> tuple[int, float]:
    """The peak above the imports, and the CPU's seconds; from a file if it was measured before."""
    name = "-".join(map(str, (*configuration, "held" if low_memory else "heap")))
    kept = directory / f"{name}.json"
    if not kept.exists():
        model = directory / ("nf4" if configuration[1] == "nf4" else "bf16")
        job = {**dict(zip(FIELDS, configuration, strict=True)), "model": str(model), "steps": 2}
        job["low_memory"] = low_memory
        done = subprocess.run(
            [sys.executable, str(WORKER), json.dumps(job)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        kept.write_text(done.stdout.splitlines()[-1])
    found = json.loads(kept.read_text())
    return int(found["peak"]), float(found["cpu"])


def measured(args: argparse.Namespace) -> None:
    """Predicted, measured, error."""
    directory: Path = args.keep
    if not (directory / "rows.pt").exists():
        prepare(directory)
    shape = find_shape(directory / "bf16")
    shown = Table(title=f"{shape.parameters:,} parameters; MB above the imports", title_justify="left")
    for column in (
        "method",
        "step",
        "optimizer",
        "checkpointing",
        "predicted",
        "held",
        "error",
        "in glibc's heap",
        "CPU time",
    ):
        shown.add_column(column, justify="left" if column in ("method", "optimizer", "checkpointing") else "right")
    worst = 0.0
    for configuration in CONFIGURATIONS:
        method, base, batch, seq, checkpointing, optimizer, rank = configuration
        if time.perf_counter() - args.started > args.seconds:
            print("more is to be measured: call again with the same --keep")
            break
        (held, slower), (heap, faster) = (
            _measure(configuration, low_memory, directory) for low_memory in (True, False)
        )
        work = Work(batch=batch, seq=seq, rank=rank, optimizer=optimizer, **_cpu())
        predicted = estimate(shape, method, base, work, checkpointing).above_imports
        error = predicted / held - 1
        worst = max(worst, abs(error))
        shown.add_row(
            f"{method} {base}" + (f" r = {rank}" if method in ("lora", "dora") else ""),
            f"{batch} x {seq}",
            optimizer,
            "yes" if checkpointing else "no",
            *(f"{count / 1e6:.0f}" for count in (predicted, held)),
            f"{error:+.1%}",
            f"{heap / 1e6:.0f} ({heap / held:.2f}x)",
            f"{slower / faster:.2f}x",
        )
    Console(width=120).print(shown)
    print(f"largest error {worst:.1%}")


def scaling(args: argparse.Namespace) -> None:
    """Memory of a rank, bytes and seconds of a step."""
    title = "a row of 2,048 tokens a rank, rank 16, checkpointing; assumed: 400 TFLOP/s, 300 GB/s (8 ranks), 50 GB/s"
    shown = Table(title=title)
    columns = (
        "model",
        "method",
        "ranks",
        "sharding",
        "memory",
        "gathered",
        "reduced",
        "received",
        "operations",
        "step, s",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("model", "method", "sharding") else "right")
    work = Work(device="cuda")
    for name in ("Llama-3.1-70B", "Llama-3.1-405B"):
        for base, sharding in (("nf4", "ddp"), ("nf4", "fsdp"), ("bf16", "fsdp")):
            for ranks in BANDWIDTH:
                step = scaled_step(
                    BUILT_IN[name], "lora", base, work, Cluster(ranks, sharding, 400e12, BANDWIDTH[ranks])
                )
                shown.add_row(
                    name,
                    f"LoRA over {base}",
                    str(ranks),
                    sharding,
                    f"{step.rank.total / 1e9:.1f} GB",
                    f"{step.gathered / 1e9:.1f} GB",
                    f"{step.reduced / 1e9:.2f} GB",
                    f"{step.received / 1e9:.1f} GB",
                    f"{step.operations / 1e12:,.0f} T",
                    f"{step.least:.2f} to {step.most:.2f}",
                )
    Console(width=140).print(shown)


COMMANDS = {"table": table, "measured": measured, "families": families, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(*COMMANDS, "all"))
    parser.add_argument("--keep", type=Path, help="directory for the model and what was measured, which is used again")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    args.started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        args.keep = args.keep or Path(temporary)
        args.keep.mkdir(parents=True, exist_ok=True)
        for name in COMMANDS if args.command == "all" else (args.command,):
            COMMANDS[name](args)


if __name__ == "__main__":
    main()
