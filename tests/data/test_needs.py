"""What a run needs of its machine is known before it starts: the formulas cover what real workers take, and
what is short is told in a line."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vmae import MaskConfig, ModelConfig
from vmae.cli import main
from vmae.data import build_loader, read_list
from vmae.data.dataset import PretrainDataset
from vmae.data.needs import LIBRARY_FILES, ORIGINAL, PACKED, WORKER_BYTES, Load, find_needs, open_files
from vmae.data.shards.ahead import MOST_BYTES
from vmae.data.shared_memory import batches_bytes
from vmae.model.cost import masked_macs
from vmae.synthetic.samples import sample_videos
from vmae.train.needs import predict_rate

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu"
SMALL = "--model vit_tiny --image-size 64 --num-frames 8 --batch-size 2 --steps 2 --device cpu".split()


def needs_of(**load):
    return {need.name: need for need in find_needs(Load(**{"workers": 2, "batch_bytes": 10 << 20} | load))}


@pytest.fixture
def sample_list(tmp_path):
    path = tmp_path / "list.txt"
    smallest = sorted(sample_videos(), key=lambda video: video.stat().st_size)[0]
    path.write_text(f"{smallest} 0 -1\n")
    return path


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_real_workers_open_no_more_files_than_planned(sample_list):
    dataset = PretrainDataset(
        read_list(sample_list),
        num_frames=16,
        stride=1,
        image_size=32,
        grid=(8, 2, 2),
        mask=MaskConfig(encoder_ratio=0.5),
        num_sample=1,
        seed=0,
        repeat=40,
    )
    own = os.getpid()
    before = len(os.listdir("/proc/self/fd"))
    with build_loader(dataset, batch_size=1, num_workers=2, total_steps=9) as loader:
        most = {own: before}
        for _ in loader:
            workers = Path(f"/proc/{own}/task/{own}/children").read_text().split()
            for process in (own, *map(int, workers)):
                most[process] = max(most.get(process, 0), len(os.listdir(f"/proc/{process}/fd")))
    assert max(most.values()) <= open_files(2) - LIBRARY_FILES + before
    assert most[own] > before + 2 * 3  # pipes, sockets and tensors are really counted


def test_files_grow_with_workers_and_ranks():
    assert open_files(0) == LIBRARY_FILES
    assert open_files(10) < 1024 < open_files(64) + 100  # the usual soft limit
    assert open_files(4, ranks=257) - open_files(4) == 2 * 256
    assert open_files(8) - open_files(4) == 4 * (3 + 2 * 5)


def test_memory_of_workers_and_batches():
    one = Load(workers=4, batch_bytes=10, rank_bytes=1000, pinned=False)
    assert one.memory_bytes == 1000 + 4 * (WORKER_BYTES + 10) + batches_bytes(10, 4)
    assert Load(workers=4, batch_bytes=10, rank_bytes=1000).memory_bytes == one.memory_bytes + 20
    stored = Load(workers=4, batch_bytes=10, rank_bytes=1000, pinned=False, remote=True)
    assert stored.memory_bytes == one.memory_bytes + 4 * MOST_BYTES
    eight = Load(workers=4, batch_bytes=10, rank_bytes=1000, pinned=False, ranks=8, staged_bytes=7)
    assert eight.memory_bytes == 8 * (one.memory_bytes + 7)


def test_cores_and_workers_for_a_rate():
    per_core = PACKED.videos_per_s(4)
    needs = needs_of(videos_per_s=3 * per_core, num_sample=4, ranks=2)
    assert needs["cores for decoding"].needed == pytest.approx(6)
    workers = needs["videos a second of a rank's workers"]
    assert workers.short and "--workers 3" in workers.remedy
    assert "cores" in " ".join(needs_of()) and needs_of()["cores for decoding"].needed is None
    assert not needs_of()["cores for decoding"].short  # nothing known, nothing said


def test_the_rate_of_a_gpu():
    """ViT-B at 35 % of an H100: 611 videos a second with four clips each, as `plan --mfu 0.35` has it."""
    flops = 6.0 * masked_macs(ModelConfig.preset("vit_b"), MaskConfig())
    rate = predict_rate("NVIDIA H100 80GB HBM3", "bfloat16", flops, 4)
    assert 600 < rate < 620
    assert needs_of(videos_per_s=rate, num_sample=4)["cores for decoding"].needed == pytest.approx(
        10.4, abs=0.2
    )
    assert predict_rate("cpu", "float32", flops, 4) is None
    assert predict_rate("NVIDIA H100", "bfloat16", None, 4) is None


def test_what_is_there_is_not_short(tmp_path):
    needs = needs_of(rank_bytes=1, checkpoint_bytes=1000, checkpoints=3, output=tmp_path / "not" / "yet")
    assert not [need.describe() for need in needs.values() if need.short]
    assert needs["disk for checkpoints"].needed == 3000


@pytest.mark.parametrize(
    ("load", "name", "remedy"),
    [
        ({"workers": 10**12}, "open files of a process", "docker run --ulimit nofile="),
        ({"rank_bytes": 2**50}, "memory of this ", "fewer --workers or a smaller --batch-size"),
        ({"batch_bytes": 2**50}, "shared memory (/dev/shm)", "docker run --shm-size="),
        ({"videos_per_s": 1e9}, "cores for decoding", "pack the videos (`vmae pack`)"),
        ({"checkpoint_bytes": 2**50, "checkpoints": 4, "output": "."}, "disk for checkpoints", "(--keep)"),
    ],
)
def test_a_shortage_is_one_line(load, name, remedy):
    short = [need.describe() for need in needs_of(**load).values() if need.short]
    (line,) = [line for line in short if line.startswith(name)]
    assert " needed, " in line and " here: " in line and remedy in line and "\n" not in line


def test_costs_are_those_of_the_committed_results():
    found = json.loads((RESULTS / "data.json").read_text())["records"]
    parts = {record["videos"]: record for record in found if record["kind"] == "parts"}
    for cost, videos in ((PACKED, "packed"), (ORIGINAL, "original")):
        one = parts[videos]
        assert cost.video_ms == pytest.approx(one["open"] + one["decode"] + one["convert"], rel=0.05)
        assert cost.clip_ms == pytest.approx(one["resize"], rel=0.05)
    loads = [r for r in json.loads((RESULTS / "needs.json").read_text())["records"] if r["kind"] == "load"]
    assert len(loads) > 4
    for one in loads:
        assert max(one["main_files"], one["worker_files"]) <= one["planned_files"]
        assert one["worker_private"]["max"] <= 1.1 * (WORKER_BYTES + one["batch_bytes"])


@pytest.mark.slow
def test_a_run_that_has_all_it_needs_says_nothing(sample_list, tmp_path, capsys):
    flags = ["--data", str(sample_list), "--output", str(tmp_path / "run"), "--dry-run", *SMALL]
    assert main(["pretrain", *flags]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_too_few_files_warns_once_and_works(sample_list, tmp_path):
    """A hard limit below what is planned is no error: less may do."""

    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 280))

    flags = ["--data", str(sample_list), "--output", str(tmp_path / "run"), "--workers", "2", *SMALL]
    command = [sys.executable, "-m", "vmae", "pretrain", *flags]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limits)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "warning" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: open files of a process: ")
    assert " needed, 280 here: raise the hard limit" in lines[0]
