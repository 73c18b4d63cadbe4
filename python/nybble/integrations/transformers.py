"""nybble as a quantizer of transformers (4.57 and 5.x): from_pretrained, save_pretrained and Trainer.

`from_pretrained` of a directory that nybble wrote gives a model with `QuantLinear` inside, its packed tensors mapped
from the files; with `quantization_config=nybble.QuantConfig(...)` a plain directory is quantized after loading, layer
by layer. Directories that nybble wrote in bitsandbytes' layout carry the key "nybble" in their quantization_config:
these come to nybble while it is imported, and go to bitsandbytes where it is not; directories without that key are
always bitsandbytes' own.

Imported by `hook` while transformers' registry is being imported, so only the registry's neighbours are imported here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from ..formats import QuantConfig

METHOD = "nybble"
_BITSANDBYTES = ("bitsandbytes_4bit", "bitsandbytes_8bit")
# What packed weights have beside their own name; the quantizer reads these itself.
_PARTS = (
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.(bitsandbytes|nybble)__\w+)$",
    r"(^|\.)(SCB|weight_format)$",
)


class NybbleConfig(QuantizationConfigMixin):
    """The `quantization_config` of a directory that nybble wrote, kept as it is for saving."""

    def __init__(self, **block: Any) -> None:
        self.quant_method: Any = METHOD
        self.block = block

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From config.json's block."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """config.json's block."""
        return dict(self.block)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing is left out."""
        return self.to_dict()


def register() -> None:
    """Tell transformers of nybble's quantizer; once."""
    configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    if METHOD in quantizers:
        return
    auto.register_quantization_config(METHOD)(NybbleConfig)
    auto.register_quantizer(METHOD)(NybbleQuantizer)
    for name in _BITSANDBYTES:
        if name in configs:
            configs[name] = _chooser(configs[name])


def _chooser(bitsandbytes: Any) -> type:
    """bitsandbytes' configuration class, but for blocks that nybble wrote."""

    class Chooser(bitsandbytes):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            chosen = NybbleConfig if METHOD in config_dict else bitsandbytes
            return chosen.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    Chooser.__name__ = Chooser.__qualname__ = bitsandbytes.__name__
    return Chooser


class _Pending(nn.Module):
    """Stands for a quantized layer while transformers loads the rest: all it has is the bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias


class NybbleQuantizer(HfQuantizer):
    """See the module. Needs no package but nybble."""

    requires_calibration = False
    requires_parameters_quantization = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._given = quantization_config if isinstance(quantization_config, QuantConfig) else None
        self._files: list[Path] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to ask for."""

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """Of transformers 4: the dtype that was asked for."""
        return torch_dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        self._device_map = kwargs.get("device_map")
        self._files = [Path(name) for name in kwargs.get("checkpoint_files") or ()]
        from ..checkpoint.bnb import group
        from ..checkpoint.files import open_source, read_header

        if not self._files:  # transformers 4 does not say which files it loads
            directory = Path(str(getattr(model.config, "_name_or_path", "")))
            if not directory.is_dir():
                raise CheckpointError(
                    f"{directory}: transformers 4 needs a local directory; or use nybble.load(directory)"
                )
            self._files = open_source(directory).shards
        from ..checkpoint.load import Names, find_fusions

        tensors = {name: info for path in self._files for name, info in read_header(path)[0].items()}
        groups = group(tensors, str(self._files[0].parent))
        self._groups, self._quantized, self._experts = groups, groups.quantized, groups.others
        known = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        names = Names(model)
        self._paths = {}
        self._fusions = find_fusions(model, names, groups)
        fused = {module for fusion in self._fusions.values() for module in fusion.sources}
        for module in self._quantized.keys() - fused:
            path = names.resolve_module(module, known)
            if path is None:
                raise CheckpointError(
                    f"{self._files[0].parent}: {module!r} is quantized, but no linear layer in {type(model).__name__}"
                )
            self._paths[module] = path
            model.set_submodule(path, _Pending(model.get_submodule(path)))
        self._take_experts_out(model, names)
        weights = [rf"(^|\.){re.escape(name)}\.weight$" for name in {*self._paths, *self._paths.values()}]
        taken = {*self._expert_paths, *self._expert_paths.values(), *self._fusions}
        weights += [rf"(^|\.){re.escape(name)}$" for name in taken]
        ignored = model._keys_to_ignore_on_load_unexpected
        # A set in transformers 5, a list in 4.
        kind = set if isinstance(ignored, set) else list
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), *_PARTS, *weights])
        return model

    def _take_experts_out(self, model: Any, names: Any) -> None:
        """Packed parameters that are no linear layer's weight: transformers must not miss or initialize them."""
        known = dict(model.named_parameters())
        self._expert_paths, self._wanted = {}, {}
        for name in self._experts:
            path = names.resolve(name, known)
            if path is None:
                raise CheckpointError(
                    f"{self._files[0].parent}: {name!r} is quantized, but no parameter of {type(model).__name__}"
                )
            self._expert_paths[name], self._wanted[name] = path, (tuple(known[path].shape), known[path].dtype)
        for path in (*self._expert_paths.values(), *self._fusions):
            owner, _, leaf = path.rpartition(".")
            module = model.get_submodule(owner)
            del module._parameters[leaf]
            module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self._quantize(model)
            return model
        from ..checkpoint.files import Source, read_header
        from ..checkpoint.load import Reader
        from ..nn import QuantLinear, mixture
        from ..nn.experts import keep_packed
        from ..tensor import QuantTensor

        source = Source(self._files[0].parent, self._files)
        for file in self._files:
            source.tensors.update(read_header(file)[0])
        reader = Reader(source, _device(self._device_map))
        for fusion in self._fusions.values():
            fusion.place(model, self._groups, reader)
        for module, path in self._paths.items():
            members, pending = self._quantized[module], model.get_submodule(path)
            state = {key: reader(name) for key, name in members.items()}
            dtype = model.dtype if "SCB" in members else None
            tensor = QuantTensor.from_state(state, name=reader.where(members["weight"]), dtype=dtype)
            layer = QuantLinear.from_quant_tensor(tensor, bias=pending.bias).train(pending.training)
            model.set_submodule(path, layer)
        for name, members in self._experts.items():
            where = reader.where(members["weight"])
            tensor = QuantTensor.from_state({key: reader(of) for key, of in members.items()}, name=where)
            shape, dtype = self._wanted[name]
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{where} has shape {list(tensor.shape)}, the model wants {list(shape)}")
            owner, _, leaf = self._expert_paths[name].rpartition(".")
            keep_packed(model.get_submodule(owner), leaf, tensor, dtype)
        mixture.use(model)
        return model

    def _quantize(self, model: Any) -> None:
        from ..checkpoint.bnb import JSON_DTYPES, quantization_config
        from ..nn import quantize_

        config = self._given or QuantConfig()
        report = quantize_(model, config)
        settings = [config.for_module(name) or config for name in report.quantized]
        dtype = str(model.dtype).removeprefix("torch.")
        dtype = dtype if dtype in JSON_DTYPES.values() else "bfloat16"
        block = quantization_config(config, settings, dtype, sorted(report.skipped))
        self.quantization_config = NybbleConfig(**block)
        model.config.quantization_config = self.quantization_config

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained writes what nybble.quantize would have written."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters over the packed weights are trainable."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """So that Trainer accepts adapters that are not PEFT's: `nybble.add_lora`."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The kernels are torch.library operators."""
        return True


def _device(device_map: Any) -> torch.device:
    """The one device of a device map; a model spread over several is refused."""
    if isinstance(device_map, dict):
        places = {str(place) for place in device_map.values()}
        if len(places) > 1:
            raise CheckpointError(f"device_map names {sorted(places)}; a quantized model is loaded onto one device")
        device_map = next(iter(device_map.values()), "cpu")
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    return torch.device(device_map if device_map not in (None, "auto") else "cpu")
