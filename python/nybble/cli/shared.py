"""What several commands do: load a model with its tokenizer and, if asked, an adapter; show how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that lies beside a model. Raises FileNotFoundError naming the directory if there is none."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("this command needs transformers: pip install 'nybble[hf]'") from error
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((directory / name).is_file() for name in names):
        raise FileNotFoundError(f"{directory}: no tokenizer there (one of {', '.join(names)})")
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def check_device(device: str) -> None:
    """Raises ValueError unless this machine has it."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.partition(":")[0], False):
        raise ValueError(
            f"device is {device!r}; this machine has: {', '.join(d for d, has in available.items() if has)}"
        )


def load_model(
    directory: Path, adapter: Path | None = None, device: str = "cpu", dtype: Any = None
) -> tuple[PreTrainedModel, Any]:
    """(model in eval mode, tokenizer) of a checkpoint directory, quantized or not, with an adapter on it if given.

    dtype: of the weights that are not quantized; the checkpoint's by default.
    """
    from ..checkpoint import load, load_adapter

    check_device(device)
    model = load(directory, device=device, dtype=dtype)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval(), load_tokenizer(directory)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function (name, done, total) that moves a bar on a terminal, and does nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def move(name: str, done: int, total: int) -> None:
            progress.update(task, description=f"{what} {name}", completed=done, total=total)

        yield move
