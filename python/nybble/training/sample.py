"""Text out of a model: greedy or sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """What the model writes after `prompt`, without the prompt.

    model and tokenizer: transformers'. temperature 0 takes the likeliest token each time, above 0 samples with `seed`
    (the global random state is left as it was). chat: put the prompt into the tokenizer's chat template as the user's
    turn. Raises ValueError for an empty prompt, max_new_tokens below 1 or a negative temperature.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat: the tokenizer has no chat template")
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device=next(model.parameters()).device)
    if ids.numel() == 0:
        raise ValueError("prompt is empty: no tokens came out of it")
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature}
    eos = getattr(tokenizer, "eos_token_id", None)
    training = model.training
    model.eval()
    devices = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            output = model.generate(  # type: ignore[operator]  # nn.Module's __getattr__ is typed Tensor | Module
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=eos, **choice
            )
    finally:
        model.train(training)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
