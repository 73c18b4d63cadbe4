"""Importing this skips the importing file where there is no GPU that nybble has kernels for, all for one reason.

tools/gpu_check.sh sets NYBBLE_REQUIRE_GPU: there a missing GPU or missing kernels are an error.
"""

from __future__ import annotations

import os

import pytest
import torch

from nybble.backends import cuda


def missing() -> str:
    """Why nothing here can run; empty if it can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU (torch.cuda.is_available() is False)"
    return cuda.missing(torch.device("cuda", torch.cuda.current_device()))


if missing():
    if os.environ.get("NYBBLE_REQUIRE_GPU"):
        raise RuntimeError(missing())
    pytest.skip(missing(), allow_module_level=True)
