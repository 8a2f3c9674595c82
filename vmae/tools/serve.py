"""`python -m vmae serve`: local web page that shows masks, reconstruction and classes of a video that is
dropped on it.

The server is that of the standard library, bound to 127.0.0.1. A request's video is one file in its own
temporary folder, which is removed when the request ends, with or without an error. The number of uploads and
of connections, the size of a file and the time of an upload are limited, so the use of disk, threads and time
is bounded. Requests from pages of other sites are refused by their Host, by their Origin, and by a header
that such a page may not send.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch

from vmae.checkpoint.arguments import add_source_arguments
from vmae.checkpoint.classifier import LoadedClassifier, load_classifier
from vmae.config import MaskConfig, _Checked
from vmae.data.containers import container_kind
from vmae.data.decode import open_video
from vmae.data.guarded import guarded
from vmae.errors import InputError
from vmae.evaluate.classify import published_views
from vmae.evaluate.encoder import middle_clip
from vmae.evaluate.pictures import draw_grid
from vmae.evaluate.predict import top_classes
from vmae.evaluate.reconstruct import load_model, reconstruct
from vmae.flags import add_settings
from vmae.masking import DECODER_MASKS, ENCODER_MASKS, DualMask
from vmae.model import Pretrainer
from vmae.settings import SEED, SIDE, Real, Whole, limits, ranged, shown
from vmae.train.checks import resolve_device
from vmae.train.pretrain_settings import RunConfig

_SECONDS = Real(above=0, most=86400)
# Browsers let a page of another site send this header only after a preflight request, which is refused here.
HEADER = "X-Vmae"
COLUMNS, TOP = 4, 5
_POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
_RATIOS = {name: limits(MaskConfig, name) for name in ("encoder_ratio", "decoder_ratio")}
_FIELDS: dict[str, Callable[[str], Any]] = {"encoder": str, "decoder": str, "seed": SEED, **_RATIOS}
RETRY = 10  # seconds, sent as Retry-After
_AGAIN = f"try again in {RETRY} seconds"


@dataclass(frozen=True, kw_only=True)
class Limits(_Checked):
    """Limits of a video, and of all requests together.

    Attributes:
        megabytes: size of the file.
        seconds: duration of the video.
        pixels: longer side of a frame.
        wait: seconds that a request waits for the request before it.
        headers: seconds in which a client must send its request's headers.
        upload: seconds that an upload may take, and sending an answer.
        uploads: videos on the disk at once: one is processed, the others wait or are being uploaded.
        connections: connections at once.
    """

    megabytes: int = ranged(100, Whole(1, 100_000))
    seconds: int = ranged(600, Whole(1, 10**6))
    pixels: int = ranged(4096, SIDE)
    wait: float = ranged(60.0, _SECONDS)
    headers: float = ranged(10.0, _SECONDS)
    upload: float = ranged(120.0, _SECONDS)
    uploads: int = ranged(4, Whole(1, 100))
    connections: int = ranged(32, Whole(1, 1000))


def _measure(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Number of frames, frames per second, (width, height)."""
    with open_video(path) as reader:
        size = reader.size
        if not size:
            height, width = reader.frames([0]).shape[1:3]
            size = (width, height)
        return len(reader), reader.fps or 25.0, size


@dataclass
class Studio:
    """Models, applied to one video at a time.

    Attributes:
        model: pre-trained model.
        stride, mask: clip stride and mask of its training.
        classifier: fine-tuned classifier, or None.
        limits: limits of videos and requests.
        busy: held while a video is processed.
    """

    model: Pretrainer
    stride: int
    mask: MaskConfig
    classifier: LoadedClassifier | None = None
    limits: Limits = field(default_factory=Limits)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def check(self, path: Path) -> None:
        """Check that the file is a video within the limits.

        Raises:
            InputError: it is not; the message gives the reason.
        """
        # Playlists and other files that name further files are of unknown kind too.
        if container_kind(str(path)) == "unknown":
            raise InputError("this is not a video file (MP4, MOV, MKV, WebM, AVI, MPEG)")
        measured: tuple[int, float, tuple[int, int]] = guarded(_measure, path)
        count, fps, (width, height) = measured
        seconds = count / fps
        if seconds > self.limits.seconds:
            raise InputError(
                f"the video has {seconds:.0f} seconds; at most {self.limits.seconds} are allowed"
            )
        if max(width, height) > self.limits.pixels:
            raise InputError(
                f"the video has {width} x {height} pixels; a side of at most {self.limits.pixels} is allowed"
            )
        if count < 2:
            raise InputError("this is one picture, not a video")

    def show(self, path: Path, mask: MaskConfig, seed: int) -> dict[str, Any]:
        """Answer for a video: picture, mask counts, losses and classes.

        Raises:
            InputError: the video is not a video within the limits, or the mask cannot be drawn.
        """
        config, device = self.model.config, next(self.model.parameters()).device
        drawn = DualMask.sample(
            1, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(seed)
        )
        self.check(path)
        clip, indices = middle_clip(path, config, self.stride)
        found = reconstruct(self.model, clip.to(device), drawn.to(device))
        times, _, _ = config.grid
        shown = np.unique(np.linspace(0, times - 1, min(COLUMNS, times)).round().astype(int))
        moments = []
        for time_of_grid in shown.tolist():
            frame = time_of_grid * config.tubelet_size
            moments.append((frame, f"frame {indices[frame]}"))
        png = io.BytesIO()
        draw_grid(found.panels, moments).save(png, format="PNG")
        visible, decoded, counted = drawn.visible.shape[1], drawn.decode.shape[1], int(drawn.weight.sum())
        trivial = f"predicting zero {found.zero_loss:.3f}, the visible mean {found.visible_mean_loss:.3f}"
        return {
            "picture": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
            "masks": f"{config.num_tokens} tokens: {visible} visible, {decoded} decoded, "
            f"{counted} counted by the loss",
            "loss": f"loss {found.loss:.3f}; {trivial}",
            "classes": self.classes(path),
        }

    def classes(self, path: Path) -> list[dict[str, Any]] | None:
        """Most likely classes, mean over two clips of the video; None without a classifier."""
        loaded = self.classifier
        if loaded is None:
            return None
        views = published_views(loaded.clip.sampling, 2, 1)
        found = top_classes(loaded, str(path), views, loaded.class_names, TOP)
        return [{"name": name, "percent": round(100 * probability, 1)} for name, probability in found]

    def page(self) -> str:
        """HTML of the page, with the mask of the model's training selected."""
        mask = {name: value for name, value in self.mask.to_dict().items() if name in _FIELDS}
        chosen = {**mask, "seed": 0}
        about = {
            "chosen": chosen,
            "encoders": list(ENCODER_MASKS),
            "decoders": list(DECODER_MASKS),
            "megabytes": self.limits.megabytes,
            "seconds": self.limits.seconds,
            "classifier": self.classifier is not None,
        }
        text = json.dumps(about).replace("<", "\\u003c")
        html = (Path(__file__).parent / "serve.html").read_text(encoding="utf-8")
        return html.replace("/* ABOUT */ null", text)


class Refused(Exception):
    """Request that is refused with a status and a line; `retry`: seconds after which it may be sent again."""

    def __init__(self, status: HTTPStatus, message: str, retry: int | None = None):
        super().__init__(message)
        self.status, self.retry = status, retry


class Deadline(io.RawIOBase):
    """Input stream of a socket with a deadline for all reads together, however slowly the data arrives.

    Raises:
        TimeoutError: the deadline has passed.
    """

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def extend(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now."""
        self.end = time.monotonic() + seconds

    def readinto(self, buffer) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    """HTTP server of a `Studio` on 127.0.0.1; port 0 means a free port.

    At most `Limits.connections` threads run, and at most `Limits.uploads` videos are on the disk.
    """

    daemon_threads = True

    def __init__(self, studio: Studio, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.studio = studio
        self.free_connections = threading.BoundedSemaphore(studio.limits.connections)
        self.free_uploads = threading.BoundedSemaphore(studio.limits.uploads)

    @property
    def names(self) -> tuple[str, ...]:
        """Values of the Host header that lead to this server."""
        hosts = ("127.0.0.1", "localhost")
        names = tuple(f"{host}:{self.server_port}" for host in hosts)
        if self.server_port == 80:
            return names + hosts
        return names

    def process_request(self, request, client_address) -> None:
        if not self.free_connections.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(1.0)
                request.sendall(f"HTTP/1.0 503 Service Unavailable\r\nRetry-After: {RETRY}\r\n\r\n".encode())
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.free_connections.release()
            raise

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free_connections.release()

    def handle_error(self, request, client_address) -> None:
        _, error, _ = sys.exc_info()
        if not isinstance(error, OSError):  # an OSError: the client is gone
            print_trace()


class Handler(BaseHTTPRequestHandler):
    """GET / returns the page; POST /show, with a video as its body and the mask in its query, returns
    JSON."""

    server: Server
    server_version, sys_version = "vmae", ""

    def setup(self) -> None:
        super().setup()
        self.input = Deadline(self.connection, self.server.studio.limits.headers)
        self.rfile.close()
        self.rfile = io.BufferedReader(self.input)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._show)

    def _get(self) -> tuple[str, bytes]:
        if self.path.partition("?")[0] != "/":
            raise Refused(HTTPStatus.NOT_FOUND, "not found; the page is at /")
        return "text/html; charset=utf-8", self.server.studio.page().encode()

    def _show(self) -> tuple[str, bytes]:
        studio, (place, _, query) = self.server.studio, self.path.partition("?")
        if place != "/show" or self.headers.get(HEADER) != "1":
            raise Refused(HTTPStatus.FORBIDDEN, "videos are accepted from the page only")
        mask, seed = _read_fields(studio.mask, query)
        self._check_length(studio.limits.megabytes)
        if not self.server.free_uploads.acquire(blocking=False):
            text = f"{studio.limits.uploads} videos are waiting already; {_AGAIN}"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, RETRY)
        try:
            with _storing():
                folder = tempfile.TemporaryDirectory(prefix="vmae-serve-")
            with folder:
                path = Path(folder.name) / "video.mp4"  # not a name from the request
                with _storing():
                    self._receive(path)
                return "application/json", json.dumps(self._work(path, mask, seed)).encode()
        finally:
            self.server.free_uploads.release()

    def _work(self, path: Path, mask: MaskConfig, seed: int) -> dict[str, Any]:
        """Answer for the video, once the videos before it are done."""
        studio = self.server.studio
        if not studio.busy.acquire(timeout=studio.limits.wait):
            text = f"another video is being processed; {_AGAIN}"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, RETRY)
        try:
            return studio.show(path, mask, seed)
        except InputError as error:
            raise Refused(
                HTTPStatus.UNPROCESSABLE_ENTITY, str(error).replace(str(path), "the video")
            ) from None
        finally:
            studio.busy.release()

    def _check_length(self, megabytes: int) -> None:
        if self.length is None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        if self.length > megabytes << 20:
            text = f"the file has {self.length >> 20} MB; at most {megabytes} are allowed"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        if not self.length:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "the file is empty")

    def _receive(self, path: Path) -> None:
        with open(path, "wb") as file:
            for part in self._body():
                file.write(part)
        if self.unread:
            raise Refused(HTTPStatus.BAD_REQUEST, "the upload is incomplete")

    def _body(self) -> Iterator[bytes]:
        """Rest of the request's body, in parts."""
        while self.unread and (part := self.rfile.read1(min(self.unread, 1 << 20))):
            self.unread -= len(part)
            yield part

    def _answer(self, work: Callable[[], tuple[str, bytes]]) -> None:
        self.close_connection = True
        self.input.extend(self.server.studio.limits.upload)
        self.length: int | None = None  # bytes of the body
        self.unread = 0  # bytes of the body that are not read yet
        retry = None
        try:
            self.length = self._read_length()
            self.unread = self.length or 0
            self._check_sender()
            status, (kind, body) = HTTPStatus.OK, work()
        except Refused as refusal:
            status, retry = refusal.status, refusal.retry
            kind, body = "application/json", json.dumps({"error": str(refusal)}).encode()
        except TimeoutError:
            status, kind = HTTPStatus.REQUEST_TIMEOUT, "application/json"
            text = f"the upload took more than {self.server.studio.limits.upload:g} seconds"
            body = json.dumps({"error": text}).encode()
        except ConnectionError:  # the client is gone
            return
        except Exception as error:  # the page shows one line; the trace goes to the terminal
            print_trace()
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            text = f"internal error ({type(error).__name__}); the terminal shows the trace"
            body = json.dumps({"error": text}).encode()
        self._send(status, kind, body, retry)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, retry: int | None) -> None:
        if self.unread <= self.server.studio.limits.megabytes << 20 and status != HTTPStatus.REQUEST_TIMEOUT:
            deque(self._body(), maxlen=0)  # a browser reads an answer only after it has sent the whole body
        self.connection.settimeout(self.server.studio.limits.upload)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY)
        if retry is not None:
            self.send_header("Retry-After", str(retry))
        self.end_headers()
        self.wfile.write(body)

    def _read_length(self) -> int | None:
        """Bytes of the body; None without a Content-Length."""
        given = self.headers.get_all("Content-Length", [])
        if self.headers.get("Transfer-Encoding") is not None:
            text = "the request must have a Content-Length, and no Transfer-Encoding"
            raise Refused(HTTPStatus.LENGTH_REQUIRED, text)
        if not given:
            return None
        if len(given) > 1 or not re.fullmatch(r"[0-9]+", given[0].strip(" \t")):
            raise Refused(HTTPStatus.BAD_REQUEST, "the Content-Length is not a whole number")
        digits = given[0].strip(" \t").lstrip("0")
        if len(digits) >= 16:  # more than any limit; Python refuses to convert more than 4,300 digits
            return 10**15
        return int(digits or "0")

    def _check_sender(self) -> None:
        names, origin, hosts = self.server.names, self.headers.get("Origin"), self.headers.get_all("Host", [])
        foreign = origin is not None and origin not in [f"http://{name}" for name in names]
        if len(hosts) != 1 or hosts[0] not in names or foreign:
            raise Refused(HTTPStatus.FORBIDDEN, f"open http://{names[0]} in a browser on this machine")

    def log_message(self, form: str, *values: object) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {printable(form % values)}\n")


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """Turn an error of the disk (full, or no permission) into an answer for the page."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        text = f"the video cannot be stored: {error.strerror}"
        raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, text) from None


def printable(text: str, most: int = 300) -> str:
    """`text` for a terminal: control characters, which could move its cursor or change its title, are escaped
    (`\\x1b`)."""
    safe = []
    for character in text[:most]:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        safe.append(character)
    return "".join(safe) + "..." * (len(text) > most)


def print_trace() -> None:
    """Print the trace of the current exception to the terminal."""
    lines = traceback.format_exc().splitlines()
    sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))


def _read_fields(mask: MaskConfig, query: str) -> tuple[MaskConfig, int]:
    """Mask and seed of a request; fields that its query does not have are those of `mask`, and seed 0."""
    try:
        given = dict(parse_qsl(query, max_num_fields=len(_FIELDS)))
    except ValueError:
        raise Refused(
            HTTPStatus.BAD_REQUEST, f"more than the {len(_FIELDS)} fields {', '.join(_FIELDS)}"
        ) from None
    unknown = sorted(set(given) - set(_FIELDS))
    if unknown:
        raise Refused(HTTPStatus.BAD_REQUEST, f"unknown fields: {shown(', '.join(unknown))}")
    values: dict[str, Any] = {}
    for name, text in given.items():
        try:
            values[name] = _FIELDS[name](text)
        except argparse.ArgumentTypeError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{name.replace('_', ' ')} {error}") from None
    seed = values.pop("seed", 0)
    try:
        return MaskConfig.from_dict({**mask.to_dict(), **values}), seed
    except InputError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None


# --- the command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    known = "a run's folder, a checkpoint, or weights"
    parser.add_argument("--checkpoint", required=True, metavar="DIR|FILE", help=f"pre-trained: {known}")
    parser.add_argument("--classifier", metavar="DIR|FILE", help=f"fine-tuned, to name classes: {known}")
    parser.add_argument(
        "--port", type=Whole(0, 65535), default=8008, help="port on 127.0.0.1 (8008); 0: any free port"
    )
    parser.add_argument(
        "--max-megabytes",
        type=limits(Limits, "megabytes"),
        default=Limits.megabytes,
        help=f"largest file, in MB ({Limits.megabytes})",
    )
    parser.add_argument(
        "--max-seconds",
        type=limits(Limits, "seconds"),
        default=Limits.seconds,
        help=f"longest video, in seconds ({Limits.seconds})",
    )
    add_settings(parser, RunConfig, "device")
    add_source_arguments(parser).add_argument(
        "--classifier-model", help="preset of --classifier, if its file does not hold its settings"
    )


def build_studio(args: argparse.Namespace) -> Studio:
    """Studio of the command line's models and limits."""
    device = resolve_device(args.device)
    source = (args.init_frames, args.init_size)  # for files that do not hold their settings
    model, settings = load_model(args.checkpoint, preset=args.model, source=source)
    classifier = None
    if args.classifier is not None:
        given: dict[str, Any] = {}
        if args.classifier_model:
            given = {"preset": args.classifier_model, "source": source}
        classifier = load_classifier(args.classifier, **given)
        classifier.model.config.check_rgb("`vmae serve`")
        classifier.model.to(device)
        for line in classifier.assumed:
            print(line)
    return Studio(
        model=model.to(device),
        stride=settings.get("stride", 4),
        mask=MaskConfig.from_dict(settings.get("mask", {})),
        classifier=classifier,
        limits=Limits(megabytes=args.max_megabytes, seconds=args.max_seconds),
    )


def run(args: argparse.Namespace) -> None:
    """Run the command until Ctrl-C or SIGTERM; temporary files of uploads are removed."""
    studio = build_studio(args)
    try:
        server = Server(studio, args.port)
    except OSError as error:
        raise InputError(
            f"port {args.port} cannot be used ({error.strerror}); choose another --port"
        ) from None
    # sys.exit, so that Python removes the temporary folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with server:
        print(f"http://{server.names[0]} (this machine only; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
