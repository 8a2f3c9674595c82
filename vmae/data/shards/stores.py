"""Requests to object stores: s3://, gs://, az://, https://, by `obstore`.

A request has a time limit; one that fails for a reason that may pass is repeated after a pause that doubles,
with jitter, until the store's patience is over. Refused access, missing objects, wrong regions and the like
do not pass: they are repeated once. Every error is one line of ours: obstore's own hold whole addresses and
answers, which may hold a secret.

Credentials come from the environment alone: AWS_*, GOOGLE_*, AZURE_*. An address that holds one is refused.

A process that has asked a store must not be forked: the threads that obstore needs are not in the child,
whose first request would wait for ever. So workers ask here, and every other process asks through one of its
own (see `vmae.data.shards.remote`).
"""

from __future__ import annotations

import ipaddress
import math
import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from vmae.data.shards.entries import ShardError
from vmae.errors import InputError

if TYPE_CHECKING:
    from obstore import GetOptions

SCHEMES = ("s3", "gs", "az", "https", "http")
PATIENCE_S, TIMEOUT_S = 600.0, 30.0  # where the environment says nothing else
CONNECT_S = 10.0
FIRST_PAUSE_S, MOST_PAUSE_S, QUICK_PAUSE_S = 0.2, 5.0, 0.5
GUIDE = 'see docs/data_at_scale.md, "Object stores"'

Answer = TypeVar("Answer")
_jitter = random.SystemRandom()  # its own: no seed of a run is touched, and no two forks draw the same
_stores: dict[str, Any] = {}
_user: int | None = None  # the process that has asked a store


class Fault(NamedTuple):
    """Why a request failed.

    Attributes:
        reason: for people, without address.
        passes: whether it may pass, so that the request is repeated for as long as the patience lasts.
    """

    reason: str
    passes: bool


class Found(NamedTuple):
    """What a store says of an object.

    Attributes:
        size: bytes.
        etag: name of its content; empty where the store gives none.
        modified: when it was written, as the store says it; empty where it does not.
    """

    size: int
    etag: str
    modified: str = ""


class Changed(InputError):
    """The object has another ETag than the one asked for."""


def seconds_of(variable: str, default: float) -> float:
    """Seconds above 0 that a variable of the environment says, else `default`.

    Raises:
        InputError: it is no number above 0.
    """
    text = os.environ.get(variable)
    try:
        seconds = default if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{variable} must be seconds above 0, not {text!r}")
    return seconds


def patience() -> float:
    """Seconds that a store may be silent in a run: the environment's VMAE_STORE_PATIENCE_S, else ten minutes.

    Raises:
        InputError: see `seconds_of`.
    """
    return seconds_of("VMAE_STORE_PATIENCE_S", PATIENCE_S)


def check_limits() -> None:
    """Raises InputError where the environment says no good limit of time; before a run."""
    patience()
    seconds_of("VMAE_STORE_TIMEOUT_S", TIMEOUT_S)


def split_address(address: str) -> tuple[str, str]:
    """(address of the bucket or server, name of the object in it).

    Raises:
        InputError: an address of another kind, without an object, or with what may be a credential; that one
            is not repeated.
    """
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES:
        raise InputError(
            f"{scheme[:20]}:// is no address of an object store; known: {', '.join(SCHEMES[:4])}"
        )
    try:
        parts = urlsplit(address)
        host, secret = parts.hostname, parts.username is not None or "@" in parts.netloc
    except ValueError:
        raise InputError(f"an address that starts with {scheme}:// cannot be read: correct it") from None
    if secret or (scheme[:4] == "http" and (parts.query or parts.fragment)) or _SIGNED.search(address):
        raise InputError(
            f"an address that starts with {scheme}:// holds a user, a query or a signature: addresses are "
            f"written into logs and must hold no credential; give it by the environment ({GUIDE})"
        )
    bucket, _, key = rest.partition("/")
    if not host or not bucket or not key:
        raise InputError(f"{address} names no object: {scheme}://BUCKET/NAME is wanted")
    if scheme == "http" and not (_loopback(host) or os.environ.get("VMAE_ALLOW_HTTP")):
        raise InputError(
            f"{address}: plain http can be read and changed on its way; use https, or set VMAE_ALLOW_HTTP=1"
        )
    return f"{scheme}://{bucket}", unquote(key) if scheme[:4] == "http" else key


_SIGNED = re.compile(r"[?&](sig|[a-z-]*signature|[a-z-]*credential|[a-z-]*token)=", re.IGNORECASE)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- one store ----------------------------------------------------------------------------------------------


def store_of(root: str) -> Any:
    """The store of a bucket or server, one for each process, so that its connections are used again.

    Raises:
        InputError: obstore is not installed, or the environment lacks what the store needs.
        RuntimeError: this process is a fork of one that has asked a store.
    """
    global _user
    if _user not in (None, os.getpid()):
        raise RuntimeError(
            "internal error: a process that had asked an object store was forked, and its child asks one; "
            "ask through vmae.data.shards.remote"
        )
    if root not in _stores:
        os.environ.setdefault(
            "TOKIO_WORKER_THREADS", "2"
        )  # of each process; else as many as the machine has cores
        try:
            from obstore.store import HTTPStore, from_url
        except ImportError:
            raise InputError(f"{root} needs obstore: `pip install 'vmae[store]'`") from None
        _user = os.getpid()
        settings: dict[str, Any] = {"client_options": _client(root), "retry_config": _NO_RETRIES}
        try:
            _stores[root] = (HTTPStore if root[:4] == "http" else from_url)(root, **settings)
        except Exception as error:
            raise InputError(f"{root}: {explain(error, root).reason}") from None
    return _stores[root]


_NO_RETRIES = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}  # they are ours, see `insist`


def _client(root: str) -> dict[str, Any]:
    """Limits of time: of a connection, of silence within an answer, and of a whole answer."""
    silence = seconds_of("VMAE_STORE_TIMEOUT_S", TIMEOUT_S)
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    options = {
        "connect_timeout": timedelta(seconds=min(CONNECT_S, silence)),
        "read_timeout": timedelta(seconds=silence),
        "timeout": timedelta(seconds=10 * silence),
        "allow_http": allowed or root.startswith("http://"),
    }
    if bundle := os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE"):
        try:
            with open(bundle, "rb") as file:
                options["root_certificate"] = file.read()
        except OSError as error:
            raise InputError(
                f"certificates {bundle} (AWS_CA_BUNDLE or SSL_CERT_FILE): {error.strerror}"
            ) from None
    return options


# --- why a request failed -----------------------------------------------------------------------------------

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")
_REGION = re.compile(r"<Region>([a-z0-9-]{1,40})</Region>")
_REGION_CODES = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException")
_KEY_CODES = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed")
_OLD_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName")
_SOURCES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (of a profile: `aws configure export-credentials "
    "--format env`), or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def explain(error: BaseException, root: str) -> Fault:
    """What an exception of obstore means, without any text of it that may hold a secret."""
    text = str(error)
    scheme = root.partition("://")[0]
    source = _SOURCES.get(scheme, "credentials")
    status, code = _STATUS.search(text), _CODE.search(text)
    if "169.254.169.254" in text or "token request" in text:  # the machine's own, which others may overload
        return Fault(f"no credentials: set {source} ({GUIDE})", not (status and status[1].startswith("4")))
    if "MissingAccount" in text:
        return Fault(f"no account: set {source} ({GUIDE})", False)
    told = " ".join(found[1] for found in (status, code) if found)
    name = code[1] if code else ""
    if name in _REGION_CODES or "BareRedirect" in text:
        own, region = os.environ.get("AWS_REGION") or "us-east-1", _REGION.search(text)
        right = f"AWS_REGION={region[1]}" if region else "AWS_REGION to the bucket's"
        return Fault(f"the bucket is in another region than {own}: set {right}", False)
    if name in _OLD_CODES:
        return Fault(f"the credentials have expired ({told}): renew them", False)
    if name in _KEY_CODES:
        return Fault(f"the store does not know these credentials ({told}): correct {source}", False)
    if name in _BUCKET_CODES:
        return Fault(f"there is no such bucket ({told})", False)
    if isinstance(error, FileNotFoundError):
        return Fault(f"there is no such object ({told})", False)
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return Fault(f"access is refused ({told or 'credentials'}): these credentials may not read it", False)
    if isinstance(error, ValueError) or type(error).__name__ == "InvalidPathError":
        return Fault("no object can have this name: correct it", False)
    if type(error).__name__ == "NotSupportedError" or "NotPartial" in text:
        return Fault("the server gives no byte ranges: copy the files to one that does", False)
    if status:
        number = int(status[1])
        return Fault(
            f"the store answers {told}",
            number >= 500 or number in (408, 425, 429) or name == "RequestTimeout",
        )
    return _explain_connection(text.partition("inner:")[2] or text, scheme)


def _explain_connection(text: str, scheme: str) -> Fault:
    """Where no answer came. `text` is obstore's description of the fault, without the address."""
    if "BadScheme" in text:
        return Fault("its endpoint is plain http: use https, or set AWS_ALLOW_HTTP=true", False)
    if "InvalidCertificate" in text:
        return Fault(
            "its certificate is not trusted (TLS); set SSL_CERT_FILE to the authority's, if it is yours",
            False,
        )
    if "InvalidMessage" in text:
        return Fault("the server does not speak https (TLS)", False)
    if "dns error" in text:
        return Fault("there is no such host (DNS)", True)
    if "kind: Timeout" in text or "TimedOut" in text:
        return Fault("no answer came in time (VMAE_STORE_TIMEOUT_S)", True)
    if "ConnectionRefused" in text or "kind: Connect" in text:
        return Fault(
            "it cannot be reached (connection refused)" if "Refused" in text else "it cannot be reached", True
        )
    return Fault("the connection broke off", True)


def insist(ask: Callable[[], Answer], address: str, root: str, patience_s: float) -> Answer:
    """`ask()`, repeated while what it fails of may pass.

    Args:
        address: for the error.
        patience_s: seconds from the first failure on, after which it is given up.

    Raises:
        ShardError: it failed for good, or for too long.
        Changed: see there.
    """
    began, pause, refused = time.monotonic(), FIRST_PAUSE_S, False
    while True:
        try:
            answer = ask()
        except (InputError, RuntimeError):
            raise
        except Exception as error:
            if type(error).__name__ == "PreconditionError":
                raise Changed from None
            fault = explain(error, root)
        else:
            return answer
        passed = time.monotonic() - began
        if not fault.passes and refused:
            raise ShardError(f"{address}: {fault.reason}")
        if fault.passes and passed >= patience_s:
            raise ShardError(f"{address}: {fault.reason}; tried for {passed:.0f} s")
        refused = not fault.passes
        time.sleep(
            QUICK_PAUSE_S
            if refused
            else min(pause * _jitter.uniform(0.5, 1.5), max(patience_s - passed, 0.1))
        )
        pause = min(2 * pause, MOST_PAUSE_S)


# --- what is asked ------------------------------------------------------------------------------------------


def read_bytes(address: str, offset: int, length: int, etag: str, patience_s: float) -> tuple[bytes, int]:
    """(bytes of an object, fewer where it ends before; its size).

    Args:
        etag: that it must have; "" for any.

    Raises:
        ShardError: see `insist`.
        Changed: it has another ETag.
        InputError: see `split_address`, `store_of`.
    """
    root, key = split_address(address)
    options: GetOptions = {"range": (offset, offset + length)}
    if etag and not etag.startswith("W/"):  # a weak one never matches (RFC 9110, 13.1.1)
        options["if_match"] = etag
    store = store_of(root)
    import obstore

    def ask() -> tuple[bytes, int]:
        try:
            answer = obstore.get(store, key, options=options)
            return answer.bytes().to_bytes(), answer.meta["size"]
        except obstore.exceptions.GenericError as error:
            if _STATUS.findall(str(error))[:1] == ["416"]:  # it ends before `offset`
                return b"", -1
            raise

    return insist(ask, address, root, patience_s)


def find_object(address: str, patience_s: float) -> Found:
    """Size and ETag of an object.

    By reading a byte, not by HEAD: only answers with a body tell a missing bucket from a missing object.

    Raises:
        ShardError, InputError: see `read_bytes`.
    """
    root, key = split_address(address)
    store = store_of(root)
    import obstore

    def ask() -> Found:
        try:
            about = obstore.get(store, key, options={"range": (0, 1)}).meta
        except obstore.exceptions.GenericError as error:
            if _STATUS.findall(str(error))[:1] != ["416"]:
                raise
            about = obstore.head(store, key)  # it is empty
        modified = about["last_modified"]
        return Found(about["size"], about["e_tag"] or "", str(modified) if modified.timestamp() else "")

    return insist(ask, address, root, patience_s)


def download(address: str, file: IO, found: Found, patience_s: float) -> None:
    """Write an object into a file, piece by piece; a piece that fails is asked for again.

    Raises:
        ShardError, InputError: see `read_bytes`; also where it changes meanwhile.
    """
    at = 0
    while at < found.size:
        length = min(_PIECE, found.size - at)
        try:
            data, size = read_bytes(address, at, length, found.etag, patience_s)
        except Changed:
            data, size = b"", -1
        if len(data) != length or size != found.size:
            raise ShardError(f"{address} was changed while it was read: start again")
        file.write(data)
        at += length


_PIECE = 8 << 20  # bytes of a request
