"""The run goes on: hung and crashed workers are replaced, bad videos written down, too many of them stop
it."""

import faulthandler
import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vmae.config import MaskConfig
from vmae.data import video_dataset
from vmae.data.dataset import PretrainDataset
from vmae.data.decode import DecodeError, VideoReader
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure, Quarantine
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError

SETTINGS = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))


class Noise(VideoReader):
    """A video without a file: its pictures follow from its name. What the name says goes wrong."""

    def __init__(self, entry):
        self.path = entry.path
        if "bad" in entry.path:
            raise DecodeError(f"{entry.path}: is bad")
        if "hang" in entry.path:
            time.sleep(1000)
        if "crash" in entry.path:
            faulthandler.disable()  # its report is for crashes that nobody meant
            os.kill(os.getpid(), signal.SIGSEGV)
        if "memory" in entry.path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "once" in entry.path:
            path = Path(entry.path.removeprefix("once-"))
            if not path.exists():
                path.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            path.unlink()  # the next time it kills again
        if "bug" in entry.path:
            raise KeyError("a bug")

    def __len__(self):
        return 30

    def _decode(self, indices):
        seed = sum(self.path.encode())
        return np.stack(
            [np.random.default_rng((seed, i)).integers(0, 256, (36, 40, 3), np.uint8) for i in indices]
        )

    def close(self):
        pass


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(video_dataset, "open_video", lambda entry, backend: Noise(entry))
    return lambda names: PretrainDataset([VideoEntry(name) for name in names], **SETTINGS)


GOOD = [f"v{i}" for i in range(11)]


@pytest.mark.parametrize(
    ("name", "error"), [("hang", "took more than 0.6 s"), ("crash", "crashed its worker (SIGSEGV)")]
)
def test_a_worker_that_hangs_or_crashes_is_replaced(make, tmp_path, name, error):
    """Its video is replaced, all else is as if the video had been undecodable from the start."""
    names = [*GOOD[:5], name, *GOOD[5:]]
    expected = make(names)
    expected.block(5, "")
    plain = list(build_loader(expected, batch_size=3, epochs=2))
    path = tmp_path / "quarantine.jsonl"
    began = time.monotonic()
    with build_loader(
        make(names), batch_size=3, epochs=2, num_workers=2, hang_s=0.6, quarantine=path
    ) as loader:
        batches = list(loader)
    assert time.monotonic() - began < 30
    assert [batch.ids for batch in batches] == [batch.ids for batch in plain]
    for one, other in zip(batches, plain, strict=True):
        assert torch.equal(one.clips, other.clips) and torch.equal(one.mask.visible, other.mask.visible)
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert line["path"] == name and line["library"] == "worker" and error in line["error"]


def test_workers_that_keep_dying(make):
    with pytest.raises(InputError, match="data workers keep dying, most likely because memory runs out"):
        list(build_loader(make(["memory"] * 12), batch_size=2, epochs=1, num_workers=1))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_video_that_kills_its_worker_twice_is_to_blame(make, tmp_path, workers):
    """As the out-of-memory killer does, with a signal that no process can catch."""
    path = tmp_path / "quarantine.jsonl"
    data = make([*GOOD * 3, "memory", *GOOD * 3])
    with build_loader(data, batch_size=3, epochs=2, num_workers=workers, quarantine=path) as loader:
        assert len(list(loader)) == 44
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert line == {
        "path": "memory",
        "error": "its worker was killed twice at this video (SIGKILL; out of memory?)",
        "library": "worker",
    }


def test_a_worker_killed_once_blames_nobody(make, tmp_path):
    """Nor does one that is killed again at a video that was decoded in between."""
    path = tmp_path / "quarantine.jsonl"
    names = [*GOOD, f"once-{tmp_path}/0"]  # kills the worker that opens it first, in each of three epochs
    with build_loader(make(names), batch_size=3, epochs=3, num_workers=1, quarantine=path) as loader:
        read = [name for batch in loader for _, _, name in batch.ids]
    assert sorted(read) == sorted(names * 3) and not path.exists()


# --- Too long, or only stopped for a while ---


class Slow:
    """A maker whose videos take 0.8 s each, in steps of 40 ms; tells when one begins."""

    def __init__(self, begun):
        self.begun, self.watch = begun, lambda video: None

    def set_watch(self, watch):
        self.watch = watch

    def block(self, video, reason):
        self.begun.send(f"blocked: {reason}")

    def __getitem__(self, task):
        self.watch(task)
        self.begun.send(task)
        for _ in range(20):
            time.sleep(0.04)
        return task


def test_a_suspicion_is_no_proof():
    """A video is given up only if it takes too long still some time after that was first seen."""
    ours, theirs = multiprocessing.Pipe()
    pool = WorkerPool(Slow(theirs), iter(range(3)), count=1, prefetch=1, hang_s=4.0)
    (worker,) = pool._workers
    assert ours.recv() == 0
    began = worker.slot[1]
    assert [pool._hangs(worker, began + after) for after in (3.9, 100.0, 101.9, 102.1)] == [
        False,
        False,
        False,
        True,
    ]
    assert next(pool) == 0 and ours.recv() == 1
    assert not pool._hangs(worker, worker.slot[1] + 200.0)  # another video: suspected afresh
    pool._hang_s = 100.0
    worker.suspected = None
    began = worker.slot[1]
    assert [pool._hangs(worker, began + after) for after in (101.0, 105.9, 106.1)] == [
        False,
        False,
        True,
    ]  # 5 s at most
    pool.close()


def _read_in_a_group_of_its_own(begun, answer):
    os.setpgid(0, 0)
    pool = WorkerPool(Slow(begun), iter(range(2)), count=1, prefetch=1, hang_s=2.0)
    answer.send((list(pool), pool.lost))


@pytest.mark.slow
class _Answers:
    """Gives what each task says."""

    def set_watch(self, watch):
        pass

    def __getitem__(self, task):
        return task()


def _answers(*tasks):
    pool = WorkerPool(_Answers(), iter(tasks), count=1, prefetch=1, hang_s=20)
    try:
        return list(pool)
    finally:
        pool.close()


def _tensor():
    return torch.arange(3)


def _unsendable():
    return lambda: None


def test_tensors_are_handed_over_where_the_folder_for_temporary_files_has_a_long_name(tmp_path, monkeypatch):
    folder = tmp_path / ("long " * 20)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert [answer.tolist() for answer in _answers(_tensor, _tensor)] == [[0, 1, 2]] * 2


def test_an_answer_that_cannot_be_handed_over_is_told():
    with pytest.raises(RuntimeError, match="_unsendable"):
        _answers(_tensor, _unsendable)


class FirstIsSlow(VideoTask):
    """Counts what was made while the first result takes long."""

    def __init__(self):
        super().__init__()
        self.made = multiprocessing.Value("i", 0)

    def __getitem__(self, task):
        if task == 0:
            time.sleep(0.5)
        with self.made.get_lock():
            self.made.value += 1
        return torch.full((2,), task)


def test_what_is_made_ahead_of_a_slow_result_is_bounded():
    """Each waiting result takes shared memory and open files."""
    maker = FirstIsSlow()
    pool = WorkerPool(maker, iter(range(40)), count=3, prefetch=2, hang_s=60)
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert next(pool).tolist() == [0, 0]
    assert maker.made.value <= 3 * 2 + 1  # the one that was taken makes room for one
    if files is not None:
        assert len(os.listdir("/proc/self/fd")) - files <= 3 * 2
    assert [int(result[0]) for result in pool] == list(range(1, 40))


@pytest.mark.slow
def test_processes_that_were_stopped_for_a_while_lose_no_video():
    """A run and its workers, stopped together in the middle of a video (by a debugger, or a virtual machine's
    pause)."""
    (begun, theirs), (answer, their_answer) = multiprocessing.Pipe(), multiprocessing.Pipe()
    run = multiprocessing.get_context("fork").Process(
        target=_read_in_a_group_of_its_own, args=(theirs, their_answer)
    )
    run.start()
    assert begun.poll(20) and begun.recv() == 0
    os.killpg(run.pid, signal.SIGSTOP)
    time.sleep(2.2)
    os.killpg(run.pid, signal.SIGCONT)
    assert answer.poll(20) and answer.recv() == ([0, 1], [])
    run.join()


def test_a_bug_is_no_bad_video(make):
    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        list(build_loader(make(["bug"] * 4), batch_size=2, epochs=1, num_workers=1))


def test_a_worker_that_somebody_stopped(make):
    loader = build_loader(make(GOOD), batch_size=2, num_workers=1)
    next(loader)
    os.kill(loader._iterator._workers[0].process.pid, signal.SIGTERM)
    with pytest.raises(RuntimeError, match="a data worker was stopped .exit code -15"):
        for _ in range(100):
            next(loader)


def test_workers_end_with_the_loader(make):
    loader = build_loader(make(GOOD), batch_size=2, num_workers=2)
    next(loader)
    processes = [worker.process for worker in loader._iterator._workers]
    loader.close()
    assert not any(process.is_alive() for process in processes) and list(loader) == []


def test_bad_settings(make):
    for options in ({"hang_s": 0}, {"max_bad_share": 1.5}, {"max_bad_share": -0.1}):
        with pytest.raises(InputError):
            build_loader(make(GOOD), batch_size=2, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_videos_stop_the_run(make, tmp_path, workers):
    data = make([f"{'bad' if i % 8 == 0 else 'v'}{i}" for i in range(400)])  # 12.5 %
    path = tmp_path / "new" / "quarantine.jsonl"
    loader = build_loader(data, batch_size=4, num_workers=workers, quarantine=path)
    with pytest.raises(InputError) as error:
        for _ in range(101):
            next(loader)
    expected = "No more than 20 of 400 videos may be bad (--max-bad-share 0.05)"
    assert (
        "reads failed (1" in str(error.value)
        and expected in str(error.value)
        and "check-data" in str(error.value)
    )
    assert "is bad; bad" in str(error.value) and str(path) in str(error.value)
    assert loader.quarantine.reads < 300
    assert len(path.read_text().splitlines()) == len(loader.quarantine.bad) > 10
    assert list(loader) == []


@pytest.mark.parametrize(
    ("total", "bad", "share", "stops"),
    [
        (4, 1, 0.05, False),
        (4, 2, 0.05, True),
        (4, 3, 0.05, True),
        (10, 1, 0.05, False),
        (10, 2, 0.05, True),
        (100, 5, 0.05, False),
        (100, 6, 0.05, True),
        (100, 7, 0.07, False),
        (100, 29, 0.29, False),
        (100, 30, 0.29, True),
        (50, 1, 0.0, True),
        (4, 3, 1.0, False),
    ],
)
def test_the_share_is_one_of_the_lists_videos(make, total, bad, share, stops):
    """However often they are read; one bad video is too much only where none is allowed."""
    data = make(
        [f"{'bad' if i < bad else 'v'}{i}" for i in range(total)] * 2
    )  # each is listed twice, and counts once
    loader = build_loader(data, batch_size=2 * total, epochs=2, max_bad_share=share)
    if stops:
        with pytest.raises(
            InputError, match=f"No more than {loader.quarantine.allowed} of {total} videos may be bad"
        ):
            list(loader)
        assert len(loader.quarantine.bad) > share * total
    else:
        assert len(list(loader)) == 2 and len(loader.quarantine.bad) == bad


@pytest.mark.parametrize(("one_in", "stops"), [(5, True), (10, True), (16, False), (20, False)])
def test_a_long_list_is_judged_before_its_end(one_in, stops):
    """With three standard deviations to spare: 10 % of 5 % allowed are seen within some 250 reads, 6.25 % not
    in 800."""
    quarantine = Quarantine(max_share=0.05, videos=10**6)
    for number in range(800):
        failed = [Failure(str(number), "is bad")] if number % one_in == 0 else []
        if stops and quarantine.reads > 260:
            pytest.fail("too late")
        try:
            quarantine.add(1 - len(failed), failed)
        except InputError as error:
            assert stops and quarantine.reads >= 200 and "No more than 50000 of 1000000" in str(error)
            return
    assert not stops


def test_the_same_video_again_is_no_other_bad_one():
    quarantine = Quarantine(max_share=0.05, videos=10**6)
    for _ in range(500):
        quarantine.add(1, [Failure("a", "is bad")])
    assert len(quarantine.bad) == 1 and quarantine.failures == 500


def test_a_resumed_run_writes_each_bad_video_once(make, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    names, options = ["bad1", "bad2", *GOOD * 6], {"quarantine": path, "max_bad_share": 0.5}
    for start in (0, 3):
        list(build_loader(make(names), batch_size=68, total_steps=6, start_step=start, **options))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["bad1", "bad2"]
    assert lines[0]["error"] == f"{lines[0]['path']}: is bad" and lines[0]["library"] is None
    path.write_text(path.read_text()[:-5])  # as a kill leaves it
    list(build_loader(make(names), batch_size=68, total_steps=1, **options))
    assert len(path.read_text().splitlines()) == 3  # the cut one is whole again, on a line of its own


def test_ranks_write_files_of_their_own(make, tmp_path):
    for rank in range(2):
        options = dict(rank=rank, world_size=2, quarantine=tmp_path / "quarantine.jsonl")
        list(build_loader(make(["bad", *GOOD]), batch_size=6, total_steps=12, **options))
    assert {path.name for path in tmp_path.iterdir()} == {"quarantine.jsonl", "quarantine-1.jsonl"}


def test_foreign_lines_in_the_quarantine_are_left_alone(make, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    foreign = b'17\n{"a": 1}\n\xff\xfe\n{"path": []}\nnull\n' + b"[" * 100_000 + b'\n{"path": "bad1"}\n'
    path.write_bytes(foreign)
    list(
        build_loader(
            make(["bad1", "bad2", *GOOD * 4]),
            batch_size=46,
            total_steps=3,
            quarantine=path,
            max_bad_share=0.5,
        )
    )
    added = path.read_bytes().removeprefix(foreign)
    assert json.loads(added)["path"] == "bad2"


def test_summary(tmp_path):
    quarantine = Quarantine(max_share=1)
    quarantine.add(30, [])
    assert quarantine.summary() == "all 30 videos read could be decoded"
    quarantine.add(8, [Failure("a.mp4", "a.mp4: cut", "decord"), Failure("b.mp4", "hung", "worker")])
    assert quarantine.summary() == (
        "2 of 40 reads failed (5.0%), of 2 videos (1 with decord, 1 with worker); the first: a.mp4: cut; "
        "b.mp4: hung"
    )
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        Quarantine(tmp_path / "file" / "quarantine.jsonl").add(0, [Failure("a", "b")])


class Foresighted(VideoTask):
    """Notes in a file what it does, and when it learns of its tasks."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def note(self, text):
        with open(self.path, "a") as file:
            file.write(f"{text}\n")

    def ahead(self, task):
        self.note(f"know {task}")
        if task == 3:
            raise RuntimeError("is raised again when the task is done, or never")

    def __getitem__(self, task):
        self.watch(task)
        end = time.monotonic() + 5
        while f"know {task + 1}" not in self.path.read_text() and task < 4 and time.monotonic() < end:
            time.sleep(0.01)
            self.watch(task)  # the next task is given meanwhile
        self.note(f"done {task}")
        return task


def test_a_worker_knows_of_its_next_task_in_the_middle_of_one(tmp_path):
    """So that what the next one needs can be asked for."""
    pool = WorkerPool(Foresighted(tmp_path / "notes"), iter(range(5)), count=1, prefetch=2, hang_s=10)
    assert list(pool) == list(range(5))
    notes = (tmp_path / "notes").read_text().split("\n")
    assert [notes.count(f"know {task}") for task in range(5)] == [1] * 5
    for task in range(1, 5):
        assert notes.index(f"know {task}") < notes.index(f"done {task - 1}")
