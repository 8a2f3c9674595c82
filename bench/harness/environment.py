"""Machine, versions and commit of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import ROOT


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Device, machine, versions, commit.

    Attributes:
        device: name of the GPU, or "cpu".
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

    @property
    def conditions(self) -> str:
        """Machine, version, commit and date in a line."""
        tree = ", work tree not clean" if self.clean is False else ""
        where = self.device
        if where == "cpu":
            where = f"{self.cores} cores of an {self.cpu}"
        return f"{where}, torch {self.torch}, commit {(self.commit or 'unknown')[:9]}{tree}, {self.date[:10]}"


def find_environment(device: torch.device | str = "cpu") -> Environment:
    """Environment of this process and tree."""
    device = torch.device(device)
    on_gpu, status = device.type == "cuda", _git("status", "--porcelain")
    affinity = hasattr(os, "sched_getaffinity")
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
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
    )


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
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
