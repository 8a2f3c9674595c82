"""What `--dry-run` shows of a run whose files are not all there, and placeholders of published scripts."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmae.data.files import path_kind
from vmae.errors import InputError
from vmae.train.pretrain_settings import RunConfig, TrainingConfig, world_size

PLACEHOLDER = "YOUR_PATH"  # of the published scripts
_READ = ("data", "data_root", "init", "classes", "label_map", "val", "test")  # settings that name files
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # https://..., hub:...


def is_placeholder(path: str) -> bool:
    """Whether a path begins at a place that published scripts leave to their users to fill in."""
    parts = Path(path).parts
    place = next((number for number, part in enumerate(parts, 1) if PLACEHOLDER in part), None)
    return place is not None and not os.path.lexists(Path(*parts[:place]))


def find_absent(args: argparse.Namespace) -> dict[str, str]:
    """The files and folders of a command line that are not there, by flag; none for a run that is no dry one,
    which says so when it reads them. Addresses are not looked at.

    Raises:
        InputError: a run, not a dry one, with a placeholder of the published scripts.
    """
    args.settings.complete(args)
    named: dict[str, str] = {}
    for name in _READ:
        key = args.settings.keys.get(name)
        if key is not None and args.given.get(name) not in (
            None,
            *(word for _, word, _ in key.about.constants),
        ):
            named[key.flags[0]] = args.given[name]
    if not args.dry_run:
        named = {flag: path for flag, path in named.items() if is_placeholder(path)}
    absent = {
        flag: path for flag, path in named.items() if not _ADDRESS.match(path) and path_kind(path) is None
    }
    written = {"--output": args.output, "--log-dir": args.log_dir}
    absent |= {flag: path for flag, path in written.items() if path and is_placeholder(path)}
    if args.dry_run:
        return absent
    if wrong := [f"{flag} {path}" for flag, path in absent.items()]:
        raise InputError(
            f"{'; '.join(wrong)}: {PLACEHOLDER} stands for a folder of yours; put your path in its place"
        )
    return {}


def is_main() -> bool:
    """Whether this process is the one that speaks, as its launcher says."""
    return os.environ.get("RANK", "0") == "0"


def show_settings(config: TrainingConfig, run: RunConfig, **unknown: None) -> None:
    """Print, as JSON, what is known without any file.

    Args:
        unknown: fields of `config` that a file decides.
    """
    if not is_main():
        return
    values: dict[str, Any] = config.to_dict() | unknown
    optim, batch = values["optim"], config.effective_batch or run.videos_per_step(world_size())
    derived = {
        "ranks": world_size(),
        "effective_batch_videos": batch,
        "clips_per_step": batch * values.get("num_sample", 1),
        "peak_lr": optim["lr"] * batch / 256,
        "final_lr": optim["min_lr"] * batch / 256,
    }
    print(json.dumps({"results": values, "run": run.to_dict(), "derived": derived}, indent=2), flush=True)


def tell_absent(absent: Mapping[str, str]) -> int:
    """A line for each path that is not there; the exit code of a dry run: 2 unless all are placeholders."""
    code = 0
    for flag, path in absent.items():
        if is_placeholder(path):
            line = (
                f"note: {flag} {path} is a placeholder: not checked; put your path in place of {PLACEHOLDER}"
            )
        else:
            line, code = (
                f"error: {flag} {path} does not exist: the settings above are not checked against it",
                2,
            )
        if is_main():
            print(line, file=sys.stderr)
    return code
