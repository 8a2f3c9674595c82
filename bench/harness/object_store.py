"""The object store on loopback that the tests use (tests/store_server.py), and what it costs."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from harness import ROOT


def load_server() -> Any:
    """The module of the server: it lies beside the tests that need it most."""
    if "store_server" not in sys.modules:
        spec = importlib.util.spec_from_file_location("store_server", ROOT / "tests" / "store_server.py")
        assert spec is not None and spec.loader is not None
        sys.modules["store_server"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["store_server"])
    return sys.modules["store_server"]


def cpu_s(process: int) -> float:
    """CPU seconds of a process so far, of all its threads."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
