"""Choices of launch configurations on disk, with a faked clock: no device is needed."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmae_kernels import autotune
from vmae_kernels import device as dev

CANDIDATES = [
    {"BLOCK_M": 128, "num_warps": 8},
    {"BLOCK_M": 64, "num_warps": 4},
    {"BLOCK_M": 32, "num_warps": 4},
]
KEY = (5120, 768, 1536, torch.uint8, torch.bfloat16)
KERNELS = Path(autotune.__file__).resolve().parent.parent


class Clock:
    """Milliseconds by launched tile; notes what was launched."""

    def __init__(self, **by_block):
        self.by_block, self.launched = by_block, []

    def launch(self, config):
        self.launched.append(config["BLOCK_M"])

    def __call__(self, call):
        call()
        return self.by_block[f"m{self.launched[-1]}"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("VMAE_AUTOTUNE_CACHE", str(tmp_path / "folder" / "choices.json"))
    monkeypatch.setattr(autotune, "_chosen", {})
    return tmp_path / "folder" / "choices.json"


def choose(clock, device="NVIDIA H100", kernel="embed_visible_fwd", key=KEY, candidates=CANDIDATES):
    timer = clock if isinstance(clock, Clock) else None
    return autotune.choose(device, kernel, candidates, key, getattr(clock, "launch", None), timer)


def test_the_fastest_is_kept(file, monkeypatch):
    """Timed once; then of the process, then of the file, whatever a clock would say."""
    clock = Clock(m128=3.0, m64=1.0, m32=2.0)
    assert choose(clock) == CANDIDATES[1] and clock.launched == [128, 64, 32]
    assert choose(clock) == CANDIDATES[1] and len(clock.launched) == 3
    monkeypatch.setattr(autotune, "_chosen", {})
    other = Clock(m128=1.0, m64=2.0, m32=3.0)
    assert choose(other) == CANDIDATES[1] and other.launched == []
    content = json.loads(file.read_text())
    assert content["schema"] == autotune.SCHEMA
    (name,) = content["choices"]
    assert name.startswith("NVIDIA H100 | triton ")
    assert name.endswith(" | embed_visible_fwd | 5120 768 1536 uint8 bfloat16")


def test_what_a_choice_depends_on(file, monkeypatch):
    """Device, kernel, shape, dtype, Triton and source: each has choices of its own, all in one file."""
    fast_64, fast_32 = Clock(m128=3.0, m64=1.0, m32=2.0), Clock(m128=3.0, m64=2.0, m32=1.0)
    choose(fast_64)
    changes = [{"device": "NVIDIA A100"}, {"kernel": "embed_visible_bwd"}]
    changes += [{"key": (5121, *KEY[1:])}, {"key": (*KEY[:4], torch.float16)}]
    for change in changes:
        assert choose(fast_32, **change) == CANDIDATES[2]
    monkeypatch.setattr(autotune.triton, "__version__", "0.0")
    assert choose(fast_32) == CANDIDATES[2]
    monkeypatch.setattr(autotune, "source_hash", lambda: "changed")
    assert choose(fast_32) == CANDIDATES[2]
    assert len(json.loads(file.read_text())["choices"]) == 7
    assert len(autotune.source_hash()) > 0


def test_a_configuration_that_is_none_of_the_candidates_is_not_launched(file):
    choose(Clock(m128=3.0, m64=1.0, m32=2.0))
    autotune._chosen.clear()
    assert choose(Clock(m128=1.0), candidates=CANDIDATES[:1]) == CANDIDATES[0]


BROKEN = [
    "",
    "{",
    "[]",
    '{"schema": "other/1", "choices": {}}',
    '{"schema": "vmae-autotune/1"}',
    '{"schema": "vmae-autotune/1", "choices": {"a": 3}}',
    '{"schema": "vmae-autotune/1", "choices": []}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_replaced(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match=r"choices\.json: ignored, and replaced by the next choice"):
        assert choose(Clock(m128=3.0, m64=1.0, m32=2.0)) == CANDIDATES[1]
    assert list(json.loads(file.read_text())["choices"].values()) == [CANDIDATES[1]]


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    """A folder that is a file: the choice holds in this process."""
    (tmp_path / "folder").write_text("")
    monkeypatch.setenv("VMAE_AUTOTUNE_CACHE", str(tmp_path / "folder" / "choices.json"))
    monkeypatch.setattr(autotune, "_chosen", {})
    clock = Clock(m128=3.0, m64=1.0, m32=2.0)
    with pytest.warns(UserWarning, match="the choice is not kept"):
        assert choose(clock) == CANDIDATES[1]
    assert choose(clock) == CANDIDATES[1] and len(clock.launched) == 3


def test_nothing_is_timed_under_capture(file):
    """The first for now, which is not kept; later what was chosen meanwhile."""
    assert choose(None) == CANDIDATES[0] and not file.exists()
    choose(Clock(m128=3.0, m64=1.0, m32=2.0))
    assert choose(None) == CANDIDATES[1]


def rank(number, start, out):
    """A rank that finds another configuration the fastest, and has choices of its own."""
    sizes = {f"m{config['BLOCK_M']}": 1.0 + (i != number % 3) for i, config in enumerate(CANDIDATES)}
    clock = Clock(**sizes)
    start.wait()
    shared = [choose(clock, key=(size, *KEY[1:])) for size in range(8)]
    own = choose(clock, key=(100 + number, *KEY[1:]))
    out.put((number, shared, own))


def test_ranks_agree(file):
    """Six processes time the same kernels at once: one choice each, and nobody's is lost."""
    context = multiprocessing.get_context("fork")
    start, out = context.Barrier(6), context.Queue()
    ranks = [context.Process(target=rank, args=(number, start, out)) for number in range(6)]
    for process in ranks:
        process.start()
    found = [out.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert all(shared == found[0][1] for _, shared, _ in found)
    choices = autotune.read_choices(file)
    assert len(choices) == 8 + 6
    for number, _, own in found:
        name = autotune.choice_key("NVIDIA H100", "embed_visible_fwd", (100 + number, *KEY[1:]))
        assert choices[name] == own == CANDIDATES[number % 3]
    assert {path.name for path in file.parent.iterdir()} == {"choices.json", "choices.json.lock"}


def test_where_choices_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("VMAE_AUTOTUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.cache_file() == tmp_path / "vmae" / "autotune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autotune.cache_file() == tmp_path / ".cache" / "vmae" / "autotune.json"


@pytest.mark.slow
def test_kernels_choose_by_it(tmp_path):
    """VMAE_AUTOTUNE=1 where kernels are not interpreted: the launcher's configuration is the file's; off,
    nothing is timed."""
    code = """
import os
import torch
from vmae_kernels import autotune, device
capturing = False
torch.cuda.is_current_stream_capturing, torch.cuda.get_device_name = lambda: capturing, lambda device: "a GPU"
clock = {128: 2.0, 64: 1.0}
seen = []
autotune.triton.testing.do_bench_cudagraph = lambda call: (call(), clock[seen[-1]])[1]
torch.cuda.synchronize = lambda: None
candidates = [{"BLOCK_M": 128}, {"BLOCK_M": 64}]
launch = lambda config: seen.append(config["BLOCK_M"])
for on, capturing in (("0", False), ("1", True), ("1", False), ("1", True)):
    os.environ["VMAE_AUTOTUNE"] = on
    print(device.choose_config("k", candidates, (1, 2), torch.device("cuda"), launch), seen)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(KERNELS), "VMAE_AUTOTUNE_CACHE": str(tmp_path / "choices.json")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "{'BLOCK_M': 128} []",
        "{'BLOCK_M': 128} []",
        "{'BLOCK_M': 64} [128, 64]",
        "{'BLOCK_M': 64} [128, 64]",
    ], done.stderr


def test_interpreting_takes_the_first(monkeypatch):
    monkeypatch.setenv("VMAE_AUTOTUNE", "1")
    if dev.INTERPRET:
        config = dev.choose_config("k", CANDIDATES, KEY, torch.device("cpu"), lambda config: None)
        assert config == CANDIDATES[0]
