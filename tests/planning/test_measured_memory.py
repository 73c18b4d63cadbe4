"""Predictions beside measured peaks: each configuration is trained in a process of its own, with FSDP2 in several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.backends.products import emulated
from nybble.planning import Cluster, Work, estimate, find_shape, scaled_step

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")

WORKER = Path(__file__).with_name("measured_step.py")

# method, base, batch, seq, checkpointing, optimizer, rank
CONFIGURATIONS = (
    ("lora", "nf4", 4, 256, False, "adamw", 16),
    ("lora", "nf4", 1, 1024, True, "adamw", 64),
    ("lora", "bf16", 2, 384, False, "adamw8bit", 16),
    ("lora", "bf16", 4, 256, True, "adamw", 16),
    ("bottleneck", "nf4", 2, 384, False, "adamw", 16),
    ("prefix", "bf16", 3, 256, False, "adamw", 16),
    ("full", "fp32", 1, 256, False, "adamw", 16),
    ("full", "fp32", 2, 192, True, "adamw8bit", 16),
)
# Other builds, in NF4: experts one at a time; scores that attention keeps, and four norms a layer.
OTHERS = (
    ("mixtral", ("lora", "nf4", 4, 256, False, "adamw", 16)),
    ("qwen3_moe", ("prefix", "nf4", 4, 256, False, "adamw", 16)),
    ("qwen3_moe", ("lora", "nf4", 2, 384, True, "adamw", 16)),
    ("gemma2", ("lora", "nf4", 4, 256, False, "adamw", 16)),
    ("gemma2", ("lora", "nf4", 2, 384, True, "adamw", 16)),
)
FIELDS = ("method", "base", "batch", "seq", "checkpointing", "optimizer", "rank")
Configuration = tuple[str, str, int, int, bool, str, int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama of 42 M parameters, in bf16 and NF4."""
    return _written(tmp_path_factory.mktemp("planned"), "llama", vocab_size=8192, num_key_value_heads=5)


def _written(directory: Path, kind: str, **sizes: Any) -> dict[str, Path]:
    """A random model of a transformers' type, by base."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "hidden_size": 640,
            "intermediate_size": 1728,
            "num_hidden_layers": 7,
            "num_attention_heads": 10,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **sizes,
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(directory / "bf16")
    nybble.quantize(directory / "bf16", directory / "nf4", nybble.QuantConfig())
    return {"bf16": directory / "bf16", "fp32": directory / "bf16", "nf4": directory / "nf4"}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Mixtures of 75 and 89 M, and a Gemma 2 of 42 M."""
    small = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}
    sizes: dict[str, dict[str, Any]] = {
        "mixtral": {**small, "intermediate_size": 1024, "num_hidden_layers": 5, "num_local_experts": 8},
        "qwen3_moe": {
            **small, "moe_intermediate_size": 512, "num_hidden_layers": 6, "num_experts": 16,
            "num_experts_per_tok": 4, "head_dim": 64,
        },
        "gemma2": {"vocab_size": 16384, "num_key_value_heads": 5, "head_dim": 64, "tie_word_embeddings": True},
    }  # fmt: skip
    return {kind: _written(tmp_path_factory.mktemp(kind), kind, **own) for kind, own in sizes.items()}


@pytest.fixture(scope="module")
def measured(models: dict[str, Path]) -> dict[Configuration, int]:
    """Bytes at the peak above the imports; two steps, as the optimizer's state is there from the first one's end."""
    peaks = {}
    for configuration in CONFIGURATIONS:
        (peaks[configuration],) = _peaks(models, configuration)
    return peaks


def _peaks(models: dict[str, Path], configuration: Configuration, processes: int = 1) -> list[int]:
    """What each process held at its fullest above its imports, in bytes."""
    job = {**dict(zip(FIELDS, configuration, strict=True)), "model": str(models[configuration[1]])}
    job |= {"steps": 2, "low_memory": True}  # what is held, and not what glibc's heap makes of it
    command = [sys.executable, str(WORKER), json.dumps(job)]
    environment = dict(os.environ)
    if processes > 1:
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            port = opened.getsockname()[1]
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}, **pipes) for rank in range(processes)]
    ended = [process.communicate() for process in started]
    assert not any(process.returncode for process in started), ended[0][1][-2000:]
    return [int(json.loads(out.splitlines()[-1])["peak"]) for out, _ in ended]


def _name(c: Configuration) -> str:
    return f"{c[0]}-{c[1]}-{c[2]}x{c[3]}-{'checkpointing' if c[4] else 'plain'}-{c[5]}-{c[6]}"


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=_name)
def test_a_prediction_is_within_a_tenth_of_the_measured_peak(
    models: dict[str, Path], measured: dict[Configuration, int], configuration: Configuration
) -> None:
    _compare(_predicted(models, configuration), measured[configuration])


@pytest.mark.parametrize(
    "kind, configuration", OTHERS, ids=lambda value: value if isinstance(value, str) else _name(value)
)
def test_so_is_that_of_other_builds(
    others: dict[str, dict[str, Path]], kind: str, configuration: Configuration
) -> None:
    (peak,) = _peaks(others[kind], configuration)
    _compare(_predicted(others[kind], configuration), peak)


def _predicted(models: dict[str, Path], configuration: Configuration) -> int:
    method, base, batch, seq, checkpointing, optimizer, rank = configuration
    work = Work(batch=batch, seq=seq, rank=rank, optimizer=optimizer, **_cpu())
    return estimate(find_shape(models["bf16"]), method, base, work, checkpointing).above_imports


def _cpu() -> dict[str, bool]:
    return {"matrix_unit": nybble.active_isa() == "amx", "widened": emulated(torch.bfloat16)}


@pytest.mark.parametrize("method, base, processes", [("lora", "nf4", 2), ("lora", "bf16", 4), ("full", "fp32", 2)])
def test_so_is_that_of_a_rank_with_fsdp2(models: dict[str, Path], method: str, base: str, processes: int) -> None:
    peaks = _peaks(models, (method, base, 1, 128, False, "adamw", 16), processes)
    step = scaled_step(find_shape(models["bf16"]), method, base, Work(1, 128, **_cpu()), Cluster(processes), False)
    _compare(step.rank.above_imports, max(peaks))


def _compare(predicted: int, peak: int) -> None:
    print(f"predicted {predicted / 1e6:.1f} MB, measured {peak / 1e6:.1f} MB, {predicted / peak - 1:+.1%}")
    assert abs(predicted / peak - 1) <= 0.10
