"""Each test runs on the first GPU where there is one, else on the CPU with interpreted kernels, so that its
lines are no news on a GPU."""

import sys
from pathlib import Path

import pytest
import torch

# Test modules are imported by path (importlib mode): what they share must be found by name.
sys.path.insert(0, str(Path(__file__).parent))

NEEDS_A_GPU = "needs a GPU: what is looked for does not exist on a CPU"
HERE = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(HERE, reason="kernels are not interpreted where there is a GPU"),
            ],
        ),
        pytest.param("cuda", marks=[pytest.mark.device, pytest.mark.skipif(not HERE, reason=NEEDS_A_GPU)]),
    ]
)
def place(request) -> torch.device:
    """The CPU, which rehearses the test, or the GPU."""
    return torch.device(request.param) if request.param == "cpu" else torch.device("cuda", 0)
