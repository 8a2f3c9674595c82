"""What a file is, by its content: the end of its name counts for nothing.

Weights come as torch's zip, as torch's older pickle, or as safetensors. What people have instead of them (a
pointer of git LFS, a saved web page, a file of another program) is named.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

from vmae.errors import InputError

ZIP, LEGACY, SAFETENSORS = "zip", "legacy", "safetensors"
_HEAD = 4096  # bytes to look at
_MAX_HEADER = 100_000_000  # bytes of safetensors' header, as its library has it
_TORCH_PICKLE = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # what torch's older files begin with

# First bytes -> what it is, and what to do.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of git LFS instead of the weights: `git lfs pull` fetches them"),
    (b"\x1f\x8b", "compressed (gzip): unpack it first"),
    (b"BZh", "compressed (bzip2): unpack it first"),
    (b"\xfd7zXZ", "compressed (xz): unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd): unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a rar archive: unpack it first"),
    (b"\x89HDF", "HDF5 (Keras, TensorFlow): only weights of PyTorch are read"),
    (b"\x93NUMPY", "an array of numpy, no weights by name"),
    (b"GGUF", "GGUF: only weights of PyTorch are read"),
    (b"%PDF", "a PDF document"),
)
_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")


def check_file(path: Path) -> None:
    """Raises InputError unless `path` is a file."""
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist or is not a file")


def format_of(path: Path) -> str:
    """The format of a file of weights: ZIP, LEGACY or SAFETENSORS; the rest of it may still be damaged.

    Raises:
        InputError: it is missing, empty or something else: the message says what it seems to be.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    if head.startswith(_TORCH_PICKLE):
        return LEGACY
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= _MAX_HEADER:
        return SAFETENSORS
    raise InputError(f"checkpoint {path} cannot be read: it {_seems(head, path.suffix.lower())}")


def _seems(head: bytes, suffix: str) -> str:
    """What a file that holds no weights seems to be, with its verb."""
    if not head:
        return "is empty (0 bytes): was a download or a copy cut off?"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return f"is {what}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_PAGE):
        return "is a web page instead of the weights: open the link in a browser, or take its direct download"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if head[4:8] == b"TFL3":
        return "is a model of TensorFlow Lite: only weights of PyTorch are read"
    if suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head[:64]):
        return "seems to be an ONNX graph: give the weights that it was exported from"
    if suffix in (".pb", ".index", ".ckpt", ".meta") or ".data-0000" in suffix:
        return "seems to be a file of TensorFlow: only weights of PyTorch are read"
    if head[:1] == b"\x80":
        return "is a pickle that torch.save did not write; save the model's state_dict() with it"
    if text.startswith((b"{", b"[")):
        return "is JSON text, no weights"
    if len(set(head)) == 1:
        return "holds no weights: it begins with the same byte over and over (a broken download?)"
    if b"\0" not in head:
        return f"is text, no weights: it begins with {head[:32].decode('utf-8', 'replace')!r}"
    return "is neither of torch.save nor safetensors"


def check_zip(path: Path) -> bool:
    """Whether the tensors of a zip of torch.save lie in it uncompressed, so that they can be mapped.

    Raises:
        InputError: it is cut off, or another program's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read: it is cut off ({path.stat().st_size:,} bytes, and the end of "
            "its zip archive is not among them); download or copy it again"
        ) from error
    names = [entry.filename for entry in entries]
    if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        what = "a zip archive that torch.save did not write"
        if names and all(name.endswith(".npy") for name in names):
            what = "arrays of numpy (.npz)"
        elif any(name.endswith(".weights.h5") for name in names):
            what = "a model of Keras"
        elif any(name.endswith("archive_format") for name in names):
            what = "an exported program (torch.export): give the weights that it was made from"
        raise InputError(f"checkpoint {path} cannot be read: it is {what} (it holds {', '.join(names[:3])})")
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise InputError(
            f"checkpoint {path} cannot be read: it is a TorchScript program, not weights; save its "
            "state_dict() with torch.save"
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def check_safetensors(path: Path) -> None:
    """Raises InputError where the file is shorter or longer than its own header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    wanted = 8 + length
    if len(header) == length:
        try:
            entries = json.loads(header)
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            wanted += max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise InputError(
                f"checkpoint {path} cannot be read: it has a damaged safetensors header"
            ) from error
    if size < wanted:
        raise InputError(
            f"checkpoint {path} cannot be read: it is cut off ({size:,} bytes of {wanted:,}); download or "
            "copy it again"
        )
