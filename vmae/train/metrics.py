"""What a run says about itself: JSONL and TensorBoard logs, the progress line, `run.json`, and the trivial
predictors.

Legend: B clips, Nk counted tokens, Nv visible tokens, P values of a tubelet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.folder import CheckpointFolder
from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.files.atomic import why_not_written, write_atomically
from vmae.files.json_files import read_json, read_json_lines
from vmae.masking import DualMask
from vmae.model.cost import peak_flops
from vmae.model.embed import statistics_of
from vmae.train.compiled import CompileWatch
from vmae.train.pretrain_settings import RunConfig
from vmae.train.sinks import Background, Service, TensorBoard, numbers_of
from vmae_kernels import patch_loss, patch_targets_ref

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]  # Windows has no such module

DATA_SHARE_WARNING = 0.10
LOG_NAME, SKIPPED_NAME = "log.jsonl", "log.skipped"
RUN_NAME = "run.json"
BOARD_NAME = "tensorboard"


@dataclass
class StepMeter:
    """Sums over the steps since the last flush."""

    steps: int = 0
    loss: float = 0.0
    clips: int = 0
    step_s: float = 0.0
    data_s: float = 0.0
    replaced: int = 0
    lossless: int = 0  # steps that were left out because their loss is not finite

    def add(self, *, loss: float, clips: int, step_s: float, data_s: float, replaced: int = 0) -> None:
        self.steps += 1
        if math.isfinite(loss):
            self.loss += loss
        else:
            self.lossless += 1
        self.clips += clips
        self.step_s += step_s
        self.data_s += data_s
        self.replaced += replaced

    @property
    def data_share(self) -> float:
        """Share of the time in which the device waited for data."""
        return self.data_s / self.step_s if self.step_s else 0.0

    def means(self) -> dict[str, Any]:
        """Mean loss (None where none was finite) and seconds a step, clips a second, and how many videos had
        to be replaced."""
        steps = max(self.steps, 1)
        return {
            "loss_mean": None if steps == self.lossless else self.loss / (steps - self.lossless),
            "clips_per_s": self.clips / self.step_s if self.step_s else 0.0,
            "data_share": self.data_share,
            "step_s": self.step_s / steps,
            "data_s": self.data_s / steps,
            "replaced": self.replaced,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on the GPU, or resident in this process; 0 where the system does not
    tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def flops_utilisation(flops: float | None, device: torch.device, dtype: str) -> float | None:
    """Share of the device's peak that `flops` a second are; None where either is not known."""
    if not flops or device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device), dtype)
    return flops / peak if peak else None


def read_log(path: str | Path, /, **keys: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The lines of a JSONL log that are whole, in order; empty where there is no file. `keys`: see
    `read_json_lines`."""
    return read_json_lines(path, **keys).records


def loss_of_last_tenth(records: list[dict[str, Any]], total_steps: int) -> float | None:
    """Mean loss of the last tenth of a run, to a line of the log; None where nothing of it was logged."""
    steps = [record for record in records if isinstance(record.get("step"), (int, float))]
    last = [record.get("loss_mean") for record in steps if record["step"] > 0.9 * total_steps]
    losses = [loss for loss in last if isinstance(loss, (int, float))]
    return sum(losses) / len(losses) if losses else None


def service_of(run: RunConfig, settings: dict[str, Any]) -> Service | None:
    """Where `--log-to` sends the numbers of a run, and `settings`."""
    if run.log_to == "none":
        return None
    name = run.log_name or Path(run.output).absolute().name
    return Service(kind=run.log_to, project=run.log_project, name=name, settings=settings)


def board_folder(run: RunConfig) -> Path:
    """Where TensorBoard files of a run go: `log_dir`, unless that is the run's own folder."""
    if run.log_dir is None or Path(run.log_dir).absolute() == Path(run.output).absolute():
        return Path(run.output) / BOARD_NAME
    return Path(run.log_dir)


@dataclass
class RunLog:
    """Where the steps of a run are written: `log.jsonl`, TensorBoard and the terminal.

    A run that goes on from step s drops what an earlier one logged after s, so that every step is there once.
    Lines that are no records of a step (cut short, spoilt, someone else's) move to `log.skipped`.

    Args:
        folder: of the run.
        start_step, total_steps: of this start.
        tensorboard: also write TensorBoard files, if the package is there.
        stream: the terminal; None means stderr. A progress bar where it is one, else a line at most every
            `quiet_s` seconds.
        check: raises InputError where the folder is no longer the run's, see `FolderLock.check`.
        board: folder of TensorBoard files; None means `tensorboard` in `folder`.
        service: a tracking service that gets the same numbers.

    Raises:
        InputError: a file cannot be written; also by `record` and `close`.
    """

    folder: Path
    start_step: int
    total_steps: int
    tensorboard: bool = True
    stream: IO | None = None
    quiet_s: float = 10.0
    check: Callable[[], None] = lambda: None
    board: Path | None = None
    service: Service | None = None
    whole_run: StepMeter = field(default_factory=StepMeter)
    compiled: CompileWatch = field(default_factory=CompileWatch)

    def __post_init__(self) -> None:
        self.stream = self.stream or sys.stderr
        self.path = self.folder / LOG_NAME
        self._board = self.board or self.folder / BOARD_NAME
        self._cut_back()
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._writer = self._open_tensorboard() if self.tensorboard else None
        self._remote = self._open_service()
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.start_step,
            unit="step",
            file=self.stream,
            dynamic_ncols=True,
            disable=not self.stream.isatty(),
        )
        self._next_line = 0.0
        self._warned = False
        self._logged = self.compiled.now

    def _cut_back(self) -> None:
        """Leave the records up to the start step in `log.jsonl`, and all lines that are none in
        `log.skipped`."""
        found = read_json_lines(self.path, step=int)
        if found.skipped:
            aside = self.folder / SKIPPED_NAME
            text = b"".join(line + b"\n" for _, line in found.skipped)
            write_atomically(
                aside, lambda file: file.write((aside.read_bytes() if aside.is_file() else b"") + text)
            )
            self.say(f"{found.note(self.path)}; they are in {aside}")
        lines = "".join(
            json.dumps(record) + "\n" for record in found.records if record["step"] <= self.start_step
        )
        write_atomically(self.path, lambda file: file.write(lines), binary=False)
        self._logged_before = max((record["step"] for record in found.records), default=0)

    def _open_service(self) -> Background | None:
        service, folder, say = self.service, self.folder, self.say
        if service is None:
            return None
        return Background(service.kind, lambda: service.open(folder, say), say, self._logged_before)

    def _open_tensorboard(self) -> TensorBoard | None:
        self._thread_error, threading.excepthook = threading.excepthook, self._on_thread_error
        try:
            with self._telling(self._board):
                return TensorBoard(self._board, self.start_step)
        except ImportError as error:
            threading.excepthook = self._thread_error
            self.say(f"note: no TensorBoard logs ({error}); `pip install tensorboard` brings them")
            return None
        except InputError:
            threading.excepthook = self._thread_error
            raise

    def _on_thread_error(self, args: Any) -> None:
        """No trace of an error of TensorBoard's writer: the next write, or `close`, raises it."""
        if not (
            isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")
        ):
            self._thread_error(args)

    def say(self, text: str) -> None:
        """A line on the terminal that leaves the progress bar whole."""
        tqdm.write(text, file=self.stream)

    def step(self, done: int, *, loss: float, clips: int, step_s: float, data_s: float) -> None:
        """Show progress after step number `done`."""
        self._tell_compiled(done)
        # The first steps of a start wait for the workers to come up; they say nothing about the data's pace.
        if done > self.start_step + 3:
            self.whole_run.add(loss=loss, clips=clips, step_s=step_s, data_s=data_s)
            self._warn_about_data()
        shown = self.whole_run
        if not shown.steps:
            shown = StepMeter(1, loss, clips, step_s, data_s)
        rate = shown.clips / shown.step_s
        texts = {"loss": f"{loss:.4f}", "clips/s": f"{rate:.1f}", "data": f"{shown.data_share:.0%}"}
        if not self._bar.disable:
            self._bar.set_postfix(texts, refresh=False)
            self._bar.update(1)
        elif time.monotonic() >= self._next_line or done == self.total_steps:
            self._next_line = time.monotonic() + self.quiet_s
            left = (self.total_steps - done) * clips / rate
            parts = ", ".join(f"{key} {value}" for key, value in texts.items())
            self.say(
                f"step {done}/{self.total_steps}: {parts}, {datetime.timedelta(seconds=round(left))} left"
            )

    def record(self, values: dict[str, Any], *, durable: bool = False) -> None:
        """Write one line of the logs; `values` has `step` and numbers. What torch.compile has done so far is
        added where it has changed since the last line. A `durable` line, and all before it, is on the disk
        then."""
        if self.compiled.now != self._logged:
            self._logged = self.compiled.now
            values = {**values, "compiled": dataclasses.asdict(self._logged)}
        self._append((json.dumps(values) + "\n").encode())
        if durable:
            with self._telling(self.path):
                os.fsync(self._handle)
        numbers = numbers_of(values)
        if self._writer is not None:
            with self._telling(self._board):
                self._writer.write(values["step"], numbers)
        if self._remote is not None:
            self._remote.write(values["step"], numbers)

    def _append(self, line: bytes) -> None:
        """Write a line whole or not at all, into the file that stands at `path`."""
        self.check()
        with self._telling(self.path):
            size = os.fstat(self._handle).st_size
            try:
                written = os.write(self._handle, line)
                while written < len(line):  # a disk that fills up takes a part
                    written += os.write(self._handle, line[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, size)
                raise
            if not os.path.samestat(os.fstat(self._handle), os.stat(self.path)):
                raise FileNotFoundError

    @contextlib.contextmanager
    def _telling(self, path: Path) -> Iterator[None]:
        """An error of the system in here is one line."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{path} is gone: it, or its folder, was removed, renamed or replaced during the run; "
                "nothing more is written"
            ) from error
        except OSError as error:
            whole = CheckpointFolder(self.folder).describe_latest()
            raise InputError(
                f"cannot write {path}: {why_not_written(error, path)}; of the checkpoints, {whole}"
            ) from error

    def _tell_compiled(self, done: int) -> None:
        """Say what torch.compile did since the last step, and why where it went wrong."""
        before = self.compiled.now
        for reason in self.compiled.look():
            self.say(f"warning: torch.compile: {reason}")
        if self.compiled.now != before:
            self.say(f"compiled by step {done}: {self.compiled.now}")

    def _warn_about_data(self) -> None:
        run = self.whole_run
        if not self._warned and run.steps >= 20 and run.data_share > DATA_SHARE_WARNING:
            self._warned = True
            self.say(
                f"warning: {run.data_share:.0%} of the time is spent waiting for data "
                f"({run.data_s / run.steps:.3f} of "
                f"{run.step_s / run.steps:.3f} s a step); more --workers, more --num-sample or smaller "
                "videos help"
            )

    def close(
        self, kind: type | None = None, error: BaseException | None = None, trace: object = None
    ) -> None:
        """Complete the files, as the end of a `with`; nothing can be logged after it. An earlier error is not
        covered."""
        self._bar.close()
        os.close(self._handle)
        if self._remote is not None:
            self._remote.close()
        if self._writer is None:
            return
        try:
            with self._telling(self._board):
                self._writer.close()
        except InputError:
            if error is None:
                raise
        finally:
            threading.excepthook = self._thread_error


class NoLog:
    """A `RunLog` that writes nothing, for all ranks but the first."""

    def say(self, text: str) -> None: ...

    def step(self, done: int, **values: float) -> None: ...

    def record(self, values: dict[str, Any], *, durable: bool = False) -> None: ...

    def close(self, *exception: object) -> None: ...


def code_version() -> dict[str, Any]:
    """`commit` of this code's git checkout and whether it is `clean`; None where there is no checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "--verify", "HEAD"), "clean": None if status is None else not status}


def describe_start(config: dict[str, Any], *, device: torch.device, start_step: int) -> dict[str, Any]:
    """One start of a run for `run.json`: resolved configuration, command, code, versions, device."""
    import numpy

    name = f"cpu ({platform.machine()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "start_step": start_step,
        **code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "config": config,
    }


def write_run_file(folder: Path, start: dict[str, Any]) -> str | None:
    """Add a start to `folder/run.json`: `{"starts": [...]}`, the last one at the end.

    Returns:
        A note where there was a file that cannot be understood: it is kept under another name.

    Raises:
        InputError: it can't be written.
    """
    path, starts, note = folder / RUN_NAME, [], None
    if path.exists():
        try:
            starts = read_starts(folder)
        except InputError as error:
            number = next(
                n for n in itertools.count(1) if not (folder / f"{RUN_NAME}.unreadable-{n}").exists()
            )
            aside = folder / f"{RUN_NAME}.unreadable-{number}"
            note = f"note: {error}; kept as {aside.name}, a new one begins"
            try:
                path.rename(aside)
            except OSError as failure:
                raise InputError(f"cannot move {path} aside to {aside}: {failure.strerror}") from failure
    _write_starts(folder, [*starts, start])
    return note


def add_to_run_file(folder: Path, **values: Any) -> None:
    """Add what is known at its end to the last start of `folder/run.json`.

    Raises:
        InputError: it can't be read or written.
    """
    *before, last = read_starts(folder)
    _write_starts(folder, [*before, {**last, **values}])


def _write_starts(folder: Path, starts: list[dict[str, Any]]) -> None:
    text = json.dumps({"starts": starts}, indent=2) + "\n"
    write_atomically(folder / RUN_NAME, lambda file: file.write(text), binary=False)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, from its `run.json`.

    Raises:
        InputError: there is none, or it holds something else.
    """
    content = read_json(folder / RUN_NAME, "run file")
    starts = content.get("starts") if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise InputError(f"run file {folder / RUN_NAME} has no list of starts")
    return starts


@torch.no_grad()
def trivial_losses(
    clips: Tensor, mask: DualMask, config: ModelConfig, normalize: bool = True
) -> dict[str, float]:
    """Losses of two predictors that learn nothing, on the tokens that the loss counts.

    Args:
        clips: as the model takes them.
        mask: of the B clips.
        normalize: whether targets are normalised; then the zero predictor's loss is about 1.

    Returns:
        `zero`: predicts 0. `mean of the visible tubelets`: predicts, for each value of a tubelet, its mean
            over the clip's visible tubelets.
    """

    statistics = statistics_of(clips, config)

    def loss_of(prediction_B1P: Tensor) -> float:
        prediction = prediction_B1P.expand(-1, mask.target.shape[1], -1)
        return patch_loss(
            prediction,
            clips,
            mask.target,
            mask.target_weight,
            normalize,
            tubelet_size=config.tubelet_size,
            backend="torch",
            statistics=statistics,
        ).item()

    size = (config.patch_size, config.tubelet_size)
    seen = patch_targets_ref(clips, mask.visible, *size, normalize, statistics)
    mean = seen.mean(1, keepdim=True)
    return {"zero": loss_of(torch.zeros_like(mean)), "mean of the visible tubelets": loss_of(mean)}
