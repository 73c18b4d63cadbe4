"""Speed on an NVIDIA GPU beside cuBLAS and bitsandbytes, the ceilings measured in the same run, and the targets.

python bench/cuda_kernels.py [--quick] [--shape N,K ...] [--m M ...] [--seconds S] [--json FILE]
python bench/cuda_kernels.py --sweep  every kernel over the number of rows: where choose.cpp should change its mind
python bench/cuda_kernels.py --step   a QLoRA step of a 1B Llama beside transformers with PEFT and bitsandbytes

NF4, block 64, double quantization, bf16. Weights are cold: copies of at least 200 MB take turns (cuda_timing). Without
a GPU: one sentence and status 2; `--dry-run` then runs the same lines on the CPU, tiny; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "cuda":
    # torch's own import looks for a package of this name and would find this script beside whichever is being run.
    raise ImportError("bench/cuda.py is a script and no package of CUDA's")

import torch
from cuda_contestants import (
    CHECKED_ROWS,
    DEQUANTIZE,
    RANK,
    BitsAndBytes,
    Missing,
    Weight,
    attempt,
    chosen,
    kernels_that_run,
    with_kernel,
)
from cuda_timing import Ceilings, Contestant, Dry, Gpu, Timing, ceilings, table

from nybble.backends import cuda

#: (out_features, in_features)
SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
ROWS = (1, 16, 64, 256, 4096)
#: Speed-up over cuBLAS bf16 on the unquantized weight, by rows of x.
TARGETS = {1: 2.6, 16: 2.5, 64: 1.7, 256: 1.0, 4096: 0.95}
#: grad_input over dequantize + cuBLAS; LoRA's cost over the plain operation; dequantize over bitsandbytes, and its
#: share of the write bandwidth.
GRAD_TARGET, LORA_TARGET, DEQUANTIZE_TARGET, WRITE_TARGET = 1.05, 0.05, 2.0, 0.8
SWEEP_ROWS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Judged:
    """A target and what was measured."""

    what: str
    goal: str
    measured: str
    met: bool


class Bench:
    """One run: the machine, what was measured, what to say about it."""

    def __init__(self, args: argparse.Namespace, gpu: Gpu) -> None:
        self.args, self.gpu = args, gpu
        self.stop = time.monotonic() + args.limit
        self.notes: list[str] = []
        self.judged: list[Judged] = []
        self.cases: list[dict[str, object]] = []
        print(f"GPU: {gpu.name()}")
        self.ceilings: Ceilings = ceilings(gpu)
        print(f"ceilings: {self.ceilings}")

    # ---- parts ----

    def race(self, facts: dict[str, object], contestants: dict[str, Contestant | None]) -> dict[str, Timing]:
        """Times those that are there, keeps the result for the JSON file."""
        present = {name: contestant for name, contestant in contestants.items() if contestant is not None}
        timings = self.gpu.race(present, self.args.seconds)
        self.notes += [
            f"{n}: {note}" for n, c in present.items() for note in c.notes if f"{n}: {note}" not in self.notes
        ]
        self.cases.append({**facts, "seconds": {name: asdict(timing) for name, timing in timings.items()}})
        return timings

    def in_time(self) -> bool:
        """Whether another case may begin; says once that one may not."""
        if time.monotonic() < self.stop:
            return True
        note = f"{self.args.limit:.0f} s are over: the rest was left out"
        self.notes += [note] if note not in self.notes else []
        return False

    def floor(self, weight: Weight, m: int) -> tuple[float, str]:
        """The shortest time by this run's ceilings, and which one it is."""
        moved = weight.nbytes + 2 * m * (weight.n + weight.k)
        memory = moved / max(self.ceilings.copy, self.ceilings.read)
        matmul = 2 * m * weight.n * weight.k / self.ceilings.matmul
        return max(memory, matmul), "memory" if memory > matmul else "matmul"

    def rate(self, weight: Weight, m: int, seconds: float) -> list[str]:
        """Achieved GB/s or TFLOP/s, and the share of the ceiling."""
        floor, limit = self.floor(weight, m)
        moved = weight.nbytes + 2 * m * (weight.n + weight.k)
        text = (
            f"{moved / seconds / 1e9:.0f} GB/s"
            if limit == "memory"
            else f"{2 * m * weight.n * weight.k / seconds / 1e12:.0f} TFLOP/s"
        )
        return [text, f"{100 * floor / seconds:.0f}%"]

    def judge(self, what: str, goal: str, measured: str, met: bool) -> str:
        self.judged.append(Judged(what, goal, measured, met))
        return "met" if met else "MISSED"

    def checked(self, weight: Weight, name: str, c: Contestant, x: torch.Tensor, grad: bool, right=None) -> Contestant:
        weight.check(name, c, x, grad, right)
        return c

    def linear(self, weight: Weight, peer: BitsAndBytes | None, m: int, grad: bool) -> list[str]:
        """One row of the table of products."""
        gpu, (n, k) = self.gpu, (weight.n, weight.k)
        x = torch.randn(m, n if grad else k, device=gpu.device, dtype=torch.bfloat16)
        kernel = chosen(gpu, n, k, m, x.dtype, grad)

        def make(name: str, contestant: Contestant, right: torch.Tensor | None = None) -> Contestant | None:
            return attempt(
                self.notes, lambda: self.checked(weight, f"{name} {n}x{k} M={m}", contestant, x, grad, right)
            )

        contestants: dict[str, Contestant | None] = {
            "cuBLAS": make("cuBLAS", weight.cublas(x, grad), weight.dense[0]),
            "nybble": make(kernel, weight.nybble(x, grad)),
            "dequantize + cuBLAS": make("dequantize + cuBLAS", weight.dequantized(x, grad)),
            "nybble, side path": attempt(self.notes, lambda: weight.nybble(x, grad, RANK)),
            "nybble, LoRA": None if grad else attempt(self.notes, lambda: weight.lora(x)),
        }
        if peer is not None:
            theirs = attempt(self.notes, lambda: peer.grad_input(x) if grad else peer.forward(x))
            contestants["bitsandbytes"] = theirs and make("bitsandbytes", theirs, peer.standing)
        facts = {"op": "grad_input" if grad else "linear", "n": n, "k": k, "m": m, "kernel": kernel}
        times = self.race(facts, contestants)
        return self.row(weight, m, grad, kernel, times)

    def row(self, weight: Weight, m: int, grad: bool, kernel: str, times: dict[str, Timing]) -> list[str]:
        label = where = f"{weight.n}x{weight.k} M={m}"
        ours, dense, both = times.get("nybble"), times.get("cuBLAS"), times.get("dequantize + cuBLAS")
        peer = times.get("bitsandbytes")
        if ours is None or dense is None or both is None:
            self.judge(f"{'grad_input' if grad else 'linear'} {where}", "runs", "does not run", False)
            return [label + (" grad" if grad else ""), *["-"] * 11]
        speed = dense.median / ours.median
        if grad:
            ratio = both.median / ours.median
            verdict = self.judge(f"grad_input {where}", f">= {GRAD_TARGET} x d+c", f"{ratio:.2f}", ratio >= GRAD_TARGET)
            goal = f"{ratio:.2f}/{GRAD_TARGET}dc"
        else:
            target = TARGETS.get(m)
            goal, verdict = (f"{target}", "") if target else ("-", "-")
            if target:
                verdict = self.judge(f"linear {where}", f">= {target} x cuBLAS", f"{speed:.2f}", speed >= target)
            if m >= 4096:
                ratio = both.median / ours.median
                self.judge(f"linear {where}", ">= 1 x d+c (2% noise)", f"{ratio:.2f}", ratio >= 0.98)
        side, lora = times.get("nybble, side path"), times.get("nybble, LoRA")
        if side is not None and m in (1, 16, 64, 256, 4096):
            cost = side.median / ours.median - 1
            self.judge(f"{'grad_input' if grad else 'linear'}+side {where}",
                       f"<= {LORA_TARGET:.0%}", f"{cost:+.1%}", cost <= LORA_TARGET)  # fmt: skip
        return [
            label + (" grad" if grad else ""),
            f"{dense.us:.1f}",
            f"{ours.us:.1f}",
            f"{speed:.2f}",
            goal,
            verdict,
            f"{dense.median / both.median:.2f}",
            f"{dense.median / peer.median:.2f}" if peer else "-",
            f"{100 * (side.median / ours.median - 1):+.0f}%" if side else "-",
            f"{100 * (lora.median / ours.median - 1):+.0f}%" if lora else "-",
            " ".join(self.rate(weight, m, ours.median)),
            kernel.replace("linear_", "").replace(DEQUANTIZE, "d+c"),
        ]

    def codecs(self, weight: Weight, peer: BitsAndBytes | None) -> list[list[str]]:
        """Rows of the table of codecs."""
        where, count = f"{weight.n}x{weight.k}", weight.n * weight.k
        rows = []
        contestants = {
            "dequantize": (weight.dequantize, weight.nbytes + 2 * count),
            "quantize": (weight.quantize, 2 * count + weight.nbytes),
            "quantize, nested": (weight.quantize_nested, 2 * count + weight.nbytes),
        }
        for name, (make, moved) in contestants.items():
            ours = attempt(self.notes, make)
            theirs = None
            if peer is not None and name in ("dequantize", "quantize"):
                theirs = attempt(self.notes, peer.dequantize if name == "dequantize" else peer.quantize)
            if ours is None:
                continue
            times = self.race({"op": name, "n": weight.n, "k": weight.k}, {"nybble": ours, "bitsandbytes": theirs})
            if "nybble" not in times:
                continue
            seconds, other = times["nybble"].median, times.get("bitsandbytes")
            ratio = other.median / seconds if other else None
            written = 2 * count / seconds / self.ceilings.write
            if name == "dequantize":
                self.judge(
                    f"dequantize {where}", f">= {WRITE_TARGET:.0%} of write", f"{written:.0%}", written >= WRITE_TARGET
                )
                if ratio:
                    goal = f">= {DEQUANTIZE_TARGET} x bitsandbytes"
                    self.judge(f"dequantize {where}", goal, f"{ratio:.2f}", ratio >= DEQUANTIZE_TARGET)
            rows.append(
                [
                    f"{name} {where}",
                    f"{seconds * 1e6:.1f}",
                    f"{moved / seconds / 1e9:.0f}",
                    f"{100 * moved / seconds / self.ceilings.copy:.0f}%",
                    f"{100 * written:.0f}%" if name == "dequantize" else "-",
                    f"{ratio:.2f}" if ratio else "-",
                ]
            )
        return rows

    # ---- what can be asked for ----

    def targets(self) -> None:
        """The issue's table."""
        products: list[list[str]] = []
        codecs: list[list[str]] = []
        try:
            for n, k in self.args.shapes:
                self.shape(n, k, products, codecs)
        finally:  # what was measured before an error is shown
            self.show(products, codecs)

    def shape(self, n: int, k: int, products: list[list[str]], codecs: list[list[str]]) -> None:
        """Adds a shape's rows to both tables."""
        weight = Weight(self.gpu, n, k)
        peer = None
        try:
            peer = None if self.args.no_peers else BitsAndBytes(weight)
        except Missing as reason:
            self.notes += [str(reason)] if str(reason) not in self.notes else []
        for m in self.args.rows:
            if self.in_time():
                products.append(self.linear(weight, peer, m, False))
        if self.in_time():
            products.append(self.linear(weight, peer, max(self.args.rows), True))
            codecs += self.codecs(weight, peer)
        del weight, peer
        self.gpu.reset_peak()

    def show(self, products: list[list[str]], codecs: list[list[str]]) -> None:
        header = ["out x in", "cuBLAS us", "nybble us", "x cuBLAS", "target", "", "d+c x", "bnb x", "+side", "+LoRA"]
        print("\n" + table([*header, "nybble's rate", "kernel"], products))
        print(
            "x: speed-up over cuBLAS bf16 (grad: target over d+c). d+c: nybble's dequantize + cuBLAS; bnb: bitsandbytes"
        )
        print(f"+side: the kernel's LoRA side path, r = {RANK}, over the plain kernel; +LoRA: with x A^T by torch\n")
        print(table(["codec", "us", "GB/s", "of copy", "of write", "x bnb"], codecs))

    def sweep(self) -> None:
        """Every kernel over the rows of x; where the best one changes, and where another than the best is chosen."""
        for n, k in self.args.shapes:
            weight = Weight(self.gpu, n, k)
            for grad in (False, True):
                best = [self.fastest(weight, m, grad) for m in self.args.rows if self.in_time()]
                print(f"\n{'grad_input' if grad else 'linear'} {n}x{k}: {spans(best)}")
                for m, name, seconds, choice, chosen_seconds in best:
                    if chosen_seconds > 1.03 * seconds:
                        print(f"  M = {m}: {choice} is chosen, {name} is {chosen_seconds / seconds:.2f} times as fast")
            del weight
            self.gpu.reset_peak()

    def fastest(self, weight: Weight, m: int, grad: bool) -> tuple[int, str, float, str, float]:
        """Rows, the fastest kernel and its seconds, the chosen one and its seconds."""
        gpu, (n, k) = self.gpu, (weight.n, weight.k)
        x = torch.randn(m, n if grad else k, device=gpu.device, dtype=torch.bfloat16)
        contestants = {}
        for name in kernels_that_run(gpu, n, k, m, x.dtype, grad):
            one = with_kernel(gpu, name, weight.nybble(x, grad))
            contestants[name] = attempt(
                self.notes, lambda name=name, one=one: self.checked(weight, f"{name} M={m}", one, x, grad)
            )
        contestants["cuBLAS"] = weight.cublas(x, grad)
        choice = chosen(gpu, n, k, m, x.dtype, grad)
        facts = {"op": "grad_input" if grad else "linear", "n": n, "k": k, "m": m, "kernel": choice, "sweep": True}
        times = self.race(facts, contestants)
        ours = {name: timing.median for name, timing in times.items() if name != "cuBLAS"}
        if not ours:
            return m, "none", 0.0, choice, 0.0
        name = min(ours, key=ours.__getitem__)
        return m, name, ours[name], choice, ours.get(choice, ours[name])

    def finish(self) -> int:
        """The targets in words, the notes, the JSON file; 1 if something computed the wrong thing or did not run."""
        if self.judged:
            missed = [f"{j.what} {j.measured} ({j.goal})" for j in self.judged if not j.met]
            print(f"\ntargets: {len(self.judged) - len(missed)} of {len(self.judged)} met")
            if missed:
                print(
                    textwrap.fill("missed: " + "; ".join(missed), 160, subsequent_indent="  ", break_on_hyphens=False)
                )
        for note in self.notes:
            print(f"note: {note[:160]}")
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "gpu": self.gpu.name(),
            "ceilings": asdict(self.ceilings),
            "cases": self.cases,
            "targets": [asdict(j) for j in self.judged],
            "notes": self.notes,
        }
        self.args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
        wrong = any("WRONG" in note for note in self.notes) or any(j.measured == "does not run" for j in self.judged)
        return 1 if wrong else 0


def spans(best: list[tuple[int, str, float, str, float]]) -> str:
    """`linear_small_m up to M = 16, linear_wgmma from 17`, of the rows that were tried."""
    parts = []
    for index, (m, name, *_) in enumerate(best):
        if index == 0 or best[index - 1][1] != name:
            parts.append(f"{name} from M = {m}")
    return ", ".join(parts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="out_features,in_features; may be repeated")
    parser.add_argument("--m", action="append", type=int, help="rows of x; may be repeated")
    parser.add_argument("--seconds", type=float, default=0.12, help="per contestant and case, on average")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new case begins")
    parser.add_argument("--quick", action="store_true", help="8192 x 8192 only")
    parser.add_argument("--sweep", action="store_true", help="every kernel over M")
    parser.add_argument("--step", action="store_true", help="a QLoRA step of a Llama of 1B parameters")
    parser.add_argument("--no-peers", action="store_true", help="without bitsandbytes")
    parser.add_argument(
        "--dry-run", action="store_true", help="every line on the CPU, tiny, with a clock that only counts"
    )
    parser.add_argument("--json", type=Path, help="where the numbers go")
    args = parser.parse_args()
    shapes = [tuple(map(int, text.split(","))) for text in args.shape] if args.shape else None
    args.shapes = shapes or ([SHAPES[1]] if args.quick else list(SHAPES))
    args.rows = args.m or list(SWEEP_ROWS if args.sweep else ROWS)
    if args.dry_run:
        args.shapes, args.rows = [(128, 192)], [1, 16, CHECKED_ROWS + 1]
    kind = "sweep" if args.sweep else "step" if args.step else "targets"
    args.json = args.json or RESULTS / f"cuda_{kind}.json"
    return args


def main() -> int:
    args = parse()
    if not args.dry_run:
        if not torch.cuda.is_available():
            print(
                "bench/cuda_kernels.py measures on an NVIDIA GPU; torch finds none here (--dry-run only runs the code)."
            )
            return 2
        reason = cuda.missing(torch.device("cuda", torch.cuda.current_device()))
        if reason:
            print(f"bench/cuda_kernels.py measures nybble's CUDA kernels, and there are none: {reason}")
            return 2
    torch.manual_seed(0)
    bench = Bench(args, Dry() if args.dry_run else Gpu())
    if args.step:
        import cuda_step

        bench.cases += cuda_step.run(bench.gpu, bench.notes)
    if args.sweep:
        bench.sweep()
    if not (args.sweep or args.step):
        bench.targets()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
