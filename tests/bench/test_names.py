"""Names of bench/ that are importable while a benchmark runs: none may hide another package."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
# Imported by transformers and torch where it is installed; not a name of ours even where it is not.
RESERVED = {"kernels", "tables", "transformers", "accelerate", "datasets", "evaluate", "timm", "xformers"}


def importable() -> set[str]:
    """A script's folder is on the path: its modules and packages are top-level names."""
    modules = {path.stem for path in BENCH.glob("*.py")}
    return modules | {path.name for path in BENCH.iterdir() if path.is_dir()} - {"__pycache__"}


def test_nothing_of_bench_hides_an_installed_package():
    taken = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names) | RESERVED
    assert "torch" in taken and "harness" in importable()
    assert not importable() & taken


def test_nothing_in_bench_is_named_kernels_or_tables():
    names = {path.stem for path in BENCH.rglob("*") if "results" not in path.parts or path.suffix == ".py"}
    assert not names & {"kernels", "tables"}


@pytest.mark.slow
def test_a_benchmark_finds_this_tree_and_hides_no_kernels(tmp_path):
    """From another folder, with nothing on the path but the script's folder."""
    code = f"""
import importlib.util, sys
before = importlib.util.find_spec("kernels")
sys.path.insert(0, {str(BENCH)!r})
import harness, vmae, vmae.files.atomic, vmae_kernels
assert importlib.util.find_spec("kernels") == before
print(vmae.__file__, vmae_kernels.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = [Path(path).parent for path in done.stdout.split()]
    assert found == [BENCH.parent / "vmae", BENCH.parent / "kernels" / "vmae_kernels"]
