"""What processes train together in the tests; alone, the same functions give what is compared with."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import SENTENCES, TEXT, ByteTokenizer, llama, write_model
from tiny_models import bert

import nybble
from nybble import LoRAConfig, TrainConfig
from nybble.nn.full import train_all
from nybble.training import TextClassifier
from nybble.training.data import Labelled

#: Documents of several lengths: rows have different numbers of targets, and some have several documents.
DOCUMENTS = [" ".join(SENTENCES[(i + j) % 3] for j in range(1 + i % 3))[: 20 + 17 * (i % 5)] for i in range(90)]
KILLED = 9
"""Status with which a process ends that is killed here."""
TEXTS = [{"text": SENTENCES[i % 3][: 9 + i % 7], "label": "abc"[i % 3]} for i in range(31)]
CONFIG = TrainConfig(
    steps=5,
    batch_size=4,
    grad_accum=2,
    seq_len=64,
    packing="documents",
    lr=1e-2,
    warmup_steps=0,
    schedule="constant",
    dtype="fp32",
    eval_every=2,
    val_fraction=0.2,
    max_grad_norm=0.05,
    save_every=0,
    plot=False,
)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def packed(model: Any) -> dict[str, str]:
    """SHA-256 of every packed weight and its scales, brought together if they are sharded."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nybble.QuantLinear):
            digest = hashlib.sha256()
            tensors = (module.weight, module.absmax, module.nested_absmax, module.codebook, module.nested_map)
            for whole in (tensor for tensor in tensors if tensor is not None):
                whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole  # type: ignore[operator]
                digest.update(f"{whole.dtype}{list(whole.shape)}".encode() + whole.detach().numpy().tobytes())
            found[path] = digest.hexdigest()
    return found


def lora(dropout: float = 0.0, **changes: Any) -> Any:
    """NF4 and LoRA, whose first values are drawn with other random numbers in every process."""
    model = llama(**changes)
    nybble.quantize_(model)
    torch.manual_seed(1 + rank())
    nybble.add_lora(model, LoRAConfig(r=6, alpha=12, dropout=dropout))
    return model


def trained(model: Any, data: Any = DOCUMENTS, config: TrainConfig = CONFIG, **options: Any) -> dict[str, Any]:
    before = packed(model)
    report = nybble.finetune(model, data, config, tokenizer=ByteTokenizer(), show=False, **options)
    return {
        "losses": report.losses,
        "adapter_losses": report.adapter_losses,
        "evaluations": [(e.step, e.loss, e.accuracy) for e in report.evaluations],
        "tokens": report.tokens,
        "same_bytes": packed(model) == before,
        "packed": before,
        "resumed": report.resumed_from,
        "interrupted": report.interrupted,
        "parameters": report.trainable_parameters,
    }


# ---- what is trained -------------------------------------------------------------------------------------------------


def nf4(directory: Path, parallel: str, out: str | None = None, on_step: Any = None, **changes: Any) -> Any:
    """Everything that a run keeps: a running mean, the best, checkpoints."""
    where = directory / (out or f"nf4-{parallel}")
    config = dataclasses.replace(CONFIG, parallel=parallel, out_dir=where, save_every=2, ema_decay=0.5, keep_best=True)
    return trained(lora(), config=dataclasses.replace(config, **changes), on_step=on_step)


def full(directory: Path, parallel: str, **changes: Any) -> Any:
    """All weights, the embedding tied to the head, moments in 8 bits."""
    model = llama()
    train_all(model)
    config = dataclasses.replace(CONFIG, parallel=parallel, out_dir=directory / f"full-{parallel}", lr=1e-3)
    config = dataclasses.replace(config, optimizer="adamw8bit", save_every=2, **changes)
    return trained(model, config=config, save=lambda model, path: model.save_pretrained(path))


def bf16(directory: Path, parallel: str) -> Any:
    """Layers computed again in the backward pass, the embedding not tied."""
    config = dataclasses.replace(CONFIG, parallel=parallel, dtype="bf16", gradient_checkpointing=True, steps=3)
    return trained(lora(dtype=torch.bfloat16, tie_word_embeddings=False), config=config)


def mixed(directory: Path, parallel: str) -> Any:
    """Two adapters on data of their own, in one batch; a third that does not act. "auto" is DDP."""
    parallel = {"ddp": "auto"}.get(parallel, parallel)
    model = lora()
    nybble.add_lora(model, LoRAConfig(r=3, alpha=6), name="second")
    nybble.add_lora(model, LoRAConfig(r=2, alpha=6), name="idle")
    config = dataclasses.replace(CONFIG, parallel=parallel, steps=3, val_fraction=0.0)
    held = {"default": DOCUMENTS[:7]}
    return trained(model, {"default": DOCUMENTS[7:], "second": DOCUMENTS[::-1]}, config, eval_data=held)


def classifier(directory: Path, parallel: str) -> Any:
    """An encoder trained whole; its pooler takes no part."""
    torch.manual_seed(0)
    model = TextClassifier(bert(pooler=True), 3)
    data = Labelled.read(TEXTS, ByteTokenizer(), 32)
    config = dataclasses.replace(CONFIG, parallel=parallel, steps=3)
    return trained(model, data, config)


def methods(directory: Path, parallel: str) -> Any:
    """Every other kind of adapter over NF4."""
    adders: dict[str, Callable[[Any], Any]] = {
        "dora": lambda model: nybble.add_lora(model, LoRAConfig(r=4, alpha=8, dora=True)),
        "bottleneck": lambda model: nybble.add_bottleneck(model, size=8),
        "prefix": lambda model: nybble.add_prefix(model, tokens=3),
        "prompt": lambda model: nybble.add_prompt(model, tokens=3),
        "int8": lambda model: nybble.add_lora(model, LoRAConfig(r=4, alpha=8)),
    }
    found = {}
    for name, add in adders.items():
        model = llama()
        nybble.quantize_(model, nybble.QuantConfig(format="int8", double_quant=False) if name == "int8" else None)
        torch.manual_seed(1 + rank())
        add(model)
        config = dataclasses.replace(
            CONFIG, parallel=parallel, steps=2, eval_every=0, out_dir=directory / f"methods-{parallel}" / name
        )
        found[name] = trained(model, config=config)
    return found


# ---- interruptions ---------------------------------------------------------------------------------------------------


def stopping(step: int) -> Callable[[int, float], None]:
    """The last process is told to end during a step."""

    def on_step(now: int, loss: float) -> None:
        if now == step and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
            os.kill(os.getpid(), signal.SIGTERM if dist.is_initialized() else signal.SIGINT)

    return on_step


def stopped(directory: Path, parallel: str) -> Any:
    """Interrupted, and gone on with by as many processes."""
    first = nf4(directory, parallel, f"stopped-{parallel}", stopping(3))
    return first, nf4(directory, parallel, f"stopped-{parallel}")


def killed(directory: Path, parallel: str) -> str:
    """The last process ends without a word; what the others hear."""

    def on_step(step: int, loss: float) -> None:
        if step == 4 and rank() == dist.get_world_size() - 1:
            os._exit(KILLED)

    return told(lambda: nf4(directory, parallel, f"killed-{parallel}", on_step))


def revived(directory: Path, parallel: str) -> Any:
    """The same run once more."""
    return nf4(directory, parallel, f"killed-{parallel}")


def chain(directory: Path, parallel: str, stop: int | None) -> Any:
    """A link of a chain of runs by other numbers of processes."""
    return nf4(directory, parallel, "chain", None if stop is None else stopping(stop))


# ---- memory that is given back ---------------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """What FSDP2 gives back is overwritten first, and never handed out at the same address again."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    own_free, own_alloc = _fsdp_param.free_storage, _fsdp_param.alloc_storage
    kept: list[torch.Tensor] = []

    def free(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.size():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0x7F)
        own_free(tensor)

    def alloc(tensor: torch.Tensor) -> None:
        # Takes the place that was given back.
        kept.append(torch.full((tensor.numel() * tensor.itemsize,), 0x7F, dtype=torch.uint8))
        own_alloc(tensor)

    _fsdp_param.free_storage, _fsdp_param.alloc_storage = free, alloc
    try:
        yield
    finally:
        _fsdp_param.free_storage, _fsdp_param.alloc_storage = own_free, own_alloc
        assert len(kept) > 20


def poison(directory: Path, parallel: str) -> Any:
    with poisoned():
        config = dataclasses.replace(CONFIG, parallel=parallel, steps=3)
        return trained(lora(), config=config), trained(
            lora(), config=dataclasses.replace(config, gradient_checkpointing=True)
        )


def mapped(directory: Path, parallel: str) -> list[str]:
    """Files of weights that are still mapped after a run of a model that was loaded from one."""
    path = directory / f"mapped-{parallel}"
    if not rank():
        plain = directory / f"plain-{parallel}"
        llama().save_pretrained(plain)
        nybble.quantize(plain, path, nybble.QuantConfig())
    dist.barrier()
    model = nybble.load(path)
    nybble.add_lora(model, LoRAConfig(r=2, alpha=4))
    result = trained(model, config=dataclasses.replace(CONFIG, parallel=parallel, steps=1))
    assert result["same_bytes"]
    maps = Path("/proc/self/maps")
    return [line for line in maps.read_text().splitlines() if str(path) in line] if maps.exists() else []


def masters(directory: Path, parallel: str, whole: bool = False) -> Any:
    """All weights of a bf16 model, trained in fp32; `whole`: cast before the run. With FSDP2 a layer is cast when it is
    to be cut, and those after it are as they were."""
    from torch.distributed import fsdp

    model = llama(dtype=torch.bfloat16)
    train_all(model.float() if whole else model)
    shard = fsdp.fully_shard

    def watched(unit: Any, **options: Any) -> Any:
        inside = {id(p) for p in unit.parameters()}
        uncut = [p for p in model.parameters() if not hasattr(p, "placements")]
        assert all((p.dtype == torch.float32) == (id(p) in inside) for p in uncut)
        return shard(unit, **options)

    fsdp.fully_shard = watched  # type: ignore[assignment]  # for this run
    try:
        config = dataclasses.replace(CONFIG, parallel=parallel, lr=1e-3, steps=3, fp32_weights=not whole)
        found = trained(model, config=config)
    finally:
        fsdp.fully_shard = shard
    return {**found, "dtypes": {str(p.dtype) for p in model.parameters()}}


# ---- what is refused -------------------------------------------------------------------------------------------------


def told(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(directory: Path, parallel: str) -> dict[str, str]:
    """What goes wrong in one process or in all, as each process hears of it."""
    config = dataclasses.replace(CONFIG, parallel=parallel, steps=3, eval_every=0)
    last = rank() == dist.get_world_size() - 1

    def run(model: Any = None, data: Any = DOCUMENTS, on_step: Any = None, **changes: Any) -> Callable[[], Any]:
        made = lora() if model is None else model
        return partial(trained, made, data, dataclasses.replace(config, **changes), on_step=on_step)

    def broken(step: int, loss: float) -> None:
        if last and step == 2:
            with torch.no_grad():
                for parameter in spoilt.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(float("nan"))

    spoilt = lora()
    sharded = lora()
    trained(sharded, config=dataclasses.replace(config, parallel="fsdp", steps=1))
    half = llama()
    train_all(half)
    half.model.layers[1].input_layernorm.to(torch.bfloat16)
    occupied = directory / f"occupied-{parallel}"
    occupied.mkdir(exist_ok=True)
    (occupied / "a file").touch()
    return {
        "rows": told(run(batch_size=5)),
        "missing": told(run(data=directory / "nothing.txt" if last else DOCUMENTS)),
        "data": told(run(data=DOCUMENTS[:-1] if last else DOCUMENTS)),
        "seed": told(run(seed=rank())),
        "nan": told(run(spoilt, on_step=broken)),
        "sharded": told(run(sharded)),
        "occupied": told(run(out_dir=occupied)),
        "dtypes": told(run(half, dtype="bf16")),
        "after": "nothing" if run()()["losses"] else "",
    }


def commands(directory: Path, parallel: str) -> dict[str, str]:
    """The command line, where one process is given something else, or cannot load what it is given."""
    from typer.testing import CliRunner

    from nybble.cli.app import build

    last = rank() == dist.get_world_size() - 1
    if not rank():
        write_model(directory / "model")
        (directory / "text.txt").write_text(TEXT)
    dist.barrier()

    def run(model: str = "model", text: str = "text.txt", **options: Any) -> str:
        given = {"steps": 1, "batch_size": 2, "seq_len": 16, "parallel": parallel, **options}
        listed = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        where = [str(directory / name) for name in (model, text, "command")]
        result = CliRunner().invoke(build(), ["finetune", *where, *listed, "--no-plot"])
        return "nothing" if result.exception is None else f"{type(result.exception).__name__}: {result.exception}"

    return {
        "model": run(model="no model" if last else "model"),
        "text": run(text="none.txt" if last else "text.txt"),
        "option": run(lr=-1 if last else 1e-4),
        "parallel": run(parallel="fsdp" if last else "ddp"),
        "lr": run(lr=1e-3 if last else 1e-4),
        "rank": run(rank=8 if last else 4),
        "after": run(),
    }


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    f"{function.__name__}-{parallel}": partial(function, parallel=parallel)
    for function in (
        nf4,
        full,
        bf16,
        mixed,
        classifier,
        methods,
        stopped,
        killed,
        revived,
        poison,
        mapped,
        masters,
        refusals,
        commands,
    )
    for parallel in ("none", "ddp", "fsdp")
}
SCENARIOS |= {
    f"chain-{parallel}-{stop}": partial(chain, parallel=parallel, stop=stop)
    for parallel in ("none", "ddp", "fsdp")
    for stop in (2, 3, None)
}
