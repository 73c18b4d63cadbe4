"""The weights of a checkpoint's blocks, rounded one block after another on what the blocks before make of the text.

Each block sees the outputs of the blocks that are already quantized, and within a block each layer those of the layers
that come before it, so later weights make up for what earlier ones lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint.workers import give_back
from ..errors import CalibrationError
from ..formats import QuantConfig
from ..tensor import QuantTensor
from . import moments
from .blocks import Blocks
from .rounding import Moments, Rounded, plain_rule, round_weight
from .settings import Rounding

if TYPE_CHECKING:
    from ..checkpoint.files import Source
    from ..checkpoint.select import Selection


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: its path in the block, the file's tensor, how it is quantized, its stored dtype."""

    path: str
    tensor: str
    config: QuantConfig
    dtype: torch.dtype


class Calibrator:
    """Hands out the quantized weights of a source, computing a block when the first of its weights is asked for.

    Attributes:
        order: names of the tensors that it makes, in the order in which it wants to be asked.
        blocks: block of each of them.
        nbytes: about what it takes at most: activations, a block in fp32, moments.
    """

    def __init__(
        self,
        source: Source,
        selection: Selection,
        tokens: Tensor,
        rounding: Rounding,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """`dtypes`: what each weight to quantize is said to be of.

        Raises:
            CalibrationError: the model is not one stack of blocks, or none of its weights is in one.
        """
        self._blocks = Blocks(source, selection.scales, selection.tile)
        self._blocks.check(tokens)
        self._rounding = rounding
        self._layers: list[list[Layer]] = [[] for _ in range(self._blocks.count)]
        # What others quantize by the plain rule: experts in three dimensions.
        self._others: list[list[Layer]] = [[] for _ in range(self._blocks.count)]
        prefix = f"{self._blocks.path}."
        for name, tensor in self._blocks.files.items():
            config = selection.settings.get(tensor)
            if config is None or not name.startswith(prefix):
                continue
            index, _, path = name[len(prefix) :].partition(".")
            if len(source.tensors[tensor].shape) == 2 and path.endswith(".weight"):
                layer = Layer(path.removesuffix(".weight"), tensor, config, dtypes[tensor])
                self._layers[int(index)].append(layer)
            else:
                config = plain_rule(config) if config.is_learned else config
                self._others[int(index)].append(Layer(path, tensor, config, dtypes[tensor]))
        self._names = {tensor: name for name, tensor in self._blocks.files.items()}
        self.order = [layer.tensor for layers in self._layers for layer in layers]
        if not self.order:
            raise CalibrationError(f"{source.root}: none of the weights to quantize is in a block of {prefix[:-1]!r}")
        self.blocks = {layer.tensor: index for index, layers in enumerate(self._layers) for layer in layers}
        self._tokens = tokens
        self.nbytes = self._blocks.least_memory(tokens) + max(
            _rounding_bytes(source.tensors[layer.tensor].shape) for layers in self._layers for layer in layers
        )
        self._next = 0
        self._made: dict[str, Rounded] = {}

    def take(self, tensor: str, stored: Callable[[str], QuantTensor]) -> tuple[Tensor, Rounded]:
        """(the exact weight in fp32, what it was rounded to) of one tensor.

        `stored(name)` gives weights of earlier blocks that an earlier run has made already. After an error the
        activations may be half those of the next block: nothing more may be asked for.
        """
        index = self.blocks[tensor]
        with torch.no_grad():
            if tensor not in self._made:
                self._blocks.look(self._tokens)
                if index < self._next:
                    raise AssertionError(f"{tensor} is asked for after a later block")
                while self._next < index:
                    self._pass(self._next, stored)
                self._quantize(index)
            weight = self._blocks.value(self._names[tensor])
        return weight, self._made.pop(tensor)

    @contextmanager
    def _block(self, index: int) -> Iterator[nn.Module]:
        with self._blocks.block(index) as block:
            for other in self._others[index]:
                owner, _, leaf = other.path.rpartition(".")
                exact = block.get_submodule(owner)._parameters[leaf]
                assert exact is not None
                plain = QuantTensor.quantize(exact, other.config, other.tensor).dequantize(torch.float32)
                block.get_submodule(owner)._parameters[leaf] = nn.Parameter(plain, requires_grad=False)
            yield block

    def _pass(self, index: int, stored: Callable[[str], QuantTensor]) -> None:
        """Through a block whose weights an earlier run has quantized."""
        with self._block(index) as block:
            for layer in self._layers[index]:
                _set_weight(block, layer.path, stored(layer.tensor).dequantize(torch.float32))
            moments.run(block, self._blocks.calls(index), self._blocks.hidden)
        self._next = index + 1

    def _quantize(self, index: int) -> None:
        layers = {layer.path: layer for layer in self._layers[index]}
        calls, hidden = self._blocks.calls(index), self._blocks.hidden
        made: dict[str, Rounded] = {}
        with self._block(index) as block:
            for group in moments.groups(block, calls, hidden, layers):
                seen = Moments(
                    moments.second_moments(block, calls, hidden, group[0]), self._rounding, layers[group[0]].tensor
                )
                for path in group:
                    layer = layers[path]
                    weight = block.get_submodule(path).get_parameter("weight")
                    rounded = round_weight(weight, seen, layer.config, layer.dtype, layer.tensor)
                    made[layer.tensor] = rounded
                    _set_weight(block, path, rounded.tensor.dequantize(torch.float32))
                del seen
                give_back()  # or what is freed in pieces adds up, 12 MB a block of SmolLM2
            for layer in layers.values():
                if layer.tensor not in made:
                    # No sample reached it as the block was; one may now, and then meets what is written.
                    weight = block.get_submodule(layer.path).get_parameter("weight")
                    plain = QuantTensor.quantize(weight, plain_rule(layer.config), layer.tensor)
                    plain.dtype = layer.dtype
                    made[layer.tensor] = Rounded(plain)
                    _set_weight(block, layer.path, plain.dequantize(torch.float32))
            moments.run(block, calls, hidden)
        give_back()
        self._made, self._next = made, index + 1


def _set_weight(block: nn.Module, path: str, weight: Tensor) -> None:
    block.get_submodule(path)._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def _rounding_bytes(shape: tuple[int, ...]) -> int:
    """What rounding a weight [N, K] takes: H, H in order, U and two for making it; the weight a few times over."""
    rows, columns = shape
    return 4 * (5 * columns * columns + 4 * rows * columns)
