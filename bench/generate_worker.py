"""A process that generates with one tool, a turn at a time as generate.py asks for it, and measures itself.

python bench/generate_worker.py JOB      JOB: JSON, see `Job`

Each line of stdin is a turn; each is answered by a line of JSON: seconds to the first token, tokens a second after it
(of all rows together), and the memory that the process held at most (VmHWM) beside what it held after its imports.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_worker import resident


@dataclass(frozen=True)
class Job:
    """tool: "nybble", or "transformers" (with bitsandbytes and PEFT); base: "nf4" or "bf16"; directory: of
    generate.py's files; adapters: how many there are."""

    tool: str
    base: str
    directory: str
    adapters: int
    threads: int = 0
    """0: as many as torch takes."""
    cpu_time: bool = False
    """Count the process's CPU seconds instead of the wall's, which other processes do not disturb as much."""


def clock(job: Job) -> float:
    return time.process_time() if job.cpu_time else time.perf_counter()


Turn = Callable[[list[list[int]], list[str] | None, int], list[float]]
"""(prompts, an adapter for each row, new tokens) -> when each token was there, by `clock`."""


def nybble(job: Job) -> Callable[[], Turn]:
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  # imports count as imports

    import nybble
    from nybble.generation.loop import Batch, ModelTraits, acting  # noqa: F401  # likewise

    class NoText:
        eos_token_id = None

        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return "." * len(ids)

    def prepare() -> Turn:
        path = f"{job.directory}/{job.base}"
        model = nybble.load(path) if job.base == "nf4" else nybble.load(path, dtype=torch.bfloat16)
        names: list[str] = []

        def turn(prompts: list[list[int]], adapters: list[str] | None, new: int) -> list[float]:
            for name in adapters or ():
                if name not in names:
                    nybble.load_adapter(model, f"{job.directory}/{name}", name)
                    names.append(name)
            times = []

            def shown(prompt: int, text: str) -> None:
                if prompt == 0:
                    times.append(clock(job))

            nybble.generate(model, NoText(), prompts, max_new_tokens=new, eos=(), adapters=adapters, on_text=shown)
            return times

        return turn

    return prepare


def transformers(job: Job) -> Callable[[], Turn]:
    import torch
    from bitsandbytes.nn import Linear4bit  # noqa: F401  # imports count as imports
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM  # noqa: F401  # likewise

    class Watch:
        """A stopping criterion, which is asked after every token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, ids: Any, scores: Any, **options: Any) -> Any:
            self.times.append(clock(job))
            return torch.zeros(len(ids), dtype=torch.bool)

    def prepare() -> Turn:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options = {"quantization_config": quantization} if job.base == "nf4" else {}
        model: Any = AutoModelForCausalLM.from_pretrained(f"{job.directory}/bf16", dtype=torch.bfloat16, **options)
        model.generation_config.eos_token_id = None
        tuned: list[Any] = []

        def turn(prompts: list[list[int]], adapters: list[str] | None, new: int) -> list[float]:
            watch, ids = Watch(), torch.tensor(prompts)
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if adapters is not None:
                if not tuned:
                    first, *others = dict.fromkeys(adapters)
                    tuned.append(PeftModel.from_pretrained(model, f"{job.directory}/{first}", adapter_name=first))
                    for name in others:
                        tuned[0].load_adapter(f"{job.directory}/{name}", name)
                    tuned[0].eval()
                inputs["adapter_names"] = adapters
            chosen = tuned[0] if adapters is not None else model
            if adapters is None and tuned:
                raise RuntimeError("turns without adapters come first: PEFT's layers stay in the model")
            with torch.inference_mode():
                chosen.generate(
                    **inputs,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                    stopping_criteria=[watch],
                )
            return watch.times

        return turn

    return prepare


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    prepare = {"nybble": nybble, "transformers": transformers}[job.tool](job)
    imports = resident("VmRSS")
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    turn = prepare()
    rows = torch.load(f"{job.directory}/rows.pt")
    text = rows[:, :-1].flatten().tolist()
    for line in sys.stdin:
        asked = json.loads(line)
        if not asked:
            print("{}", flush=True)
            continue
        count, length, new = asked["rows"], asked["length"], asked["new"]
        prompts = [text[1000 * i : 1000 * i + length] for i in range(count)]
        adapters = [f"adapter{i % job.adapters}" for i in range(count)] if asked["adapters"] else None
        started = clock(job)
        times = turn(prompts, adapters, new)
        rate = count * (len(times) - 1) / (times[-1] - times[0])
        memory = {"imports": imports, "peak": resident("VmHWM")}
        print(json.dumps({"first": times[0] - started, "rate": rate, "tokens": len(times), **memory}), flush=True)


if __name__ == "__main__":
    main()
