"""Download of files and folders of the Hugging Face hub by name (`vmae.checkpoint.hub_names`).

What is fetched is data: `config.json`, files of weights, `preprocessor_config.json`; never code.

The package `huggingface_hub` (`pip install 'vmae[hub]'`) talks to the hub and keeps the cache, and its
variables count: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN. Two things are added here: a
large file goes on where it was cut off, in the next process too (release 2.4 deletes what it has), and its
SHA-256 is held against the hub's. By the cache's file locks one process downloads, and the others of the
machine wait for it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from vmae.checkpoint.hub_names import (
    CONFIG,
    INDEX_FILES,
    PROCESSOR,
    WEIGHT_FILES,
    HubName,
    is_weights,
    megabytes,
    parse_hub_name,
    shard_names,
)
from vmae.errors import InputError
from vmae.files.json_files import parse_json

_WAITS = (1.0, 2.0)  # seconds before the second and the third attempt
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Missing(Exception):
    """The repository has no such file."""


class _Unreachable(InputError):
    """The hub was not asked or did not answer, and the cache does not have the file."""


def fetch(checkpoint: str | Path, *, any_kind: bool = False) -> Path:
    """A file or folder of the hub in the cache, downloaded first where it is not there.

    A process asks the hub once for each name. Where the hub can't be asked, the cached copy counts, and a
    line says so.

    Args:
        any_kind: folders of other models than VideoMAE too.

    Returns:
        The local path; its last folder `snapshots/COMMIT` says of which commit it is.

    Raises:
        InputError: no such repository, revision or file, no access, no network and nothing in the cache, a
            download that breaks off or comes out different, or a cache that can't be written: one line each.
    """
    name = parse_hub_name(checkpoint)
    hub = _library(name)
    return _fetch(name, (hub.constants.ENDPOINT, hub.constants.HF_HUB_CACHE), any_kind)


def cached(checkpoint: str | Path) -> Path | None:
    """The cached copy of a file or folder of the hub, without asking the hub; None where it is not whole."""
    name = parse_hub_name(checkpoint)
    try:
        return Repository(_library(name), name, offline=True, any_kind=True).fetch()
    except InputError:
        return None


@functools.cache
def _fetch(name: HubName, place: tuple[str, str], any_kind: bool) -> Path:
    return Repository(_library(name), name, any_kind=any_kind).fetch()


def forget() -> None:
    """Ask the hub again for names that this process has asked for."""
    _fetch.cache_clear()


def _library(name: HubName) -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, file_download, utils
    except ImportError as error:
        missing = "" if error.name == "huggingface_hub" else f" ({error})"
        raise InputError(
            f"{name} needs the huggingface_hub package{missing}: pip install 'vmae[hub]', or download the "
            "file and give its path"
        ) from None
    assert constants and errors and file_download and utils  # its attributes from here on
    return huggingface_hub


class Repository:
    """A repository of the hub at a revision, through `huggingface_hub`."""

    def __init__(self, library: Any, name: HubName, *, offline: bool = False, any_kind: bool = False) -> None:
        self.library, self.name, self.any_kind = library, name, any_kind
        self.why_offline = "the hub is not asked" if offline else ""  # then only the cache counts
        self.errors, self.utils = library.errors, library.utils
        self.cache = Path(library.constants.HF_HUB_CACHE)
        self.page = f"{library.constants.ENDPOINT}/{name.repo}"

    # --- what to fetch ---

    def fetch(self) -> Path:
        name = self.name
        try:
            if name.is_file:
                return self.get(name.path or "")
        except _Missing:
            raise InputError(self._no_file(name.path or "")) from None
        return self.fetch_folder(f"{name.path}/" if name.path else "")

    def fetch_folder(self, prefix: str) -> Path:
        try:
            config = self.get(prefix + CONFIG)
        except _Missing:
            raise InputError(self._no_file(prefix + CONFIG)) from None
        if not self.any_kind:
            self._check_kind(config)
        pinned, commit = self, _commit_of(config, prefix + CONFIG)
        if re.fullmatch("[0-9a-f]{40}", commit):  # the other files of the same commit
            pinned = Repository(self.library, replace(self.name, revision=commit))
            pinned.why_offline = self.why_offline
        weights = pinned.first(prefix, [name for pair in zip(WEIGHT_FILES, INDEX_FILES) for name in pair])
        if weights is None:
            raise InputError(self._no_file(f"{prefix}{WEIGHT_FILES[0]} and no {WEIGHT_FILES[1]}"))
        if weights.name in INDEX_FILES:
            pinned.get_shards(prefix, weights)
        with contextlib.suppress(InputError):
            pinned.first(prefix, [PROCESSOR])
        return config.parent

    def _check_kind(self, config: Path) -> None:
        """Raises InputError where a `config.json` is of another kind of model, before its weights come."""
        try:
            values = parse_json(config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return  # who reads it says what is wrong
        kind = values.get("model_type") if isinstance(values, dict) else None
        if isinstance(kind, str) and not kind.lower().startswith("videomae"):
            raise InputError(
                f"{self.name}: its {CONFIG} is of model_type {kind!r}, not of a VideoMAE; the weights were "
                "not fetched"
            )

    def first(self, prefix: str, names: list[str]) -> Path | None:
        """The first of these files that there is."""
        unreachable: InputError | None = None
        for name in names:
            try:
                return self.get(prefix + name)
            except _Missing:
                continue
            except _Unreachable as error:  # one of the others may be in the cache
                unreachable = unreachable or error
        if unreachable is not None:
            raise unreachable
        return None

    def get_shards(self, prefix: str, index: Path) -> None:
        try:
            content = parse_json(index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{index} is no index of weights: {error}") from None
        for shard in shard_names(content if isinstance(content, dict) else {}, index):
            try:
                self.get(prefix + shard)
            except _Missing:
                raise InputError(
                    f"{self.name}: {index.name} names {shard}, which the repository does not have"
                ) from None

    # --- one file ---

    def get(self, file: str) -> Path:
        """A file of the repository in the cache.

        Raises:
            _Missing: it has no such file.
            InputError: everything else that can go wrong.
        """
        there = self._cached(file)
        exact = self.name.revision is not None and re.fullmatch("[0-9a-f]{40}", self.name.revision)
        if self.why_offline or exact:
            if there is self._NO_EXIST:
                raise _Missing
            if isinstance(there, Path):
                return there
        if self.why_offline:
            raise _Unreachable(self._not_cached(file))
        try:
            url = self.library.hf_hub_url(self.name.repo, file, revision=self.name.revision)
            waits = () if isinstance(there, Path) else _WAITS
            about = self._retry(lambda: self.library.get_hf_file_metadata(url), waits)
            if re.fullmatch("[0-9a-f]{64}", about.etag or "") and about.commit_hash:
                self._complete(file, about)
            return Path(self._retry(lambda: self._library_download(file), waits))
        except InputError:
            raise
        except Exception as error:
            return self._fall_back(error, file, there if isinstance(there, Path) else None)

    _NO_EXIST = object()

    def _cached(self, file: str) -> Path | object | None:
        """The cached file; `_NO_EXIST` where it is known that there is none; None where nothing is known."""
        found = self.library.try_to_load_from_cache(
            self.name.repo, file, cache_dir=self.cache, revision=self.name.revision
        )
        return Path(found) if isinstance(found, str) else None if found is None else self._NO_EXIST

    def _library_download(self, file: str) -> str:
        return self.library.hf_hub_download(
            self.name.repo, file, revision=self.name.revision, cache_dir=self.cache
        )

    def _complete(self, file: str, about: Any) -> None:
        """Put a large file among the cache's blobs, from where an earlier download of it ended."""
        folder = self.cache / self.library.file_download.repo_folder_name(
            repo_id=self.name.repo, repo_type="model"
        )
        blob = folder / "blobs" / about.etag
        lock = self.cache / ".locks" / folder.name / f"{about.etag}.lock"
        if blob.exists():
            return
        for place in (blob, lock):
            place.parent.mkdir(parents=True, exist_ok=True)
        with self.utils.WeakFileLock(lock):
            if blob.exists():  # another process was first
                return
            part = blob.with_name(f"{about.etag}.incomplete")
            self._download(file, about, part)
            size = part.stat().st_size
            if about.size not in (None, size) or _sha256(part) != about.etag:
                part.unlink()
                raise InputError(
                    f"{self._of(file)}: the {megabytes(size)} that arrived are not those of the hub (their "
                    "SHA-256 differs) and were deleted: start again"
                )
            part.replace(blob)

    def _download(self, file: str, about: Any, part: Path) -> None:
        url = self.library.hf_hub_url(self.name.repo, file, revision=about.commit_hash)
        attempts = 0
        while True:
            have = part.stat().st_size if part.exists() else 0
            if about.size is not None and have > about.size:
                part.unlink()
                have = 0
            free = shutil.disk_usage(part.parent).free
            if about.size is not None and about.size - have > free:
                raise InputError(
                    f"{self._of(file)}: {megabytes(about.size - have)} are to come, {megabytes(free)} are "
                    f"free in {self.cache}; HF_HOME names another place for the cache"
                )
            if attempts == 0:
                _LOG.info("downloading %s (%s) to %s", self._of(file), megabytes(about.size or 0), self.cache)
            try:
                self._stream(url, file, about.size, part, have)
                return
            except Exception as error:
                if not _is_transport(error):
                    raise
                now = part.stat().st_size if part.exists() else 0
                attempts = 1 if now > have else attempts + 1
                state = f"{megabytes(now)} of {megabytes(about.size or 0)}"
                if attempts > len(_WAITS):
                    raise InputError(
                        f"{self._of(file)}: the connection broke ({_reason(error)}); {state} are kept: start "
                        "again, it goes on from there"
                    ) from None
                _LOG.warning("note: %s: cut off at %s (%s); going on", self._of(file), state, _reason(error))
                time.sleep(_WAITS[attempts - 1])

    def _stream(self, url: str, file: str, size: int | None, part: Path, have: int) -> None:
        """Append to `part` from byte `have` on, as the bytes arrive."""
        headers = {**self.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with contextlib.ExitStack() as stack:
            answer, blocks = self._open(stack, url, headers)
            self.utils.hf_raise_for_status(answer)
            if answer.status_code == 200:  # it sends the whole file, whatever was asked for
                have = 0
            target = stack.enter_context(open(part, "ab" if have else "wb"))
            name = PurePosixPath(file).name
            bar = stack.enter_context(
                self.utils.tqdm(
                    desc=name,
                    total=size,
                    initial=have,
                    unit="B",
                    unit_scale=True,
                    disable=None,
                    name="vmae.hub",
                )
            )
            for block in blocks:
                target.write(block)
                bar.update(len(block))
        if size is not None and part.stat().st_size < size:
            raise ConnectionError("the answer ended early")

    def _open(
        self, stack: contextlib.ExitStack, url: str, headers: dict[str, str]
    ) -> tuple[Any, Iterator[bytes]]:
        """The answer to a GET that follows redirects (to another host without the token), and its bytes."""
        session, wait = self.library.get_session(), self.library.constants.HF_HUB_DOWNLOAD_TIMEOUT
        if callable(getattr(session, "stream", None)):  # of httpx; before release 1.0, of requests
            answer = stack.enter_context(
                session.stream("GET", url, headers=headers, timeout=wait, follow_redirects=True)
            )
            return answer, answer.iter_bytes()
        answer = stack.enter_context(session.get(url, headers=headers, timeout=wait, stream=True))
        return answer, answer.iter_content(1 << 16)

    def _retry(self, call: Callable[[], _T], waits: tuple[float, ...]) -> _T:
        """`call`, again after each of `waits` where the network or the hub failed for a moment."""
        for wait in waits:
            try:
                return call()
            except Exception as error:
                status = _status(error)
                if isinstance(error, self.errors.OfflineModeIsEnabled) or not (
                    _is_transport(error) or status == 429 or status >= 500
                ):
                    raise
                time.sleep(wait)
        return call()

    # --- errors ---

    def _of(self, file: str) -> str:
        return str(replace(self.name, path=file))

    def _fall_back(self, error: Exception, file: str, there: Path | None) -> Path:
        """The cached file where the hub could not be asked; raises what `error` means otherwise."""
        errors = self.errors
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(
            error, errors.LocalEntryNotFoundError
        ):
            raise _Missing from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise InputError(self._no_revision()) from None
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        why = self._why(cause or error)
        if isinstance(cause, errors.OfflineModeIsEnabled) or _is_transport(cause) or _status(cause) >= 500:
            self.why_offline = why
        if there is not None:
            if not isinstance(cause, errors.OfflineModeIsEnabled):
                _LOG.warning("note: %s: taken from the cache; %s", self._of(file), why)
            return there
        if self.why_offline:
            raise _Unreachable(self._not_cached(file)) from None
        raise InputError(f"{self.name}: {why}") from None

    def _not_cached(self, file: str) -> str:
        return f"{self.name}: {self.why_offline}, and the cache {self.cache} does not have {file}"

    def _why(self, error: BaseException | None) -> str:
        """Words for an error of the library."""
        errors, status = self.errors, _status(error)
        try:
            has_token = self.library.get_token() is not None
        except OSError:  # its file can't be read: nor can the cache beside it
            has_token = False
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: the hub is not asked"
        if isinstance(error, errors.GatedRepoError):
            login = (
                "the token that is set has no access yet" if has_token else "then run `hf auth login` here"
            )
            return f"it is gated: log in at {self.page}, accept its licence; {login} (or set HF_TOKEN)"
        if isinstance(error, errors.RepositoryNotFoundError):
            login = (
                "the token that is set can't read it"
                if has_token
                else "for a private one, `hf auth login` first"
            )
            return f"no such repository at {self.page}, or a private one: check the name; {login}"
        if status in (401, 403):
            return f"the hub refuses the token that is set ({status}): `hf auth login` sets another"
        if status:
            return f"the hub answers with error {status}" + (": try again later" if status > 428 else "")
        if isinstance(error, errors.FileMetadataError):
            return f"{self.page} does not answer as a hub does: check HF_ENDPOINT, proxy and login pages"
        if _is_transport(error):
            return f"{self.library.constants.ENDPOINT} cannot be reached ({_reason(error)})"
        if isinstance(error, OSError) and error.errno is not None:
            return f"the cache {self.cache} cannot be written ({_reason(error)}); HF_HOME names another place"
        return _reason(error)

    def _no_file(self, file: str) -> str:
        """Line on a file that the repository does not have, with the nearest ones that it has."""
        try:
            names = list(self.library.HfApi().list_repo_files(self.name.repo, revision=self.name.revision))
        except Exception:  # the listing is a courtesy
            names = []
        base = {PurePosixPath(name).name: name for name in names}
        near = difflib.get_close_matches(file, names, 3, 0.7)
        near += [base[name] for name in difflib.get_close_matches(PurePosixPath(file).name, base, 3, 0.8)]
        near = [name for name in dict.fromkeys(near) if is_weights(name)]
        near = near or [name for name in names if is_weights(name)]
        shown = ", ".join(str(replace(self.name, path=name)) for name in near[:4])
        more = ", ..." if len(near) > 4 else ""
        return f"{self.page} has no {file}" + (f"; it has {shown}{more}" if shown else "")

    def _no_revision(self) -> str:
        try:
            refs = self.library.HfApi().list_repo_refs(self.name.repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
        except Exception:  # as above
            names = []
        shown = f"; it has {', '.join(names[:6])}" if names else ""
        return f"{self.page} has no revision {self.name.revision}{shown}"


def _commit_of(path: Path, file: str) -> str:
    """The commit of a cached file, by its path."""
    return path.parents[file.count("/")].name


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = (
            error.__cause__
            or error.__context__
            or next((a for a in error.args if isinstance(a, Exception)), None)
        )


def _is_transport(error: BaseException | None) -> bool:
    """Whether the network failed, not the hub or the disk."""
    if error is None or _status(error):
        return False
    return (
        isinstance(error, (ConnectionError, TimeoutError))
        or type(error).__module__.split(".")[0] in _TRANSPORTS
    )


def _status(error: BaseException | None) -> int:
    """The HTTP status of an answer that is an error; 0 for other errors."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _reason(error: BaseException | None) -> str:
    """The innermost reason of an error, in a few words."""
    for one in reversed(list(_chain(error))):
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if re.search("IncompleteRead|peer closed connection", lines[0]):
        return "the answer ended early"
    return lines[0][:120]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
