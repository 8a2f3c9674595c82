"""What only a GPU shows: graphs, streams, devices, waiting, memory.

Where there is no GPU the same lines run on a CPU, so that none of them is new on a GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_steps import (
    WARMUP,
    arguments_of,
    capture,
    held,
    make_step,
    no_waiting,
    run_operation,
    side_stream,
    wait,
)

from vmae_kernels import embed_visible
from vmae_kernels.backend import OPERATIONS
from vmae_kernels.device import has_copy_engine

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("device_steps.py")
GPUS = torch.cuda.device_count()
REPLAYS = 3
SANITIZER_S = 90


def test_a_whole_step_is_captured(place):
    """Forward, backward and optimizer in one graph: replays give the losses of steps that are launched."""
    launched, captured = make_step(place), make_step(place)
    expected = [float(launched()) for _ in range(WARMUP + REPLAYS)]
    with side_stream(place):
        first = [captured() for _ in range(WARMUP)]
    replay = capture(captured, place)
    losses = [float(x) for x in first] + [float(replay()) for _ in range(REPLAYS)]
    # On a GPU attention's backward sums in any order, and the optimizer magnifies small gradients.
    assert losses == pytest.approx(expected, rel=2e-3 if place.type == "cuda" else 1e-4)
    assert losses == sorted(losses, reverse=True)  # the weights moved at each replay
    assert losses[0] - losses[-1] > 0.01 * losses[0]


def test_a_replay_reads_the_inputs_that_are_there_then(place):
    """New clips are copied into the old ones' memory."""
    step = make_step(place)
    with side_stream(place):
        for _ in range(WARMUP):
            step()
    with torch.no_grad():
        with side_stream(place):
            step.model(step.clips, step.mask)
        replay = capture(lambda: step.model(step.clips, step.mask), place)
        before = float(replay())
        step.clips.copy_(255 - step.clips)
        after = float(replay())
        assert after == pytest.approx(float(step.model(step.clips, step.mask)), rel=1e-4)
        assert abs(after - before) > 1e-3 * before


def test_descriptors_of_the_copy_engine_in_a_graph(place):
    """The descriptor is of a folded weight in the graph's own memory: a replay folds the weight anew."""
    if not has_copy_engine(place):
        pytest.skip("needs compute capability 9.0: older GPUs have no tensor descriptors")
    clips, visible, weight, bias, pos = (x.to(place) for x in arguments_of(0)["embed_visible"])

    def embed():
        return embed_visible(clips, visible, weight, bias, pos, backend="triton")

    with side_stream(place):
        embed()
    replay = capture(embed, place)
    before = replay().clone()
    assert torch.equal(before, embed())
    weight.mul_(2)
    after = replay().clone()
    assert torch.equal(after, embed()) and not torch.equal(after, before)


def test_every_operation_has_arguments_here():
    assert OPERATIONS.keys() <= arguments_of(0).keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_two_streams(name, place):
    """Work on two streams at once gives what one after the other gives."""
    sets = [arguments_of(seed) for seed in (1, 2)]
    alone = [run_operation(name, each[name], place) for each in sets]
    wait(place)
    together = []
    for _ in range(3):
        together = []
        for each in sets:
            with side_stream(place) if place.type == "cpu" else _own_stream(place):
                together.append(run_operation(name, each[name], place))
    wait(place)
    for found, expected in zip(together, alone):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def _own_stream(device):
    """A stream that nothing waits for, so that two of them overlap."""
    return torch.cuda.stream(torch.cuda.Stream(device))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_device_that_is_not_the_current_one(name, place):
    """Launched where the tensors are, whatever device is current."""
    other = torch.device("cuda", GPUS - 1) if place.type == "cuda" else place
    if place.type == "cuda" and GPUS < 2:
        pytest.skip("needs two GPUs")
    arguments = arguments_of(3)[name]
    expected = [x.cpu() for x in run_operation(name, arguments, place)]
    found = run_operation(name, arguments, other)  # the first GPU is current
    assert all(x.device == other for x in found)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


def test_two_devices_train_side_by_side(place):
    """Two models in one process, their steps interleaved: each has the losses of a run alone."""
    other = torch.device("cuda", GPUS - 1) if place.type == "cuda" else place
    if place.type == "cuda" and GPUS < 2:
        pytest.skip("needs two GPUs")
    alone = make_step(place)
    expected = [float(alone()) for _ in range(2)]
    steps = [make_step(place), make_step(other)]
    losses = [[step() for step in steps] for _ in range(2)]
    for which in range(2):
        assert [float(pair[which]) for pair in losses] == pytest.approx(expected, rel=2e-3)


def test_a_step_waits_for_nothing(place):
    """No value is read back from the device in forward, backward and optimizer."""
    step = make_step(place)
    for _ in range(WARMUP):
        step()
    wait(place)
    with no_waiting(place):
        loss = step()
    assert 0 < float(loss) < 100


def test_memory_comes_back(place):
    """A step holds nothing when it is over but gradients and the optimizer's state; a model that is gone,
    nothing."""
    make_step(place)()  # what libraries keep for good, such as workspaces
    before = held(place)
    step = make_step(place)
    for _ in range(2):
        step()
    settled = held(place)
    for _ in range(3):
        step()
    assert held(place) == settled
    step.optimizer.zero_grad(set_to_none=True)
    assert held(place) < settled
    del step
    assert held(place) <= before


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (path for path in ("/usr/local/cuda/bin/compute-sanitizer",) if Path(path).is_file()), None
    )


def run_script(*prefix: str) -> subprocess.CompletedProcess:
    """One step in a process of its own, each tensor in memory of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [*prefix, sys.executable, str(SCRIPT)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SANITIZER_S)


@pytest.mark.device
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: compute-sanitizer watches its kernels"
)
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
def test_a_step_under_compute_sanitizer():
    try:
        done = run_script(sanitizer(), "--tool", "memcheck", "--error-exitcode", "86")
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer takes over {SANITIZER_S} s here")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_step_that_is_sanitised():
    done = run_script()
    assert done.returncode == 0 and "one step on" in done.stdout, done.stdout + done.stderr
