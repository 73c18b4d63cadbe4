"""Blocks run one at a time give what the whole model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.calibration import moments
from nybble.calibration.blocks import Blocks, Call
from nybble.checkpoint.files import open_source
from nybble.errors import CalibrationError

transformers = pytest.importorskip("transformers")

KINDS = ("llama", "qwen2", "gemma2", "gpt_neox", "phi", "opt", "bert")
TOKENS = torch.randint(1, 256, (3, 24), generator=torch.Generator().manual_seed(1))


def blocks_of(directory: Path) -> Blocks:
    return Blocks(open_source(directory), {}, (128, 128))


def looked(blocks: Blocks) -> Blocks:
    blocks.look(TOKENS)
    return blocks


def linears(block: torch.nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if type(module) is torch.nn.Linear]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_whole_models(kind: str, make: Callable[..., Path]) -> None:
    directory = make(kind, torch.float32)
    cls = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    whole = cls.from_pretrained(directory, dtype=torch.float32).eval()
    blocks = blocks_of(directory)
    with torch.no_grad():
        expected = whole(input_ids=TOKENS, output_hidden_states=True).hidden_states
        blocks.look(TOKENS)
        for index in range(blocks.count):
            # The same operations on one sample instead of three: sums of 64 products in another order.
            assert torch.allclose(blocks.hidden, expected[index], rtol=1e-4, atol=1e-5), index
            with blocks.block(index) as block:
                moments.run(block, blocks.calls(index), blocks.hidden)
            assert all(parameter.is_meta for parameter in blocks._stack[index].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_run_again_sees_its_new_weights(kind: str, make: Callable[..., Path]) -> None:
    """No cache of keys and values, no state, keeps what an earlier pass computed."""
    blocks = blocks_of(make(kind, torch.float32))
    with torch.no_grad(), looked(blocks).block(1) as block:
        call, sample = blocks.calls(1)[0], blocks.hidden[:1]
        first = call.on(block, sample)
        assert torch.equal(call.on(block, sample), first)
        for name in linears(block):
            block.get_submodule(name).weight.mul_(-0.5)
        changed = call.on(block, sample)
        fresh = copy.deepcopy(block)
        assert torch.equal(Call((), dict(call.kwargs)).on(fresh, sample) if not call.args else changed, changed)
        assert not torch.allclose(changed, first, atol=1e-2)


def test_layers_with_one_input_are_found_in_order(make: Callable[..., Path]) -> None:
    blocks = blocks_of(make())
    with torch.no_grad(), looked(blocks).block(1) as block:
        found = moments.groups(block, blocks.calls(1), blocks.hidden, linears(block))
    assert [sorted(path.rpartition(".")[2] for path in group) for group in found] == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_moments_are_those_of_the_inputs(make: Callable[..., Path]) -> None:
    directory = make()
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen = []
    whole.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    blocks = blocks_of(directory)
    with torch.no_grad():
        whole(TOKENS)
        x = seen[0].flatten(0, 1).double()
        with looked(blocks).block(0) as block:
            found = moments.second_moments(block, blocks.calls(0), blocks.hidden, "mlp.down_proj")
    expected = x.t() @ x / x.shape[0]
    # fp32 sums of 72 products.
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=72 * 2.0**-23 * float(expected.diagonal().max()))


def test_models_that_are_no_single_stack_are_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(CalibrationError, match=r"2 lists of blocks \(encoder.block, decoder.block\)"):
        blocks_of(tmp_path / "t5")


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 256,
}


@pytest.mark.parametrize(
    ("kind", "settings", "what"),
    [
        ("DebertaV2", {"conv_kernel_size": 3, "conv_act": "gelu"}, "does more between the blocks 0 and 1"),
        ("Albert", {"embedding_size": 16}, "does not run its blocks one after another, each once"),
    ],
)
def test_models_that_do_more_than_run_blocks_are_refused(
    kind: str, settings: dict[str, object], what: str, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CalibrationError, match=what), torch.no_grad():
        blocks_of(tmp_path / "model").look(TOKENS)


def test_experts_that_transformers_fuses_are_refused_at_once(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 has experts one by one")
    with pytest.raises(CalibrationError, match="makes it of other tensors while loading"):
        blocks_of(tmp_path / "model")


def test_weights_that_are_not_run_may_be_missing(make: Callable[..., Path]) -> None:
    directory = make("bert")
    tensors = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "pooler" not in name}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert looked(blocks_of(directory)).hidden.isfinite().all()


def test_tied_weights_are_found_by_either_name(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 256}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    blocks = blocks_of(tmp_path / "t5")
    assert blocks.files["encoder.embed_tokens.weight"] == "shared.weight"


def test_token_ids_of_another_tokenizer_are_refused(make: Callable[..., Path]) -> None:
    blocks = blocks_of(make())
    with pytest.raises(ValueError, match="vocabulary has 256"):
        blocks.check(torch.full((1, 8), 300))
    with pytest.raises(ValueError, match="longer than the model's context"):
        blocks.check(torch.ones(1, 200, dtype=torch.int64))
