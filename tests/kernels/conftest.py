"""Kernel tests run on the GPU where there is one, else in Triton's interpreter, chosen before Triton is
imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Test modules are imported by path (importlib mode): what they share must be found by name.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from vmae_kernels.device import INTERPRET  # noqa: E402  (after the environment is set)


@pytest.fixture(autouse=True)
def seeded_and_filled_with_nan(monkeypatch):
    """Fixed random numbers; scratch memory full of NaN, so that an element nobody wrote is seen."""
    if DEVICE == "cpu" and not INTERPRET:
        pytest.fail("Triton was imported before its interpreter was chosen: run with TRITON_INTERPRET=1")
    torch.manual_seed(0)
    monkeypatch.setenv("VMAE_NAN_SCRATCH", "1")


@pytest.fixture
def device():
    return DEVICE
