"""The page and its request, over HTTP, and in a real browser where there is one."""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmae import ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.cli import main
from vmae.data.write_video import write_video
from vmae.synthetic.samples import sample_videos
from vmae.tools import serve
from vmae.tools.serve import Limits, Server, build_studio

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, patch_size=8, num_frames=8, depth=1)
MASK = {"encoder": "tube", "encoder_ratio": 0.75, "decoder": "running_cell", "decoder_ratio": 0.5}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    about = {"model": CONFIG.to_dict(), "mask": MASK, "stride": 2}
    export_weights(folder / "pre.pth", build_pretrainer(CONFIG).state_dict(), config=about)
    clip = {"num_frames": 8, "image_size": 32, "stride": 2}
    about = {
        "model": CONFIG.to_dict(),
        "clip": clip,
        "pooling": "mean",
        "class_names": ["<b>waving</b>", "jumping"],
    }
    export_weights(folder / "classes.pth", build_classifier(CONFIG, 2).state_dict(), config=about)
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Folder of uploads."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(serve.tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def server(checkpoints, temporary):
    flags = [
        "--checkpoint",
        str(checkpoints / "pre.pth"),
        "--classifier",
        str(checkpoints / "classes.pth"),
        "--device",
        "cpu",
    ]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    running = Server(
        build_studio(parser.parse_args([*flags, "--max-megabytes", "2", "--max-seconds", "20"])), 0
    )
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def ask(server, body=b"", query="", method="POST", path="/show", headers=()):
    """Status and answer: JSON, or the page."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, f"{path}?{query}", body, {"X-Vmae": "1", **dict(headers)})
    reply = connection.getresponse()
    text = reply.read()
    if reply.headers["Content-Type"] == "application/json":
        return reply.status, json.loads(text)
    return reply.status, text.decode()


def left(temporary):
    """Uploads on the disk."""
    return [
        os.path.join(folder, name)
        for folder, _, files in os.walk(temporary)
        for name in files
        if "vmae-serve" in folder
    ]


VIDEO = Path(sample_videos()[2])


def test_a_video_is_shown_and_leaves_nothing_behind(server, temporary):
    status, answer = ask(server, VIDEO.read_bytes(), "encoder_ratio=0.5&seed=3")
    assert status == 200 and answer["masks"].startswith("64 tokens: 32 visible, 32 decoded")
    picture = Image.open(io.BytesIO(base64.b64decode(answer["picture"].split(",")[1])))
    assert picture.format == "PNG" and np.asarray(picture).std() > 20
    assert {one["name"] for one in answer["classes"]} == {"<b>waving</b>", "jumping"}
    assert sum(one["percent"] for one in answer["classes"]) == pytest.approx(100, abs=0.2)
    assert ask(server, VIDEO.read_bytes(), "encoder_ratio=0.5&seed=3")[1] == answer
    assert ask(server, VIDEO.read_bytes(), "encoder_ratio=0.5&seed=4")[1]["picture"] != answer["picture"]
    assert not left(temporary)


def test_the_page(server):
    status, page = ask(server, method="GET", path="/")
    assert status == 200 and '"encoder_ratio": 0.75' in page and "/* ABOUT */" not in page
    assert "http://" not in page and "https://" not in page  # nothing is fetched from elsewhere
    chosen = json.loads(re.search(r'"chosen": (\{[^}]*\})', page)[1])
    assert all(f'id="{name}"' in page for name in chosen)  # the page's script fills in a field of each
    assert ask(server, method="GET", path="/etc/passwd")[0] == 404


def one_picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, format="PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"just some text\n" * 30, 422, "this is not a video file"),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
            422,
            "this is not a video file",
        ),
        (one_picture(), 422, "this is not a video file"),
        (b"", 422, "the file is empty"),
        (VIDEO.read_bytes()[:3000], 422, "the video"),
        (b"\0\0\0\x18ftypisom" + bytes(500), 422, "the video"),
    ],
    ids=["text", "playlist", "picture", "empty", "cut off", "MP4 of nothing"],
)
def test_other_files_get_one_line(server, temporary, capfd, body, status, message):
    found, answer = ask(server, body)
    assert found == status and message in answer["error"] and "\n" not in answer["error"]
    assert str(temporary) not in answer["error"] and "Traceback" not in capfd.readouterr().err
    assert not left(temporary)


def test_too_large_too_long_too_wide(server, temporary, tmp_path):
    with socket.create_connection(
        ("127.0.0.1", server.server_port), timeout=20
    ) as raw:  # refused before it is sent
        host = f"127.0.0.1:{server.server_port}"
        raw.sendall(
            f"POST /show HTTP/1.1\r\nHost: {host}\r\nX-Vmae: 1\r\nContent-Length: {3 << 20}\r\n\r\n".encode()
        )
        reply = raw.makefile("rb").read().decode()
    assert " 413 " in reply and "the file has 3 MB; at most 2 are allowed" in reply
    write_video(tmp_path / "long.mp4", np.zeros((42, 32, 32, 3), np.uint8), fps=2)
    assert (
        "has 21 seconds; at most 20 are allowed"
        in ask(server, (tmp_path / "long.mp4").read_bytes())[1]["error"]
    )
    server.studio.limits = Limits(pixels=100)
    assert (
        "has 176 x 144 pixels; a side of at most 100 is allowed"
        in ask(server, VIDEO.read_bytes())[1]["error"]
    )
    write_video(tmp_path / "one.mp4", np.zeros((1, 32, 32, 3), np.uint8))
    assert "one picture, not a video" in ask(server, (tmp_path / "one.mp4").read_bytes())[1]["error"]
    assert not left(temporary)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("encoder_ratio=lots", "encoder ratio must be a number at least 0 and below 1, not lots"),
        ("encoder_ratio=nan", "encoder ratio must be a number at least 0 and below 1, not nan"),
        ("decoder_ratio=-inf", "decoder ratio must be a number at least 0 and below 1, not -inf"),
        ("encoder=stripes", "stripes"),
        ("encoder_ratio=1.5", "1.5"),
        ("seed=-1", "seed must be a whole number from 0"),
        ("seed=" + "9" * 5000, "seed must be a whole number from 0"),
        ("path=/etc", "unknown fields: 'path'"),
        ("&".join(f"f{number}=1" for number in range(100)), "more than the 5 fields"),
        ("decoder=running_cell&decoder_ratio=0.3", "0.3"),
    ],
)
def test_other_masks_get_one_line(server, query, message):
    status, answer = ask(server, VIDEO.read_bytes(), query)
    assert status in (400, 422) and message in answer["error"]


def test_other_sites_are_refused(server):
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"X-Vmae": "0"},
    ):
        for body in (VIDEO.read_bytes(),):
            assert ask(server, body, headers=headers)[0] == 403
    own = f"http://localhost:{server.server_port}"
    assert ask(server, b"text", headers={"Origin": own, "Host": own.removeprefix("http://")})[0] == 422
    assert ask(server, method="GET", path="/", headers={"Host": "evil.example:80"})[0] == 403


def test_one_at_a_time(server):
    server.studio.limits = Limits(wait=0.1)
    with server.studio.busy:
        status, answer = ask(server, VIDEO.read_bytes())
    assert status == 503 and answer["error"] == "another video is being processed; try again in 10 seconds"
    server.studio.limits = Limits()
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(server, VIDEO.read_bytes())[0])) for _ in range(3)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers == [200] * 3


def test_an_internal_error_is_one_line_and_a_trace_in_the_terminal(server, temporary, monkeypatch, capfd):
    monkeypatch.setattr(server.studio, "show", lambda *args: 1 / 0)
    status, answer = ask(server, VIDEO.read_bytes())
    assert status == 500 and "ZeroDivisionError" in answer["error"] and not left(temporary)
    assert not server.studio.busy.locked()
    trace = capfd.readouterr().err
    assert "Traceback" in trace and "ZeroDivisionError: division by zero" in trace


def test_the_command_refuses_what_it_cannot_serve(checkpoints, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--checkpoint", str(checkpoints / "pre.pth"), "--port", port]) == 2
        assert f"port {port} cannot be used" in capsys.readouterr().err
    assert main(["serve", "--checkpoint", str(checkpoints / "classes.pth")]) == 2
    assert "has no decoder" in capsys.readouterr().err
    assert main(["serve", "--checkpoint", str(checkpoints / "pre.pth"), "--port", "70000"]) == 2
    assert main(["serve", "--checkpoint", str(checkpoints / "pre.pth"), "--max-seconds", "0"]) == 2


# --- hostile and clumsy requests ----------------------------------------------------------------------------


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=20)


def raw(server, request: bytes) -> tuple[int, bytes]:
    """Status (0: closed without one) and the whole reply to bytes of any kind."""
    with connect(server) as connection:
        with contextlib.suppress(OSError):  # it may be refused before all of it was sent
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        reply = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                reply += part
    return int(reply.split()[1]) if reply.startswith(b"HTTP/") else 0, reply


def head(server, *lines: str, show="/show") -> bytes:
    """The start of an upload, as the page would send it, with more lines."""
    first = (f"POST {show} HTTP/1.1", f"Host: 127.0.0.1:{server.server_port}", "X-Vmae: 1")
    return "".join(f"{line}\r\n" for line in (*first, *lines, "")).encode()


def wait_until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_clean(text: str) -> bool:
    """No trace, and no control characters."""
    return "Traceback" not in text and all(c == "\n" or c.isprintable() for c in text)


@pytest.fixture
def small(checkpoints, temporary):
    """Server with small limits."""
    started = []

    def start(**limits):
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser)
        studio = build_studio(
            parser.parse_args(["--checkpoint", str(checkpoints / "pre.pth"), "--device", "cpu"])
        )
        studio.limits = Limits(**{"megabytes": 1, **limits})
        started.append(Server(studio, 0))
        threading.Thread(
            target=started[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return started[-1]

    yield start
    for running in started:
        running.shutdown()
        running.server_close()


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Content-Length: " + "9" * 5000], 413),
        (["Content-Length: " + "0" * 5000 + "9" * 16], 413),
        (["Content-Length: -5"], 400),
        (["Content-Length: +5"], 400),
        (["Content-Length: 1_000"], 400),
        (["Content-Length: 5, 5"], 400),
        (["Content-Length: 5", "Content-Length: 6"], 400),
        (["Content-Length: 0x10"], 400),
        (["Content-Length: \u0663"], 400),
        (["Content-Length: \xb2"], 400),
        (["Content-Length:"], 400),
        (["Content-Length: 1e3"], 400),
        ([], 411),
        (["Transfer-Encoding: chunked"], 411),
        (["Transfer-Encoding: chunked", "Content-Length: 5"], 411),
        (["Content-Length: 000"], 422),
        (["Content-Length: 50"], 400),  # less is sent
    ],
    ids=lambda part: str(part)[:40],
)
def test_lengths_of_every_kind(server, temporary, capfd, lines, status):
    found, reply = raw(server, head(server, *lines) + b"ten bytes.")
    assert found == status and json.loads(reply.split(b"\r\n\r\n")[1])["error"]
    assert is_clean(capfd.readouterr().err) and not left(temporary)


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET //[ HTTP/1.1",
        b"GET http://[ HTTP/1.1",
        b"POST //[?x HTTP/1.1",
        b"GET /[ HTTP/1.1",
        b"GET http://[::1/ HTTP/1.0",
        b"GET /\x1b[2J\x1b]0;owned\x07 HTTP/1.1",
        b"GET /\x9b31m HTTP/1.1",
        b"\x1b]0;owned\x07",
        b"\x1b[31m / HTTP/1.1",
        b"GARBAGE",
        b"GET",
        b"GET / / HTTP/1.1",
        b"GET / HTTP/9.9",
        b"GET / HTTP/1." + b"9" * 5000,
        b"GET / HTTP/\x1b[2J",
        b"GET / HTTP/" + b"9" * 5000 + b".1",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1",
        b"\x00" * 50,
        b"\xff\xfe\x00G",
        b"DELETE / HTTP/1.1",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0",
        b"OPTIONS * HTTP/1.1",
        b"POST /show?" + b"&" * 60000 + b" HTTP/1.1",
        b"GET /%00%1b[2J HTTP/1.1",
    ],
    ids=lambda line: repr(line[:24]),
)
def test_request_lines_of_every_kind(server, capfd, request_line):
    host = f"\r\nHost: 127.0.0.1:{server.server_port}\r\nX-Vmae: 1\r\n\r\n".encode()
    status, reply = raw(server, request_line + host)
    assert 400 <= status <= 505 and status != 500 or reply.startswith((b"{", b"<!DOCTYPE")), reply[:200]
    assert is_clean(capfd.readouterr().err) and b"\x1b" not in reply and b"\x9b" not in reply


@pytest.mark.parametrize(
    "headers",
    [
        b"a: b\r\n" * 300,
        b"a: " + b"b" * 70000,
        b"no colon",
        b": no name",
        b" folded\r\n more",
        b"Host: \x1b[2J",
        b"Host: 127.0.0.1.evil.example:8008",
        b"Host: localhost",
        b"Host:",
        b"Origin: \x1b[2J\x00",
        b"X-Vmae: \xff\xfe",
        b"a:\x00b",
    ],
    ids=lambda line: repr(line[:24]),
)
def test_headers_of_every_kind(server, capfd, headers):
    status, reply = raw(server, b"GET / HTTP/1.1\r\n" + headers + b"\r\n\r\n")
    assert 400 <= status < 500, reply[:200]
    own = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
    assert raw(server, b"GET / HTTP/1.1\r\n" + own + own + b"\r\n")[0] == 403  # which of the two would it be?
    assert raw(server, b"GET / HTTP/1.1\r\n" + own + b"\r\n")[0] == 200
    assert is_clean(capfd.readouterr().err)


def test_control_characters_of_a_request_do_not_reach_the_terminal(server, capfd):
    status, answer = ask(server, VIDEO.read_bytes()[:100], "encoder=%1b%5d0;owned%07%9b")
    assert status == 400 and "\x1b" not in json.dumps(answer)
    assert raw(server, b"GET /\x1b[31mred\x07\x9b HTTP/1.1\r\n\r\n")[0] == 403
    output = capfd.readouterr().err
    assert is_clean(output) and "\\x1b[31mred\\x07\\x9b" in output and output.count("\n") == 2
    assert serve.printable("a\u202eb\nc") == "a\\u202eb\\nc" and len(serve.printable("x" * 10_000)) < 400


def test_names_of_files_do_not_matter(server, temporary):
    disposition = {"Content-Disposition": 'attachment; filename="../../../x.mp4"', "X-File": "../../x"}
    assert ask(server, b"text", headers=disposition)[0] == 422
    for place in ("/show/../../x", "/../show", "/show%2f..", "//show/../x"):
        assert ask(server, b"text", path=place)[0] == 403
    assert not left(temporary) and {path.name for path in temporary.parent.iterdir()} == {"uploads"}


def test_incomplete_uploads_are_limited_and_removed(small, temporary, capfd):
    running = small(uploads=2)
    halves = [connect(running) for _ in range(12)]
    for connection in halves[:2]:
        connection.sendall(head(running, f"Content-Length: {1 << 20}") + bytes(1000))
    wait_until(lambda: len(left(temporary)) == 2)
    for connection in halves[2:]:
        connection.sendall(head(running, f"Content-Length: {1 << 20}") + bytes(1 << 20))
    states = [connection.makefile("rb").read() for connection in halves[2:]]
    assert len(left(temporary)) == 2
    assert all(b" 503 " in state and b"\r\nRetry-After: 10\r\n" in state for state in states)
    assert all(b"2 videos are waiting already; try again in 10 seconds" in state for state in states)
    for connection in halves:
        connection.close()
    wait_until(lambda: not left(temporary) and not list(temporary.glob("vmae-serve-*")))
    assert ask(running, VIDEO.read_bytes())[0] == 200
    assert is_clean(capfd.readouterr().err)


def drip(connection, seconds=5.0) -> float:
    """Send a byte now and then until the server closes the connection; seconds that it took."""
    began = time.monotonic()
    connection.settimeout(0.02)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < began + seconds:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if connection.recv(4096):
                    break
    return time.monotonic() - began


def test_a_slow_upload_ends(small, temporary, capfd):
    running = small(upload=0.4, uploads=1)
    with connect(running) as connection:
        connection.sendall(head(running, "Content-Length: 1000000"))
        assert 0.3 < drip(connection) < 3
    with connect(running) as connection:  # and so does one that sends nothing more
        connection.sendall(head(running, "Content-Length: 1000000") + b"x")
        assert b" 408 " in connection.recv(4096)
    wait_until(lambda: not left(temporary))
    assert ask(running, b"text")[0] == 422  # its place is free again
    assert is_clean(capfd.readouterr().err)


def test_slow_headers_end(small, capfd):
    running = small(headers=0.4)
    for start in (b"GET / HTTP/1.1\r\nA: ", b"", b"GET"):
        with connect(running) as connection:
            connection.sendall(start)
            assert 0.3 < drip(connection) < 3
    assert is_clean(capfd.readouterr().err)


def test_connections_are_limited(small, capfd):
    running = small(connections=3)
    idle = [connect(running) for _ in range(3)]
    wait_until(lambda: running.free_connections._value == 0)
    status, reply = raw(running, b"GET / HTTP/1.1\r\n\r\n")
    assert status == 503 and b"Retry-After: 10" in reply
    for connection in idle:
        connection.close()
    wait_until(lambda: running.free_connections._value == 3)
    assert ask(running, method="GET", path="/")[0] == 200
    assert is_clean(capfd.readouterr().err)


def test_a_client_that_leaves_early(small, temporary, capfd):
    running = small()
    for sent in (VIDEO.read_bytes(), VIDEO.read_bytes()[:5000]):
        with connect(running) as connection:
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # close with a reset
            connection.sendall(head(running, f"Content-Length: {VIDEO.stat().st_size}") + sent)
    wait_until(
        lambda: not left(temporary) and running.free_connections._value == running.studio.limits.connections
    )
    assert is_clean(capfd.readouterr().err) and not running.studio.busy.locked()


def test_no_place_to_store_a_video(small, temporary, capfd):
    running = small()
    temporary.rmdir()
    status, answer = ask(running, VIDEO.read_bytes())
    assert status == 507 and answer["error"] == "the video cannot be stored: No such file or directory"
    temporary.mkdir()
    assert ask(running, b"text")[0] == 422 and is_clean(capfd.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_leaves_no_incomplete_upload(checkpoints, temporary, number):
    command = [
        sys.executable,
        "-m",
        "vmae",
        "serve",
        "--checkpoint",
        str(checkpoints / "pre.pth"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's `&` makes its processes ignore it
    )
    port = int(process.stdout.readline().split(":")[2].split()[0])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        start = (
            f"POST /show HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-Vmae: 1\r\nContent-Length: 100000\r\n\r\n"
        )
        connection.sendall(start.encode() + bytes(50_000))
        wait_until(lambda: left(temporary))
        process.send_signal(number)
        process.wait(30)
    assert not list(temporary.glob("vmae-serve-*"))


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1400"):
        options.add_argument(word)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def test_in_a_browser(server, browser, tmp_path):
    """Choose a video, press the button, read the result; then a text file, and a file that is too large."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def element(name):
        return browser.find_element(By.ID, name)

    def keep(name):
        if "VMAE_SCREENSHOTS" in os.environ:
            browser.save_screenshot(str(Path(os.environ["VMAE_SCREENSHOTS"]) / f"{name}.png"))

    def wait(message):
        WebDriverWait(browser, 30).until(lambda _: message in element("message").text)

    browser.get(f"http://127.0.0.1:{server.server_port}/")
    assert element("encoder_ratio").get_attribute("value") == "0.75" and not element("result").is_displayed()
    element("go").click()
    wait("Not shown: choose a video first.")
    keep("empty")
    element("file").send_keys(str(VIDEO))
    element("encoder_ratio").clear()
    element("encoder_ratio").send_keys("0.5")
    element("seed").send_keys(Keys.ENTER)  # by keyboard alone
    wait("Done in")
    assert "32 visible, 32 decoded" in element("summary").text
    assert browser.execute_script("return document.getElementById('picture').naturalWidth") > 300
    assert "<b>waving</b>" in element("classes").text  # as text
    keep("result")
    (tmp_path / "notes.mp4").write_text("no video at all\n" * 50)
    element("file").send_keys(str(tmp_path / "notes.mp4"))
    element("go").click()
    wait("Not shown: this is not a video file")
    assert not element("result").is_displayed()
    keep("text")
    (tmp_path / "huge.mp4").write_bytes(bytes(3 << 20))
    element("file").send_keys(str(tmp_path / "huge.mp4"))
    element("go").click()
    wait("Not shown: the file has 3 MB; at most 2 are allowed.")
    assert [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "422" not in entry["message"]
    ] == []


def test_weights_without_settings(tmp_path, capsys):
    config = ModelConfig.preset("vit_tiny", img_size=64, num_frames=8)
    export_weights(tmp_path / "pre.pth", build_pretrainer(config).state_dict())
    export_weights(tmp_path / "classes.pth", build_classifier(config, 2).state_dict())
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = [
        "--checkpoint",
        str(tmp_path / "pre.pth"),
        "--classifier",
        str(tmp_path / "classes.pth"),
        "--device",
        "cpu",
    ]
    flags += ["--model", "vit_tiny", "--classifier-model", "vit_tiny"]
    studio = build_studio(parser.parse_args([*flags, "--init-frames", "8", "--init-size", "64"]))
    assert studio.model.config.grid == studio.classifier.model.config.grid == config.grid
    output = capsys.readouterr().out
    assert "classes.pth: it does not say how videos were seen" in output and "pre.pth: it does" not in output
    build_studio(parser.parse_args(flags))  # then it prints what it assumes, for both
    output = capsys.readouterr().out
    assert all(f"{name}.pth" in output and "16" in output for name in ("pre", "classes"))
