"""Machine, versions and commit of a measurement; clocks, power and temperature of a GPU before and after it.

In a rehearsal (`VMAE_REHEARSE=1`, set by `bench/gpu.py --rehearse`) everything runs on a CPU, with invented
device times. Its results name "rehearsal" as their device, and `bench/readme.py` refuses them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness import ROOT

REHEARSE = "VMAE_REHEARSE"
REHEARSAL = "rehearsal"
# Fields of `nvidia-smi --query-gpu`, by those of `GpuState`.
_FIELDS = {
    "sm_mhz": "clocks.sm",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "memory_mhz_max": "clocks.max.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
# Its newer and its older name; drivers before 530 know the second only.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of NVML's reasons for lower clocks (nvml.h); idle (1) and clocks set by an application (2) are none.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_FAKE_STATE = "595.0, 1500, 1980, 2619, 2619, 500.5, 700.0, 60, 0x0000000000000004"
STATE_AGE_S = 5.0  # a state younger than that is not asked for again


def rehearsing() -> bool:
    """Whether this is a rehearsal."""
    return os.environ.get(REHEARSE) == "1"


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """What a GPU is at now: clocks in MHz, power in watts, degrees Celsius; None: nvidia-smi does not tell.

    Attributes:
        throttled: why its clocks are lower than they could be; empty where they are not.
    """

    driver: str | None
    sm_mhz: float | None
    sm_mhz_max: float | None
    memory_mhz: float | None
    memory_mhz_max: float | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None
    throttled: list[str]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Device, machine, versions, commit.

    Attributes:
        device: name of the GPU, or "cpu"; "rehearsal" in a rehearsal.
        gpu_before, gpu_after: the GPU when the measurement began, and when its last result was written.
        clean: the work tree had no uncommitted change; None: not known.
        date: UTC, ISO 8601.
        capability: of the GPU, [major, minor].
    """

    device: str
    cpu: str
    cores: int | None
    torch: str
    commit: str | None
    clean: bool | None
    date: str
    threads: int | None = None
    triton: str | None = None
    python: str | None = None
    cuda: str | None = None
    capability: list[int] | None = None
    gpu_before: GpuState | None = None
    gpu_after: GpuState | None = None

    @property
    def rehearsed(self) -> bool:
        """Nothing was measured."""
        return self.device == REHEARSAL

    @property
    def conditions(self) -> str:
        """Machine, version, commit and date in a line; clocks of a GPU, and what kept them low."""
        tree = ", work tree not clean" if self.clean is False else ""
        where = self.device
        if where == "cpu":
            where = f"{self.cores} cores of an {self.cpu}"
        if self.rehearsed:
            where = "REHEARSAL on a CPU, times invented"
        commit = (self.commit or "unknown")[:9]
        return f"{where}{self._clocks()}, torch {self.torch}, commit {commit}{tree}, {self.date[:10]}"

    def _clocks(self) -> str:
        state = self.gpu_after or self.gpu_before
        if state is None:
            return ""
        text = f" at {_number(state.sm_mhz)} of {_number(state.sm_mhz_max)} MHz"
        text += f", {_number(state.power_limit_w)} W, driver {state.driver}"
        both = [reason for state in (self.gpu_before, self.gpu_after) if state for reason in state.throttled]
        return text + (f", THROTTLED: {', '.join(dict.fromkeys(both))}" if both else "")


def find_environment(device: torch.device | str = "cpu") -> Environment:
    """Environment of this process and tree."""
    device = torch.device(device)
    on_gpu, status = device.type == "cuda", _git("status", "--porcelain")
    affinity = hasattr(os, "sched_getaffinity")
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    return Environment(
        device=REHEARSAL if rehearsing() else name,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if affinity else os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        commit=_git("rev-parse", "HEAD"),
        clean=None if status is None else not status,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        cuda=(torch.version.cuda or torch.version.hip) if on_gpu else None,
        capability=list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        gpu_before=gpu_state(device) if on_gpu or rehearsing() else None,
    )


def with_gpu_after(environment: Environment) -> Environment:
    """The environment with the GPU as it is now; unchanged where it was measured on none, or was read from a
    file."""
    if environment.gpu_before is None or not (rehearsing() or torch.cuda.is_available()):
        return environment
    after = gpu_state("cuda" if torch.cuda.is_available() else "cpu")
    return environment if after is None else replace(environment, gpu_after=after)


_last: tuple[float, GpuState | None] = (float("-inf"), None)


def gpu_state(device: torch.device | str, age_s: float = STATE_AGE_S) -> GpuState | None:
    """State of a GPU, by nvidia-smi, at most `age_s` old; None where there is no nvidia-smi."""
    global _last
    if time.monotonic() - _last[0] > age_s:
        _last = (time.monotonic(), read_state(_smi_command(device)))
    return _last[1]


def _smi_command(device: torch.device | str) -> list[str]:
    if rehearsing():
        return [sys.executable, "-c", f"print({_FAKE_STATE!r})"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # CUDA_VISIBLE_DEVICES renumbers GPUs for torch only.
    which = torch.cuda.current_device() if uuid is None else f"GPU-{uuid}"
    return ["nvidia-smi", "-i", str(which), "--format=csv,noheader,nounits"]


def read_state(command: Sequence[str]) -> GpuState | None:
    """What `command` with a `--query-gpu` prints; the reasons for low clocks are left out where it knows
    neither of their names."""
    for reasons in (*((name,) for name in _REASONS), ()):
        query = ",".join(("driver_version", *_FIELDS.values(), *reasons))
        text = _output([*command, f"--query-gpu={query}"])
        if text is not None:
            cells = [cell.strip() for cell in text.splitlines()[0].split(",")] if text else []
            return _state_of(cells) if len(cells) > len(_FIELDS) else None
    return None


def _state_of(cells: Sequence[str]) -> GpuState:
    values = {name: _value(cell) for name, cell in zip(_FIELDS, cells[1:])}
    bits = int(cells[1 + len(_FIELDS)], 16) if len(cells) > 1 + len(_FIELDS) and "x" in cells[-1] else 0
    throttled = [reason for bit, reason in THROTTLES.items() if bits & bit]
    return GpuState(driver=cells[0], throttled=throttled, **values)


def _value(cell: str) -> float | None:
    """A number; None for "[N/A]"."""
    try:
        return float(cell)
    except ValueError:
        return None


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _git(*arguments: str) -> str | None:
    return _output(["git", "-C", str(ROOT), *arguments])


def _output(command: Sequence[str]) -> str | None:
    """What a command prints; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
