"""Where the numbers of a run go beside `log.jsonl`: TensorBoard, and where asked for, W&B or trackio.

All are a `Sink`. TensorBoard is written at once, and its errors are the run's. A service is written by a
thread (`Background`): what it does, or does not, neither stops, slows nor changes a run.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json

IDS_NAME = "sinks.json"
PATIENCE_S = 30.0  # for what is still to be sent when a run ends
ROOM = 1000  # lines that may wait


class Sink(Protocol):
    """Takes the numbers of a run; both may raise."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log, but for its step; those of a group as `group/name`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        named = {key: value}
        if isinstance(value, dict):
            named = {f"{key}/{name}": number for name, number in value.items()}
        found |= {name: number for name, number in named.items() if isinstance(number, (int, float))}
    found.pop("step", None)
    return found


class TensorBoard:
    """Event files in a folder; what an earlier start wrote after `start_step` is hidden.

    Raises:
        ImportError: the package is not there.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, number in values.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True, kw_only=True)
class Service:
    """A run of a tracking service, before it is opened.

    Attributes:
        kind: a name of `SERVICES`.
        project, name: of the run there; None leaves the project to the service's environment variable.
        settings: plain containers that are shown beside the run's numbers.
    """

    kind: str
    project: str | None
    name: str
    settings: dict[str, Any]

    def open(self, folder: Path, say: Callable[[str], None]) -> Sink:
        """Begin the run, or go on with the one that `folder` knows; may wait for a network."""
        return SERVICES[self.kind](self, folder, say)

    def run_id(self, folder: Path) -> str:
        """Of this run there: kept in `folder`, so that a resumed run goes on in the same one."""
        path = folder / IDS_NAME
        ids = read_json(path, "file of run ids") if path.exists() else {}
        if self.kind not in ids:
            ids[self.kind] = secrets.token_hex(4)
            write_atomically(path, lambda file: file.write(json.dumps(ids) + "\n"), binary=False)
        return ids[self.kind]


# Not what W&B would send by itself: terminal, git remote and diff, host, command, packages, machine load.
_WANDB_QUIET = {
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "host": "",
    "silent": True,
    # Less than PATIENCE_S: a process whose W&B still tries to log in does not end.
    "init_timeout": 20.0,
}


def _wandb_has_key() -> bool:
    """Whether W&B would log in without asking at the terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host.split(":")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandB:
    """A run of Weights & Biases; without a key, or with WANDB_MODE=offline, files that `wandb sync` sends."""

    def __init__(self, service: Service, folder: Path, say: Callable[[str], None]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _wandb_has_key():
            mode = "offline"
            say(f"note: no key of W&B was found: files stay in {folder / 'wandb'}, for `wandb sync`")
        known = wandb.Settings.model_fields
        self._run = wandb.init(
            project=service.project or os.environ.get("WANDB_PROJECT", "vmae"),
            name=service.name,
            id=service.run_id(folder),
            resume="allow",
            config=service.settings,
            dir=os.environ.get("WANDB_DIR", str(folder)),
            mode=mode,
            settings=wandb.Settings(**{key: value for key, value in _WANDB_QUIET.items() if key in known}),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its own folder on this machine (TRACKIO_DIR), or a Space (TRACKIO_SPACE_ID)."""

    def __init__(self, service: Service, folder: Path, say: Callable[[str], None]) -> None:
        import trackio

        self._run = trackio.init(
            project=service.project or os.environ.get("TRACKIO_PROJECT", "vmae"),
            name=f"{service.name}-{service.run_id(folder)}",  # trackio knows a run by its name
            config=service.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


SERVICES: dict[str, Callable[[Service, Path, Callable[[str], None]], Sink]] = {
    "wandb": WandB,
    "trackio": Trackio,
}


def check_service(name: str) -> None:
    """Raises InputError where the package of a service is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"--log-to {name} needs the {name} package: pip install {name}")


class Background:
    """A sink in a thread of its own. The first error, or too little room, is said once; it never raises.

    Args:
        name: for messages.
        start: opens the sink, in the thread.
        say: shows a line.
        after_step: lines up to this step are there already, from an earlier start.
    """

    def __init__(
        self, name: str, start: Callable[[], Sink], say: Callable[[str], None], after_step: int = 0
    ) -> None:
        self._name, self._start, self._say, self._after = name, start, say, after_step
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(ROOM)
        self._told = self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"log to {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        if step <= self._after or self._failed:
            return
        try:
            self._lines.put_nowait((step, values))
        except queue.Full:
            self._tell(f"it takes lines too slowly; beyond {ROOM} that wait, they are left out")

    def close(self) -> None:
        """Send what waits, for at most `PATIENCE_S`."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            self._tell(f"{ROOM} lines were not sent")
            return
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._tell(f"not all was sent within {PATIENCE_S:g} s of the run's end")

    def _run(self) -> None:
        try:
            sink = self._start()
            while (line := self._lines.get()) is not None:
                sink.write(*line)
            sink.close()
        except Exception as error:  # whatever a service's package raises
            self._failed = True
            words = str(error).strip().splitlines() or [type(error).__name__]
            self._tell(f"nothing more is sent: {words[0]}")

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"warning: --log-to {self._name}: {what}; the run goes on, log.jsonl has all lines")
