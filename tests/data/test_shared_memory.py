"""What workers may fill of /dev/shm is known, and refused with a remedy, before a run starts."""

import os
from types import SimpleNamespace

import pytest

from vmae import InputError
from vmae.cli import main
from vmae.data import shared_memory
from vmae.data.shared_memory import batches_bytes, check_shared_memory, find_shared_memory
from vmae.synthetic.samples import sample_videos


def mount(monkeypatch, free, total=64 << 20):
    sizes = {"f_blocks": total // 4096, "f_bavail": free // 4096, "f_bfree": free // 4096}
    found = SimpleNamespace(f_frsize=4096, **sizes)
    monkeypatch.setattr(shared_memory.os, "statvfs", lambda path: found)


def test_bytes_of_batches():
    assert batches_bytes(100, workers=0) == 0
    assert batches_bytes(100, workers=4, prefetch=2) == 900  # 8 made, 1 being read


def test_the_mount_is_read(monkeypatch):
    mount(monkeypatch, 1 << 20)
    assert find_shared_memory() == (64 << 20, 1 << 20)
    monkeypatch.undo()
    monkeypatch.setattr(shared_memory, "FOLDER", "/nowhere")
    assert find_shared_memory() is None
    check_shared_memory(1 << 60, 4)  # nothing known, nothing refused


def test_too_little_is_refused_with_the_remedy(monkeypatch):
    mount(monkeypatch, 60 << 20)
    check_shared_memory(20 << 20, workers=1)  # 60 MiB
    with pytest.raises(InputError, match=r"may fill 120 MiB of shared memory \(1 workers of each of 2 ranks"):
        check_shared_memory(20 << 20, workers=1, ranks=2)
    with pytest.raises(InputError) as caught:
        check_shared_memory(77 << 20, workers=12, ranks=8)
    text = str(caught.value)
    assert "15 GiB" in text and "/dev/shm has 60 MiB free of 64 MiB" in text
    assert "docker run --shm-size=19g" in text and "--ipc=host" in text and "fewer --workers" in text


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_says_it_before_it_writes(monkeypatch, tmp_path, capsys, workers):
    mount(monkeypatch, 1 << 20)
    (tmp_path / "list.txt").write_text("".join(f"{path} 0 -1\n" for path in sample_videos()))
    code = main(
        ["pretrain", "--data", str(tmp_path / "list.txt"), "--output", str(tmp_path / "run"), "--dry-run"]
        + f"--model vit_tiny --batch-size 2 --steps 1 --device cpu --workers {workers}".split()
    )
    said = capsys.readouterr()
    assert not (tmp_path / "run").exists()
    if workers == "0":  # decoded in the main process
        assert code == 0
    else:
        assert code == 2 and "of shared memory (2 workers, 2 batches of" in said.err


@pytest.mark.slow
def test_plan_and_doctor_tell(monkeypatch, capsys):
    mount(monkeypatch, 1 << 20)
    flags = "--gpus 16 --workers 8 --batch-size 8 --checkpointing none --parallel ddp"
    main(["plan", "--model", "vit_s", *flags.split()])
    # 8 GPUs x 17 batches x 32 clips of 2.3 MiB
    assert "shared memory of a node: 9.76 GiB at most" in capsys.readouterr().out
    main(["doctor"])
    said = capsys.readouterr().out
    assert "shared memory: /dev/shm has 1 MiB free of 64 MiB\n  little: 4 workers" in said


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm here")
def test_this_machines():
    found = find_shared_memory()
    assert 0 <= found.free <= found.total
