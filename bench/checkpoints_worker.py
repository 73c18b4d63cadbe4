"""A process that does what checkpoints.py asks for and measures itself.

python bench/checkpoints_worker.py nybble|load_into|bitsandbytes

Each line of stdin is a JSON list, a command with its arguments; each is answered by a line of JSON. Memory is what
Linux tells of the process: resident in all (VmRSS, its peak VmHWM), of that anonymous (RssAnon) and of mapped files
(RssFile, which processes share), and its share of all that (Pss). The tool's packages are imported first, those of
the others not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

TOOLS = ("nybble", "load_into", "bitsandbytes")
SAMPLE_SECONDS = 0.005


def status() -> dict[str, int]:
    """VmRSS, VmHWM, RssAnon and RssFile of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) << 10 for key in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def proportional() -> int:
    """Pss in bytes: pages that n processes map count 1/n."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


class Peaks:
    """What a block adds to the process at most: `rss` by the kernel's own mark, `anon` and `file` by samples."""

    def __enter__(self) -> Peaks:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now on
        self._before, self._stop = status(), threading.Event()
        self._anon, self._file = [self._before["RssAnon"]], [self._before["RssFile"]]
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            now = status()
            self._anon[:], self._file[:] = [max(*self._anon, now["RssAnon"])], [max(*self._file, now["RssFile"])]

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        elapsed = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        self.result = {
            "seconds": elapsed,
            "peak": status()["VmHWM"],
            "rss": status()["VmHWM"] - self._before["VmRSS"],
            "anon": self._anon[0] - self._before["RssAnon"],
            "file": self._file[0] - self._before["RssFile"],
        }


class Together:
    """What a process and those that it starts hold at most, libraries included, by samples."""

    def __enter__(self) -> Together:
        self.before = of_all([os.getpid()])
        self._most, self._stop = dict(self.before), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(10 * SAMPLE_SECONDS):  # Pss costs a walk over all pages
            now = of_all([os.getpid(), *started()])
            self._most = {key: max(self._most[key], now[key]) for key in now}

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        self.most = self._most


def started() -> list[int]:
    """The processes that this one has started."""
    children = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
    return [int(child) for part in children for child in part]


def of_all(processes: list[int]) -> dict[str, int]:
    """Sums over processes, in bytes: their shares of what they map (Pss), and what is theirs alone (Anonymous)."""
    total = dict.fromkeys(("Pss", "Anonymous"), 0)
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                key = line.partition(":")[0]
                if key in total:
                    total[key] += int(line.split()[1]) << 10
    return total


class Tool:
    """The commands. Subclasses know a package."""

    def __init__(self) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.torch, self.llama, self.model = torch, LlamaForCausalLM, None

    def memory(self) -> dict[str, int]:
        """What the process holds now."""
        return {**status(), "Pss": proportional()}

    def quantize(self, source: str, destination: str, **options: Any) -> dict[str, float]:
        """Checkpoint to checkpoint."""
        with Peaks() as peaks:
            self._quantize(source, destination, **options)
        return peaks.result

    def load(self, directory: str) -> dict[str, float]:
        """Seconds until there is a model."""
        skeleton = self._skeleton(directory)
        start = time.perf_counter()
        self.model = self._load(directory, skeleton)
        return {"seconds": time.perf_counter() - start}

    def forward(self, rows: int = 16) -> dict[str, object]:
        """A forward pass over a few tokens."""
        start = time.perf_counter()
        with self.torch.inference_mode():
            logits = self.model(input_ids=self.torch.arange(1, rows + 1)[None], use_cache=False).logits
        return {"seconds": time.perf_counter() - start, "norm": float(logits.float().norm())}

    def in_fp32(self) -> dict[str, str]:
        """Turns the model's 4-bit layers into plain fp32 ones; the hash of all their weights."""
        nn, digest = self.torch.nn, hashlib.sha256()
        for name, module in list(self.model.named_modules()):
            if self._is_quantized(module):
                weight = self._weight(module).float().contiguous()
                digest.update(name.encode() + weight.view(self.torch.uint8).numpy().tobytes())
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                self.model.set_submodule(name, linear)
        nn.Module.float(self.model)  # transformers' own refuses where weights were quantized
        return {"sha256": digest.hexdigest()}

    def perplexity(self, tokenizer: str, window: int = 512) -> dict[str, float]:
        """On 1 John, as `nybble demo` measures it."""
        from transformers import AutoTokenizer

        from nybble.demo import bible
        from nybble.training.evaluate import perplexity

        ids = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).encode(bible.held_out_text())
        return {"perplexity": perplexity(self.model, ids, window)}

    def _skeleton(self, directory: str) -> Any:
        return None


class Nybble(Tool):
    """nybble.quantize and nybble.load."""

    def __init__(self) -> None:
        super().__init__()
        import nybble
        import nybble.checkpoint

        self.nybble = nybble

    def _quantize(self, source: str, destination: str, **options: Any) -> None:
        self.nybble.quantize(source, destination, **options)

    def quantize_together(self, source: str, destination: str, **options: Any) -> dict[str, float]:
        """Checkpoint to checkpoint with `processes`; memory of all of them, libraries included."""
        first: list[float] = []

        def tick(done: int, total: int, name: str) -> None:
            if not first:
                first.append(time.perf_counter())

        begin = time.perf_counter()
        with Together() as memory:
            self.nybble.quantize(source, destination, progress=tick, **options)
        libraries = options["processes"] * memory.before["Anonymous"]
        return {
            "seconds": memory.seconds,
            "start": first[0] - begin,
            "pss": memory.most["Pss"],
            "added": memory.most["Anonymous"] - libraries,
        }

    def calibrate(self, source: str, destination: str, text: str, samples: int, seq: int) -> dict[str, float]:
        """Checkpoint to checkpoint, calibrated on a text file."""
        calibration = self.nybble.Calibration(text, samples=samples, seq=seq)
        with Peaks() as peaks:
            self._quantize(source, destination, calibration=calibration)
        return peaks.result

    def _load(self, directory: str, skeleton: Any) -> Any:
        return self.nybble.load(directory)

    def _is_quantized(self, module: Any) -> bool:
        return isinstance(module, self.nybble.QuantLinear)

    def _weight(self, module: Any) -> Any:
        return module.dequantize(self.torch.float32)


class LoadInto(Nybble):
    """nybble.load_into a model that is there already, without memory for its parameters."""

    def _skeleton(self, directory: str) -> Any:
        from transformers import AutoConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = AutoConfig.from_pretrained(directory)
        with self.torch.device("meta"):
            model = self.llama(config).bfloat16().eval()
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are in no checkpoint
        return model

    def _load(self, directory: str, skeleton: Any) -> Any:
        self.nybble.load_into(skeleton, directory)
        return skeleton


class BitsAndBytes(Tool):
    """transformers with bitsandbytes."""

    def __init__(self) -> None:
        super().__init__()
        import bitsandbytes
        import transformers

        self.bitsandbytes, self.transformers = bitsandbytes, transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def _quantize(self, source: str, destination: str) -> None:
        config = self.transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.torch.bfloat16,
        )
        model = self._from_pretrained(source, quantization_config=config)
        model.save_pretrained(destination)

    def _load(self, directory: str, skeleton: Any) -> Any:
        return self._from_pretrained(directory)

    def _from_pretrained(self, directory: str, **options: Any) -> Any:
        cls = self.transformers.AutoModelForCausalLM
        options = {"dtype": self.torch.bfloat16, "device_map": "cpu", "local_files_only": True, **options}
        return cls.from_pretrained(directory, **options).eval()

    def _is_quantized(self, module: Any) -> bool:
        return isinstance(module, self.bitsandbytes.nn.Linear4bit)

    def _weight(self, module: Any) -> Any:
        state = module.weight.quant_state
        state.dtype = self.torch.float32  # what it decodes to
        return self.bitsandbytes.functional.dequantize_4bit(module.weight.data, state)


class Worker:
    """Such a process, for checkpoints.py: `worker("load", directory)` returns the answer."""

    def __init__(self, tool: str) -> None:
        command = [sys.executable, __file__, tool]
        pipe, environment = subprocess.PIPE, {**os.environ, "NYBBLE_TRANSFORMERS": "0"}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.result()

    def send(self, command: str, *arguments: object, **options: object) -> None:
        """Ask, without waiting for the answer."""
        self._process.stdin.write(json.dumps([command, list(map(str, arguments)), options]) + "\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """The answer to what was asked first."""
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process has ended with {self._process.wait()}")
        return json.loads(line)

    def __call__(self, command: str, *arguments: object, **options: object) -> dict[str, Any]:
        self.send(command, *arguments, **options)
        return self.result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what packages print is not an answer
    tool = dict(zip(TOOLS, (Nybble, LoadInto, BitsAndBytes), strict=True))[sys.argv[1]]()
    answers.write("{}\n")
    for line in sys.stdin:
        command, arguments, options = json.loads(line)
        answers.write(json.dumps(getattr(tool, command)(*arguments, **options)) + "\n")


if __name__ == "__main__":
    main()
