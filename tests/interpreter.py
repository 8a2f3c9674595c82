"""Whether Triton's interpreter works with the versions at hand."""

from __future__ import annotations

import numpy
import torch
from packaging.version import Version

from vmae_kernels.optional_triton import WHY_MISSING, triton


def why_not_interpreted() -> str | None:
    """The reason why kernels cannot be interpreted here; None if they can, or run on a GPU.

    Triton 3.6's interpreter makes Python numbers of arrays of one element. numpy 2.4 made that an error
    ("only 0-dimensional arrays can be converted to Python scalars"); Triton 3.7 no longer does it.
    """
    if torch.cuda.is_available() or WHY_MISSING:
        return None
    if Version(triton.__version__) >= Version("3.7") or Version(numpy.__version__) < Version("2.4"):
        return None
    found = f"triton {triton.__version__} with numpy {numpy.__version__}"
    return f"{found}: its interpreter needs numpy below 2.4; `pip install 'numpy<2.4'` or triton 3.7"
