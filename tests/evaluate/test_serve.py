"""The page and its one question, over HTTP; and in a real browser, where there is one."""

import argparse
import base64
import http.client
import io
import json
import os
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmae import ModelConfig, build_classifier, build_pretrainer
from vmae.cli import main
from vmae.data.samples import sample_videos
from vmae.data.write_video import write_video
from vmae.evaluate import serve
from vmae.evaluate.serve import Limits, Server, build_studio
from vmae.train.checkpoint import export_weights

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, patch_size=8, num_frames=8, depth=1)
MASK = {"encoder": "tube", "encoder_ratio": 0.75, "decoder": "running_cell", "decoder_ratio": 0.5}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    about = {"model": CONFIG.to_dict(), "mask": MASK, "stride": 2}
    export_weights(folder / "pre.pth", build_pretrainer(CONFIG).state_dict(), config=about)
    clip = {"num_frames": 8, "image_size": 32, "stride": 2}
    about = {"model": CONFIG.to_dict(), "clip": clip, "pooling": "mean", "class_names": ["<b>waving</b>", "jumping"]}
    export_weights(folder / "classes.pth", build_classifier(CONFIG, 2).state_dict(), config=about)
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where uploads go."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(serve.tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def server(checkpoints, temporary):
    words = ["--checkpoint", str(checkpoints / "pre.pth"), "--classifier", str(checkpoints / "classes.pth"), "--device", "cpu"]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    running = Server(build_studio(parser.parse_args([*words, "--max-megabytes", "2", "--max-seconds", "20"])), 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def ask(server, body=b"", query="", method="POST", path="/show", headers=()):
    """Status and answer: JSON, or the page."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, f"{path}?{query}", body, {"X-Vmae": "1", **dict(headers)})
    reply = connection.getresponse()
    text = reply.read()
    return reply.status, json.loads(text) if reply.headers["Content-Type"] == "application/json" else text.decode()


VIDEO = Path(sample_videos()[2])


def test_a_video_is_shown_and_leaves_nothing_behind(server, temporary):
    status, answer = ask(server, VIDEO.read_bytes(), "encoder_ratio=0.5&seed=3")
    assert status == 200 and answer["masks"].startswith("64 tubelets: the encoder sees 32, the decoder rebuilds 32")
    picture = Image.open(io.BytesIO(base64.b64decode(answer["picture"].split(",")[1])))
    assert picture.format == "PNG" and np.asarray(picture).std() > 20
    assert {one["name"] for one in answer["classes"]} == {"<b>waving</b>", "jumping"}
    assert sum(one["percent"] for one in answer["classes"]) == pytest.approx(100, abs=0.2)
    assert ask(server, VIDEO.read_bytes(), "encoder_ratio=0.5&seed=3")[1] == answer
    assert ask(server, VIDEO.read_bytes(), "encoder_ratio=0.5&seed=4")[1]["picture"] != answer["picture"]
    assert not list(temporary.iterdir())


def test_the_page(server):
    status, page = ask(server, method="GET", path="/")
    assert status == 200 and '"encoder_ratio": 0.75' in page and "/* ABOUT */" not in page
    assert "http://" not in page and "https://" not in page  # nothing is fetched from elsewhere
    assert ask(server, method="GET", path="/etc/passwd")[0] == 404


def one_picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, format="PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"just some text\n" * 30, 422, "this is not a video file"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n", 422, "this is not a video file"),
        (one_picture(), 422, "this is not a video file"),
        (b"", 422, "the file is empty"),
        (VIDEO.read_bytes()[:3000], 422, "the video"),
        (b"\0\0\0\x18ftypisom" + bytes(500), 422, "the video"),
    ],
    ids=["text", "playlist", "picture", "empty", "cut off", "MP4 of nothing"],
)
def test_other_files_get_a_line(server, temporary, capfd, body, status, words):
    found, answer = ask(server, body)
    assert found == status and words in answer["error"] and "\n" not in answer["error"]
    assert str(temporary) not in answer["error"] and "Traceback" not in capfd.readouterr().err
    assert not list(temporary.iterdir())


def test_too_large_too_long_too_wide(server, temporary, tmp_path):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as raw:  # refused before it is sent
        host = f"127.0.0.1:{server.server_port}"
        raw.sendall(f"POST /show HTTP/1.1\r\nHost: {host}\r\nX-Vmae: 1\r\nContent-Length: {3 << 20}\r\n\r\n".encode())
        reply = raw.makefile("rb").read().decode()
    assert " 413 " in reply and "the file has 3 MB, more than the 2 allowed here" in reply
    write_video(tmp_path / "long.mp4", np.zeros((42, 32, 32, 3), np.uint8), fps=2)
    assert "has 21 seconds, more than the 20 allowed" in ask(server, (tmp_path / "long.mp4").read_bytes())[1]["error"]
    server.studio.limits = Limits(pixels=100)
    assert "has 176 x 144 pixels, more than the 100 allowed" in ask(server, VIDEO.read_bytes())[1]["error"]
    write_video(tmp_path / "one.mp4", np.zeros((1, 32, 32, 3), np.uint8))
    assert "one picture, not a video" in ask(server, (tmp_path / "one.mp4").read_bytes())[1]["error"]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("encoder_ratio=lots", "encoder ratio: 'lots' is not a number"),
        ("encoder_ratio=nan", "not a number"),
        ("encoder=stripes", "stripes"),
        ("encoder_ratio=1.5", "1.5"),
        ("seed=-1", "the seed must be at least 0"),
        ("path=/etc", "unknown fields: path"),
        ("decoder=running_cell&decoder_ratio=0.3", "0.3"),
    ],
)
def test_other_masks_get_a_line(server, query, words):
    status, answer = ask(server, VIDEO.read_bytes(), query)
    assert status in (400, 422) and words in answer["error"]


def test_other_sites_are_refused(server):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"X-Vmae": "0"}):
        for body in (VIDEO.read_bytes(),):
            assert ask(server, body, headers=headers)[0] == 403
    own = f"http://localhost:{server.server_port}"
    assert ask(server, b"text", headers={"Origin": own, "Host": own.removeprefix("http://")})[0] == 422
    assert ask(server, method="GET", path="/", headers={"Host": "evil.example:80"})[0] == 403


def test_one_at_a_time(server):
    server.studio.limits = Limits(wait=0.1)
    with server.studio.busy:
        status, answer = ask(server, VIDEO.read_bytes())
    assert status == 503 and "another video" in answer["error"]
    server.studio.limits = Limits()
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(server, VIDEO.read_bytes())[0])) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers == [200] * 3


def test_a_fault_of_ours_is_a_line_too_and_a_trace_in_the_terminal(server, temporary, monkeypatch, capfd):
    monkeypatch.setattr(server.studio, "show", lambda *args: 1 / 0)
    status, answer = ask(server, VIDEO.read_bytes())
    assert status == 500 and "ZeroDivisionError" in answer["error"] and not list(temporary.iterdir())
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


# --- in a browser -----------------------------------------------------------------------------------------------------


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
    """A person's way: choose, press, look; then a text file, and one that is too large."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def element(name):
        return browser.find_element(By.ID, name)

    def keep(name):
        if "VMAE_SCREENSHOTS" in os.environ:
            browser.save_screenshot(str(Path(os.environ["VMAE_SCREENSHOTS"]) / f"{name}.png"))

    def wait(words):
        WebDriverWait(browser, 30).until(lambda _: words in element("message").text)

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
    assert "the encoder sees 32" in element("words").text
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
    wait("Not shown: the file has 3 MB, more than the 2 allowed here.")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "422" not in entry["message"]] == []
