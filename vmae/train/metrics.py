"""What a run says about itself: JSONL and TensorBoard logs, the progress line, `run.json`, and the trivial predictors.

Legend: B clips, Nk counted tokens, Nv visible tokens, P values of a tubelet.
"""

from __future__ import annotations

import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from tqdm import tqdm

from vmae.config import ModelConfig
from vmae.cost import peak_flops
from vmae.masking import DualMask
from vmae.train.checkpoint import write_atomically
from vmae_kernels import patch_loss, patch_targets_ref

DATA_SHARE_WARNING = 0.10
LOG_NAME = "log.jsonl"
RUN_NAME = "run.json"


@dataclass
class StepMeter:
    """Sums over the steps since the last flush."""

    steps: int = 0
    loss: float = 0.0
    clips: int = 0
    step_s: float = 0.0
    data_s: float = 0.0
    replaced: int = 0

    def add(self, *, loss: float, clips: int, step_s: float, data_s: float, replaced: int = 0) -> None:
        self.steps += 1
        self.loss += loss
        self.clips += clips
        self.step_s += step_s
        self.data_s += data_s
        self.replaced += replaced

    @property
    def data_share(self) -> float:
        """Share of the time in which the device waited for data."""
        return self.data_s / self.step_s if self.step_s else 0.0

    def means(self) -> dict[str, float]:
        """Mean loss and seconds a step, clips a second, and how many videos had to be replaced."""
        steps = max(self.steps, 1)
        return {
            "loss_mean": self.loss / steps,
            "clips_per_s": self.clips / self.step_s if self.step_s else 0.0,
            "data_share": self.data_share,
            "step_s": self.step_s / steps,
            "data_s": self.data_s / steps,
            "replaced": self.replaced,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def flops_utilisation(flops: float | None, device: torch.device, dtype: str) -> float | None:
    """Share of the device's peak that `flops` a second are; None where either is not known."""
    peak = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return flops / peak if flops and peak else None


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL log, in order; empty where there is no file."""
    path = Path(path)
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a killed run
            continue
    return records


def loss_of_last_tenth(records: list[dict[str, Any]], total_steps: int) -> float | None:
    """Mean loss of the last tenth of a run, to a line of the log; None where nothing of it was logged."""
    losses = [record["loss_mean"] for record in records if record["step"] > 0.9 * total_steps]
    return sum(losses) / len(losses) if losses else None


@dataclass
class RunLog:
    """Where the steps of a run are written: `log.jsonl`, TensorBoard and the terminal.

    A run that goes on from step s drops what an earlier one logged after s, so that every step is there once.

    Args:
        folder: of the run.
        start_step, total_steps: of this start.
        tensorboard: also write TensorBoard files, if the package is there.
        stream: the terminal; None means stderr. A progress bar where it is one, else a line at most every `quiet_s` seconds.
    """

    folder: Path
    start_step: int
    total_steps: int
    tensorboard: bool = True
    stream: IO | None = None
    quiet_s: float = 10.0
    whole_run: StepMeter = field(default_factory=StepMeter)

    def __post_init__(self) -> None:
        self.stream = self.stream or sys.stderr
        self.path = self.folder / LOG_NAME
        kept = [record for record in read_log(self.path) if record["step"] <= self.start_step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.path, lambda file: file.write(lines), binary=False)
        self._file = open(self.path, "a", encoding="utf-8")
        self._writer = self._open_tensorboard() if self.tensorboard else None
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

    def _open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.say(f"note: no TensorBoard logs ({error}); `pip install tensorboard` brings them")
            return None
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start_step + 1)

    def say(self, text: str) -> None:
        """A line on the terminal that leaves the progress bar whole."""
        tqdm.write(text, file=self.stream)

    def step(self, done: int, *, loss: float, clips: int, step_s: float, data_s: float) -> None:
        """Show progress after step number `done`."""
        # The first steps of a start wait for the workers to come up; they say nothing about the data's pace.
        if done > self.start_step + 3:
            self.whole_run.add(loss=loss, clips=clips, step_s=step_s, data_s=data_s)
            self._warn_about_data()
        shown = self.whole_run if self.whole_run.steps else StepMeter(1, loss, clips, step_s, data_s)
        rate = shown.clips / shown.step_s
        texts = {"loss": f"{loss:.4f}", "clips/s": f"{rate:.1f}", "data": f"{shown.data_share:.0%}"}
        if not self._bar.disable:
            self._bar.set_postfix(texts, refresh=False)
            self._bar.update(1)
        elif time.monotonic() >= self._next_line or done == self.total_steps:
            self._next_line = time.monotonic() + self.quiet_s
            left = (self.total_steps - done) * clips / rate
            words = ", ".join(f"{key} {value}" for key, value in texts.items())
            self.say(f"step {done}/{self.total_steps}: {words}, {datetime.timedelta(seconds=round(left))} left")

    def record(self, values: dict[str, Any]) -> None:
        """Write one line of the logs; `values` has `step` and numbers."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                named = {f"{key}/{name}": number for name, number in value.items()} if isinstance(value, dict) else {key: value}
                for name, number in named.items():
                    if name != "step" and number is not None:
                        self._writer.add_scalar(name, number, values["step"])

    def _warn_about_data(self) -> None:
        run = self.whole_run
        if not self._warned and run.steps >= 20 and run.data_share > DATA_SHARE_WARNING:
            self._warned = True
            self.say(
                f"warning: {run.data_share:.0%} of the time is spent waiting for data ({run.data_s / run.steps:.3f} of "
                f"{run.step_s / run.steps:.3f} s a step); more --workers, more --num-sample or smaller videos help"
            )

    def close(self) -> None:
        """Complete the files; nothing can be logged after it."""
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class NoLog:
    """A `RunLog` that writes nothing, for all ranks but the first."""

    def say(self, text: str) -> None: ...

    def step(self, done: int, **values: float) -> None: ...

    def record(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def code_version() -> dict[str, Any]:
    """`commit` of this code's git checkout and whether it is `clean`; None where there is no checkout."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
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

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "start_step": start_step,
        **code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "config": config,
    }


def write_run_file(folder: Path, start: dict[str, Any]) -> None:
    """Add a start to `folder/run.json`: `{"starts": [...]}`, the last one at the end.

    Raises:
        InputError: it can't be written.
    """
    _write_starts(folder, [*_read_starts(folder), start])


def add_to_run_file(folder: Path, **values: Any) -> None:
    """Add what is known at its end to the last start of `folder/run.json`.

    Raises:
        InputError: it can't be written.
    """
    *before, last = _read_starts(folder) or [{}]
    _write_starts(folder, [*before, {**last, **values}])


def _read_starts(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write_starts(folder: Path, starts: list[dict[str, Any]]) -> None:
    text = json.dumps({"starts": starts}, indent=2) + "\n"
    write_atomically(folder / RUN_NAME, lambda file: file.write(text), binary=False)


@torch.no_grad()
def trivial_losses(clips: Tensor, mask: DualMask, config: ModelConfig, normalize: bool = True) -> dict[str, float]:
    """Losses of two predictors that learn nothing, on the tokens that the loss counts.

    Args:
        clips: uint8 [B, T, H, W, 3], or normalised float [B, 3, T, H, W].
        mask: of the B clips.
        normalize: whether targets are normalised; then the zero predictor's loss is about 1.

    Returns:
        `zero`: predicts 0. `visible_mean`: predicts, for each value of a tubelet, its mean over the clip's visible tubelets.
    """

    def loss_of(prediction_B1P: Tensor) -> float:
        prediction = prediction_B1P.expand(-1, mask.target.shape[1], -1)
        return patch_loss(
            prediction, clips, mask.target, mask.target_weight, normalize, tubelet_size=config.tubelet_size, backend="torch"
        ).item()

    seen = patch_targets_ref(clips, mask.visible, config.patch_size, config.tubelet_size, normalize)
    mean = seen.mean(1, keepdim=True)
    return {"zero": loss_of(torch.zeros_like(mean)), "visible_mean": loss_of(mean)}
