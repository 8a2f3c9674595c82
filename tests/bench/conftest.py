"""Benchmarks are scripts that import one another from their own folder."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def benches(monkeypatch):
    """`benches("name")` imports bench/name.py."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCH))
    found = importlib.import_module
    yield found
    for name in [
        name
        for name, module in sys.modules.items()
        if str(getattr(module, "__file__", "")).startswith(str(BENCH))
    ]:
        del sys.modules[name]
