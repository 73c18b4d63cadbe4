"""Blocks run one at a time give what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.calibration import moments
from nybble.calibration.blocks import Blocks
from nybble.checkpoint.files import open_source
from nybble.errors import CalibrationError

transformers = pytest.importorskip("transformers")

KINDS = ("llama", "qwen2", "gemma2", "gpt_neox", "phi", "opt", "bert")
TOKENS = torch.randint(1, 256, (3, 24), generator=torch.Generator().manual_seed(1))


def blocks_of(directory: Path) -> Blocks:
    return Blocks(open_source(directory), {}, (128, 128))


def linears(block: torch.nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if type(module) is torch.nn.Linear]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_whole_models(kind: str, make: Callable[..., Path]) -> None:
    directory = make(kind)
    cls = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    whole = cls.from_pretrained(directory, dtype=torch.float32).eval()
    blocks = blocks_of(directory)
    with torch.no_grad():
        expected = whole(input_ids=TOKENS, output_hidden_states=True).hidden_states
        blocks.look(TOKENS)
        for index in range(blocks.count):
            # What a table of 16-bit rows is multiplied with (Gemma) is rounded to its dtype: 2^-8 of it at most.
            assert torch.allclose(blocks.hidden, expected[index], rtol=2**-7, atol=2**-7), index
            with blocks.block(index) as block:
                moments.run(block, blocks.calls(index), blocks.hidden)
            assert all(parameter.is_meta for parameter in blocks._stack[index].parameters())


def test_layers_with_one_input_are_found_in_order(make: Callable[..., Path]) -> None:
    blocks = blocks_of(make())
    with torch.no_grad(), blocks_looked(blocks).block(1) as block:
        found = moments.groups(block, blocks.calls(1), blocks.hidden, linears(block))
    assert [sorted(path.rpartition(".")[2] for path in group) for group in found] == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def blocks_looked(blocks: Blocks) -> Blocks:
    blocks.look(TOKENS)
    return blocks


def test_moments_are_those_of_the_inputs(make: Callable[..., Path]) -> None:
    directory = make()
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen = []
    whole.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    blocks = blocks_of(directory)
    with torch.no_grad():
        whole(TOKENS)
        x = seen[0].flatten(0, 1).double()
        with blocks_looked(blocks).block(0) as block:
            found = moments.second_moments(block, blocks.calls(0), blocks.hidden, "mlp.down_proj")
    expected = x.t() @ x / x.shape[0]
    # fp32 sums of 72 products.
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=72 * 2.0**-23 * float(expected.diagonal().max()))


def test_models_that_are_no_single_stack_are_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(CalibrationError, match=r"2 lists of blocks \(encoder.block, decoder.block\)"):
        blocks_of(tmp_path / "t5")


def test_token_ids_of_another_tokenizer_are_refused(make: Callable[..., Path]) -> None:
    blocks = blocks_of(make())
    with pytest.raises(ValueError, match="vocabulary has 256"):
        blocks.check(torch.full((1, 8), 300))
    with pytest.raises(ValueError, match="longer than the model's context"):
        blocks.check(torch.ones(1, 200, dtype=torch.int64))
