"""Prefixes and prompts on a model and off it again, and the models and settings that are refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny import llama
from tiny_models import assert_near, build, ids, output
from virtual_models import (
    METHODS,
    TEXT,
    adapted,
    each_kind,
    each_method,
    need_interface,
    with_text,
)

import nybble
from nybble.nn import add_lora, add_prefix, add_prompt
from nybble.nn.adapters import Adapted, delete_adapter, set_adapter
from nybble.nn.virtual import virtual_tokens

transformers = pytest.importorskip("transformers")


# ---- on the model and off it -----------------------------------------------------------------------------------------


def state(model: Any) -> list[Any]:
    """Everything of a model that virtual tokens could change."""
    return [
        [
            (name, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m.__dict__))
            for name, m in model.named_modules()
        ],
        sorted(model.state_dict()),
        model.config._attn_implementation,
    ]


@each_method
@each_kind
def test_deleting_leaves_the_model_as_it_was(kind: str, method: str) -> None:
    need_interface(method, kind)
    model = build(kind)
    before, expected = state(model), output(model, ids())
    METHODS[method](model, tokens=3)
    METHODS[method](model, tokens=5, name="b")
    assert state(model) != before
    delete_adapter(model, "default")
    delete_adapter(model, "b")
    assert state(model) == before
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert torch.equal(output(model, ids()), expected)


@each_method
def test_copies_and_pickles_are_independent(method: str) -> None:
    model = adapted(method)
    add_lora(model, r=2, name="lora")
    set_adapter(model, "default")
    expected = output(model, ids())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in others:
        assert torch.equal(output(other, ids()), expected)
        virtual, own = virtual_tokens(other), virtual_tokens(model)
        assert virtual is not own
        with torch.no_grad():
            next(virtual.parameters()).zero_()  # type: ignore[union-attr]
        assert not torch.equal(output(other, ids()), expected)
        delete_adapter(other, "default")
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(output(model, ids()), expected)
    delete_adapter(model, "default")
    assert model.config._attn_implementation == "sdpa"


def test_two_models_of_one_configuration() -> None:
    config = llama().config
    torch.manual_seed(0)
    one, two = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    assert one.config is two.config
    plain = output(two, ids())
    add_prefix(one, tokens=3)
    first = output(one, ids())
    assert torch.equal(output(two, ids()), plain)
    add_prefix(two, tokens=3)
    second = output(two, ids())
    delete_adapter(one, "default")
    assert torch.equal(output(two, ids()), second)  # still there
    assert not torch.equal(output(one, ids()), first)


def test_a_prefix_survives_a_change_of_the_attention() -> None:
    model = adapted("prefix")
    expected = output(model, ids())
    model.set_attn_implementation("eager")
    assert_near(output(model, ids()), expected)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(RuntimeError, match="attention was set to 'flex_attention' after a prefix was added"):
        output(model, ids())
    model.config._attn_implementation = "sdpa"
    delete_adapter(model, "default")
    assert model.config._attn_implementation == "sdpa"


def test_inside_another_module_and_by_the_decoder() -> None:
    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("llama").model
            self.head = torch.nn.Linear(64, 2)

    model = Classifier()
    add_prefix(model, tokens=2)
    assert virtual_tokens(model) is model.encoder.nybble_virtual
    causal = adapted("prompt")
    hidden = causal.model(input_ids=ids(), use_cache=False).last_hidden_state
    assert torch.equal(causal.lm_head(hidden), output(causal, ids()))


def test_saved_by_transformers_without_a_trace_in_the_configuration(tmp_path: Any) -> None:
    model = adapted("prefix")
    model.config.save_pretrained(tmp_path)
    assert "nybble" not in (tmp_path / "config.json").read_text()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("Falcon", {"bos_token_id": 0, "eos_token_id": 0}, "Falcon.* has 2 layers, and 0 of them compute attention"),
        ("Bloom", {}, "Bloom.* has 2 layers, and 0 of them compute attention"),
        ("T5", {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 32}, "T5.* is an encoder-decoder"),
        (
            "Albert",
            {"embedding_size": 16, "intermediate_size": 32},
            "Albert.*(uses an attention layer several times|0 of them)",
        ),
        ("Mamba", {"state_size": 4}, "Mamba"),
    ],
)
def test_models_whose_attention_cannot_be_reached(architecture: str, settings: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = getattr(transformers, f"{architecture}Config")(**({} if architecture == "T5" else common), **settings)
    model = transformers.AutoModel.from_config(config).eval()
    before = state(model)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        add_prefix(model, tokens=2)
    assert state(model) == before and [p.requires_grad for p in model.parameters()] == trains


def test_a_prompt_goes_where_a_prefix_cannot() -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=256, initializer_range=0.2)
    model = transformers.BloomModel(config).eval()
    full = output(model, with_text(ids()))[:, 4:]
    add_prompt(model, text=TEXT, tokens=4)
    assert_near(output(model, ids()), full, 1e-5)
    add_prompt(model, tokens=2, name="short")
    set_adapter(model, ["short", "default"])
    with pytest.raises(ValueError, match="rows with different numbers of virtual tokens need a model that takes pos"):
        output(model, ids())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prefix", {"tokens": 0}, "tokens is 0; it must be an integer of 1 or more"),
        ("prompt", {"tokens": 1.5}, "tokens is 1.5; it must be"),
        ("prefix", {"init": "zero"}, "init is 'zero'; allowed are vocabulary, random, text"),
        ("prompt", {"init": "text"}, "text is missing, and init is 'text'"),
        ("prefix", {"init": "random", "text": [1]}, "text is given, and init is 'random'"),
        ("prefix", {"projection": True, "init": "vocabulary"}, "init is 'vocabulary'; with projection it must be"),
        ("prefix", {"projection_size": 4}, "projection_size is given, and projection is False"),
        ("prefix", {"projection": True, "projection_size": 0}, "projection_size is 0; it must be"),
        ("prompt", {"std": 0}, "std is 0; it must be a finite number above 0"),
        ("prompt", {"dtype": torch.int8}, "dtype is torch.int8; allowed are"),
        ("prompt", {"text": []}, "text has 0 tokens; it must have 1 or more, with ids below 256"),
        ("prefix", {"text": [3, 256]}, "text has 2 tokens; it must have 1 or more, with ids below 256"),
        ("prefix", {"name": "a b"}, "adapter name is 'a b'"),
    ],
)
def test_bad_settings_are_named(method: str, options: dict[str, Any], message: str) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        METHODS[method](model, **options)
    assert state(model) == before


def test_other_refusals() -> None:
    model = adapted("prefix")
    for add in METHODS.values():
        with pytest.raises(ValueError, match="model has a prefix 'default' already"):
            add(model)
    with pytest.raises(TypeError, match="text is a string, and no tokenizer is given"):
        add_prompt(model, text="a text", name="b")
    with pytest.raises(TypeError, match="holds 0 transformers models"):
        add_prompt(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="give either config or its fields"):
        add_prompt(model, nybble.PromptConfig(), tokens=3)
    flex = build("llama")
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="its attention is 'flex_attention'; a prefix needs one of 'sdpa', 'eager'"):
        add_prefix(flex)
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))


def test_a_text_by_a_tokenizer() -> None:
    class Bytes:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return list(text.encode())

    ours, theirs = build("llama"), build("llama")
    add_prompt(ours, text="ab", tokenizer=Bytes(), tokens=5)
    add_prompt(theirs, text=[97, 98, 97, 98, 97], tokens=5)
    assert torch.equal(output(ours, ids()), output(theirs, ids()))
