"""Choices among launch configurations, kept on disk: VMAE_AUTOTUNE=1 times each configuration of a kernel
once for each device, shape, dtype, version of Triton and state of this package's source.

The file is `autotune.json` in `$XDG_CACHE_HOME/vmae` (`~/.cache/vmae`), or what VMAE_AUTOTUNE_CACHE names.
All processes that share it launch the same configurations: the first to write a choice wins, and one that
timed meanwhile takes the winner's. It is replaced in one step, under a lock, with the choices of others kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vmae_kernels.optional_triton import triton

SCHEMA = "vmae-autotune/1"
Config = dict[str, int]


def cache_file() -> Path:
    """Where choices are kept."""
    if named := os.environ.get("VMAE_AUTOTUNE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vmae" / "autotune.json"


@functools.cache
def source_hash() -> str:
    """Of this package's files: a kernel that changed is timed again."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def choice_key(device: str, kernel: str, key: tuple) -> str:
    """Everything that a choice depends on, for people to read: `device` is the GPU model's name, `key` sizes
    and dtypes."""
    parts = (str(part).removeprefix("torch.") for part in key)
    return " | ".join((device, f"triton {triton.__version__}", source_hash(), kernel, " ".join(parts)))


def read_choices(path: Path) -> dict[str, Config]:
    """Choices by key; none where there is no file yet. One that cannot be used is ignored with a warning."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}, not {SCHEMA!r}")
        choices = content["choices"]
        if not all(isinstance(config, dict) for config in choices.values()):
            raise ValueError("a choice is no configuration")
        return choices
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path}: ignored, and replaced by the next choice: {error!r}", stacklevel=2)
        return {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock goes with its process; a file system that has none is used without."""
    import fcntl

    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep_choice(path: Path, key: str, config: Config) -> Config:
    """Writes a choice unless there is one: returns the one that counts. A file that cannot be written costs a
    warning, and the choice holds in this process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            choices = read_choices(path)
            if key in choices:
                return choices[key]
            content = {"schema": SCHEMA, "choices": dict(sorted({**choices, key: config}.items()))}
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_text(json.dumps(content, indent=1))
            new.replace(path)
    except OSError as error:
        warnings.warn(f"{path}: the choice is not kept: {error}", stacklevel=2)
    return config


def device_milliseconds(call: Callable[[], object]) -> float:
    """Of one call on the device, from replays of a CUDA graph: the host takes no part. Waits for the device
    first, for the replays run on a stream of their own."""
    torch.cuda.synchronize()
    return triton.testing.do_bench_cudagraph(call)


def fastest(
    candidates: list[Config], launch: Callable[[Config], object], milliseconds: Callable[..., float]
) -> Config:
    """The first of the fastest."""
    return min(candidates, key=lambda config: milliseconds(functools.partial(launch, config)))


_chosen: dict[tuple[Path, str], Config] = {}


def choose(
    device: str, kernel: str, candidates: list[Config], key: tuple, launch: Callable[[Config], object],
    milliseconds: Callable[..., float] | None = device_milliseconds,
) -> Config:  # fmt: skip
    """The configuration of `candidates` for this kernel, device and shape: of this process, else of the file,
    else the fastest, which is written there. Without `milliseconds` nothing is timed: the first, for now."""
    path, name = cache_file(), choice_key(device, kernel, key)
    if (path, name) not in _chosen:
        config = read_choices(path).get(name)
        if config not in candidates:
            if milliseconds is None:
                return candidates[0]
            config = keep_choice(path, name, fastest(candidates, launch, milliseconds))
        _chosen[path, name] = config if config in candidates else candidates[0]
    return _chosen[path, name]
