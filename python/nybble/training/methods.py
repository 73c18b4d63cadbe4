"""The ways of fine-tuning by name, as the command line and the benchmarks choose them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

METHODS = ("lora", "dora", "bottleneck", "prefix", "prompt", "full")
_NEEDS = {
    "lora": ("rank", "alpha", "dropout", "rslora", "target"),
    "dora": ("rank", "alpha", "dropout", "rslora", "target"),
    "bottleneck": ("size", "placement", "dropout"),
    "prefix": ("tokens", "projection"),
    "prompt": ("tokens", "prompt_text"),
    "full": (),
}


@dataclass(frozen=True)
class Method:
    """What is trained, and its size; fields that the method does not have must keep their defaults."""

    name: str = field(
        default="lora", metadata={"help": "What is trained: lora, dora, bottleneck, prefix, prompt or full."}
    )
    rank: int = field(default=16, metadata={"help": "lora, dora: rank of the matrices."})
    alpha: float = field(default=32.0, metadata={"help": "lora, dora: the scale is alpha / rank."})
    dropout: float = field(default=0.0, metadata={"help": "lora, dora, bottleneck: dropout on the adapter's path."})
    rslora: bool = field(default=False, metadata={"help": "lora, dora: scale by alpha / sqrt(rank)."})
    target: tuple[str, ...] = field(
        default=(), metadata={"help": "lora, dora: name pattern of layers to adapt; repeatable.  [default: all-linear]"}
    )
    size: int = field(default=64, metadata={"help": "bottleneck: width of its middle."})
    placement: str = field(
        default="houlsby",
        metadata={"help": "bottleneck: houlsby (after attention and feed-forward) or pfeiffer (after the latter)."},
    )
    tokens: int = field(default=20, metadata={"help": "prefix, prompt: number of virtual tokens."})
    projection: bool = field(default=False, metadata={"help": "prefix: train it through a small MLP."})
    prompt_text: str | None = field(default=None, metadata={"help": "prompt: begin with the embeddings of this text."})

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.name!r}")
        defaults = {f.name: f.default for f in self.__dataclass_fields__.values()}
        for option, default in defaults.items():
            if option != "name" and getattr(self, option) != default and option not in _NEEDS[self.name]:
                owners = ", ".join(method for method, options in _NEEDS.items() if option in options)
                raise ValueError(f"{option} is an option of {owners}, not of {self.name}")


def apply(model: nn.Module, method: Method, tokenizer: Any = None, name: str = "default") -> Any:
    """Prepare a model for training by `method`; returns the method's report."""
    from .. import nn as layers

    if method.name in ("lora", "dora"):
        config = layers.LoRAConfig(
            r=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            target=method.target or layers.ALL_LINEAR,
            rslora=method.rslora,
            dora=method.name == "dora",
        )
        return layers.add_lora(model, config, name)
    if method.name == "bottleneck":
        bottleneck = layers.BottleneckConfig(size=method.size, placement=method.placement, dropout=method.dropout)
        return layers.add_bottleneck(model, bottleneck, name)
    if method.name == "prefix":
        return layers.add_prefix(model, layers.PrefixConfig(tokens=method.tokens, projection=method.projection), name)
    if method.name == "prompt":
        return layers.add_prompt(model, _prompt(method, tokenizer), name)
    return layers.train_all(model)


def _prompt(method: Method, tokenizer: Any) -> Any:
    from ..nn import PromptConfig

    if method.prompt_text is None:
        return PromptConfig(tokens=method.tokens, init="vocabulary")
    ids = tokenizer.encode(method.prompt_text, add_special_tokens=False)
    return PromptConfig(tokens=method.tokens, init="text", text=tuple(ids))
