"""Loading a checkpoint directory into a transformers model whose linear layers stay quantized.

This is the file that knows transformers; it is imported on use (extra `hf`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError
from ..tensor import QuantTensor
from .bnb import Groups, group, module_of, prefix_of, source_quantization
from .files import TORCH_DTYPES, Source, open_source, read_config

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


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is needed to build the model: pip install 'nybble[hf]'") from error
    return transformers


@contextmanager
def _named(directory: Path) -> Iterator[None]:
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


def _config(directory: Path) -> PretrainedConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no config.json, so the model's architecture is unknown")
    read_config(path)
    with _named(directory):
        config = _transformers().AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for the method's own package
    return config


def _model_class(config: PretrainedConfig, directory: Path) -> type[PreTrainedModel]:
    names = list(getattr(config, "architectures", None) or [])
    transformers = _transformers()
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise CheckpointError(f"{directory / 'config.json'}: architectures {names} are not classes of transformers")


def skeleton(directory: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a directory's config.json: parameters on meta, buffers with their values."""
    config = _config(directory)
    cls = _model_class(config, directory)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with _named(directory), _ParametersOnMeta():
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


def load(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint directory as a transformers model in eval mode, its quantized weights as `QuantLinear`.

    The model is built without memory for its parameters; each tensor of the file then takes its place directly. On the
    CPU these are mapped from the file, so that loading is quick and processes share the pages. A directory without
    quantized weights loads as the ordinary model.

    Args:
        directory: written by `nybble.quantize`, by bitsandbytes through transformers, or plain.
        dtype: of the parameters that are not quantized; by default what config.json says.
        device: where the tensors go.

    Raises:
        ImportError: transformers is not installed.
        CheckpointError: a file is damaged, or its tensors do not fit the model: names them.
        CheckpointNotFoundError: a file is missing.
    """
    source = open_source(directory)
    if not source.is_directory:
        raise CheckpointError(f"{directory}: a directory with config.json is needed, this is a file")
    groups = group(source.tensors, str(directory))
    if not groups.quantized and not groups.others:
        return _load_plain(source, dtype, device)
    model = skeleton(source.root, dtype)
    names = Names(model)
    with Reader(source, device) as reader:
        _place_quantized(model, names, groups, reader)
        _place_others(model, names, groups, reader)
        _place_plain(model, names, groups, reader)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    _load_generation_config(model, source.root)
    model.config._name_or_path = str(directory)
    block = (source.config() or {}).get("quantization_config")
    if isinstance(block, dict):
        model.config.quantization_config = block  # for save_pretrained
    return model.eval()


def _load_plain(source: Source, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    method = source_quantization(source.config())
    if method is not None:
        raise CheckpointError(f"{source.root}: quantized by {method!r}, whose layout nybble does not read")
    config = _config(source.root)
    cls = _model_class(config, source.root)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with _named(source.root), _quiet():
        model: nn.Module = cls.from_pretrained(
            str(source.root), dtype=dtype, local_files_only=True, use_safetensors=True
        )
    return model.to(device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar: a library call prints nothing that was not asked for."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Reader:
    """Tensors of a source by name, each shard opened once."""

    def __init__(self, source: Source, device: str | torch.device) -> None:
        self.source, self._device = source, torch.device(device)
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._handles.clear()

    def __call__(self, name: str) -> Tensor:
        info = self.source.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{info.path}: tensor {name!r} has dtype {info.dtype}, which the model cannot use")
        try:
            if info.path not in self._handles:
                self._handles[info.path] = safe_open(info.path, framework="pt")
            tensor: Tensor = self._handles[info.path].get_tensor(name)
        except SafetensorError as error:  # the library's own reading of the header, which may be stricter than ours
            raise CheckpointError(f"{info.path}: tensor {name!r}: safetensors cannot read it ({error})") from error
        return tensor.to(self._device)

    def where(self, name: str) -> str:
        return f"{self.source.tensors[name].path}: tensor {name!r}"


def _place_quantized(model: PreTrainedModel, names: Names, groups: Groups, reader: Reader) -> None:
    from ..nn import QuantLinear

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {name for name, _ in model.named_modules()}
    bias_keys = set()
    plain = set(groups.plain)
    fused = find_fusions(model, names, groups)
    for module, members in groups.quantized.items():
        where = reader.where(members["weight"])
        path = names.resolve_module(module, known)
        if path is None and any(module in fusion.sources for fusion in fused.values()):
            continue
        if path is None or path not in linear:
            what = "no module" if path is None else f"a {type(model.get_submodule(path)).__name__}, not a Linear,"
            raise CheckpointError(
                f"{where} is quantized, but the model {type(model).__name__} has {what} at {module!r}"
            )
        skeleton = linear[path]
        state = {key: reader(name) for key, name in members.items()}
        quantized = QuantTensor.from_state(state, name=where, dtype=_int8_dtype(members, model))
        if quantized.shape != (skeleton.out_features, skeleton.in_features):
            want = [skeleton.out_features, skeleton.in_features]
            raise CheckpointError(f"{where} has shape {list(quantized.shape)}, the model wants {want}")
        bias = None
        if skeleton.bias is not None:
            key = f"{prefix_of(module)}bias"
            if key not in plain:
                raise CheckpointError(f"{where}: the model wants a bias, but there is no {key!r}")
            bias = _checked(reader, key, skeleton.bias)
            bias_keys.add(key)
        model.set_submodule(path, QuantLinear.from_quant_tensor(quantized, bias=bias))
    for fusion in fused.values():
        fusion.place(model, groups, reader)
    groups.plain = [key for key in groups.plain if key not in bias_keys]


def _place_others(model: PreTrainedModel, names: Names, groups: Groups, reader: Reader) -> None:
    """Packed parameters that are no linear layer's weight: the experts of a mixture."""
    from ..nn.experts import keep_packed

    known = dict(model.named_parameters())
    for name, members in groups.others.items():
        where = reader.where(members["weight"])
        path = names.resolve(name, known)
        if path is None:
            raise CheckpointError(f"{where} is quantized, but the model {type(model).__name__} has no such parameter")
        tensor = QuantTensor.from_state({key: reader(key_of) for key, key_of in members.items()}, name=where)
        if tuple(tensor.shape) != tuple(known[path].shape):
            raise CheckpointError(f"{where} has shape {list(tensor.shape)}, the model wants {list(known[path].shape)}")
        owner, _, leaf = path.rpartition(".")
        keep_packed(model.get_submodule(owner), leaf, tensor, known[path].dtype)


def _int8_dtype(members: dict[str, str], model: PreTrainedModel) -> torch.dtype | None:
    """The int8 layout does not say what a weight was; the model does."""
    return model.dtype if "SCB" in members and model.dtype.is_floating_point else None


def _checked(reader: Reader, key: str, want: Tensor) -> Tensor:
    """A tensor of the file in the model's dtype; the file's own memory where the dtype is right already."""
    value = reader(key)
    if value.shape != want.shape:
        raise CheckpointError(f"{reader.where(key)} has shape {list(value.shape)}, the model wants {list(want.shape)}")
    return value.to(want.dtype) if want.dtype.is_floating_point else value


Place = tuple[str, nn.Module, str]  # full name, module, name in the module


def _places(model: nn.Module) -> list[list[Place]]:
    """Every parameter that is still to be loaded, as the list of all places that share it."""
    from ..nn import QuantLinear

    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear) or ".parametrizations." in f".{path}.":
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((f"{prefix_of(path)}{name}", module, name))
    return list(places.values())


def _place_plain(model: PreTrainedModel, names: Names, groups: Groups, reader: Reader) -> None:
    """Give every parameter and persistent buffer its tensor; errors list what is missing and what is left over."""
    places = _places(model)
    parameters = {full for shared in places for full, _, _ in shared}
    buffers = {name: b for name, b in model.named_buffers() if ".parametrizations." not in f".{name}"}
    known = parameters | buffers.keys()
    values: dict[str, Tensor] = {}
    unexpected = []
    fused: dict[str, Fusion] = {}
    for key in groups.plain:
        path = names.resolve(key, known)
        fusion = names.fusion(key, parameters) if path is None else None
        if fusion is not None:
            target, converter, pattern = fusion
            want = model.get_parameter(target)
            fused.setdefault(target, Fusion(target, tuple(want.shape), want.dtype, converter, model.config))
            fused[target].sources[key] = pattern
        elif path is None:
            unexpected.append(key)
        elif path in parameters:
            values[path] = _checked(reader, key, model.get_parameter(path))
        elif _is_persistent(model, path):
            owner, _, leaf = path.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = _checked(reader, key, buffers[path])
    for found in fused.values():
        values.update(_fused(model, names, found, reader, parameters))
    missing = []
    for shared in places:
        if not _place_shared(model, shared, values):
            missing.append(shared[0][0])
    missing += [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = [key for key in unexpected if not any(p.search(key) for p in ignored)]
    if missing or unexpected:
        lists = [
            (missing, "tensors of the model missing from the files"),
            (unexpected, "tensors the model does not have"),
        ]
        parts = [f"{len(n)} {what}: {', '.join(n[:4])}{' ...' if len(n) > 4 else ''}" for n, what in lists if n]
        if any(names.is_fused(key) for key in unexpected):
            parts.append("transformers fuses some of these while loading, which is not supported here")
        raise CheckpointError(f"{reader.source.root}: does not fit {type(model).__name__}: {'; '.join(parts)}")


@dataclass
class Fusion:
    """A parameter that transformers builds from several tensors while loading: all experts of a layer in one.

    Attributes:
        path: of the parameter. shape, dtype: that the model wants. converter: transformers' own.
        sources: name of a tensor, or path of a quantized module -> which of the converter's patterns it is.
        paths: of quantized modules -> where they are in the model, relative to the module that has the parameter.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    converter: Any
    config: Any
    sources: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """The parameter from its weights, by `paths`."""
        made = self.convert({module: values[path] for module, path in self.paths.items()})
        return next(iter(made.values()))

    def convert(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What transformers makes of `values`, by name; it takes them by the numbers in their names."""
        converter = copy.deepcopy(self.converter)
        for key in sorted(values, key=_numbers_by_value):
            converter.add_tensor(self.path, key, self.sources[key], values[key])
        made = converter.convert(self.path, model=None, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def checked(self, values: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The same; CheckpointError where the values do not go together."""
        try:
            return self.convert(values)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{where} do not make up {self.path!r}: {error}") from error

    def place(self, model: nn.Module, groups: Groups, reader: Reader) -> None:
        """Let the parameter be made of its packed weights when it is used."""
        from ..nn.experts import FusedOnUse, keep_fused

        tensors: dict[str, QuantTensor] = {}
        for module, path in self.paths.items():
            members = groups.quantized[module]
            state = {key: reader(name) for key, name in members.items()}
            dtype = self.dtype if "SCB" in members else None
            tensors[path] = QuantTensor.from_state(state, name=reader.where(members["weight"]), dtype=dtype)
        where = f"{reader.where(groups.quantized[next(iter(self.paths))]['weight'])} and {len(self.paths) - 1} more"
        shapes = {m: torch.empty(tensors[p].shape, dtype=self.dtype, device="meta") for m, p in self.paths.items()}
        made = self.checked(shapes, where)
        found = [list(value.shape) for value in made.values()]
        if found != [list(self.shape)]:
            raise CheckpointError(f"{where} make {found[0]}, the model wants {list(self.shape)} for {self.path!r}")
        owner, _, leaf = self.path.rpartition(".")
        keep_fused(model.get_submodule(owner), leaf, FusedOnUse(tensors, self, self.shape, self.dtype))


def find_fusions(model: Any, names: Names, groups: Groups) -> dict[str, Fusion]:
    """Parameter of the model -> the quantized modules that transformers makes it of.

    Raises:
        CheckpointError: only some of its weights are quantized, or they are no part of the module that has it.
    """
    known = dict(model.named_parameters())
    modules = {name for name, _ in model.named_modules()}
    result: dict[str, Fusion] = {}
    for module, members in groups.quantized.items():
        found = None if names.resolve_module(module, modules) else names.fusion(members["weight"], known)
        if found is None:
            continue
        path, converter, pattern = found
        want = known[path]
        fusion = result.setdefault(path, Fusion(path, tuple(want.shape), want.dtype, converter, model.config))
        fusion.sources[module] = pattern
        inside = names.inside(members["weight"], path.rpartition(".")[0])
        if inside is None:
            raise CheckpointError(f"{module!r} is quantized, and {path!r}, which it is a part of, is not above it")
        fusion.paths[module] = module_of(inside)
    for key in groups.plain if result else ():
        found = names.fusion(key, known)
        if found is not None and found[0] in result:
            other = next(iter(result[found[0]].sources))
            raise CheckpointError(f"{other!r} is quantized and {key!r} is not, but {found[0]!r} is made of both")
    return result


def _fused(
    model: PreTrainedModel, names: Names, fusion: Fusion, reader: Reader, known: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are made of plain tensors, by name; in memory of their own."""
    values = {}
    for key in fusion.sources:
        value = reader(key)
        values[key] = value.to(fusion.dtype) if value.is_floating_point() else value
    where = f"{reader.where(next(iter(fusion.sources)))} and {len(fusion.sources) - 1} more"
    for name, value in fusion.checked(values, where).items():
        full = names.resolve(name, known)
        want = None if full is None else tuple(model.get_parameter(full).shape)
        if full is None or tuple(value.shape) != want:
            raise CheckpointError(f"{where} make {name!r} {list(value.shape)}, the model wants {list(want or ())}")
        yield full, value


def _numbers_by_value(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _place_shared(model: PreTrainedModel, shared: list[Place], values: dict[str, Tensor]) -> bool:
    """Load one parameter wherever it is tied to; False if the files have none of its names.

    Places stay tied unless the files hold different values under two of the names, which then each get their own.
    """
    given = [full for full, _, _ in shared if full in values]
    if not given:
        return False
    main = nn.Parameter(values[given[0]], requires_grad=values[given[0]].is_floating_point())
    for full, module, name in shared:
        own = values.get(full)
        if own is None or own is values[given[0]] or torch.equal(own, main):
            module._parameters[name] = main
        else:
            module._parameters[name] = nn.Parameter(own, requires_grad=own.is_floating_point())
            if hasattr(model.config, "tie_word_embeddings"):
                model.config.tie_word_embeddings = False
    return True


def _is_persistent(model: nn.Module, path: str) -> bool:
    owner, _, leaf = path.rpartition(".")
    return leaf not in model.get_submodule(owner)._non_persistent_buffers_set


def _load_generation_config(model: PreTrainedModel, directory: Path) -> None:
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = _transformers().GenerationConfig.from_pretrained(
            str(directory), local_files_only=True
        )
