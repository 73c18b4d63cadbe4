"""A transformer's blocks one at a time, straight from a checkpoint's files.

The model is built without memory for its parameters. What comes before the first block is run once, to learn what every
block is called with (masks, rotary tables); then a block at a time gets its weights, in fp32, and loses them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.bnb import prefix_of
from ..checkpoint.files import Source, TensorInfo
from ..checkpoint.load import Names, Reader, skeleton
from ..checkpoint.slabs import FP8_DTYPES, ScaledReader
from ..errors import CalibrationError
from ..training.evaluate import check_length, check_vocabulary

_INPUT = "hidden_states"


class StopBlock(Exception):
    """What was to be seen has been seen: the rest of the forward pass is not needed."""


class Call:
    """What a block is called with, beside its hidden states."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states, and the rest."""
        if args:
            return args[0], cls(tuple(args[1:]), dict(kwargs))
        rest = dict(kwargs)
        return rest.pop(_INPUT), cls((), rest)

    def on(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after `block`."""
        result = block(hidden, *self.args, **self.kwargs)
        return result[0] if isinstance(result, tuple) else result


class Blocks:
    """The blocks of a checkpoint's model, and the hidden states before the first of them.

    Attributes:
        path: of the list of blocks in the model, such as "model.layers". count: how many blocks.
        hidden: fp32 [samples, tokens, width], after `look` what comes before block 0. Overwritten by whoever walks
            through the blocks.
        files: name of a block's parameter in the model -> name of the tensor in the files.
    """

    def __init__(self, source: Source, scales: Mapping[str, TensorInfo | None], tile: tuple[int, int]) -> None:
        """`scales`, `tile`: of fp8 weights, as in `checkpoint.select.Selection`.

        Raises:
            CalibrationError: the model is not one stack of blocks.
            CheckpointError: transformers cannot build it.
        """
        self._source, self._scales, self._tile = source, scales, tile
        self._model = skeleton(source.root, torch.float32).eval()
        self.path = _find_stack(self._model)
        stack = self._model.get_submodule(self.path)
        assert isinstance(stack, nn.ModuleList)
        self._stack, self.count = stack, len(stack)
        self._reader = Reader(source, "cpu")
        self.files = self._resolve()
        self._calls: list[list[Call]] = []

    def check(self, tokens: Tensor) -> None:
        """Raises ValueError unless the model can take these tokens, int64 [samples, tokens]."""
        check_vocabulary(self._model, tokens, "calibration data")
        check_length(self._model, tokens.shape[1], "seq")

    def look(self, tokens: Tensor) -> None:
        """Run what comes before the blocks on tokens, unless that is done already.

        Raises:
            CalibrationError: the model needs more than token ids, or its files lack a tensor.
        """
        if not self._calls:
            self._look(tokens)

    def least_memory(self, tokens: Tensor) -> int:
        """About what the hidden states, one block in fp32 and its activations on one sample take, in bytes."""
        config = self._model.config
        width = int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or 0)
        block = max(sum(math.prod(p.shape) for p in module.parameters()) for module in self._stack)
        widest = max(max(p.shape) for module in self._stack for p in module.parameters())
        return 4 * (tokens.numel() * width + block + tokens.shape[1] * (8 * width + 4 * widest))

    def _resolve(self) -> dict[str, str]:
        names = Names(self._model)
        known = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in self._model.named_buffers()}
        resolved = ((names.resolve(key, known), key) for key in self._source.tensors)
        return {name: key for name, key in resolved if name is not None}

    # ---- weights ---------------------------------------------------------------------------------------------------

    def value(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """The tensor of the model's parameter `name`, from the files; `dtype` None: as it is stored, mapped."""
        if name not in self.files:
            raise CalibrationError(f"{self._source.root}: the model's {name!r} is not in its files")
        info = self._source.tensors[self.files[name]]
        if info.dtype in FP8_DTYPES:
            reader = ScaledReader(info, self._scales.get(info.name), self._tile)
            return reader.read(0, info.numel).view(info.shape).to(dtype or torch.bfloat16, copy=True)
        value = self._reader(info.name)
        return value if dtype is None or not value.is_floating_point() else value.to(dtype)

    def _fill(self, module: nn.Module, path: str) -> None:
        for inner, owner in module.named_modules():
            self._fill_one(owner, f"{path}.{inner}" if inner else path, torch.float32)

    def _fill_one(self, owner: nn.Module, path: str, dtype: torch.dtype | None) -> None:
        """Give a module its own parameters and buffers."""
        for leaf, parameter in owner._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix_of(path)}{leaf}"
            value = self.value(name, dtype)
            if value.shape != parameter.shape:
                raise CalibrationError(
                    f"{self._source.root}: tensor {self.files[name]!r} has shape {list(value.shape)}, "
                    f"the model wants {list(parameter.shape)}"
                )
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and f"{prefix_of(path)}{leaf}" in self.files:
                owner._buffers[leaf] = self.value(f"{prefix_of(path)}{leaf}")

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in fp32, as long as it is needed."""
        block = self._stack[index]
        self._fill(block, f"{self.path}.{index}")
        try:
            yield block
        finally:
            for owner in block.modules():
                _empty_one(owner)

    def calls(self, index: int) -> list[Call]:
        """What block `index` is called with, for every sample."""
        return self._calls[index]

    # ---- before the first block ------------------------------------------------------------------------------------

    def _look(self, tokens: Tensor) -> None:
        inside = {id(module) for module in self._stack.modules()}
        head = self._model.get_output_embeddings()  # comes after the blocks, so it is not run
        outside = [(n, m) for n, m in self._model.named_modules() if id(m) not in inside and m is not head]
        hooks = []
        for name, module in outside:
            # Rows are looked up in a table that stays in the file: it is not worth a copy in fp32.
            table = isinstance(module, nn.Embedding)
            self._fill_one(module, name, None if table else torch.float32)
            if table:
                hooks.append(module.register_forward_hook(lambda module, given, out: out.float()))
        try:
            self._record(tokens)
        finally:
            for hook in hooks:
                hook.remove()
            for _, module in outside:
                _empty_one(module)

    def _record(self, tokens: Tensor) -> None:
        first, call = self._first_input(tokens[:1])
        with self.block(0) as block:
            example = block(first, *call.args, **call.kwargs)
        self._check_output(first, example)
        # Blocks that hand on what they are given: the masks and tables of all blocks, without computing any.
        known: list[Tensor] = []
        hidden: list[Tensor] = []
        self._calls = [[] for _ in range(self.count)]

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given, call = Call.split(args, kwargs)
                if index == 0:
                    hidden.append(given.float().clone())
                self._calls[index].append(_shared(call, known))
                if index == self.count - 1:
                    raise StopBlock
                return (given, *example[1:]) if isinstance(example, tuple) else given

            return forward

        with _replaced(dict(enumerate(self._stack)), stub):
            for row in tokens:
                self._run(row[None])
        self.hidden = torch.cat(hidden)

    def _first_input(self, tokens: Tensor) -> tuple[Tensor, Call]:
        seen: list[tuple[Tensor, Call]] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                seen.append(Call.split(args, kwargs))
                raise StopBlock

            return forward

        with _replaced({0: self._stack[0]}, stub):
            self._run(tokens)
        return seen[0]

    def _run(self, tokens: Tensor) -> None:
        """The model's own forward pass, up to where a block stops it."""
        options = {"use_cache": False} if getattr(self._model.config, "is_decoder", True) else {}
        try:
            self._model(input_ids=tokens, **options)
        except StopBlock:
            return
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as error:
            raise CalibrationError(
                f"{type(self._model).__name__} cannot be run from token ids alone: {type(error).__name__}: {error}"
            ) from error
        raise CalibrationError(f"{type(self._model).__name__} does not run its {self.path!r}")

    def _check_output(self, given: Tensor, example: Any) -> None:
        after = example[0] if isinstance(example, tuple) else example
        if not isinstance(after, Tensor) or after.shape != given.shape:
            raise CalibrationError(
                f"{type(self._model).__name__}: a block of {self.path!r} does not return hidden states of the shape "
                f"{list(given.shape)} that it was given"
            )


def _find_stack(model: nn.Module) -> str:
    """The path of the list of blocks.

    Raises:
        CalibrationError: there is none, or more than one.
    """
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if len({type(block) for block in module}) == 1 and any(isinstance(m, nn.Linear) for m in module.modules()):
            found[path] = sum(math.prod(p.shape) for p in module.parameters())
    if len(found) != 1:
        what = f"{len(found)} lists of blocks ({', '.join(found)})" if found else "no list of blocks"
        raise CalibrationError(
            f"{type(model).__name__} has {what}; calibration takes models of one stack, such as decoders and encoders"
        )
    return next(iter(found))


@contextmanager
def _replaced(modules: Mapping[int, nn.Module], stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Modules whose forward is a stub for a while."""
    for index, module in modules.items():
        module.forward = stub(index)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _empty_one(owner: nn.Module) -> None:
    for leaf, parameter in owner._parameters.items():
        if parameter is not None:
            owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _shared(call: Call, known: list[Tensor]) -> Call:
    """The same call with tensors that were there before in place of equal ones: masks and tables are all alike."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            for other in known:
                if other is value or (
                    other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value)
                ):
                    return other
            known.append(value)
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(one(item) for item in value)
        if isinstance(value, dict):
            return {key: one(item) for key, item in value.items()}
        return value

    return Call(tuple(one(value) for value in call.args), {key: one(value) for key, value in call.kwargs.items()})
