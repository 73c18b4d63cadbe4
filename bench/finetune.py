"""Fine-tuning steps beside transformers + PEFT + bitsandbytes: speed, memory, loss, on the same model and data.

python bench/finetune.py [--rounds N] [--steps N] [--only NAME ...] [--keep DIR]

A Llama of 170 M random parameters (hidden 1024, ffn 2816, 12 layers, 16 heads, vocabulary 8192), LoRA r = 16 on all
linear layers, 4 rows of 256 words of the King James Bible a step, AdamW. Every way of training is a process of its
own, so that its memory can be told; they take turns, a few steps each, in the same run, and the others wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from finetune_worker import Job
from rich.console import Console
from rich.table import Table

import nybble
from nybble.demo import bible

VOCABULARY, SEQ_LEN, BATCH = 8192, 256, 4
WAYS = {
    f"{tool} {base}{', checkpointing' if checkpointing else ''}": (tool, base, checkpointing)
    for checkpointing in (False, True)
    for base in ("nf4", "bf16")
    for tool in ("nybble", "peft")
}


def prepare(directory: Path) -> dict[str, str]:
    """The model, in bf16 and NF4, the adapter that all start from, and the rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "bf16")
    nybble.quantize(directory / "bf16", directory / "nf4", nybble.QuantConfig())
    nybble.add_lora(model, r=16, alpha=32)
    nybble.save_adapter(model, directory / "adapter")
    text = " ".join(bible.training_documents()).lower().split()
    known = {word: i + 1 for i, (word, _) in enumerate(Counter(text).most_common(VOCABULARY - 1))}
    ids = torch.tensor([known.get(word, 0) for word in text])
    count = (len(ids) - 1) // SEQ_LEN
    torch.save(ids[: count * SEQ_LEN + 1].unfold(0, SEQ_LEN + 1, SEQ_LEN).clone(), directory / "rows.pt")
    return {name: str(directory / name) for name in ("bf16", "nf4", "adapter", "rows.pt")}


class Worker:
    """One way of training in its own process."""

    def __init__(self, name: str, files: dict[str, str], options: dict[str, Any], peer_compute: str) -> None:
        tool, base, checkpointing = WAYS[name]
        model = files["nf4"] if (tool, base) == ("nybble", "nf4") else files["bf16"]
        own = options if tool == "nybble" else None
        job = Job(
            tool,
            base,
            checkpointing,
            model,
            files["adapter"],
            files["rows.pt"],
            BATCH,
            options=own,
            compute=peer_compute,
        )
        command = [sys.executable, str(Path(__file__).with_name("finetune_worker.py")), json.dumps(asdict(job))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.memory: dict[str, int] = {}

    def steps(self, count: int, timed: bool) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.losses += answer.pop("losses")
        seconds = answer.pop("seconds")
        self.seconds += seconds if timed else []
        self.memory = answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps of each way in a round")
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("--keep", type=Path, help="directory for the model; kept and used again")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: more of nybble's TrainConfig")
    parser.add_argument(
        "--peer-compute",
        choices=("bf16", "fp32"),
        default="bf16",
        help="fp32 where the CPU has no instructions for bf16: torch's bf16 products take over a minute a step there",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.keep or Path(temporary)
        names = ("bf16", "nf4", "adapter", "rows.pt")
        files = {name: str(directory / name) for name in names}
        if not all(Path(file).exists() for file in files.values()):
            files = prepare(directory)
        workers = {name: Worker(name, files, args.options, args.peer_compute) for name in args.only}
        for worker in workers.values():
            worker.steps(2, timed=False)
        for _ in range(args.rounds):
            for worker in workers.values():
                worker.steps(args.steps, timed=True)
        for worker in workers.values():
            worker.close()
    show(workers)


def show(workers: dict[str, Worker]) -> None:
    table = Table(title=f"{BATCH} x {SEQ_LEN} tokens a step, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("", "tokens/s", "ratio", "peak MB", "above imports", "ratio", "loss, last steps"):
        table.add_column(column, justify="right" if column else "left")
    for name, worker in workers.items():
        peer = workers.get(name.replace("nybble", "peft"))
        speed = BATCH * SEQ_LEN / statistics.median(worker.seconds)
        above = worker.memory["peak"] - worker.memory["imports"]
        faster = less = ""
        if peer is not None and peer is not worker:
            faster = f"{statistics.median(peer.seconds) / statistics.median(worker.seconds):.2f}x"
            less = f"{above / (peer.memory['peak'] - peer.memory['imports']):.2f}x"
        tail = statistics.mean(worker.losses[-8:])
        table.add_row(
            name,
            f"{speed:.0f}",
            faster,
            f"{worker.memory['peak'] / 1e6:.0f}",
            f"{above / 1e6:.0f}",
            less,
            f"{tail:.4f}",
        )
    Console(width=120).print(table)
    shared = min(len(worker.losses) for worker in workers.values())
    first = next(iter(workers.values())).losses
    for name, worker in workers.items():
        gaps = [abs(a - b) for a, b in zip(worker.losses[:shared], first[:shared], strict=True)]
        print(f"{name}: largest difference in loss from the first row over {shared} steps {max(gaps):.4f}")


if __name__ == "__main__":
    main()
