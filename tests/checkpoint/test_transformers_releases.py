"""Folders of `convert`, read and written by releases of transformers of each kind.

Each release gets an environment of its own (its packages, and this environment's for the rest), kept for the
next time in the folder that TEST_RELEASES names; without it, nothing is fetched and nothing runs. `make
test-interop` sets it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
FOLDER = os.environ.get("TEST_RELEASES")


def newest() -> str:
    """The release in constraints.txt for this Python."""
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    )
    pins = [Requirement(line) for line in lines if line.startswith("transformers==")]
    return next(
        str(pin.specifier) for pin in pins if pin.marker is None or pin.marker.evaluate()
    ).removeprefix("==")


# Release -> names of the biases of its q and v; where they change, the releases before and after are here.
# 4.50.0 is the first that setup.py allows; from 5.18 on, old names are mapped to the new ones.
OLD, NEW = ("q_bias", "v_bias"), ("query.bias", "value.bias")
RELEASES = {
    **dict.fromkeys(("4.50.0", "4.57.6", "5.0.0", "5.5.0"), OLD),
    **dict.fromkeys(("5.5.1", "5.9.0", "5.14.1", "5.17.0"), (*NEW, "key.bias")),
    **dict.fromkeys(("5.18.0", newest()), NEW),
}


def install(release: str, folder: Path) -> Path:
    """The interpreter of an environment with this release, made unless it is there; skips (in CI: fails)
    where pip cannot."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.EnvBuilder(symlinks=True).create(folder)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(own, "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-compile", "--disable-pip-version-check", "--timeout", "20", "--retries", "2"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        *options,
        f"transformers=={release}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"pip cannot install transformers {release}: {last}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    ready.touch()
    return python


@pytest.mark.skipif(
    FOLDER is None, reason="fetches ten releases of transformers; `make test-interop` runs it"
)
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_reads_and_writes_the_same_model(release):
    """Logits, pixels and loss within 1e-4 in both directions, and no bias of q or v that is 0 there."""
    python = install(release, Path(FOLDER).absolute() / release)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [python, Path(__file__).with_name("transformers_release.py")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["transformers"] == release and found["zeros"] == []
    biases = {name.removeprefix("attention.") for name in found["parameters"] if "bias" in name}
    assert biases == set(RELEASES[release]), "this release is of another kind than the table says"
    errors = found["errors"]
    assert len(errors) >= 10 and max(errors.values()) <= 1e-4, errors
