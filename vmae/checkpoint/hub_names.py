"""Names of files and folders of the Hugging Face hub, and of the files in such a folder.

    hub:OWNER/NAME                        a repository as a folder: its config.json and weights
    hub:OWNER/NAME/PATH/FILE.pth          one file of it
    hub:OWNER/NAME/PATH                   a folder in it, with a config.json of its own
    hub:OWNER/NAME@REVISION[/PATH...]     of a branch, a tag or a commit (`refs/pr/1` too), else of `main`

`hf://` and the addresses of the hub's pages (`https://huggingface.co/OWNER/NAME/resolve/main/FILE`, `/blob/`,
`/tree/`) mean the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vmae.errors import InputError

SCHEME = "hub:"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".pyth", ".tar")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<path>.+?))?/?"
)
_FORMS = f"{SCHEME}OWNER/NAME, {SCHEME}OWNER/NAME@REVISION or {SCHEME}OWNER/NAME/PATH/FILE.pth"
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class HubName:
    """A file or a folder of the hub.

    Attributes:
        repo: owner and name of the repository.
        revision: branch, tag or commit; None is its main branch.
        path: of the file or folder in it; None is the whole repository.
    """

    repo: str
    revision: str | None = None
    path: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether `path` has the suffix of a file of weights."""
        return self.path is not None and is_weights(self.path)

    def __str__(self) -> str:
        revision = self.revision or ""
        if not revision.startswith("refs/"):
            revision = revision.replace("/", "%2F")
        revision = f"@{revision}" if revision else ""
        return f"{SCHEME}{self.repo}{revision}{'' if self.path is None else f'/{self.path}'}"


def is_hub_name(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is named by its place on the hub (or by another web address), not by a path."""
    return re.match(r"hub:|(?:hf|https?):/", str(checkpoint)) is not None


def parse_hub_name(checkpoint: str | Path) -> HubName:
    """The place on the hub that a name or an address means.

    Raises:
        InputError: it has another form, leaves the repository (`..`), or is an address elsewhere.
    """
    text = str(checkpoint)
    if text.startswith("http"):
        rest = _of_address(text)
    else:
        rest = re.sub(r"^(?:hub:|hf:)/*", "", text).removeprefix("models/")
    if rest.startswith(("datasets/", "spaces/", "kernels/", "buckets/")):
        raise InputError(f"{text}: only models are read from the hub ({_FORMS})")
    found = _NAME.fullmatch(rest)
    if found is None or "--" in found["repo"] or ".." in found["repo"]:
        raise InputError(f"{text} is no name of the Hugging Face hub; its forms are {_FORMS}")
    path = found["path"]
    if path is not None and not set(re.split(r"[/\\]", path)).isdisjoint({"", ".", ".."}):
        raise InputError(f"{text}: path {path!r} is none inside of a repository")
    revision = unquote(found["revision"]) if found["revision"] else None
    if revision is not None and ".." in revision:
        raise InputError(f"{text}: {revision!r} is no revision")
    return HubName(found["repo"], revision, path)


def _of_address(text: str) -> str:
    """`OWNER/NAME@REVISION/PATH` of an address of the hub's pages."""
    address = urlsplit(re.sub(r"^(https?):/+", r"\1://", text))  # a `Path` has lost one of the slashes
    own = urlsplit(_endpoint()).netloc
    if address.netloc.lower() not in (*_HOSTS, own):
        raise InputError(
            f"{text} is an address outside of the Hugging Face hub: download the file and give its path "
            f"(of the hub: {_FORMS})"
        )
    parts = [unquote(part) for part in address.path.strip("/").split("/")]
    if len(parts) > 3 and parts[2] in ("resolve", "blob", "raw", "tree"):
        del parts[2]
        end = 5 if parts[2] == "refs" else 3
        revision, parts[2:end] = "/".join(parts[2:end]), []
        if revision != "main":
            parts[1] += f"@{revision.replace('/', '%2F')}"
    return "/".join(parts)


def proposal(checkpoint: str | Path) -> str:
    """End of the line on a path that does not exist: the hub's form of it, where it looks like one."""
    text = str(checkpoint)
    found = _NAME.fullmatch(text)
    if found is None or Path(text.split("/")[0]).exists() or (found["path"] is None and is_weights(text)):
        return ""
    return f"; of the Hugging Face hub: {SCHEME}{text}"


def is_weights(name: str) -> bool:
    """Whether a name has the suffix of a file of weights."""
    return name.lower().endswith(_SUFFIXES)


def _endpoint() -> str:
    try:
        from huggingface_hub import constants
    except ImportError:
        return "https://huggingface.co"
    return constants.ENDPOINT


# --- files of a folder --------------------------------------------------------------------------------------


def refuse_pointer(path: Path) -> None:
    """Raises InputError where a file is the pointer that git LFS leaves in place of a large one."""
    try:
        with open(path, "rb") as file:
            start = file.read(200)
    except OSError:
        return  # who reads it says why it can't
    if start.startswith(_POINTER):
        size = re.search(rb"\nsize (\d+)", start)
        wants = f" of {megabytes(int(size[1]))}" if size else ""
        raise InputError(
            f"{path} is a pointer of git LFS, not the file{wants} itself: run `git lfs pull` in its folder, "
            f"or name the repository ({SCHEME}OWNER/NAME)"
        )


def shard_names(index: dict[str, Any], path: Path) -> list[str]:
    """The files that an index of weights names, each once.

    Raises:
        InputError: it names none, or anything but a plain name of a file of weights.
    """
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path} has no weight_map from tensors to files")
    for name in names.values():
        plain = isinstance(name, str) and is_weights(name) and not re.search(r"[/\\:\0]", name)
        if not plain:
            raise InputError(f"{path} names {name!r}, which is no file of weights in its own folder: refused")
    return list(dict.fromkeys(names.values()))


def megabytes(size: int) -> str:
    """A size in bytes, in words."""
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size} bytes"
