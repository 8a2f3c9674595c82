"""Puts `bench/` on the path, for its harness, which experiments share; import it before `harness`."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "bench"))
