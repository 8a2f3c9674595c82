"""Named arrays in one file that every process of a machine maps into its memory: read once, shared, never
private.

The layout is that of safetensors (a header of JSON, then the arrays one after the other), so other tools read
these files; writing takes arrays in pieces, so that a file may be larger than the memory that writes it.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import parse_json

_NAMES = {
    "u1": "U8",
    "i1": "I8",
    "u2": "U16",
    "i2": "I16",
    "u4": "U32",
    "i4": "I32",
    "u8": "U64",
    "i8": "I64",
}
_NAMES |= {"f4": "F32", "f8": "F64"}
_DTYPES = {name: np.dtype("<" + code) for code, name in _NAMES.items()}
_MOST_HEADER = 100 << 20  # bytes, as in safetensors

Pieces = np.ndarray | Iterable[np.ndarray]


def write_arrays(path: str | Path, arrays: Mapping[str, Pieces], about: Mapping[str, str]) -> None:
    """Write one-dimensional arrays as a file that is complete or absent.

    Args:
        arrays: by name; an iterable of arrays of one dtype is written piece by piece, at least one piece.
        about: texts by name, for `read_arrays`.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(Path(path), lambda file: _write(file, arrays, about))


def _write(file: IO, arrays: Mapping[str, Pieces], about: Mapping[str, str]) -> None:
    """The header comes first and holds the lengths, which pieces tell at their end: room is left for it."""
    room = 4096 + 256 * len(arrays) + 2 * len(json.dumps(dict(about)))
    room += -room % 4096
    file.seek(8 + room)
    header: dict[str, object] = {"__metadata__": dict(about)}
    place = 0
    for name, pieces in arrays.items():
        begin, dtype = place, np.dtype("u1")
        for piece in [pieces] if isinstance(pieces, np.ndarray) else pieces:
            dtype = piece.dtype
            file.write(np.ascontiguousarray(piece, dtype.newbyteorder("<")).data)
            place += piece.nbytes
        count = (place - begin) // dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype.str[1:]], "shape": [count], "data_offsets": [begin, place]}
        padding = -place % 8
        if padding:  # safetensors allows no holes: what aligns the next array is an array too
            file.write(bytes(padding))
            header[f"_pad{len(header)}"] = {
                "dtype": "U8",
                "shape": [padding],
                "data_offsets": [place, place + padding],
            }
            place += padding
    text = json.dumps(header, ensure_ascii=True).encode()
    if len(text) > room:
        raise ValueError("the description of the arrays is longer than planned")
    file.seek(0)
    file.write(struct.pack("<Q", room) + text.ljust(room))


def read_arrays(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """(`about`, arrays) of a file that `write_arrays` or safetensors wrote; the arrays are read-only views of
    its mapped pages.

    Raises:
        InputError: the file is missing, cannot be read, or is damaged or cut off.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise InputError(f"{path} is damaged: it ends within its header")
            length = struct.unpack("<Q", head)[0]
            if length > _MOST_HEADER:
                raise InputError(f"{path} is no file of arrays (safetensors)")
            header = parse_json(file.read(length).decode("utf-8"))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no file of arrays (safetensors), or is damaged") from None
    try:
        about = header.pop("__metadata__", {})
        arrays = {
            name: _view(mapped, 8 + length, **told) for name, told in header.items() if name[:4] != "_pad"
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged or cut off: write it anew") from None
    return about, arrays


def _view(mapped: mmap.mmap, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    first, last = data_offsets
    kind = _DTYPES[dtype]
    if (
        len(shape) != 1
        or last - first != shape[0] * kind.itemsize
        or not 0 <= first <= last <= len(mapped) - start
    ):
        raise ValueError("an array that is not there")
    return np.frombuffer(mapped, kind, shape[0], start + first)
