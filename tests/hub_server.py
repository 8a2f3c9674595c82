"""A hub on loopback: what `huggingface_hub` asks of huggingface.co, answered by `http.server` from memory.

Branches and commits, files kept in git (their ETag is the SHA-1 of git) and large ones (a redirect to another
port, as the hub's storage; their ETag is the SHA-256), ranges, listings, gates, and faults on demand.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".pth", ".safetensors", ".bin", ".pt")


@dataclass
class Repo:
    """Commits by hash, each with its files; branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        digest = hashlib.sha1(
            b"".join(name.encode() + body for name, body in sorted(files.items()))
        ).hexdigest()
        self.commits[digest] = files
        self.refs |= dict.fromkeys(names or ("main",), digest)
        return digest


@dataclass
class Hub:
    """The server's state: what it holds, what was asked, and how it fails.

    Attributes:
        asked: (method, path, range, token) of each request to the hub; `storage` of each to the storage.
        cut: bodies of large files that break off after so many bytes, one each.
        reset: cut connections by a reset instead of an orderly end.
        lie: bytes sent instead of a file's, by name.
        status: answer to everything.
        pause: seconds before each body of a large file.
        after: what happens once after the body of a small file, by name.
        no_commit: answers lack the headers of a hub, as those of any other server.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    storage: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    reset: bool = False
    lie: dict[str, bytes] = field(default_factory=dict)
    status: int = 0
    pause: float = 0.0
    no_commit: bool = False
    after: dict[str, Callable[[], object]] = field(default_factory=dict)
    ports: tuple[int, int] = (0, 0)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo())

    def bodies(self) -> list[tuple[str, str | None]]:
        """File and range of each body of a large file that was sent."""
        return [(path.rsplit("/", 1)[-1], span) for method, path, span, _ in self.storage if method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_storage = False

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        log = self.hub.storage if self.is_storage else self.hub.asked
        log.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        if self.hub.status:
            return self.error(self.hub.status, "", "the hub is ill")
        if self.is_storage:
            digest, name = path.strip("/").split("/", 1)
            return self.send_large(name.rsplit("/", 1)[-1], self.body_of(digest))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.answer_api(parts[2:])
        return self.answer_file("/".join(parts[:2]), parts[2:])

    def body_of(self, digest: str) -> bytes:
        files = [
            body for repo in self.hub.repos.values() for one in repo.commits.values() for body in one.values()
        ]
        return next(body for body in files if hashlib.sha256(body).hexdigest() == digest)

    def find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and the commit; None after an error was sent."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization")
        if repo is None or (name.startswith("private/") and token != "Bearer hf_right"):
            self.error(404 if token else 401, "RepoNotFound", "Repository not found")
        elif token and token not in ("Bearer hf_right", "Bearer hf_other"):
            self.error(401, "", "Invalid credentials in Authorization header")
        elif repo.gated and token != "Bearer hf_right":
            self.error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, commit
        return None

    def answer_api(self, parts: list[str]) -> None:
        name, what = "/".join(parts[:2]), parts[2:3]
        revision = "/".join(parts[3:]) if len(parts) > 3 else "main"
        found = self.find(name, revision)
        if found is None:
            return
        repo, commit = found
        if what == ["refs"]:
            names = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
            return self.send_json({"branches": names, "tags": [], "converts": []})
        files = repo.commits[commit]
        if what == ["tree"]:
            rows = [{"type": "file", "path": n, "size": len(b), "oid": git_hash(b)} for n, b in files.items()]
            return self.send_json(rows)
        siblings = [{"rfilename": n} for n in files]
        self.send_json(
            {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        )

    def answer_file(self, name: str, parts: list[str]) -> None:
        if parts[:1] != ["resolve"]:
            return self.error(404, "", "no such page")
        end = 4 if parts[1:2] == ["refs"] else 2
        found = self.find(name, "/".join(parts[1:end]))
        if found is None:
            return
        repo, commit = found
        file = "/".join(parts[end:])
        if file not in repo.commits[commit]:
            return self.error(404, "EntryNotFound", "Entry not found", commit)
        body = repo.commits[commit][file]
        if not file.endswith(LARGE):
            self.send(200, body, {"ETag": f'"{git_hash(body)}"', "X-Repo-Commit": commit})
            if self.command == "GET":
                self.hub.after.pop(file, lambda: None)()
            return None
        digest = hashlib.sha256(body).hexdigest()
        self.send(
            302,
            b"",
            {
                "Location": f"http://127.0.0.1:{self.hub.ports[1]}/{digest}/{file}",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(body)),
            },
        )

    def send_large(self, name: str, body: bytes) -> None:
        time.sleep(self.hub.pause)
        body = self.hub.lie.get(name, body)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send(206 if start else 200, body[start:], headers, cut=True)

    def send_json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str, text: str, commit: str = "") -> None:
        headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {})}
        self.send(status, b"", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        if self.hub.no_commit:
            headers = {}
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and self.hub.cut and (count := self.hub.cut.pop(0)) < len(body):
            self.wfile.write(body[:count])
            self.wfile.flush()
            if self.hub.reset:  # no orderly end: the peer sees "connection reset"
                import socket
                import struct

                time.sleep(0.05)  # what was written arrives first
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body)


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on two ports of loopback: its own, and that of its storage."""
    hub = Hub()
    servers = []
    for is_storage in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_storage": is_storage})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    hub.ports = (servers[0].server_address[1], servers[1].server_address[1])
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
