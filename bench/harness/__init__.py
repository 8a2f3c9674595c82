"""What the benchmarks share: results and their tables, steps in processes of their own, plots, progress.

Importing it, before anything else of this project,
- puts this tree's `vmae` and `vmae_kernels` on the path: what is measured is what stands beside it;
- lets Triton interpret its kernels where there is no GPU (Triton reads that once), so that they can be
  checked and counted.
"""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

for _folder in (ROOT / "kernels", ROOT):
    if str(_folder) not in sys.path:
        sys.path.insert(1, str(_folder))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
