"""A transformer's blocks one at a time, straight from a checkpoint's files.

The model is built without memory for its parameters. What comes before the first block is run once, to learn what every
block is called with (masks, rotary tables); then a block at a time gets its weights, in fp32, and loses them again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.bnb import prefix_of
from ..checkpoint.files import Source, TensorInfo
from ..checkpoint.load import Names, Reader, skeleton
from ..checkpoint.slabs import FP8_DTYPES, ScaledReader
from ..errors import CalibrationError
from ..nn import QuantLinear
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
        """The hidden states, and the rest.

        Raises:
            CalibrationError: there are no hidden states, or the rest holds a state that changes as blocks run.
        """
        rest = dict(kwargs)
        given = args[0] if args else rest.pop(_INPUT, None)
        if not isinstance(given, Tensor):
            raise CalibrationError(
                f"its blocks are not called with {_INPUT}, but with {', '.join(kwargs) or 'nothing'}"
            )
        for name, value in rest.items():
            if "Cache" in type(value).__name__ or "State" in type(value).__name__:
                raise CalibrationError(
                    f"its blocks share a state that changes as they run ({name}: {type(value).__name__})"
                )
        return given, cls(tuple(args[1:]), rest)

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
        files: name of a parameter or buffer in the model -> name of the tensor in the files.
    """

    hidden: Tensor

    def __init__(self, source: Source, scales: Mapping[str, TensorInfo | None], tile: tuple[int, int]) -> None:
        """`scales`, `tile`: of fp8 weights, as in `checkpoint.select.Selection`.

        Raises:
            CalibrationError: the model is not one stack of blocks whose parameters are the files' tensors.
            CheckpointError: transformers cannot build it.
        """
        self._source, self._scales, self._tile = source, scales, tile
        self._model = skeleton(source.root, torch.float32).eval()
        self._model.config.use_cache = False
        self.path = find_stack(self._model)
        stack = self._model.get_submodule(self.path)
        assert isinstance(stack, nn.ModuleList)
        self._stack, self.count = stack, len(stack)
        self._reader = Reader(source, "cpu")
        self.files = self._resolve()
        self._calls: list[list[Call]] = []
        missing = [name for name, _ in stack.named_parameters(self.path) if name not in self.files]
        if missing:
            raise CalibrationError(
                f"{source.root}: calibration takes blocks as they lie in the files; {missing[0]!r} of "
                f"{type(self._model).__name__} is not there (transformers makes it of other tensors while loading)"
            )

    def check(self, tokens: Tensor) -> None:
        """Raises ValueError unless the model can take these tokens, int64 [samples, tokens]."""
        check_vocabulary(self._model, tokens, "calibration data")
        check_length(self._model, tokens.shape[1], "seq")

    def look(self, tokens: Tensor) -> None:
        """Run what comes before the blocks on tokens, unless that is done already.

        Raises:
            CalibrationError: the model needs more than token ids, its files lack a tensor, or its blocks are not run
                one after another, each once, with nothing in between.
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
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        known = parameters.keys() | {name for name, _ in self._model.named_buffers()}
        resolved = ((names.resolve(key, known), key) for key in self._source.tensors)
        files = {name: key for name, key in resolved if name is not None}
        shared = {id(parameters[name]): key for name, key in files.items() if name in parameters}
        tied = {name: shared[id(parameter)] for name, parameter in parameters.items() if id(parameter) in shared}
        return {**tied, **files}

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

    def _fill(self, owner: nn.Module, path: str, dtype: torch.dtype | None) -> None:
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
        block, path = self._stack[index], f"{self.path}.{index}"
        for inner, owner in block.named_modules():
            self._fill(owner, f"{path}.{inner}" if inner else path, torch.float32)
        try:
            yield block
        finally:
            for owner in block.modules():
                _empty(owner)

    def calls(self, index: int) -> list[Call]:
        """What block `index` is called with, for every sample."""
        return self._calls[index]

    # ---- before the first block ------------------------------------------------------------------------------------

    def _look(self, tokens: Tensor) -> None:
        with self._run_outside() as passed:
            first, call = self._first_input(tokens[:1])
            with self.block(0) as block:
                example = block(first, *call.args, **call.kwargs)
            self._check_output(first, example)
            self._record(tokens, example, passed)

    @contextmanager
    def _run_outside(self) -> Iterator[list[bool]]:
        """Modules around the blocks get their weights when they are run; none is run once the list holds True."""
        passed = [False]
        inside = {id(module) for module in self._stack.modules()}
        outside = [(name, module) for name, module in self._model.named_modules() if id(module) not in inside]
        around = {name for name, _ in outside if self.path.startswith(prefix_of(name))}
        hooks = []
        for name, module in outside:

            def before(module: nn.Module, given: Any, name: str = name) -> None:
                if passed[0] and name not in around:
                    raise StopBlock
                # Rows are looked up in a table that stays in the file: it is not worth a copy in fp32.
                if any(p is not None and p.is_meta for p in module._parameters.values()) or name not in filled:
                    self._fill(module, name, None if isinstance(module, nn.Embedding) else torch.float32)
                    filled.add(name)

            hooks.append(module.register_forward_pre_hook(before))
            if isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_hook(lambda module, given, out: out.float()))
        filled: set[str] = set()
        try:
            yield passed
        finally:
            for hook in hooks:
                hook.remove()
            for _, module in outside:
                _empty(module)

    def _first_input(self, tokens: Tensor) -> tuple[Tensor, Call]:
        seen: list[tuple[Tensor, Call]] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                seen.append(Call.split(args, kwargs))
                raise StopBlock

            return forward

        with _replaced([self._stack[0]], stub):
            self._run(tokens)
        if not seen:
            raise CalibrationError(f"{type(self._model).__name__} does not run its {self.path!r}")
        return seen[0]

    def _record(self, tokens: Tensor, example: Any, passed: list[bool]) -> None:
        """Blocks that hand on what they are given: the masks and tables of all blocks, without computing any."""
        known: list[Tensor] = []
        self._calls = [[] for _ in range(self.count)]
        handed: list[Tensor] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given, call = Call.split(args, kwargs)
                if index != len(handed):
                    raise CalibrationError("it does not run its blocks one after another, each once")
                if index and not torch.equal(given, handed[-1]):
                    raise CalibrationError(f"it does more between the blocks {index - 1} and {index} than to hand on")
                if index == 0:
                    sample = len(self._calls[0])
                    if sample == 0:
                        self.hidden = torch.empty(tokens.shape[0], *given.shape[1:])
                    self.hidden[sample] = given[0]
                self._calls[index].append(_shared(call, known))
                handed.append(given.clone())
                passed[0] = index == self.count - 1
                return (handed[-1], *example[1:]) if isinstance(example, tuple) else handed[-1]

            return forward

        with _replaced(list(self._stack), stub):
            for row in tokens:
                handed.clear()
                passed[0] = False
                self._run(row[None])
                if len(handed) != self.count:
                    raise CalibrationError(f"{type(self._model).__name__} runs {len(handed)} of {self.count} blocks")

    def _run(self, tokens: Tensor) -> None:
        """The model's own forward pass, up to where it is stopped."""
        parameters = inspect.signature(self._model.forward).parameters
        takes = "use_cache" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        try:
            self._model(input_ids=tokens, **({"use_cache": False} if takes else {}))
        except StopBlock:
            return
        except CalibrationError as error:
            raise CalibrationError(f"{type(self._model).__name__} cannot be calibrated: {error}") from error
        except (
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
            NotImplementedError,
            IndexError,
            KeyError,
        ) as error:
            raise CalibrationError(
                f"{type(self._model).__name__} cannot be run from token ids alone: {type(error).__name__}: {error}"
            ) from error

    def _check_output(self, given: Tensor, example: Any) -> None:
        after = example[0] if isinstance(example, tuple) else example
        if not isinstance(after, Tensor) or after.shape != given.shape:
            raise CalibrationError(
                f"{type(self._model).__name__}: a block of {self.path!r} does not return hidden states of the shape "
                f"{list(given.shape)} that it was given"
            )


def find_stack(model: nn.Module) -> str:
    """The path of the list of blocks: the one outermost list of modules with linear layers in it.

    Raises:
        CalibrationError: there is none, or more than one.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if any(isinstance(inner, (nn.Linear, QuantLinear)) for inner in module.modules()):
            found.append(path)
    if len(found) != 1:
        what = f"{len(found)} lists of blocks ({', '.join(found)})" if found else "no list of blocks"
        raise CalibrationError(
            f"{type(model).__name__} has {what}; calibration takes models of one stack, such as decoders and encoders"
        )
    return found[0]


@contextmanager
def _replaced(modules: Sequence[nn.Module], stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Modules whose forward is a stub for a while."""
    for index, module in enumerate(modules):
        module.forward = stub(index)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _empty(owner: nn.Module) -> None:
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
            items = [one(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: one(item) for key, item in value.items()}
        return value

    return Call(tuple(one(value) for value in call.args), {key: one(value) for key, value in call.kwargs.items()})
