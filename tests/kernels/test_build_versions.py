"""`make build-versions`: what counts as failed. The builds themselves are CI's."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for Python: "installs" every release but 0.1.0, builds with all but 0.2.0.
PYTHON = """#!/usr/bin/env bash
echo "$PYTHONPATH $*" >> "$CALLS"
case "$*" in
  *pip*triton==0.1.0) echo "no such release" >&2; exit 1 ;;
  *pip*) folder=$(sed 's/.*--target \\([^ ]*\\) .*/\\1/' <<< "$*"); mkdir -p "$folder/triton-1.dist-info"
         touch "$folder/triton-1.dist-info/RECORD" ;;
esac
case "$PYTHONPATH" in
  */0.2.0:*) echo "| a table |"; echo FAIL; echo "a_kernel sm_80: 8 stack bytes"; exit 1 ;;
esac
echo "ok: 126 kernels"
"""


@pytest.fixture
def build(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def call(*releases, ci=""):
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "CI": ci, "PYTHONPATH": ""}
        environment |= {"CALLS": str(tmp_path / "calls"), "PIP_FLAGS": ""}
        command = [str(ROOT / ".ci/build_versions.sh"), str(tmp_path / "releases"), *releases]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return call


def test_every_release_is_built_with_itself(build, tmp_path):
    """Fetched once; the second time it is there."""
    for _ in range(2):
        done = build("3.6.0", "3.9.0")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"triton {x}: ok: 126 kernels" for x in ("3.6.0", "3.9.0")]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("pip" in call for call in calls) == 2
    assert sum(f"releases/3.6.0:{ROOT}/kernels -m vmae_kernels.build" in call for call in calls) == 2


def test_a_spill_fails_and_the_next_release_is_built(build):
    done = build("0.2.0", "3.9.0")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "triton 0.2.0: FAILED", "FAIL", "a_kernel sm_80: 8 stack bytes", "triton 3.9.0: ok: 126 kernels"
    ]  # fmt: skip


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_release_that_cannot_be_fetched(build, ci):
    """Skipped with the reason; in CI that fails."""
    done = build("0.1.0", "3.9.0", ci=ci)
    assert done.returncode == (1 if ci else 0)
    first, second = done.stdout.splitlines()
    assert first == "triton 0.1.0: SKIPPED, it cannot be fetched: no such release"
    assert second == "triton 3.9.0: ok: 126 kernels"


def test_the_releases_are_those_of_the_documents():
    """From the oldest that setup.py allows to the newest, with that of constraints.txt."""
    (line,) = [x for x in (ROOT / "Makefile").read_text().splitlines() if ".ci/build_versions.sh" in x]
    releases = line.split("/triton ")[1].split()
    assert f"triton=={releases[1]}" in (ROOT / "constraints.txt").read_text()
    assert f"triton>={releases[0].removesuffix('.0')}" in (ROOT / "setup.py").read_text()
