"""Files of torch.save, read without executing anything that they say.

torch's `weights_only` loads tensors and plain containers, and of what else a file may name the exact names
below. None of numpy's or pathlib's own code runs for them: a scalar of numpy becomes a number of Python, a
dtype and a path become plain descriptions. So files of numpy 1 (`numpy.core`) and 2 (`numpy._core`), and
paths of other systems, load with any release of either.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from vmae.checkpoint.content import ZIP, check_zip
from vmae.errors import InputError

_NUMBERS = re.compile(r"b1|[?]|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[US]\d{1,6}")


def _refused(name: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"GLOBAL {name} was not an allowed global")


class NumpyType:
    """What a file says of a dtype of numpy: of numbers, truth values and text; others are refused."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise _refused(f"numpy.dtype of {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 8 or any(part is not None for part in state[2:5]):
            raise _refused("numpy.dtype with fields")
        if state[1] not in ("<", ">", "|", "="):
            raise _refused(f"numpy.dtype of byte order {state[1]!r}")
        self.order = state[1]


def _number(kind: Any, data: Any = None) -> Any:
    """The number or text of a scalar of numpy, from its bytes."""
    if not isinstance(kind, NumpyType):
        raise _refused(f"numpy.core.multiarray.scalar of {type(kind).__name__}")
    dtype = np.dtype(kind.order + kind.code)
    if not isinstance(data, bytes) or len(data) != dtype.itemsize or not data:
        raise _refused(f"numpy.core.multiarray.scalar of {kind.code} without its {dtype.itemsize} bytes")
    return np.frombuffer(data, dtype)[0].item()


_WIDTHS = {"Int": (8, 16, 32, 64), "UInt": (8, 16, 32, 64), "Float": (16, 32, 64), "Complex": (64, 128)}
_KINDS = ["Bool", "Str", "Bytes", *(f"{kind}{width}" for kind, widths in _WIDTHS.items() for width in widths)]
_PATHS: dict[str, type] = {"PosixPath": PurePosixPath, "PurePosixPath": PurePosixPath, "Path": PurePosixPath}
_PATHS |= {"WindowsPath": PureWindowsPath, "PureWindowsPath": PureWindowsPath, "PurePath": PurePosixPath}

# Name in a file -> what stands for it, beside what torch itself allows.
ALLOWED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": NumpyType,
    **{f"numpy.dtypes.{kind}DType": NumpyType for kind in _KINDS},
    # The module of Python up to 3.12 and from 3.14 on, and that of 3.13.
    **{f"{module}.{name}": kind for module in ("pathlib", "pathlib._local") for name, kind in _PATHS.items()},
}


def read_pickle(path: Path, kind: str) -> Any:
    """Content of a file of torch.save: tensors on the CPU, plain containers, and what `ALLOWED` names.

    Tensors of a zip are mapped, not read: what nobody uses (an optimizer's state) takes no memory.

    Args:
        kind: its format, see `format_of`.

    Raises:
        InputError: the file is damaged or cut off, or names anything else.
    """
    mapped = kind == ZIP and check_zip(path)
    allowed: list[Any] = [(value, name) for name, value in ALLOWED.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # of pickle protocols and old storages
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
            with open(path, "rb") as file:  # by such a name torch.load takes the file for the other format
                return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the bytes are anybody's: whatever its parser stumbles on
        raise InputError(f"checkpoint {path} {_why(error)}") from error


def _why(error: Exception) -> str:
    """What is wrong with a file that could not be loaded, with its verb."""
    text = " ".join(str(error).split()) or type(error).__name__
    if named := re.search(r"GLOBAL (.+?) (?:was not an allowed|whose module)", text):
        return f"is damaged, or holds more than weights and was not executed: it names {named[1]}"
    if named := re.search(r"(?:Can only|Trying to call reduce|Only persistent_load).{0,200}", text):
        return f"is damaged, or holds more than weights and was not executed: {named[0]}"
    if re.search(r"Unsupported operand (?:128|1[34]\d|15[01])\b", text):
        return (
            "is damaged, or holds more than weights and was not executed: its pickle protocol is none of "
            "torch.save's own (2); save it again without pickle_protocol"
        )
    if isinstance(error, EOFError) or re.search(r"EOF|[Rr]an out of input|corrupt|truncat|archive", text):
        return f"cannot be read: it is cut off or damaged ({text[:120]}); download or copy it again"
    if isinstance(error, pickle.UnpicklingError):
        return f"is damaged, or holds more than weights and was not executed: {text[:160]}"
    return f"cannot be read: it is damaged ({type(error).__name__}: {text[:120]})"
