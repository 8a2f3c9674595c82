"""A real object store on loopback, SeaweedFS (`weed`), that can be killed and started again; and a relay
before it that makes its network worse."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, SECRET = "TESTKEY", "canary-secret-6f1b"  # the secret must be found nowhere
_START_S = 60.0


def find_weed() -> str | None:
    """The program, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class StoreServer:
    """A server with one key, its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = (
            "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
            "filer.port.grpc", "s3.port", "s3.port.grpc",
        )  # fmt: skip
        self.ports = dict(zip(names, free_ports(len(names))))
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.process: subprocess.Popen | None = None

    @property
    def port(self) -> int:
        return self.ports["s3.port"]

    @property
    def files(self) -> str:
        """Address of a plain web server, with ranges, that shows the buckets."""
        return f"http://127.0.0.1:{self.ports['filer.port']}/buckets"

    def environment(self, port: int | None = None) -> dict[str, str]:
        """What a client needs; `port` is that of a relay."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def start(self, wait: bool = True) -> None:
        ports = [f"-{name}={port}" for name, port in self.ports.items()]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [find_weed() or "weed", "-v=-1", "server", "-s3", f"-dir={self.folder}", "-ip=127.0.0.1",
                 "-ip.bind=127.0.0.1", f"-s3.config={self.folder}/s3.json", "-volume.max=50",
                 "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *ports],
                stdout=log, stderr=log,
            )  # fmt: skip
        if wait:
            self.put("ready/ready", b"ready")

    def kill(self) -> None:
        """As kill -9, or a power cut."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.process = None

    def put(self, name: str, content: bytes) -> None:
        """Write BUCKET/KEY; waits until the server is up."""
        self.call("put", name, content)

    def delete(self, name: str) -> None:
        self.call("delete", name)

    def upload(self, index: Path, folder: str, etags: bool = True) -> str:
        """Copy an index and its shards into tests/`folder` (each bucket takes some of few volumes); address
        of the index there. Needs the environment."""
        from vmae.data.shards.index import ShardIndex, read_index, write_index
        from vmae.data.shards.remote import head

        found = read_index(index)
        shards = []
        for shard in found.relative:
            self.put(f"tests/{folder}/{shard.name}", (index.parent / shard.name).read_bytes())
            etag = head(f"s3://tests/{folder}/{shard.name}").etag if etags else ""
            shards.append(shard._replace(etag=etag))
        kept = {"sources": found.sources, "suffixes": found.suffixes, "settings": found.settings}
        path = self.folder / f"{folder}.vmae"
        write_index(path, ShardIndex(found.columns, shards, **kept))
        self.put(f"tests/{folder}/index.vmae", path.read_bytes())
        return f"s3://tests/{folder}/index.vmae"

    def call(self, action: str, name: str, *content: bytes) -> None:
        """By a process of its own: this one may fork afterwards."""
        given = content[0] if content else b""
        bucket, key = name.split("/", 1)
        subprocess.run(
            [sys.executable, __file__, action, bucket, key],
            input=given, check=True, env={**os.environ, **self.environment()},
        )  # fmt: skip


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[StoreServer]:
    """A server that is up."""
    server = StoreServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _call(action: str, bucket: str, key: str, content: bytes) -> None:
    """In a process of its own; the first puts fail while the server comes up, and make the bucket."""
    from datetime import timedelta

    import obstore
    from obstore.store import S3Store

    no_retries: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
    store = S3Store(bucket, client_options={"allow_http": True}, retry_config=no_retries)
    end = time.monotonic() + _START_S
    while True:
        try:
            if action == "delete":
                obstore.delete(store, key)
            else:
                obstore.put(store, ".made", b"")
                obstore.put(store, key, content, use_multipart=False)
            return
        except obstore.exceptions.BaseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


# --- a worse network ----------------------------------------------------------------------------------------


@dataclass
class Relay:
    """Passes connections on to a port, with faults.

    Attributes:
        delay_s: before each answer's bytes are passed on.
        rate: bytes a second that all connections have together; 0 for no limit.
        fail_every: each n-th request is answered with `status`, and each 2n-th cut off by a reset in the
            middle of its answer instead; 0 for none.
        status: answer of a failed request; 0 resets the connection each time, any but 503 never.
        flip_every: of each n-th answer a byte is changed.
        silent: take connections, and answer nothing.
        certificate: PEM file of a certificate and its key, to speak https.
        requests, bytes: passed on so far.
    """

    to: int
    delay_s: float = 0.0
    rate: float = 0.0
    fail_every: int = 0
    status: int = 503
    flip_every: int = 0
    silent: bool = False
    certificate: Path | None = None
    requests: int = 0
    failed: int = 0
    bytes: int = 0
    port: int = 0
    _free: float = 0.0
    _lock: Any = field(default_factory=threading.Lock)
    _listener: Any = None

    def __enter__(self) -> Relay:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = None
        try:
            if self.certificate is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate)
                client = context.wrap_socket(client, server_side=True)
            while request := self._head(client):
                while self.silent:
                    time.sleep(0.05)
                with self._lock:
                    self.requests += 1
                    number = self.requests
                    failing = self.fail_every > 0 and number % self.fail_every == 0
                    halves = self.status == 503 and number // (self.fail_every or 1) % 2 == 0
                    reset = failing and (self.status == 0 or halves)
                    flipped = self.flip_every > 0 and number % self.flip_every == 0
                    self.failed += failing or flipped
                if failing and not reset:
                    client.sendall(b"HTTP/1.1 %d Fault\r\nContent-Length: 0\r\n\r\n" % self.status)
                    continue
                if server is None:
                    server = socket.create_connection(("127.0.0.1", self.to))
                server.sendall(request)
                self._answer(client, server, cut=reset, flipped=flipped)
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
        except OSError:
            pass
        finally:
            client.close()
            if server is not None:
                server.close()

    @staticmethod
    def _head(side: socket.socket) -> bytes:
        """A request, or the head of an answer with what came of its body."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = side.recv(1 << 16)
            if not more:
                return b""
            data += more
        return data

    def _answer(self, client: socket.socket, server: socket.socket, cut: bool, flipped: bool) -> None:
        data = self._head(server)
        if not data:
            raise OSError("the server is gone")
        if self.delay_s:
            time.sleep(self.delay_s)
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
        left = (lengths or [0])[0] - len(body)
        half = left // 2
        self._send(client, data)
        while left > (half if cut else 0):
            body = server.recv(min(1 << 16, left))
            if not body:
                raise OSError("the server is gone")
            left -= len(body)
            if flipped:
                body, flipped = bytes([body[0] ^ 1]) + body[1:], False
            self._send(client, body)

    def _send(self, client: socket.socket, data: bytes) -> None:
        if self.rate:
            with self._lock:
                self._free = max(self._free, time.monotonic()) + len(data) / self.rate
                pause = self._free - time.monotonic()
            time.sleep(max(pause, 0))
        with self._lock:
            self.bytes += len(data)
        client.sendall(data)


if __name__ == "__main__":
    _call(sys.argv[1], sys.argv[2], sys.argv[3], sys.stdin.buffer.read())
