"""Runs in this process, small disks, and actions in the middle of a step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Test modules are imported by path (importlib mode): what they share must be found by name.
sys.path.insert(0, str(Path(__file__).parent))


MICRO = dict(embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
RUN = (
    "--model micro --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75 "
    "--batch-size 2 --steps 6 --workers 0 --lr 0.1 --log-every 1 --device cpu --no-tensorboard"
).split()


@pytest.fixture
def pretrain(labelled_world, tmp_path, monkeypatch):
    """`pretrain(output, *flags, data=list)`: the command on folders of frames, some 0.3 s; returns its exit
    code."""
    from vmae.cli import main
    from vmae.config import PRESETS

    monkeypatch.setitem(PRESETS, "micro", MICRO)
    own = tmp_path / "frames.txt"
    own.write_text("".join(f"{labelled_world}/v{video:02} 1 10\n" for video in range(12)))

    def start(output, *flags, data=own):
        return main(["pretrain", "--data", str(data), "--output", str(output), *RUN, *map(str, flags)])

    return start


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(number, action)`: do it, once, in the middle of step `number` of a run in this process."""
    from vmae.train.loop import Trainer

    plain, waiting = Trainer.clip, {}

    def clip(self, record):
        action = waiting.pop(record.step + 1, None)
        if action is not None:
            action()
        return plain(self, record)

    monkeypatch.setattr(Trainer, "clip", clip)
    return waiting.__setitem__


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: an empty file system of that size; skips where none may be mounted."""
    mounted = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True
        )
        if done.returncode:
            pytest.skip("no file system may be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=False)
