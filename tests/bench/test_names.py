"""Names of bench/ that are importable while a benchmark runs: none may hide another package."""

import importlib.metadata
import sys
from pathlib import Path

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
