"""macOS and Windows, imitated: without triton, POSIX modules and signals, all imports and a CPU computes."""

import subprocess
import sys

import pytest

CODE = """
import importlib, os, signal, sys

HIDDEN = {"triton", "fcntl", "resource", "termios", "pwd", "grp"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in HIDDEN:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hide())
import torch
import torch.distributed.checkpoint  # asks for the platform before it uses the signals

for name in ("SIGUSR1", "SIGCHLD", "SIGBUS", "SIGKILL"):
    delattr(signal, name)
del os.sched_getaffinity

import vmae
from vmae.cli import COMMANDS, main

for module, _ in COMMANDS.values():
    importlib.import_module(module)
assert main(["doctor"]) == 0
small = ["--model", "vit_tiny", "--image-size", "64", "--num-frames", "8", "--encoder-ratio", "0.75"]
assert main(["plan", *small, "--gpus", "1"]) == 0

size = dict(img_size=32, num_frames=4, embed_dim=24, depth=1, num_heads=2)
config = vmae.ModelConfig(**size, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
ratios = dict(encoder_ratio=0.5, decoder_ratio=0.5)
mask = vmae.DualMask.sample(2, config.grid, encoder="tube", decoder="running_cell", **ratios)
clips = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
losses = []
for backend in ("torch", "auto"):
    torch.manual_seed(0)
    model = vmae.build_pretrainer(config, backend=backend)
    losses.append(model(clips, mask))
    losses[-1].backward()
    assert model.mask_token.grad.abs().sum() > 0
assert losses[0] == losses[1]
try:
    vmae.build_pretrainer(config, backend="triton")(clips, mask)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_triton_and_posix():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why = "the package triton cannot be imported: No module named 'triton'"
    assert f"fused operations: torch ({why})" in done.stdout  # doctor
    assert done.stdout.endswith(f"{why}; use backend='torch' or 'auto'\n")
