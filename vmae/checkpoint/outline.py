"""What a file of weights holds, without its tensors' bytes: names, shapes, dtypes, and what is beside them.

Nothing of the file is executed. Its pickle is read with inert stand-ins for every class and function that it
names, so a file that no loader would open can be described too.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmae.errors import InputError

_LARGEST_PICKLE = 256 << 20  # bytes of descriptions: those of the largest published file have 0.3 MB
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u8": "Q", "b1": "?"}


@dataclass(frozen=True)
class TensorOutline:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Outline:
    """Content of a file.

    Attributes:
        format: "torch zip", "torch pickle" or "safetensors".
        tensors: tensors by name, by the dotted path of the dictionary that holds them; "" is the whole file.
        beside: other values by their path, as plain numbers, texts, lists and dictionaries.
        classes: dotted names of all classes and functions that its pickle names.
    """

    format: str
    tensors: dict[str, dict[str, TensorOutline]]
    beside: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def read_outline(path: str | Path) -> Outline:
    """The outline of a `.pth`, `.pt`, `.bin` or `.safetensors` file.

    Raises:
        InputError: it cannot be read, or is none of these.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            if head[:2] == b"PK":
                return _of_content("torch zip", *_read_zip(path))
            if head[8:9] == b"{":
                return _of_safetensors(path)
            file.seek(0)
            return _of_content("torch pickle", *_read_pickles(file))
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"checkpoint {path} cannot be read: {reason}") from error
    except (TypeError, AttributeError, IndexError, MemoryError, RecursionError, struct.error) as error:
        raise InputError(f"checkpoint {path} cannot be read: its pickle is damaged ({error})") from error


# --- pickles ------------------------------------------------------------------------------------------------


class _Named:
    """Stand-in for an instance of a class, or the result of a function, that a pickle names."""

    place = ""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, {}, {}
        return made

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any
        self.items: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    add = append

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class _Storage:
    dtype: str


class _Reader(pickle.Unpickler):
    """Unpickles with `_Named` for every name."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        place = f"{module}.{name}"
        self.names.add(place)
        return type(name, (_Named,), {"place": place})

    def persistent_load(self, key: Any) -> Any:
        kind = key[1] if isinstance(key, tuple) and len(key) > 1 else None
        place = getattr(kind, "place", str(kind))
        return _Storage(_STORAGES.get(place.rpartition(".")[2], "uint8"))


def _load(data: Any) -> tuple[Any, set[str]]:
    reader = _Reader(data)
    return reader.load(), reader.names


def _read_zip(path: Path) -> tuple[Any, set[str]]:
    with zipfile.ZipFile(path) as archive:
        entry = next((one for one in archive.infolist() if one.filename.endswith("data.pkl")), None)
        if entry is None:
            raise ValueError("a zip archive without data.pkl is no file of torch.save")
        if entry.file_size > _LARGEST_PICKLE:
            raise ValueError(f"its data.pkl has {entry.file_size:,} bytes")
        return _load(io.BytesIO(archive.read(entry)))


def _read_pickles(file: Any) -> tuple[Any, set[str]]:
    """Torch's older form: three pickles (magic number, version, system), then the content."""
    for number in range(3):
        value, names = _load(file)
        if names or (number == 0 and value != 0x1950A86A20F9469CFC6C):
            raise ValueError("it is neither of torch.save nor safetensors")
    return _load(file)


class _Plainer:
    """Makes values of numbers, texts, lists, dictionaries and `TensorOutline`s, not more than `most` of them:
    a pickle of a few bytes can hold lists of lists without end."""

    def __init__(self, most: int = 100_000) -> None:
        self.left = most

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it holds more values than weights have")
        if depth > 12:
            return "..."
        if isinstance(value, Mapping):
            return {str(key): self(one, depth + 1) for key, one in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self(one, depth + 1) for one in value]
        if isinstance(value, _Storage):
            return f"storage of {value.dtype}"
        if isinstance(value, bytes):
            return value.decode("latin1")
        if isinstance(value, _Named):
            return self._named(value, depth)
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

    def _named(self, value: _Named, depth: int) -> Any:
        name = value.place.rpartition(".")[2]
        if name.startswith("_rebuild_tensor") and isinstance(value.arguments[0], _Storage):
            dtype = next((one.place for one in value.arguments if _is_dtype(one)), value.arguments[0].dtype)
            return TensorOutline(tuple(map(int, value.arguments[2])), dtype.rpartition(".")[2])
        if name.startswith("_rebuild_parameter"):
            return self(value.arguments[0], depth + 1)
        if name == "scalar" and "numpy" in value.place:
            return _scalar(*value.arguments)
        if name == "encode":
            return self(value.arguments[0], depth + 1)
        inner = value.state if value.state else value.items or list(value.arguments)
        found = self(inner, depth + 1)
        if name == "Namespace" and isinstance(found, dict):
            return found
        return {"class": value.place, **(found if isinstance(found, dict) else {"of": found})}


def _is_dtype(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, _Named) and value.place.startswith("torch.")


def _scalar(dtype: Any, data: Any = b"") -> Any:
    kind = dtype.arguments[0] if isinstance(dtype, _Named) and dtype.arguments else ""
    if isinstance(data, _Named) and data.arguments:  # _codecs.encode(text, "latin1")
        data = data.arguments[0]
    raw = data.encode("latin1") if isinstance(data, str) else data
    form = _SCALARS.get(str(kind).lstrip("<>|="))
    if form and isinstance(raw, bytes) and len(raw) == struct.calcsize("<" + form):
        return struct.unpack("<" + form, raw)[0]
    return f"numpy {kind}"


# --- outlines -----------------------------------------------------------------------------------------------


def _of_content(form: str, content: Any, names: set[str]) -> Outline:
    tensors: dict[str, dict[str, TensorOutline]] = {}
    beside: dict[str, Any] = {}
    plain = _Plainer()(content)
    if not isinstance(plain, dict):
        raise ValueError(f"it holds no tensors by name, but {type(plain).__name__}")
    for place, found in _tables(plain):
        tensors[place] = found
    for key, value in plain.items():
        if not isinstance(value, TensorOutline) and key not in tensors:
            beside[key] = value
    return Outline(form, tensors, beside, tuple(sorted(names)))


def _tables(
    content: Mapping[str, Any], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, TensorOutline]]]:
    """Dictionaries that hold tensors by name, outermost first."""
    own = {name: value for name, value in content.items() if isinstance(value, TensorOutline)}
    if own:
        yield place, own
    for name, value in content.items():
        if isinstance(value, dict) and depth < 2 and name not in ("optimizer", "scaler", "lr_scheduler"):
            yield from _tables(value, f"{place}.{name}" if place else name, depth + 1)


def _of_safetensors(path: Path) -> Outline:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_PICKLE or length + 8 > path.stat().st_size:
            raise ValueError("its safetensors header is longer than the file: it was cut off")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its safetensors header is no table")
    about = header.pop("__metadata__", {})
    tensors = {
        name: TensorOutline(tuple(one["shape"]), _SAFETENSORS.get(one["dtype"], one["dtype"]))
        for name, one in header.items()
    }
    return Outline("safetensors", {"": tensors}, about if isinstance(about, dict) else {})
