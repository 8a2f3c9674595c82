"""The virtual environment of `make`: of the Python asked for, and none where that is not supported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = f"3.{sys.version_info[1]}{sys.abiflags}"


def make_venv(venv: Path, python: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "recipes/venv.sh", venv, python], capture_output=True, text=True)


def interpreter(path: Path, version: str) -> Path:
    """Stands in for an interpreter of another version: it is asked for nothing else before it is refused or
    replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def venv_of(folder: Path, version: str, made_by: str | Path = "") -> Path:
    interpreter(folder / "bin/python", version)
    (folder / "pyvenv.cfg").touch()
    (folder / ".ready").touch()
    if made_by:
        (folder / ".made-by").write_text(f"{made_by}\n")
    return folder


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.15", "3.99t", "4.1"])
def test_unsupported_python_is_refused_before_anything_is_made(tmp_path, version):
    done = make_venv(tmp_path / "venv", str(interpreter(tmp_path / "old", version)))
    assert done.returncode == 2 and f"is Python {version}; vmae needs Python 3.10 to 3.14" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_unsupported_python_leaves_an_environment_alone(tmp_path):
    venv = venv_of(tmp_path / "venv", HERE)
    assert make_venv(venv, str(interpreter(tmp_path / "old", "3.9"))).returncode == 2
    assert (venv / ".ready").exists()


def test_missing_python_is_named(tmp_path):
    done = make_venv(tmp_path / "venv", "no-such-python")
    assert (
        done.returncode == 2
        and "no-such-python does not start" in done.stderr
        and not (tmp_path / "venv").exists()
    )


@pytest.mark.slow
def test_another_python_makes_the_environment_anew(tmp_path):
    venv = venv_of(tmp_path / "venv", "3.10" if HERE != "3.10" else "3.11")
    done = make_venv(venv, sys.executable)
    assert done.returncode == 0 and "making" in done.stdout, done.stderr
    assert not (venv / ".ready").exists()  # so that `make` installs again
    program = "import pip, sys; print(sys.version_info[1])"
    assert subprocess.check_output([venv / "bin/python", "-c", program], text=True).strip() == str(
        sys.version_info[1]
    )
    (venv / ".ready").touch()
    assert (
        make_venv(venv).returncode == 0 and (venv / ".ready").exists()
    )  # without a choice, the last one holds


@pytest.mark.parametrize("made_by", ["", "no-such-python"])
def test_environment_of_unknown_origin_is_kept(tmp_path, made_by):
    venv = venv_of(tmp_path / "venv", "3.12", made_by)
    done = make_venv(venv)
    assert (done.returncode, done.stdout) == (0, "") and (venv / ".ready").exists()


def test_chosen_python_is_remembered(tmp_path):
    venv = venv_of(tmp_path / "venv", "3.12", interpreter(tmp_path / "mine", "3.12"))
    assert make_venv(venv).returncode == 0 and (venv / ".ready").exists()


def test_folder_that_is_no_environment_is_never_removed(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/notes.txt").touch()
    done = make_venv(tmp_path / "venv", sys.executable)
    assert (
        done.returncode == 2
        and "is no virtual environment" in done.stderr
        and (tmp_path / "venv/notes.txt").exists()
    )


def test_limits_are_those_of_the_package():
    assert re.search(
        r'python_requires=">=3\.10,<3\.15"', (ROOT / "setup.py").read_text()
    )  # what recipes/venv.sh reads
