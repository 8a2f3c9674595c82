"""A run's folder has one holder, and a folder that goes away, or a disk that is full, ends the run with one
line."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.folder import CheckpointFolder, export_weights, find_weights
from vmae.checkpoint.format import find_damage
from vmae.cli import main
from vmae.files import folder_lock
from vmae.files.folder_lock import LOCK_NAME, FolderLock, refuse_if_locked
from vmae.train.loop import Trainer
from vmae.train.metrics import read_log

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def hold(folder: Path, pipe) -> None:
    with FolderLock(folder, "a test's run"):
        pipe.send(True)
        pipe.recv()


@contextlib.contextmanager
def holder(folder: Path):
    """Another process that holds the folder."""
    pipe, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, theirs))
    process.start()
    pipe.recv()
    try:
        yield process, pipe
    finally:
        process.kill()
        process.join()


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    found = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "Traceback" not in error, error
    return found[0]


# --- One holder ---


def test_a_second_run_is_refused_before_it_writes_anything(pretrain, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(run, "--steps", "2") == 0
    with holder(run) as (process, pipe):
        before = contents(run)
        for flags in (["--steps", "8"], ["--no-resume"], ["--resume", "last-good"], ["--dry-run"]):
            assert pretrain(run, *flags) == 2
            error = one_line(capsys)
            assert (
                f"{run} is in use by a test's run (process {process.pid} on " in error
                and "another --output" in error
            )
        assert contents(run) == before
        pipe.send(True)
        process.join()
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-00000002",
        "config.yaml",
        "log.jsonl",
        "run.json",
        "weights.pth",
    ]
    assert pretrain(run, "--steps", "3") == 0


def test_the_lock_is_there_during_a_run_and_gone_after_any_end(pretrain, at_step, tmp_path, capsys):
    seen = []

    def look():
        seen.append(json.loads((tmp_path / "run" / LOCK_NAME).read_text()))

    at_step(1, look)
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert pretrain(tmp_path / "run") == 0
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert pretrain(tmp_path / "run") == 130
    for step, error in ((4, RuntimeError), (4, KeyboardInterrupt)):
        at_step(step, lambda error=error: (_ for _ in ()).throw(error("sudden")))
        with contextlib.suppress(RuntimeError):
            pretrain(tmp_path / "run")
        assert not (tmp_path / "run" / LOCK_NAME).exists()
    assert seen[0]["pid"] == os.getpid() and {"host", "started", "date", "boot"} <= set(seen[0])
    assert pretrain(tmp_path / "run") == 0 and not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("detect-temporal", "FEATURES DATASET --output {run}"),
        (
            "finetune",
            "--data {world}/train.txt --output {run} --model vit_tiny --image-size 32 --num-frames 4 "
            "--device cpu",
        ),
        ("evaluate", "{world}/train.txt --output {run} --checkpoint {weights} --device cpu"),
        ("features", "{plain} --output {run} --checkpoint {weights} --device cpu"),
        ("pack", "{world}/train.txt {run}"),
    ],
)
def test_other_commands_are_refused_too(labelled_world, tmp_path, capsys, command, flags):
    model = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
    weights, about = tmp_path / "weights.pth", {"model": model.to_dict(), "clip": {}}
    export_weights(weights, build_classifier(model, 3).state_dict(), config=about)
    plain = tmp_path / "plain.txt"
    plain.write_text(f"{labelled_world}/v00 1 10\n")
    names = {"run": tmp_path / "run", "world": labelled_world, "weights": weights, "plain": plain}
    with holder(tmp_path / "run") as (process, _):
        assert main([command, *flags.format(**names).split()]) == 2
        assert f"in use by a test's run (process {process.pid} on " in one_line(capsys)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_NAME]


@pytest.mark.parametrize("waited_for", [True, False])  # False: a zombie, as under a parent that does not look
def test_a_killed_run_leaves_a_lock_that_stops_nobody(pretrain, tmp_path, waited_for):
    with holder(tmp_path / "run") as (process, _):
        process.kill()
        if waited_for:
            process.join()
        else:
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.001)
        assert (tmp_path / "run" / LOCK_NAME).exists()
        assert pretrain(tmp_path / "run") == 0
        assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_stopped_process_still_holds(tmp_path):
    with holder(tmp_path) as (process, _):
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(InputError, match=f"process {process.pid}"):
            refuse_if_locked(tmp_path)


BOOTED = folder_lock._boot_time()


# Changes to the lock of a living process -> words of the refusal, or None where it is stale.
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "is in use by a test's run"),
        ({"started": 1}, None),  # the process id came again
        ({"boot": "another", "since": BOOTED - 60}, None),  # a reboot
        (
            {"boot": "another"},
            "on another machine.*delete .*run.lock",
        ),  # younger than our boot: a machine of the same name
        (
            {"boot": "another", "host": "node7", "since": BOOTED - 60},
            "on node7,.*on another machine.*delete .*run.lock",
        ),
        ({"boot": "another", "machine": "another", "since": BOOTED - 60}, "on another machine"),
        ({"pids": "pid:[1]"}, "in another container.*delete .*run.lock"),
        ({"boot": None}, "on another machine"),
    ],
)
def test_stale_locks_are_told_from_living_ones(tmp_path, changes, words):
    with holder(tmp_path):
        lock = tmp_path / LOCK_NAME
        lock.write_text(json.dumps({**json.loads(lock.read_text()), **changes}))
        if words is None:
            refuse_if_locked(tmp_path)
            with FolderLock(tmp_path):
                assert json.loads(lock.read_text())["pid"] == os.getpid()
        else:
            with pytest.raises(InputError, match=words):
                refuse_if_locked(tmp_path)
            with pytest.raises(InputError, match=words), FolderLock(tmp_path):
                pass
            assert lock.exists()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME] * (words is not None)


@pytest.mark.parametrize("text", ["", "17", "{}", "\xff", "[" * 100_000, '{"pid": "x"}'])
def test_a_lock_that_says_nothing_is_respected(tmp_path, text):
    (tmp_path / LOCK_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="not to be understood.*delete .*run.lock"), FolderLock(tmp_path):
        pass


def test_a_job_started_again_elsewhere_takes_the_lock_of_its_earlier_start(tmp_path, monkeypatch):
    for job, count, first in (
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", None),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "0"),
    ):
        with monkeypatch.context() as patched:
            patched.setenv(job, "4711")
            if first is not None:
                patched.setenv(count, first)
            lock = FolderLock(tmp_path)
            (tmp_path / LOCK_NAME).write_text(json.dumps({**lock.about, "boot": "another", "host": "node7"}))
            with pytest.raises(InputError, match="node7"):  # the same start: two steps of one job
                refuse_if_locked(tmp_path)
            patched.setenv(count, "1")
            with FolderLock(tmp_path):
                pass
            (tmp_path / LOCK_NAME).write_text(json.dumps({**lock.about, "boot": "another", "host": "node7"}))
            patched.setenv(job, "4712")
            with pytest.raises(InputError, match="node7"):
                refuse_if_locked(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun calls all runs that are given no name
    assert FolderLock(tmp_path).about["launches"] == {}


@pytest.mark.parametrize(
    ("holder_job", "squeue", "stale"),
    [
        ("4711", "exit 0", True),  # over, and not forgotten yet
        ("4711", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("4711", "echo RUNNING", False),
        ("4711", "echo PENDING", False),  # to be started again
        ("4711", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
        ("4711", "sleep 60", False),
        (None, "exit 0", False),  # of no job
        ("south 4711", "exit 0", False),  # of another cluster
    ],
)
def test_a_slurm_job_asks_whether_another_one_is_over(tmp_path, monkeypatch, holder_job, squeue, stale):
    """A node was lost, or memory was: the lock stays, and the same part is started on another machine."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(folder_lock, "_SQUEUE_S", 0.5)
    about = {**FolderLock(tmp_path).about, "boot": "another", "host": "node7"}
    about["launches"] = {} if holder_job is None else {f"SLURM_JOB_ID {holder_job}": 0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).write_text(json.dumps(about))
    with pytest.raises(InputError, match="node7"):  # not inside a job: nobody is asked
        refuse_if_locked(tmp_path / "run")
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    if stale:
        with FolderLock(tmp_path / "run"):
            pass
    else:
        with pytest.raises(InputError, match="node7"):
            refuse_if_locked(tmp_path / "run")


def test_a_lock_that_came_in_a_stale_ones_place_stays(tmp_path):
    late = FolderLock(tmp_path)
    stale = {**late.about, "boot": "another", "since": BOOTED - 60, "token": "stale"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(stale))
    assert refuse_if_locked(tmp_path) == stale
    with FolderLock(tmp_path):  # took it since
        late._clear(stale)
        assert (tmp_path / LOCK_NAME).exists()


def contend(folder: Path, start, end, results) -> None:
    start.wait()
    try:
        with FolderLock(folder) as lock:
            results.put("held")
            end.wait()
            lock.check()
    except InputError:
        results.put("refused")


@pytest.mark.parametrize("links", [True, False])  # False: a file system without hard links
@pytest.mark.parametrize("stale", [True, False])
def test_of_many_that_come_at_once_one_holds(tmp_path, monkeypatch, stale, links):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for turn in range(3):
        folder = tmp_path / str(turn)
        if stale:
            with holder(folder) as (process, _):
                process.kill()
        start, end, results = FORK.Event(), FORK.Event(), FORK.Queue()
        crowd = [FORK.Process(target=contend, args=(folder, start, end, results)) for _ in range(6)]
        for process in crowd:
            process.start()
        start.set()
        found = sorted(results.get(timeout=20) for _ in crowd)
        end.set()
        for process in crowd:
            process.join()
        assert found == ["held"] + ["refused"] * 5 and results.empty()
        assert not folder.exists() or not list(folder.iterdir())  # it goes with a holder who has made it


def test_a_lock_deleted_by_hand_comes_back_and_one_that_was_taken_ends_the_run(
    pretrain, at_step, tmp_path, capsys
):
    lock = tmp_path / "run" / LOCK_NAME
    there = []
    at_step(2, lock.unlink)
    at_step(4, lambda: there.append(lock.exists()))
    assert pretrain(tmp_path / "run") == 0 and there == [True]
    other = json.dumps({**FolderLock(tmp_path).about, "what": "a thief"})
    at_step(7, lambda: lock.write_text(other))
    assert pretrain(tmp_path / "run", "--steps", "9") == 2
    assert "was taken over by a thief" in one_line(capsys)
    assert lock.read_text() == other and not (tmp_path / "run" / "checkpoint-00000009").exists()


def test_a_run_that_ended_while_this_one_was_checked_is_not_undone(pretrain, tmp_path, monkeypatch, capsys):
    """Between the choice of a checkpoint and the lock, another run went on."""
    import vmae.train.run

    assert pretrain(tmp_path / "run", "--steps", "2") == 0
    plain = vmae.train.run.open_folder

    def late(*args):
        monkeypatch.setattr(vmae.train.run, "open_folder", plain)
        assert pretrain(tmp_path / "run", "--steps", "4") == 0
        return plain(*args)

    monkeypatch.setattr(vmae.train.run, "open_folder", late)
    assert pretrain(tmp_path / "run", "--steps", "3") == 2
    assert "another run has just written to" in one_line(capsys)
    assert len(losses(tmp_path / "run")) == 4 and not (tmp_path / "run" / LOCK_NAME).exists()


@pytest.mark.slow
def test_two_real_runs_in_one_folder_and_a_kill(labelled_world, tmp_path):
    data, run = tmp_path / "frames.txt", tmp_path / "run"
    data.write_text("".join(f"{labelled_world}/v{video:02} 1 10\n" for video in range(12)))
    size = "--model vit_tiny --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75"
    flags = [*size.split(), "--batch-size", "2", "--workers", "1", "--log-every", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "vmae", "pretrain", "--data", str(data), "--output", str(run), *flags]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *more], env=environment, stdout=pipe, stderr=pipe, text=True)

    def wait_for(process: subprocess.Popen, steps: int) -> None:
        while len(read_log(run / "log.jsonl")) < steps:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    first = start("--steps", "100000", "--save-every", "5")
    started = [first]
    try:
        wait_for(first, 7)
        started.append(second := start("--no-resume"))
        out, err = second.communicate(timeout=60)
        assert (
            second.returncode == 2
            and f"in use by a training run (process {first.pid} on " in err
            and err.count("\n") == 1
        )
        assert first.poll() is None and not list(run.glob("previous-*"))
        first.kill()
        started.append(
            third := start("--steps", "100000")
        )  # at once: the first one's worker may live on for a moment
        wait_for(third, len(read_log(run / "log.jsonl")) + 3)
        while run.exists():  # the run may remove its lock at the same moment
            shutil.rmtree(run, ignore_errors=True)
        out, err = third.communicate(timeout=60)
        assert third.returncode == 2 and "resuming from" in out and not run.exists()
        assert [line for line in err.splitlines() if line.startswith("error: ")][0].count("is gone") == 1
        assert "Traceback" not in err
    finally:
        for process in started:
            process.kill()


# --- A folder that goes away ---


def remove(run: Path) -> None:
    shutil.rmtree(run)


def rename(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def replace(run: Path) -> None:
    rename(run)
    run.mkdir()


def unlink_log(run: Path) -> None:
    (run / "log.jsonl").unlink()


def log_of_another(run: Path) -> None:
    unlink_log(run)
    (run / "log.jsonl").write_text("mine\n")


# The next write is a line of the log; a checkpoint; one in the background; TensorBoard's too.
NEXT = [
    "--log-every 1",
    "--log-every 100 --save-every 4",
    "--log-every 100 --save-every 4 --async-save",
    "--tensorboard",
]


@pytest.mark.parametrize("flags", NEXT)
@pytest.mark.parametrize("how", [remove, rename, replace])
def test_a_folder_that_goes_away_ends_the_run_and_is_not_made_again(
    pretrain, at_step, tmp_path, capsys, how, flags
):
    run = tmp_path / "run"
    at_step(3, lambda: how(run))
    assert pretrain(run, "--save-every", "2", *flags.split()) == 2
    shown = capsys.readouterr()
    error = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "Traceback" not in shown.err and "gone" in error[0] and str(run) in error[0], (
        shown.err
    )
    assert "done:" not in shown.out
    assert run.exists() == (how is replace) and (how is not replace or list(run.iterdir()) == [])


@pytest.mark.parametrize("how", [unlink_log, log_of_another])
def test_a_log_that_goes_away_ends_the_run(pretrain, at_step, tmp_path, capsys, how):
    at_step(3, lambda: how(tmp_path / "run"))
    assert pretrain(tmp_path / "run") == 2
    assert "log.jsonl is gone" in one_line(capsys)
    if how is log_of_another:
        assert (tmp_path / "run" / "log.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("place", ["_export_last", "export_run"])
def test_a_folder_that_goes_away_before_the_export_ends_the_run(
    pretrain, tmp_path, capsys, monkeypatch, place
):
    import vmae.train.run

    plain = getattr(vmae.train.run, place)

    def late(*args):
        if place == "export_run":
            plain(*args)
        shutil.rmtree(tmp_path / "run")
        if place != "export_run":
            plain(*args)

    monkeypatch.setattr(vmae.train.run, place, late)
    assert pretrain(tmp_path / "run") == 2
    assert "is gone" in one_line(capsys) and not (tmp_path / "run").exists()


def test_an_unmounted_folder_ends_the_run(pretrain, at_step, small_disk, capsys):
    disk = small_disk(20_000_000)
    at_step(3, lambda: subprocess.run(["umount", "-l", disk], check=True))
    assert pretrain(disk / "run") == 2
    assert "is gone" in one_line(capsys) and list(disk.iterdir()) == []


def test_a_folder_that_goes_away_hides_no_loss_that_is_not_finite(pretrain, tmp_path, capsys, monkeypatch):
    def clip(self, record):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return torch.tensor(float("nan"))

    monkeypatch.setattr(Trainer, "clip", clip)
    assert pretrain(tmp_path / "run") == 2
    error = one_line(capsys)
    assert (
        "step 0: the loss is" in error
        and "are not written down: output folder" in error
        and "is gone" in error
    )
    assert not (tmp_path / "run").exists()


# --- A full disk ---


def fill(disk: Path, left: int = 0) -> None:
    """With a file `fill`, but for `left` bytes, once no checkpoint is being written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    with contextlib.suppress(OSError), open(disk / "fill", "wb", buffering=0) as file:
        size = shutil.disk_usage(disk).free - left
        while size > 0:
            size -= file.write(b"\0" * min(size, 1 << 16))


@pytest.mark.parametrize("flags", ["", "--async-save", "--tensorboard"])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(
    pretrain, at_step, small_disk, tmp_path, capsys, flags
):
    assert pretrain(tmp_path / "whole", "--save-every", "2") == 0
    disk = small_disk(8_000_000)
    at_step(3, lambda: fill(disk, left=300_000))  # enough for the log, and not for a checkpoint of 1 MB
    assert pretrain(disk / "run", "--save-every", "2", *flags.split()) == 2
    error = one_line(capsys)
    # Of tensors as small as these, a quarter of the file is wrapping.
    wanted = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-00000006").iterdir()) / 1e6
    assert f"cannot write {disk}/run/checkpoint-00000004: No space left on device" in error
    named = float(error.partition(" MB wanted")[0].rpartition("(")[2])
    assert 0.7 * wanted < named < 1.01 * wanted and f" MB free in {disk}/run" in error
    assert f"the newest whole one is {disk}/run/checkpoint-00000002" in error
    run = CheckpointFolder(disk / "run")
    assert run.unfinished() == [] and [path.name for path in run.named()] == ["checkpoint-00000002"]
    assert find_damage(run.latest()) == []
    (disk / "fill").unlink()
    assert pretrain(disk / "run", "--save-every", "2", *flags.split()) == 0
    assert losses(disk / "run") == losses(tmp_path / "whole")


def test_a_disk_too_full_for_a_line_of_the_log(pretrain, at_step, small_disk, capsys):
    disk = small_disk(8_000_000)
    log = disk / "run" / "log.jsonl"

    def leave_nine_bytes():
        fill(disk)
        with open(log, "a") as file:
            file.write(" " * (4096 - log.stat().st_size % 4096 - 10) + "\n")

    at_step(3, leave_nine_bytes)
    assert pretrain(disk / "run", "--save-every", "2") == 2
    error = one_line(capsys)
    assert "No space left on device (0.0 MB free in" in error and "the newest whole one is" in error
    (disk / "fill").unlink()
    assert pretrain(disk / "run", "--save-every", "2") == 0
    assert [record["step"] for record in read_log(disk / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not (disk / "run" / "log.skipped").exists()  # no half line was left


def test_a_disk_too_full_for_tensorboard(pretrain, at_step, small_disk, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    traces = []
    monkeypatch.setattr(threading, "excepthook", traces.append)
    disk = small_disk(8_000_000)
    at_step(
        3, lambda: fill(disk)
    )  # the last pages of both logs have room for some lines, TensorBoard's for fewer
    assert pretrain(disk / "run", "--tensorboard", "--steps", "40", "--save-every", "100") == 2
    error = one_line(capsys)
    assert "run/tensorboard: No space left on device" in error and "there is no whole one yet" in error
    assert traces == [] and threading.excepthook == traces.append  # its writer is a thread


def test_a_disk_that_is_full_at_the_start_and_at_the_export(pretrain, small_disk, monkeypatch, capsys):
    import vmae.train.run

    disk = small_disk(8_000_000)
    fill(disk)
    assert pretrain(disk / "run") == 2
    assert "No space left on device" in one_line(capsys) and list((disk / "run").iterdir()) == []
    (disk / "fill").unlink()
    plain = vmae.train.run.export_run
    monkeypatch.setattr(vmae.train.run, "export_run", lambda *args: (fill(disk, left=100_000), plain(*args)))
    assert pretrain(disk / "run") == 2
    error = one_line(capsys)
    assert "weights.pth: No space left on device" in error and "MB wanted" in error
    (disk / "fill").unlink()
    monkeypatch.setattr(vmae.train.run, "export_run", plain)
    assert pretrain(disk / "run") == 0 and (disk / "run" / "weights.pth").exists()


# --- Checkpoints without a manifest ---


@pytest.mark.parametrize("how", ["missing", "a folder", "a dangling link"])
def test_a_checkpoint_without_a_manifest_is_passed_over_aloud_and_kept(
    pretrain, tmp_path, capsys, caplog, how
):
    run = tmp_path / "run"
    assert pretrain(run, "--save-every", "2") == 0
    expected = losses(run)
    manifest = run / "checkpoint-00000006" / "manifest.json"
    manifest.unlink()
    if how == "a folder":
        manifest.mkdir()
    elif how == "a dangling link":
        manifest.symlink_to("nowhere")
    caplog.clear()
    assert find_weights(run).name == "checkpoint-00000004"
    assert "checkpoint-00000006: it has no manifest.json that can be read" in caplog.text
    capsys.readouterr()
    for flags in ([], ["--resume", "last-good"]):
        assert pretrain(run, *flags, "--dry-run") == 0
    assert pretrain(run) == 0
    text = capsys.readouterr().out
    assert (
        "note: passed over, incomplete: checkpoint-00000006: it has no manifest.json that can be read" in text
    )
    assert "resuming from" in text and "step 4" in text and losses(run) == expected
    assert sorted(os.listdir(run / "previous-1" / "checkpoint-00000006"))[:2] == [".metadata", "__0_0.distcp"]


def test_where_no_checkpoint_has_a_manifest_a_fresh_start_says_so(pretrain, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-00000006").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-00000007").write_text("no folder")
    assert pretrain(tmp_path / "run", "--steps", "1") == 0
    text = capsys.readouterr().out
    assert (
        "checkpoint-00000006: it has no manifest.json" in text
        and "checkpoint-00000007: it is no folder" in text
    )
    assert "a fresh start" in text and (tmp_path / "run" / "previous-1" / "checkpoint-00000006").is_dir()


# --- Several ranks ---


def pretrain_rank(data: Path, run: Path, fill_at: int | None) -> tuple[int, str]:
    torch.set_num_threads(1)
    plain = Trainer.clip

    def clip(self, record):
        if record.step + 1 == fill_at and self.parallel.is_main:
            fill(run.parent, left=100_000)
        return plain(self, record)

    Trainer.clip = clip
    flags = "--model micro --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75"
    more = "--batch-size 1 --steps 4 --save-every 2 --workers 0 --device cpu --parallel fsdp --log-every 1"
    flags += " --no-tensorboard"
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main(["pretrain", "--data", str(data), "--output", str(run), *f"{flags} {more}".split()])
    return code, error.getvalue()


@pytest.mark.slow
def test_all_ranks_end_with_the_line_of_the_one_that_knows(pretrain, run_ranks, small_disk, tmp_path):
    disk, data = (
        small_disk(8_000_000),
        tmp_path / "frames.txt",
    )  # `pretrain` has made the list, and named the model
    for code, error in run_ranks(2, pretrain_rank, data, disk / "run", 3):
        assert (
            code == 2
            and "checkpoint-00000004: No space left on device (" in error
            and "Traceback" not in error
        )
        assert f"the newest whole one is {disk}/run/checkpoint-00000002" in error
    with holder(disk / "run") as (process, _):
        for code, error in run_ranks(2, pretrain_rank, data, disk / "run", None):
            assert code == 2 and f"in use by a test's run (process {process.pid}" in error
    (disk / "fill").unlink()
    assert [code for code, _ in run_ranks(2, pretrain_rank, data, disk / "run", None)] == [0, 0]
    data.write_text("".join(data.read_text().splitlines(keepends=True)[::-1]))
    for code, error in run_ranks(2, pretrain_rank, data, disk / "run", None):
        assert code == 2 and "is not the list that" in error
