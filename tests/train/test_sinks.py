"""Numbers beside `log.jsonl`: a service gets each step once, and whatever it does, the run is the same."""

import contextlib
import importlib.util
import io
import os
import platform
import signal
import sqlite3
import sys
import threading
import time

import pytest

from vmae.train import sinks
from vmae.train.metrics import RunLog, read_log
from vmae.train.sinks import SERVICES, Background, Service, numbers_of


class Kept:
    """A service that keeps what it gets, by run id; an instance is one start."""

    runs: dict = {}
    closed = 0

    def __init__(self, service, folder, say):
        self.lines = Kept.runs.setdefault(service.run_id(folder), [])
        self.service = service
        Kept.last = service

    def write(self, step, values):
        self.lines.append((step, values))

    def close(self):
        Kept.closed += 1


class Failing(Kept):
    def write(self, step, values):
        raise ConnectionError("no network\nsecond line")


class Hanging(Kept):
    def write(self, step, values):
        time.sleep(60)


@pytest.fixture
def service(monkeypatch):
    """`service(kind)`: `--log-to wandb` is that kind."""
    monkeypatch.setattr(Kept, "runs", {})
    monkeypatch.setattr(Kept, "closed", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    return lambda kind: monkeypatch.setitem(SERVICES, "wandb", kind)


def losses(folder):
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def test_numbers_of_a_line():
    line = {"step": 3, "loss": 0.5, "samples": {"one": 2, "name": "x"}, "text": "y", "none": None}
    assert numbers_of(line) == {"loss": 0.5, "samples/one": 2}


def test_a_service_gets_each_line_and_the_settings(pretrain, service, tmp_path):
    service(Kept)
    assert pretrain(tmp_path / "a", "--log-to", "wandb", "--log-project", "shapes") == 0
    ((_, lines),) = Kept.runs.items()
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5, 6] and Kept.closed == 1
    assert [values["loss"] for _, values in lines] == losses(tmp_path / "a")
    assert (Kept.last.project, Kept.last.name) == ("shapes", "a")
    assert Kept.last.settings["model"]["embed_dim"] == 48 and "output" not in Kept.last.settings
    assert pretrain(tmp_path / "b") == 0 and Kept.closed == 1, "off by default"
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_resumed_run_goes_on_in_the_same_one_without_a_step_twice(
    pretrain, at_step, service, tmp_path, capsys
):
    """Stopped at step 5, whose last checkpoint is of step 4: step 5 is logged again, and not sent again."""
    service(Kept)
    flags = ("--log-to", "wandb", "--save-every", "4", "--log-name", "x")

    def fail():
        raise KeyError("a bug")

    at_step(6, fail)
    with pytest.raises(KeyError):
        pretrain(tmp_path / "a", *flags)
    assert Kept.closed == 1
    assert pretrain(tmp_path / "a", *flags) == 0
    assert "resuming from" in capsys.readouterr().out
    ((_, lines),) = Kept.runs.items()
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5, 6] and Kept.last.name == "x"


def test_lines_that_an_earlier_start_logged_are_not_sent_again(service, tmp_path):
    service(Kept)
    sent = Service(kind="wandb", project=None, name="a", settings={})
    for start, steps in ((0, (1, 2, 3, 4, 5)), (3, (4, 5, 6, 7))):
        options = dict(tensorboard=False, stream=io.StringIO(), service=sent)
        with contextlib.closing(RunLog(tmp_path, start, 9, **options)) as log:
            for step in steps:
                log.record({"step": step, "loss": 1.0 / step})
    ((_, lines),) = Kept.runs.items()
    assert lines == [(step, {"loss": 1.0 / step}) for step in range(1, 8)] and Kept.closed == 2


def test_the_end_waits_for_what_is_still_to_be_sent():
    class Slow:
        lines: list = []

        def write(self, step, values):
            time.sleep(0.05)
            self.lines.append(step)

        def close(self):
            self.lines.append("closed")

    sink = Background("x", Slow, print)
    for step in (1, 2, 3):
        sink.write(step, {})
    sink.close()
    assert Slow.lines == [1, 2, 3, "closed"]


def test_a_run_that_begins_anew_is_another_one(pretrain, service, tmp_path):
    service(Kept)
    for flags in ((), ("--no-resume",)):
        assert pretrain(tmp_path / "a", "--log-to", "wandb", "--steps", "2", *flags) == 0
    assert [[step for step, _ in lines] for lines in Kept.runs.values()] == [[1, 2], [1, 2]]


def test_a_service_that_fails_is_told_once_and_changes_nothing(pretrain, service, tmp_path, capsys):
    service(Failing)
    assert pretrain(tmp_path / "a", "--log-to", "wandb") == 0
    error = capsys.readouterr().err
    assert error.count("--log-to wandb: nothing more is sent: no network; the run goes on") == 1
    assert "second line" not in error and pretrain(tmp_path / "b") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_service_that_hangs_holds_a_run_for_a_bounded_time(
    pretrain, service, tmp_path, capsys, monkeypatch
):
    service(Hanging)
    monkeypatch.setattr(sinks, "PATIENCE_S", 0.1)
    start = time.perf_counter()
    assert pretrain(tmp_path / "a", "--log-to", "wandb") == 0 and time.perf_counter() - start < 30
    assert "not all was sent within 0.1 s of the run's end" in capsys.readouterr().err


def test_lines_that_nobody_takes_are_left_out(monkeypatch):
    monkeypatch.setattr(sinks, "ROOM", 2)
    go, told = threading.Event(), []

    def start():
        go.wait()
        raise OSError("gone")

    sink = Background("x", start, told.append)
    for step in range(1, 9):
        sink.write(step, {"loss": 1.0})
    assert len(told) == 1 and "too slowly; beyond 2 that wait" in told[0]
    sink.close()
    go.set()
    sink._thread.join(10)
    assert len(told) == 1, "said once"


def test_a_signal_closes_the_service(pretrain, at_step, service, tmp_path):
    service(Kept)
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert pretrain(tmp_path / "a", "--log-to", "wandb") == 0
    ((_, lines),) = Kept.runs.items()
    assert [step for step, _ in lines] == [1, 2, 3] and Kept.closed == 1


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_told_before_anything_is_written(pretrain, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert pretrain(tmp_path / "a", "--log-to", name) == 2
    assert f"--log-to {name} needs the {name} package: pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_wandb_for_real(pretrain, tmp_path, monkeypatch, capsys):
    """Offline: two starts of one run, and nothing of the machine in its files."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for steps in (3, 6):
        flags = ("--log-to", "wandb", "--steps", steps, "--save-every", 3)
        assert pretrain(tmp_path / "a", *flags) == 0
        shown = capsys.readouterr().err
        assert "no key of W&B was found" in shown and "warning: --log-to" not in shown
        if steps == 3:
            (tmp_path / "a" / "weights.pth").unlink()
    files = sorted((tmp_path / "a" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one run id"
    text = b"".join(file.read_bytes() for file in files)
    assert b"loss_mean" in text and b"embed_dim" in text
    for secret in (platform.node(), os.environ.get("HOME", "/root"), os.getcwd(), sys.executable):
        assert bytes([len(secret)]) + secret.encode() not in text, secret  # texts come with their lengths


@pytest.mark.slow
def test_trackio_for_real(pretrain, tmp_path, monkeypatch, capsys):
    """Two starts are one run there, with each step once."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    for steps in (3, 6):
        assert pretrain(tmp_path / "a", "--log-to", "trackio", "--steps", steps, "--save-every", 3) == 0
        assert "warning: --log-to" not in capsys.readouterr().err
        if steps == 3:
            (tmp_path / "a" / "weights.pth").unlink()
    (base,) = (tmp_path / "trackio").rglob("vmae*.db")
    with sqlite3.connect(base) as rows:
        found = rows.execute("select run_name, step from metrics order by step").fetchall()
    assert [step for _, step in found] == [1, 2, 3, 4, 5, 6] and len({name for name, _ in found}) == 1
