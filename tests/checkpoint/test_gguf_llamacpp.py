"""llama.cpp runs the exported files: its logits, tokens and answers are those of transformers.

The server of the package xllamacpp (llama.cpp's own, in this process) is asked on the loopback interface. With an fp32
cache and plain attention it computes F32 files in fp32 throughout.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CASES, TEXT, write_model, write_tokenizer

import nybble
from nybble.demo import smollm2

gguf = pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.llamacpp

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Ask]]:
    """A function that starts llama.cpp on a file and returns one that posts to it: (path, body) -> answer."""
    servers = []

    def start(path: Path) -> Ask:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.cpuparams.n_threads, params.warmup, params.verbosity = 256, 1, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = xllamacpp.Server(params)
        servers.append(server)

        def ask(where: str, body: dict[str, Any]) -> dict[str, Any]:
            request = urllib.request.Request(
                server.listening_address + where, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                result: dict[str, Any] = json.load(answer)
                return result

        return ask

    yield start
    servers.clear()


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return smollm2.write_checkpoint(tmp_path_factory.mktemp("smollm2") / "bf16")
    except FileNotFoundError as error:
        pytest.skip(str(error))


GREEDY = {"temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True}


def log_probabilities(ask: Ask, ids: list[int]) -> dict[int, float] | None:
    """ln p of the tokens that may follow; None where the likeliest ends inside a character, which is not answered."""
    answer = ask("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 380, **GREEDY})
    if "completion_probabilities" not in answer:
        return None
    return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens(case: str, serve: Callable[[Path], Ask], tmp_path: Path) -> None:
    kind, pre, changes = CASES[case]
    source = write_model(tmp_path / "model", kind, pre, **changes)
    if pre == "llama-bpe":
        write_tokenizer(source, pre, add_bos=True)
    nybble.export_gguf(source, tmp_path / "model.gguf", "f32")
    ask = serve(tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    compared = 0
    for seed in range(4):
        ids = torch.randint(3, 300, (1, 100), generator=torch.Generator().manual_seed(seed))
        given = log_probabilities(ask, ids[0].tolist())
        if given is None:
            continue
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0, -1], -1)
        assert len(given) > 300
        # About 1e-5 is measured; a wrong order of q and k, base or scaling shows from 0.2 on.
        assert max(abs(float(expected[token]) - value) for token, value in given.items()) < 1e-3
        compared += 1
    assert compared
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for text in (TEXT[:300], "<|im_start|>it's 12345<tool>\n\n  x<|im_end|>", "DON'T \r\n\t don't 日本 ½"):
        body = {"content": text, "add_special": True, "parse_special": True}
        assert ask("/tokenize", body)["tokens"] == tokenizer(text).input_ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens(prefix: bool, serve: Callable[[Path], Ask], tmp_path: Path) -> None:
    from test_gguf_tokenizer import sentencepiece

    source = write_model(tmp_path / "model", "llama")
    sentencepiece(source, prefix)
    nybble.export_gguf(source, tmp_path / "model.gguf")
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    ask = serve(tmp_path / "model.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in (TEXT[:400].replace("\r", ""), "four bits 日本 bytebits", "two  spaces"):
        body = {"content": text, "add_special": True, "parse_special": True}
        assert ask("/tokenize", body)["tokens"] == tokenizer(text).input_ids


def rounded(values: torch.Tensor) -> torch.Tensor:
    """What Q8_0 makes of the values, 32 at a time along the last dimension."""
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = values.reshape(-1, values.shape[-1]).numpy()
    return torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind).copy()).reshape(values.shape)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_smollm2_answers_alike(serve: Callable[[Path], Ask], smol: Path, tmp_path: Path) -> None:
    nybble.export_gguf(smol, tmp_path / "model.gguf", "f16")
    ask = serve(tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smol)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, do_sample=False, max_new_tokens=10)[0, ids.shape[1] :].tolist()
    answer = ask("/completion", {"prompt": text, "n_predict": 10, **GREEDY})
    assert answer["tokens"] == expected
    assert "Paris" in answer["content"]


def test_smollm2_in_q8_0_loses_what_q8_0_loses(serve: Callable[[Path], Ask], smol: Path, tmp_path: Path) -> None:
    """llama.cpp rounds the activations of 8-bit weights to Q8_0 too, by rules that depend on the processor.

    So its answer is not one sequence of tokens on every machine (two first tokens of this one lie 0.1 nats apart), but
    it is no further from fp32's than a computation in torch with the same two roundings, up to a factor of two.
    """
    nybble.export_gguf(smol, tmp_path / "model.gguf", "q8_0")
    ask = serve(tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smol)
    prompts = [
        tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True),
        "In the beginning God created the heaven and the",
        "The capital of France is",
    ]

    def predict() -> list[torch.Tensor]:
        ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
        with torch.no_grad():
            return [torch.log_softmax(model(row).logits[0, -1], -1) for row in ids]

    exact = predict()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.data = rounded(module.weight.data)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, given: (rounded(given[0]),))
    simulated = predict()
    squares = torch.zeros(2)
    for prompt, fp32, q8_0 in zip(prompts, exact, simulated, strict=True):
        given = log_probabilities(ask, tokenizer(prompt).input_ids)
        assert given is not None and len(given) > 300
        tokens = torch.tensor(list(given))
        answers = torch.stack([torch.tensor(list(given.values())), q8_0[tokens]])
        squares += (answers - fp32[tokens]).square().mean(1)
    assert squares[0].sqrt() < 2 * squares[1].sqrt()
