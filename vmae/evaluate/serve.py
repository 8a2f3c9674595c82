"""`python -m vmae serve`: a page on this machine; drop in a video, see masks, what the model rebuilds, and classes.

The standard library's server, bound to 127.0.0.1. A request's video is one file in a folder of its own, removed with its
folder when the answer is made, whatever it is. Requests of other sites' pages are refused: by Host (no other name leads
here), by Origin, and by a header that a page of another site may not send.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch

from vmae.config import MaskConfig
from vmae.data.containers import container_kind
from vmae.data.decode import open_video
from vmae.data.guarded import guarded
from vmae.errors import InputError
from vmae.evaluate.classify import published_views
from vmae.evaluate.encoder import middle_clip
from vmae.evaluate.pictures import draw_grid
from vmae.evaluate.predict import top_classes
from vmae.evaluate.reconstruct import load_model, reconstruct
from vmae.masking import DECODER_MASKS, ENCODER_MASKS, DualMask
from vmae.model import Pretrainer
from vmae.train.checkpoint import find_weights
from vmae.train.checks import resolve_device
from vmae.train.load import LoadedClassifier, load_classifier

HEADER = "X-Vmae"  # a page of another site cannot send it without being asked first, and is told nothing
COLUMNS, TOP = 4, 5
_POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
_FIELDS = {"encoder": str, "encoder_ratio": float, "decoder": str, "decoder_ratio": float, "seed": int}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a video may be.

    Attributes:
        megabytes: of its file.
        seconds: of its length.
        pixels: of its longer side.
        wait: seconds that a request waits for the one before it.
    """

    megabytes: int = 100
    seconds: int = 600
    pixels: int = 4096
    wait: float = 60.0


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
        if container_kind(str(path)) == "unknown":  # playlists and the like, which name other files, are no videos either
            raise InputError("this is not a video file (MP4, MOV, MKV, WebM, AVI, MPEG)")
        count, fps, (width, height) = guarded(_measure, path)
        if count / fps > self.limits.seconds:
            raise InputError(f"the video has {count / fps:.0f} seconds, more than the {self.limits.seconds} allowed here")
        if max(width, height) > self.limits.pixels:
            raise InputError(f"the video has {width} x {height} pixels, more than the {self.limits.pixels} allowed on a side")
        if count < 2:
            raise InputError("this is one picture, not a video")

    def show(self, path: Path, mask: MaskConfig, seed: int) -> dict[str, Any]:
        """Picture, losses, words and classes of a video.

        Raises:
            InputError: the video, the mask or the seed is not good.
        """
        if not 0 <= seed < 2**63:
            raise InputError(f"the seed must be at least 0, not {seed}")
        config, device = self.model.config, next(self.model.parameters()).device
        drawn = DualMask.sample(1, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(seed))
        self.check(path)
        clip, indices = middle_clip(path, config, self.stride)
        found = reconstruct(self.model, clip.to(device), drawn.to(device))
        steps = np.unique(np.linspace(0, config.grid[0] - 1, min(COLUMNS, config.grid[0])).round().astype(int))
        moments = [(int(step) * config.tubelet_size, f"frame {indices[step * config.tubelet_size]}") for step in steps]
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
        return (Path(__file__).parent / "serve.html").read_text(encoding="utf-8").replace("/* ABOUT */ null", text)


class Refused(Exception):
    """A request that gets a status and a line."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves a `Studio` on 127.0.0.1; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, studio: Studio, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.studio = studio

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost"))


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /show, with a video as body and the mask in the query, gives JSON."""

    server: Server
    timeout = 60  # seconds without a byte
    server_version, sys_version = "vmae", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._show)

    def _get(self) -> tuple[str, bytes]:
        if urlsplit(self.path).path != "/":
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here; the page is at /")
        return "text/html; charset=utf-8", self.server.studio.page().encode()

    def _show(self) -> tuple[str, bytes]:
        studio, address = self.server.studio, urlsplit(self.path)
        if address.path != "/show" or self.headers.get(HEADER) != "1":
            raise Refused(HTTPStatus.FORBIDDEN, "videos are taken from the page only")
        mask, seed = _read_fields(studio.mask, dict(parse_qsl(address.query)))
        with tempfile.TemporaryDirectory(prefix="vmae-serve-") as folder:
            path = Path(folder) / "video.mp4"
            self._receive(path, studio.limits.megabytes)
            if not studio.busy.acquire(timeout=studio.limits.wait):
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "another video is being worked on; try again in a minute")
            try:
                answer = studio.show(path, mask, seed)
            except InputError as error:
                raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error).replace(str(path), "the video")) from None
            finally:
                studio.busy.release()
        return "application/json", json.dumps(answer).encode()

    def _receive(self, path: Path, megabytes: int) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long the video is")
        left = int(length)
        if left > megabytes << 20:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the file has {left >> 20} MB, more than the {megabytes} allowed here"
            )
        if not self.unread:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "the file is empty")
        with open(path, "wb") as file:
            for part in self._body():
                file.write(part)
        if self.unread:
            raise Refused(HTTPStatus.BAD_REQUEST, "the upload broke off")

    def _body(self) -> Iterator[bytes]:
        """What is left of it, in parts."""
        while self.unread and (part := self.rfile.read(min(self.unread, 1 << 20))):
            self.unread -= len(part)
            yield part

    def _answer(self, work) -> None:
        self.close_connection = True
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if length.isdecimal() else 0
        try:
            self._check_sender()
            status, (kind, body) = HTTPStatus.OK, work()
        except Refused as refusal:
            status, kind, body = refusal.status, "application/json", json.dumps({"error": str(refusal)}).encode()
        except OSError:  # the other side is gone
            return
        except Exception as error:  # a page gets a line; the trace goes to the terminal
            traceback.print_exc()
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            body = json.dumps({"error": f"something went wrong here ({type(error).__name__}); the terminal says more"}).encode()
        if self.unread <= self.server.studio.limits.megabytes << 20:  # a browser hears an answer only when all is sent
            deque(self._body(), maxlen=0)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
        self.wfile.write(body)

    def _check_sender(self) -> None:
        names, origin = self.server.names, self.headers.get("Origin")
        if self.headers.get("Host") not in names or (origin is not None and origin not in [f"http://{name}" for name in names]):
            raise Refused(HTTPStatus.FORBIDDEN, f"open http://{names[0]} in a browser on this machine")

    def log_message(self, form: str, *values: object) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {form % values}\n")


def _read_fields(mask: MaskConfig, query: dict[str, str]) -> tuple[MaskConfig, int]:
    unknown = sorted(set(query) - set(_FIELDS))
    if unknown:
        raise Refused(HTTPStatus.BAD_REQUEST, f"unknown fields: {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for name, text in query.items():
        try:
            values[name] = _FIELDS[name](text)
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{name.replace('_', ' ')}: {text!r} is not a number") from None
        if values[name] != values[name] or values[name] in (math.inf, -math.inf):
            raise Refused(HTTPStatus.BAD_REQUEST, f"{name.replace('_', ' ')}: {text!r} is not a number")
    seed = values.pop("seed", 0)
    try:
        return MaskConfig.from_dict({**mask.to_dict(), **values}), seed
    except InputError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    known = "a run's folder, a checkpoint, or weights"
    parser.add_argument("--checkpoint", required=True, metavar="DIR|FILE", help=f"pre-trained: {known}")
    parser.add_argument("--classifier", metavar="DIR|FILE", help=f"fine-tuned, to name classes: {known}")
    parser.add_argument("--port", type=int, default=8008, help="of http://127.0.0.1 (8008); 0: a free one")
    parser.add_argument("--max-megabytes", type=int, default=Limits.megabytes, help=f"of a file ({Limits.megabytes})")
    parser.add_argument("--max-seconds", type=int, default=Limits.seconds, help=f"of a video ({Limits.seconds})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    parser.add_argument("--model", help="preset of weights that do not say what they are")
    parser.add_argument("--classifier-model", help="the same, of --classifier")


def build_studio(args: argparse.Namespace) -> Studio:
    """Models loaded, settings checked."""
    if min(args.max_megabytes, args.max_seconds) < 1:
        raise InputError("--max-megabytes and --max-seconds must be at least 1")
    device = resolve_device(args.device)
    model, settings = load_model(find_weights(args.checkpoint), preset=args.model)
    classifier = None if args.classifier is None else load_classifier(args.classifier, preset=args.classifier_model)
    if classifier is not None:
        classifier.model.to(device)
    return Studio(
        model=model.to(device),
        stride=settings.get("stride", 4),
        mask=MaskConfig.from_dict(settings.get("mask", {})),
        classifier=classifier,
        limits=Limits(megabytes=args.max_megabytes, seconds=args.max_seconds),
    )


def run(args: argparse.Namespace) -> None:
    """The command; ends with Ctrl-C."""
    if not 0 <= args.port < 65536:
        raise InputError(f"--port must be from 0 to 65535, not {args.port}")
    studio = build_studio(args)
    try:
        server = Server(studio, args.port)
    except OSError as error:
        raise InputError(f"port {args.port} cannot be used ({error.strerror}); choose another --port") from None
    with server:
        print(f"http://{server.names[0]} (this machine only; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
