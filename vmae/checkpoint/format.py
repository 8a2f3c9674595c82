"""Format of a training checkpoint: torch's distributed checkpoint (one shard a rank) beside a manifest that
validates it.

    checkpoint-00001000/
      manifest.json      step, config, ranks; size and SHA-256 of every other file, and of itself
      .metadata          torch's: which tensor lies where
      __0_0.distcp ...   the shards

Only tensors are in the shards, and they load with `weights_only=True`. `.metadata` is a pickle, of which only
torch's own description classes are accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from vmae.errors import InputError
from vmae.files.atomic import reason_of
from vmae.files.json_files import parse_json, why_no_json

# A process alone knows that it is.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

MANIFEST = "manifest.json"
FORMAT = 1
Layouts = dict[str, tuple[torch.Size, torch.dtype]]
NamedTensors = dict[str, dict[str, Tensor]]
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        "float32",
        "float64",
        "bfloat16",
        "float16",
        "int64",
        "int32",
        "uint8",
        "bool",
        "strided",
    },
    "pathlib": {"PosixPath", "WindowsPath", "Path", "PurePosixPath"},
    # Python 3.13's name for the same.
    "pathlib._local": {"PosixPath", "WindowsPath", "Path", "PurePosixPath"},
}


class _DescriptionUnpickler(pickle.Unpickler):
    """Loads the classes that describe a checkpoint, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(
                f"{module}.{name} does not belong into a checkpoint's metadata; it was not executed"
            )
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """Reads tensors, and executes nothing that a file says."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _DescriptionUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it does not describe a checkpoint")
        for name, layout in metadata.state_dict_metadata.items():
            if not isinstance(layout, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is no tensor")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint's folder (its content may still be damaged)."""
    return os.path.isfile(path / MANIFEST)  # also False where permission is missing


# --- the manifest ---


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return {"bytes": os.path.getsize(path), "sha256": total.hexdigest()}


def make_manifest(files: dict[str, dict[str, Any]], step: int, ranks: int, about: dict[str, Any]) -> str:
    """The manifest's text.

    Args:
        files: `file_facts` by name.
        about: plain containers: `config`, and what else a resumed run has to know.
    """
    content = {
        "format": FORMAT,
        "step": step,
        "ranks": ranks,
        "torch": torch.__version__,
        "files": files,
        **about,
    }
    content = json.loads(json.dumps(content))  # tuples become lists, as they will when it is read
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Manifest of a checkpoint: `step`, `config`, `ranks`, `files`, `samples`.

    Raises:
        InputError: there is none, it was changed, or it is of a later form than this code knows.
    """
    file = Path(path) / MANIFEST
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        written = isinstance(content, dict) and content.pop("sha256", None) == _digest(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path} is not a training checkpoint: it has no {MANIFEST}; weights alone go to --init"
        ) from error
    except OSError as error:
        raise InputError(
            f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise InputError(
            f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({why_no_json(error)})"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read (it holds no object)")
    if not written:
        raise InputError(f"checkpoint {path} is damaged: {MANIFEST} is not what was written")
    if content.get("format") != FORMAT:
        raise InputError(f"checkpoint {path} has form {content.get('format')}; this code reads form {FORMAT}")
    return content


def find_damage(path: str | Path, part: int = 0, parts: int = 1) -> list[str]:
    """Problems of a checkpoint's files, each by name; none if all are as they were written.

    Args:
        part, parts: look at this share of the files only.
    """
    path, problems = Path(path), []
    for name, written in sorted(read_manifest(path)["files"].items())[part::parts]:
        try:
            found = file_facts(path / name) if (path / name).exists() else None
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
            continue
        if found is None:
            problems.append(f"{name} is missing")
        elif found["bytes"] != written["bytes"]:
            problems.append(f"{name} has {found['bytes']} bytes instead of {written['bytes']}")
        elif found != written:
            problems.append(f"{name} is not what was written (its SHA-256 differs)")
    return problems


# --- reading tensors ---


def _metadata(path: Path) -> Metadata:
    try:
        return SafeReader(path).read_metadata()
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
    ) as error:
        raise InputError(
            f"checkpoint {path} is damaged, or holds more than tensors: .metadata: {error}"
        ) from error


def tensor_layouts(path: str | Path) -> Layouts:
    """Shape and dtype of every tensor of a checkpoint, by `GROUP.NAME`.

    Raises:
        InputError: it can't be read, or holds anything but tensors.
    """
    described = _metadata(Path(path)).state_dict_metadata
    return {
        name: (layout.size, layout.properties.dtype)
        for name, layout in described.items()
        if isinstance(layout, TensorStorageMetadata)  # all are, see `SafeReader`
    }


def shapes_of(layouts: Layouts, group: str) -> dict[str, torch.Size]:
    """Shapes of a group's tensors, by name."""
    prefix = f"{group}."
    return {key.removeprefix(prefix): size for key, (size, _) in layouts.items() if key.startswith(prefix)}


def load_tensors(path: str | Path, state: dict[str, dict[str, Tensor]], group: Any = None) -> None:
    """Fill the tensors of `state` in place (sharded ones with their part), from however many shards there
    are.

    Args:
        group: of ranks that all read together, with gloo; None reads alone.

    Raises:
        InputError: a file can't be read, or lacks one of the tensors.
    """
    try:
        dcp.load(state, storage_reader=SafeReader(path), process_group=group, no_dist=group is None)
    except (
        dcp.CheckpointException,
        RuntimeError,
        OSError,
        ValueError,
        pickle.UnpicklingError,
        EOFError,
    ) as error:
        raise InputError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error


def read_group(path: str | Path, group: str = "model") -> dict[str, Tensor]:
    """The named tensors of a checkpoint's group, whole, on the CPU, read by this process alone."""
    prefix = f"{group}."
    layouts = {key: layout for key, layout in tensor_layouts(path).items() if key.startswith(prefix)}
    tensors = {
        key.removeprefix(prefix): torch.empty(size, dtype=dtype) for key, (size, dtype) in layouts.items()
    }
    if not tensors:
        raise InputError(f"checkpoint {path} holds no {group}")
    load_tensors(path, {group: tensors})
    return tensors
