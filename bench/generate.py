"""Tokens a second beside transformers + bitsandbytes (+ PEFT), on the same model, interleaved in one run.

python bench/generate.py [--rounds N] [--new N] [--only NAME ...] [--keep DIR] [--smollm2]

The Llama of 170 M random parameters of finetune.py, in NF4 and bf16, after prompts of 32 and 512 words of the King
James Bible; then 8 prompts at once for 4 LoRA adapters of rank 16, two rows each. Greedy, and no token ends an answer.
Every tool is a process of its own, so that its memory can be told; they take turns, and the others wait. A turn's rate
is that of the tokens after the first, whose time is told apart. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import finetune
import torch
from generate_worker import Job
from harness import machine_line
from rich.console import Console
from rich.table import Table

import nybble

ADAPTERS, ROWS = 4, 8
WAYS = {f"{tool} {base}": (tool, base) for base in ("nf4", "bf16") for tool in ("nybble", "transformers")}
CASES = {"32": (32, 1, False), "512": (512, 1, False), "8 x 32, 4 adapters": (32, ROWS, True)}
"""By name: tokens of a prompt, prompts, whether adapters act."""


def prepare(directory: Path) -> None:
    """The model in both forms, the prompts, and adapters that do something."""
    from transformers import LlamaForCausalLM

    if not (directory / "rows.pt").exists():
        finetune.prepare(directory)
    for number in range(ADAPTERS):
        if (directory / f"adapter{number}").exists():
            continue
        torch.manual_seed(number)
        model = LlamaForCausalLM.from_pretrained(directory / "bf16", dtype=torch.bfloat16)
        nybble.add_lora(model, r=16, alpha=32)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.01)
        nybble.save_adapter(model, directory / f"adapter{number}")


class Worker:
    """One tool in its own process."""

    def __init__(self, name: str, directory: Path, args: argparse.Namespace) -> None:
        tool, base = WAYS[name]
        job = Job(tool, base, str(directory), ADAPTERS, args.threads, args.cpu_time)
        command = [sys.executable, str(Path(__file__).with_name("generate_worker.py")), json.dumps(asdict(job))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns: dict[str, list[dict[str, Any]]] = {}
        self.ask({})  # it has loaded

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def turn(self, case: str, new: int, timed: bool) -> None:
        length, rows, adapters = CASES[case]
        answer = self.ask({"length": length, "rows": rows, "adapters": adapters, "new": new})
        if timed:
            self.turns.setdefault(case, []).append(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--only", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--keep", type=Path, help="directory for the model; kept and used again")
    parser.add_argument("--threads", type=int, default=0, help="of each tool; by default torch's")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds, where the machine is not idle; with --threads 1"
    )
    parser.add_argument("--smollm2", action="store_true", help="also let SmolLM2 answer a question")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up the seconds of all threads: give --threads 1 too")
    console = Console(width=140)
    console.print(machine_line(), highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.keep or Path(temporary)
        prepare(directory)
        workers = {name: Worker(name, directory, args) for name in args.only}
        for case in args.cases:  # those with adapters last: PEFT's layers stay in the model
            for number in range(args.rounds + 1):  # the first is not timed
                for worker in workers.values():
                    worker.turn(case, args.new if number else 8, timed=number > 0)
                if number:
                    rates = ", ".join(f"{name} {w.turns[case][-1]['rate']:.1f}" for name, w in workers.items())
                    console.print(f"{case}, round {number}: {rates} tokens/s", markup=False, highlight=False)
        for worker in workers.values():
            worker.close()
        for case in args.cases:
            console.print(table(case, workers, args))
        if args.smollm2:
            answer_questions(console, directory)


def table(case: str, workers: dict[str, Worker], args: argparse.Namespace) -> Table:
    length, rows, adapters = CASES[case]
    title = f"{rows} prompt{'s' if rows > 1 else ''} of {length} tokens, {args.new} new ones"
    title += ", by CPU time of one thread" if args.cpu_time else ""
    result = Table(title=title + (f", {ADAPTERS} adapters" if adapters else ""), title_justify="left")
    for heading in ("", "tokens/s", "lowest", "highest", "x peer", "first token, ms", "peak memory above imports, MB"):
        result.add_column(heading, justify="right" if heading else "left")
    rates = {name: [turn["rate"] for turn in worker.turns[case]] for name, worker in workers.items()}
    for name, worker in workers.items():
        own = rates[name]
        peer = rates.get(name.replace("nybble", "transformers"))
        times = "" if peer is None or not name.startswith("nybble") else f"{_median(own) / _median(peer):.2f}"
        result.add_row(
            name,
            f"{_median(own):.1f}",
            f"{min(own):.1f}",
            f"{max(own):.1f}",
            times,
            f"{1e3 * _median([turn['first'] for turn in worker.turns[case]]):.0f}",
            f"{max(turn['peak'] - turn['imports'] for turn in worker.turns[case]) / 1e6:.0f}",
        )
    return result


def _median(values: list[float]) -> float:
    return statistics.median(values)


def answer_questions(console: Console, directory: Path) -> None:
    """What SmolLM2-135M-Instruct answers, greedy, in bf16 and in NF4."""
    from transformers import AutoTokenizer

    from nybble.demo import smollm2
    from nybble.generation.loop import chat_ids

    source, packed = directory / "smollm2", directory / "smollm2-nf4"
    if not source.exists():
        smollm2.write_checkpoint(source)
        nybble.quantize(source, packed)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    question = "What is the capital of France?"
    for name, path in (("bf16", source), ("NF4", packed)):
        ids = chat_ids(tokenizer, [{"role": "user", "content": question}])
        answer = nybble.generate(nybble.load(path), tokenizer, [ids], max_new_tokens=40)[0]
        console.print(f"SmolLM2-135M-Instruct, {name}: {question} -> {answer.text}", markup=False, highlight=False)
    console.print(f"({smollm2.NOTE})", markup=False, highlight=False)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
