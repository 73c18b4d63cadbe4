"""The model that a directory's config.json names, without its weights: its modules, and what their tensors are called.

This and `load` are the files that know transformers, which is imported on use (extra `hf`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError
from .bnb import module_of, prefix_of
from .files import read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# torch.empty and its kin give room for parameters; everything with values (rotary tables, position ids) is computed.
_UNINITIALIZED = {torch.empty, torch.empty_strided}


class _ParametersOnMeta(TorchFunctionMode):
    """Uninitialized tensors are made on the meta device, computed ones where they belong.

    A plain `torch.device("meta")` would also take the values of the buffers that no checkpoint holds (`inv_freq`).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _UNINITIALIZED and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def import_transformers() -> Any:
    """The package, or what to install.

    Raises:
        ImportError: it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is needed to build the model: pip install 'nybble[hf]'") from error
    return transformers


@contextmanager
def named(directory: Path) -> Iterator[None]:
    """transformers' own complaints about config.json, with the directory's name.

    Which exceptions those are is not documented: a model class divides by a field that is 0, a validator of
    huggingface_hub has exceptions of its own. Only what is not about the file passes.
    """
    try:
        yield
    except (CheckpointError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{directory / 'config.json'}: transformers cannot build this model ({what})") from error


def model_config(directory: Path) -> PretrainedConfig:
    """config.json as transformers reads it, without what it says of quantization; CheckpointError if it cannot."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no config.json, so the model's architecture is unknown")
    read_config(path)
    with named(directory):
        config = import_transformers().AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for the method's own package
    return config


def model_class(config: PretrainedConfig, directory: Path) -> type[PreTrainedModel]:
    """The class of transformers that config.json names first; CheckpointError if it names none."""
    names = list(getattr(config, "architectures", None) or [])
    transformers = import_transformers()
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise CheckpointError(f"{directory / 'config.json'}: architectures {names} are not classes of transformers")


def skeleton(directory: Path, dtype: torch.dtype | None = None, values: bool = True) -> PreTrainedModel:
    """The model of a directory's config.json: parameters on meta, buffers with their values.

    values: False puts everything on meta, for who only counts: some classes (Llama 4's experts) fill parameters with
    zeros as they are built, gigabytes of them.
    """
    config = model_config(directory)
    cls = model_class(config, directory)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with named(directory), _ParametersOnMeta() if values else torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    return model


class Names:
    """From a file's tensor names to the model's: with or without the base model's prefix, and as transformers renames.

    transformers 5 keeps files' names where a class has changed and renames while loading (`embed_out` to `lm_head`);
    earlier versions have no such table.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix = getattr(model, "base_model_prefix", "") or ""
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:
            return
        for transform in get_model_conversion_mapping(model):
            (self._renamings if isinstance(transform, WeightRenaming) else self._converters).append(transform)

    def _renamed(self, key: str) -> str:
        for transform in self._renamings:
            key = transform.rename_source_key(key)[0]
        return key

    def is_fused(self, key: str) -> bool:
        """Whether transformers builds one parameter of its own from this tensor and others (experts, fused gates)."""
        return any(transform.rename_source_key(self._renamed(key))[1] is not None for transform in self._converters)

    def fusion(self, key: str, known: Collection[str]) -> tuple[str, Any, str] | None:
        """(parameter, converter, pattern of the converter) where transformers builds a parameter from several tensors.

        `parameter` is one of `known`; a converter may make more than one.
        """
        renamed = self._renamed(key)
        for transform in self._converters:
            target, pattern = transform.rename_source_key(renamed)
            if pattern is not None:
                path = next((path for path in self._with_prefix(target) if path in known), None)
                return None if path is None else (path, transform, pattern)
        return None

    def inside(self, key: str, owner: str) -> str | None:
        """A file's `key` as it is called in the model, relative to the module `owner`; None if it is not inside."""
        return next((n.removeprefix(f"{owner}.") for n in self._candidates(key) if n.startswith(f"{owner}.")), None)

    def _with_prefix(self, name: str) -> Iterator[str]:
        yield name
        if self._prefix:
            yield f"{self._prefix}.{name}"
            yield name.removeprefix(f"{self._prefix}.")

    def _candidates(self, key: str) -> Iterator[str]:
        for name in (key, self._renamed(key)):
            yield from self._with_prefix(name)

    def resolve(self, key: str, known: Collection[str]) -> str | None:
        """The one of `known` that a file's `key` is, or None."""
        return next((name for name in self._candidates(key) if name in known), None)

    def resolve_module(self, module: str, known: Collection[str]) -> str | None:
        """The same for the path of a module with a weight; `known` are paths too."""
        paths = map(module_of, self._candidates(f"{prefix_of(module)}weight"))
        return next((path for path in paths if path in known), None)


@dataclass
class Architecture:
    """What a model class says of its modules, by module path.

    `linear`: plain nn.Linear; `embeddings`: plain nn.Embedding; `transposed`: transformers' Conv1D; `keep`: linear ones
    that must not be quantized, with the reason; `tied`: those that share their weight with another; `modules`: all that
    have a weight; `names`: from a file's names to these.
    """

    names: Names
    linear: set[str] = field(default_factory=set)
    embeddings: set[str] = field(default_factory=set)
    transposed: set[str] = field(default_factory=set)
    keep: dict[str, str] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


def describe(directory: Path) -> Architecture:
    """Build the model of `directory` without weights and sort its modules.

    Raises:
        ImportError: transformers is missing.
        CheckpointError: config.json names a model that transformers cannot build.
    """
    model = skeleton(directory)
    result = Architecture(Names(model))
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        result.modules.add(name)
        owners.setdefault(id(weight), []).append(name)
        # Subclasses of Linear are left alone: nn.MultiheadAttention, for one, reads its out_proj's weight directly.
        if type(module) is nn.Linear:
            result.linear.add(name)
        elif type(module) is nn.Embedding:
            result.embeddings.add(name)
        elif type(module).__name__ == "Conv1D":
            result.transposed.add(name)
    for names in owners.values():
        if len(names) > 1:
            result.tied.update(names)
            result.keep.update({name: f"tied to {names[0] if name != names[0] else names[1]}" for name in names})
    for pattern in getattr(model, "_keep_in_fp32_modules", None) or ():
        fixed = {name for name in result.linear if pattern in name.split(".")}
        result.keep.update({name: "its model class wants it in full precision" for name in fixed})
    return result
