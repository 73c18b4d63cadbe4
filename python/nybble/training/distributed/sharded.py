"""A part of every parameter in every process: torch's FSDP2 (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..config import TrainConfig
from ..mode import weights_dtype
from ..optim import MIN_8BIT_SIZE
from ..state import owner
from .calls import Calls
from .group import Group
from .layout import Layout
from .world import cast

T = TypeVar("T")


class Sharded(Group):
    """FSDP2: a layer's parameters are gathered before its forward and its backward and given up after it.

    Packed weights and scales are parameters like others; they are sent as the bytes that they are. Only gradients of
    trained parameters are added up, and the optimizer works on this process's rows of them.
    """

    kind = "fsdp"
    _calls: Any

    def check(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        super().check(model, parameters, config)
        from torch.distributed.fsdp import FSDPModule

        if not hasattr(FSDPModule, "set_gradient_divide_factor"):
            raise ValueError(f"parallel='fsdp' needs torch 2.8 or later, this is {torch.__version__}")
        for name, module in model.named_modules():
            if parametrize.is_parametrized(module):
                raise ValueError(
                    f"parallel='fsdp': {name} decodes packed experts when they are used, which FSDP2 cannot shard; "
                    "parallel='ddp' can train it"
                )
        for name, parameter in model.named_parameters():
            if not parameter.dim() or not parameter.is_contiguous():
                what = "has no dimension" if not parameter.dim() else "is not contiguous"
                raise ValueError(f"parallel='fsdp': parameter {name} {what}, which FSDP2 cannot shard")
        if weights_dtype(config) is None:
            _check_dtypes(model)
        if config.optimizer == "adamw8bit":
            for name, parameter in parameters.items():
                if parameter.numel() >= MIN_8BIT_SIZE:
                    _check_blocks(name, Layout(tuple(parameter.shape), self.size))

    def hold(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None = None
    ) -> dict[str, nn.Parameter]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        names = list(parameters)
        trained = {id(p) for p in parameters.values()}
        parameters.clear()  # the whole ones live on in the model alone
        self._layouts = {name: Layout(tuple(p.shape), self.size) for name, p in model.named_parameters()}
        mesh = init_device_mesh(self.device.type, (self.size,))
        _let_go(model)
        self._calls = Calls(model)
        units: list[Any] = _units(model)
        for unit in (*units, self._calls):
            # What was whole is freed here, a layer at a time, if nobody else holds it; so it is cast a layer at a time.
            whole = (p for p in unit.parameters() if id(p) in trained and not hasattr(p, "placements"))
            cast(whole, dtype)
            fully_shard(unit, mesh=mesh)
        for unit in (*units, self._calls):
            # Each process's loss is divided by the targets of all of them, so gradients are summed, not averaged.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            again: Any = getattr(unit, "set_unshard_in_backward", None)
            if isinstance(unit, nn.Embedding) and again is not None:
                again(False)  # its gradient needs the tokens alone
        self._trained: dict[str, Any] = {name: model.get_parameter(name) for name in names}
        with torch.no_grad():
            self._parts = {name: nn.Parameter(p.to_local()) for name, p in self._trained.items()}
        return dict(self._parts)

    def optimizer_options(self) -> Mapping[str, dict[str, Any]]:
        """Whether moments have 8 bits is decided by the size of the whole parameter."""
        small = {name for name in self._parts if _count(self._layouts[name].shape) < MIN_8BIT_SIZE}
        return {name: {"bits": 32} if name in small else {"min_8bit_size": 0} for name in self._parts}

    def run(self, function: Callable[..., T], *args: Any) -> T:
        try:
            return self._calls(function, *args)
        finally:
            if not torch.is_grad_enabled():
                # Without a backward pass the outermost parameters would stay gathered, and be those of now in later
                # steps too.
                self._calls.reshard()

    def collect(self) -> None:
        for name, part in self._parts.items():
            grad = self._trained[name].grad
            part.grad = None if grad is None else grad.to_local()

    def clear(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None

    def squares(self, own: float) -> float:
        return self.sum_of(own)

    # ---- files -------------------------------------------------------------------------------------------------------

    def write(self, tensors: Mapping[str, Tensor], do: Callable[[Mapping[str, Any]], T]) -> T:
        """The first process asks for the tensors that it wants, by number, as often as it likes; the others serve."""
        parts: dict[str, Any] = {}
        for name, tensor in tensors.items():
            layout = self._layouts.get(owner(name) or "")
            sizes = None if layout is None else layout.sizes(tensor, self.rank)
            parts[name] = tensor if sizes is None else Part(self, len(parts), tensor, sizes)
        served: dict[int, Part] = {part.number: part for part in parts.values() if isinstance(part, Part)}

        def ask() -> T:
            try:
                return do(parts)
            finally:
                self._tell(-1)

        if not self.first:
            while (number := self._tell(0)) >= 0:
                served[number].gather()
        return self.from_first(ask)

    def _tell(self, number: int) -> int:
        """The first process's number, in all of them."""
        told = torch.tensor([number])
        dist.broadcast(told, src=0, group=self.group)
        return int(told)

    def gather(self, part: Tensor, sizes: list[int]) -> Tensor | None:
        """The whole of a tensor that is cut into `sizes` rows, in the first process."""
        row = part.detach().to("cpu").contiguous()
        padded = row.new_zeros(max(sizes), *row.shape[1:])
        padded[: len(row)] = row
        # As bytes: gloo has no idea of some dtypes.
        flat = padded.view(-1).view(torch.uint8)
        found = [torch.empty_like(flat) for _ in sizes] if self.first else None
        dist.gather(flat, found, dst=0, group=self.group)
        if found is None:
            return None
        shaped = [values.view(row.dtype).view(padded.shape)[:count] for values, count in zip(found, sizes, strict=True)]
        return torch.cat(shaped)

    def _own(self, name: str, whole: Tensor) -> Tensor:
        layout = self._layouts.get(owner(name) or "")
        return whole if layout is None else layout.cut(whole, self.rank)

    @contextmanager
    def assembled(self, model: nn.Module, names: list[str] | None) -> Iterator[None]:
        chosen = None if names is None else set(names)
        wanted = {name: p for name, p in model.named_parameters() if chosen is None or name in chosen}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module, leaf))
        try:
            for name, sharded in wanted.items():
                part: Any = sharded
                sizes = [len(self._layouts[name].rows(rank)) for rank in range(self.size)]
                whole = self.gather(part.to_local(), sizes)
                if whole is not None:
                    for module, leaf in places[id(sharded)]:
                        module._parameters[leaf] = nn.Parameter(whole.to(self.device), sharded.requires_grad)
            yield
        finally:
            for sharded in wanted.values():
                for module, leaf in places[id(sharded)]:
                    module._parameters[leaf] = sharded


@dataclass(frozen=True)
class Part:
    """A tensor of which every process has some rows; a `state.Whole`."""

    world: Sharded
    number: int
    tensor: Tensor
    sizes: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.sizes), *self.tensor.shape[1:])

    def whole(self) -> Tensor:
        """All of it; in the first process, while the others serve."""
        self.world._tell(self.number)
        found = self.gather()
        assert found is not None
        return found

    def gather(self) -> Tensor | None:
        """This process's part in it."""
        return self.world.gather(self.tensor, self.sizes)


def _units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the layers, that is the members of the outermost module lists of one class each, and
    an embedding that is not tied to the head."""
    units: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and id(module) not in inside:
            units.extend(module)
            inside.update(id(inner) for inner in module.modules())
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = None if get_embedding is None else get_embedding()
    if isinstance(embedding, nn.Module) and id(embedding) not in inside:
        own = {id(p) for p in embedding.parameters()}
        others = (m for m in model.modules() if all(m is not inner for inner in embedding.modules()))
        if not any(id(p) in own for m in others for p in m._parameters.values()):
            units.append(embedding)
    return units


def _let_go(model: nn.Module) -> None:
    """Of what modules have beside their parameters, nothing is to keep the whole ones in memory: what they derived from
    them; and buffers, such as codebooks, which may be a few bytes of a mapped file, all of which stays while they do.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # with the originals, whose ids are not to be given away
    for module in model.modules():
        for name in ("_kept", "_kept_squares"):
            module.__dict__.pop(name, None)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_cpu:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer, buffer.clone()
                module._buffers[name] = copies[id(buffer)][1]


def _check_dtypes(model: nn.Module) -> None:
    """Gradients that travel together must have one dtype."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for unit in (*_units(model), model):
        dtypes: dict[torch.dtype, str] = {}
        for parameter in unit.parameters():
            if parameter.requires_grad and id(parameter) in names:
                dtypes.setdefault(parameter.dtype, names.pop(id(parameter)))
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            raise ValueError(
                f"parallel='fsdp': trained parameters of one layer must have one dtype; {first} is {one}, {second} is "
                f"{other}. Cast one, or use parallel='ddp'"
            )


def _check_blocks(name: str, layout: Layout) -> None:
    if not layout.blocks_are_whole:
        rows = len(layout.rows(0))
        raise ValueError(
            f"optimizer='adamw8bit' with parallel='fsdp': {name} {list(layout.shape)} would be cut into parts of "
            f"{rows} rows, {rows * layout.row} elements, which is no multiple of a block's {layout.block_size}: its "
            "codes would depend on the number of processes. Use another number, optimizer='adamw' or parallel='ddp'"
        )


def _count(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
