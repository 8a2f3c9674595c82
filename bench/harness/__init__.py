"""What the benchmarks share: results and their tables, steps in processes of their own, plots, progress.

Importing it, before anything else of this project,
- lets Triton interpret its kernels where there is no GPU (Triton reads that once), so that they can be
  checked and counted;
- imports `vmae` and `vmae_kernels` of this tree: what is measured is what stands beside it, installed or not.
  The tree does not stay on the path: its folder `kernels` would be found as the package of that name, which
  transformers looks for.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_FOLDERS = (str(ROOT / "kernels"), str(ROOT))
sys.path[:0] = _FOLDERS
for _name in ("vmae_kernels", "vmae"):
    importlib.import_module(_name)
for _folder in _FOLDERS:
    sys.path.remove(_folder)
