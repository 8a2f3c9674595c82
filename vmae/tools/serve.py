"""`python -m vmae serve`: a page on this machine; drop in a video, see masks, what the model rebuilds, and
classes.

The standard library's server, bound to 127.0.0.1. A request's video is one file in a folder of its own,
removed with its folder when the answer is made, whatever it is; few are taken at once, each within a size and
a time, so what all of them take of disk, threads and time is bounded. Requests of other sites' pages are
refused: by Host (no other name leads here), by Origin, and by a header that a page of another site may not
send.
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

from vmae.checkpoint.folder import find_weights
from vmae.checkpoint.load import LoadedClassifier, add_source_arguments, load_classifier
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
HEADER = "X-Vmae"  # a page of another site cannot send it without being asked first, and is told nothing
COLUMNS, TOP = 4, 5
_POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
_RATIOS = {name: limits(MaskConfig, name) for name in ("encoder_ratio", "decoder_ratio")}
_FIELDS = {"encoder": str, "decoder": str, "seed": SEED, **_RATIOS}
RETRY = 10  # seconds, told to those who have to wait
_AGAIN = f"try again in {RETRY} seconds"


@dataclass(frozen=True, kw_only=True)
class Limits(_Checked):
    """What a video may be, and what all requests together may take.

    Attributes:
        megabytes: of its file.
        seconds: of its length.
        pixels: of its longer side.
        wait: seconds that a request waits for the one before it.
        headers: seconds until a request must have said what it wants, and in which an answer must be taken.
        upload: seconds that the video's way here may take.
        uploads: videos on the disk at once; one is worked on, the others wait or are on their way.
        connections: at once.
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
    """Frames, frames a second, (width, height)."""
    with open_video(path) as reader:
        return len(reader), reader.fps or 25.0, reader.size or reader.frames([0]).shape[2:0:-1]


@dataclass
class Studio:
    """The models, and one video at a time.

    Attributes:
        model, stride, mask: pre-trained, and how it was trained to see.
        classifier: a fine-tuned one, or None.
    """

    model: Pretrainer
    stride: int
    mask: MaskConfig
    classifier: LoadedClassifier | None = None
    limits: Limits = field(default_factory=Limits)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def check(self, path: Path) -> None:
        """Whether the file is a video within the limits.

        Raises:
            InputError: it is not; the message says why.
        """
        if (
            container_kind(str(path)) == "unknown"
        ):  # playlists and the like, which name other files, are no videos either
            raise InputError("this is not a video file (MP4, MOV, MKV, WebM, AVI, MPEG)")
        count, fps, (width, height) = guarded(_measure, path)
        if count / fps > self.limits.seconds:
            raise InputError(
                f"the video has {count / fps:.0f} seconds, more than the {self.limits.seconds} allowed here"
            )
        if max(width, height) > self.limits.pixels:
            raise InputError(
                f"the video has {width} x {height} pixels, more than the {self.limits.pixels} allowed on a "
                "side"
            )
        if count < 2:
            raise InputError("this is one picture, not a video")

    def show(self, path: Path, mask: MaskConfig, seed: int) -> dict[str, Any]:
        """Picture, losses, words and classes of a video.

        Raises:
            InputError: the video or the mask is not good.
        """
        config, device = self.model.config, next(self.model.parameters()).device
        drawn = DualMask.sample(
            1, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(seed)
        )
        self.check(path)
        clip, indices = middle_clip(path, config, self.stride)
        found = reconstruct(self.model, clip.to(device), drawn.to(device))
        steps = np.unique(
            np.linspace(0, config.grid[0] - 1, min(COLUMNS, config.grid[0])).round().astype(int)
        )
        moments = [
            (int(step) * config.tubelet_size, f"frame {indices[step * config.tubelet_size]}")
            for step in steps
        ]
        png = io.BytesIO()
        draw_grid(found.panels, moments).save(png, format="PNG")
        visible, picked, counted = drawn.visible.shape[1], drawn.decode.shape[1], int(drawn.weight.sum())
        trivial = f"predicting zero {found.zero_loss:.3f}, the visible mean {found.visible_mean_loss:.3f}"
        return {
            "picture": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
            "masks": f"{config.num_tokens} tubelets: the encoder sees {visible}, the decoder rebuilds {picked}, "
            f"the loss counts {counted}",
            "loss": f"loss {found.loss:.3f}; {trivial}",
            "classes": None if self.classifier is None else self.classes(path),
        }

    def classes(self, path: Path) -> list[dict[str, Any]]:
        """The likeliest, the mean over two clips of the video."""
        loaded = self.classifier
        views = published_views(loaded.clip.sampling, 2, 1)
        found = top_classes(loaded, str(path), views, loaded.class_names, TOP)
        return [{"name": name, "percent": round(100 * probability, 1)} for name, probability in found]

    def page(self) -> str:
        """The page, with this model's own mask chosen."""
        chosen = {**self.mask.to_dict(), "seed": 0}
        about = {
            "chosen": chosen,
            "encoders": ENCODER_MASKS,
            "decoders": DECODER_MASKS,
            "megabytes": self.limits.megabytes,
            "seconds": self.limits.seconds,
            "classifier": self.classifier is not None,
        }
        text = json.dumps(about).replace("<", "\\u003c")
        return (
            (Path(__file__).parent / "serve.html")
            .read_text(encoding="utf-8")
            .replace("/* ABOUT */ null", text)
        )


class Refused(Exception):
    """A request that gets a status and a line; `retry` in seconds where it may come again."""

    def __init__(self, status: HTTPStatus, message: str, retry: int | None = None):
        super().__init__(message)
        self.status, self.retry = status, retry


class Deadline(io.RawIOBase):
    """What a socket sends, up to a moment: however slowly it comes, no read waits longer.

    Raises:
        TimeoutError: the moment has come.
    """

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def extend(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def readinto(self, buffer) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    """Serves a `Studio` on 127.0.0.1; port 0 takes a free one.

    Connections and uploads are counted: `Limits.connections` threads at most, and `Limits.uploads` videos on
    the disk.
    """

    daemon_threads = True

    def __init__(self, studio: Studio, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.studio = studio
        self.free_connections = threading.BoundedSemaphore(studio.limits.connections)
        self.free_uploads = threading.BoundedSemaphore(studio.limits.uploads)

    @property
    def names(self) -> tuple[str, ...]:
        names = ("127.0.0.1", "localhost")
        return tuple(f"{name}:{self.server_port}" for name in names) + (
            names if self.server_port == 80 else ()
        )

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
        if not isinstance(sys.exc_info()[1], OSError):  # else the other side is gone
            tell_trace()


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /show, with a video as body and the mask in the query, gives JSON."""

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
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here; the page is at /")
        return "text/html; charset=utf-8", self.server.studio.page().encode()

    def _show(self) -> tuple[str, bytes]:
        studio, (place, _, query) = self.server.studio, self.path.partition("?")
        if place != "/show" or self.headers.get(HEADER) != "1":
            raise Refused(HTTPStatus.FORBIDDEN, "videos are taken from the page only")
        mask, seed = _read_fields(studio.mask, query)
        self._check_length(studio.limits.megabytes)
        if not self.server.free_uploads.acquire(blocking=False):
            text = f"{studio.limits.uploads} videos are waiting here already; {_AGAIN}"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, RETRY)
        try:
            with _storing():
                folder = tempfile.TemporaryDirectory(prefix="vmae-serve-")
            with folder:
                path = Path(folder.name) / "video.mp4"  # whatever the request calls it
                with _storing():
                    self._receive(path)
                return "application/json", json.dumps(self._work(path, mask, seed)).encode()
        finally:
            self.server.free_uploads.release()

    def _work(self, path: Path, mask: MaskConfig, seed: int) -> dict[str, Any]:
        """The answer, when the videos before this one are done."""
        studio = self.server.studio
        if not studio.busy.acquire(timeout=studio.limits.wait):
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, f"another video is being worked on; {_AGAIN}", RETRY
            )
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
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long the video is")
        if self.length > megabytes << 20:
            text = f"the file has {self.length >> 20} MB, more than the {megabytes} allowed here"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        if not self.length:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "the file is empty")

    def _receive(self, path: Path) -> None:
        with open(path, "wb") as file:
            for part in self._body():
                file.write(part)
        if self.unread:
            raise Refused(HTTPStatus.BAD_REQUEST, "the upload broke off")

    def _body(self) -> Iterator[bytes]:
        """What is left of it, in parts."""
        while self.unread and (part := self.rfile.read1(min(self.unread, 1 << 20))):
            self.unread -= len(part)
            yield part

    def _answer(self, work: Callable[[], tuple[str, bytes]]) -> None:
        self.close_connection = True
        self.input.extend(self.server.studio.limits.upload)
        self.length, self.unread, retry = None, 0, None
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
            body = json.dumps(
                {"error": f"the upload took more than {self.server.studio.limits.upload:g} seconds"}
            ).encode()
        except ConnectionError:  # the other side is gone
            return
        except Exception as error:  # a page gets a line; the trace goes to the terminal
            tell_trace()
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            body = json.dumps(
                {"error": f"something went wrong here ({type(error).__name__}); the terminal says more"}
            ).encode()
        self._send(status, kind, body, retry)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, retry: int | None) -> None:
        if self.unread <= self.server.studio.limits.megabytes << 20 and status != HTTPStatus.REQUEST_TIMEOUT:
            deque(self._body(), maxlen=0)  # a browser takes an answer only when all is sent
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
        """Bytes of the body; None where the request does not say."""
        given = self.headers.get_all("Content-Length", [])
        if self.headers.get("Transfer-Encoding") is not None:
            raise Refused(
                HTTPStatus.LENGTH_REQUIRED,
                "the request must say how long the video is, with no Transfer-Encoding",
            )
        if not given:
            return None
        if len(given) > 1 or not re.fullmatch(r"[0-9]+", given[0].strip(" \t")):
            raise Refused(HTTPStatus.BAD_REQUEST, "the Content-Length is no whole number")
        digits = given[0].strip(" \t").lstrip("0")
        return int(digits or "0") if len(digits) < 16 else 10**15  # Python itself reads 4,300 of them

    def _check_sender(self) -> None:
        names, origin, hosts = self.server.names, self.headers.get("Origin"), self.headers.get_all("Host", [])
        foreign = origin is not None and origin not in [f"http://{name}" for name in names]
        if len(hosts) != 1 or hosts[0] not in names or foreign:
            raise Refused(HTTPStatus.FORBIDDEN, f"open http://{names[0]} in a browser on this machine")

    def log_message(self, form: str, *values: object) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {printable(form % values)}\n")


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """A disk that is full, or may not be written to, is said to the page."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        raise Refused(
            HTTPStatus.INSUFFICIENT_STORAGE, f"the video cannot be stored here: {error.strerror}"
        ) from None


def printable(text: str, most: int = 300) -> str:
    """`text` as a terminal can show it: control characters, which could move its cursor or retitle it, as
    `\\x1b`."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return safe + "..." * (len(text) > most)


def tell_trace() -> None:
    """The trace of the exception at hand, to the terminal."""
    lines = traceback.format_exc().splitlines()
    sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))


def _read_fields(mask: MaskConfig, query: str) -> tuple[MaskConfig, int]:
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
        "--port", type=Whole(0, 65535), default=8008, help="of http://127.0.0.1 (8008); 0: a free one"
    )
    parser.add_argument(
        "--max-megabytes",
        type=limits(Limits, "megabytes"),
        default=Limits.megabytes,
        help=f"of a file ({Limits.megabytes})",
    )
    parser.add_argument(
        "--max-seconds",
        type=limits(Limits, "seconds"),
        default=Limits.seconds,
        help=f"of a video ({Limits.seconds})",
    )
    add_settings(parser, RunConfig, "device")
    add_source_arguments(parser).add_argument(
        "--classifier-model", help="preset of --classifier, if it does not say either"
    )


def build_studio(args: argparse.Namespace) -> Studio:
    """Models loaded, settings checked."""
    device = resolve_device(args.device)
    source = (args.init_frames, args.init_size)  # of those that do not say
    given = {"preset": args.model, "source": source} if args.model else {}
    model, settings = load_model(find_weights(args.checkpoint), **given)
    classifier = None
    if args.classifier is not None:
        given = {"preset": args.classifier_model, "source": source} if args.classifier_model else {}
        classifier = load_classifier(args.classifier, **given)
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
    """The command; ends with Ctrl-C or SIGTERM, and removes what is left of uploads."""
    studio = build_studio(args)
    try:
        server = Server(studio, args.port)
    except OSError as error:
        raise InputError(
            f"port {args.port} cannot be used ({error.strerror}); choose another --port"
        ) from None
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the temporary folders are removed as Python ends
    with server:
        print(f"http://{server.names[0]} (this machine only; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
