"""What is no video is not opened, nothing that a file names is, and a file that lies about its size costs
nothing."""

import http.server
import os
import struct
import threading

import numpy as np
import pytest
from PIL import Image

from vmae.data import containers
from vmae.data.containers import container_kind, names_other_files, open_container
from vmae.data.decode import BACKENDS, DecodeError, open_video, video_backends
from vmae.data.manifest import VideoEntry
from vmae.data.pack import PackConfig, pack_video
from vmae.data.readers.pyav import PyavReader

av = pytest.importorskip("av")

BACKEND_NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(BACKENDS[name].missing() is not None, reason=str(BACKENDS[name].missing())),
    )
    for name in video_backends()
]
TABLES = "moov.trak.mdia.minf.stbl."
MOST = b"\xff\xff\xff\xff"


@pytest.fixture(scope="module")
def server(odd_videos):
    """(address of a web server that has a video at every path, list of the paths that were asked for)."""
    asked, data = [], odd_videos["base"].read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


def manifest(kind, place):
    dash = (
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT4S"><Period><AdaptationSet '
        'mimeType="video/mp4"><Representation id="1" '
        f'bandwidth="1"><BaseURL>{place}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4.8,\n{place}\n#EXT-X-ENDLIST\n"
    return {
        "dash": dash,
        "skip": f"<!--skip-->{dash}",
        "free": f"<!--free-->{dash}",
        "hls": hls,
        "concat": f"ffconcat version 1.0\nfile '{place}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 26\n",
        "asx": f'<asx version="3.0"><entry><ref href="{place}"/></entry></asx>',
    }[kind].encode()


@pytest.mark.parametrize("kind", ["dash", "skip", "free", "hls", "concat", "sdp", "asx"])
@pytest.mark.parametrize("there", ["file", "server"])
def test_nothing_that_a_file_names_is_opened(odd_videos, server, tmp_path, kind, there, uninstall):
    address, asked = server
    place = str(odd_videos["base"]) if there == "file" else f"http://{address}/{kind}.mp4"
    for suffix in (".mp4", ".mkv"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(manifest(kind, place))
        assert container_kind(str(path)) == "unknown"
        for name in (
            "auto",
            *(name for name in video_backends() if BACKENDS[name].missing() is None),
        ):
            with pytest.raises(
                DecodeError, match=f"x{suffix}: cannot be opened: (not a video file|Invalid data)"
            ):
                open_video(path, name)
        with pytest.raises(DecodeError, match="cannot be opened"):
            pack_video(path, tmp_path / "packed.mp4", PackConfig())
    assert asked == [] and not (tmp_path / "packed.mp4").exists()


def test_ffmpeg_would_open_them(odd_videos, tmp_path):
    """The list of formats is what keeps it from that."""
    path = tmp_path / "x.mp4"
    path.write_bytes(manifest("concat", odd_videos["base"]))
    with av.open(str(path), options={"safe": "0"}) as container:
        assert container.format.name == "concat" and len(list(container.decode(video=0))) == 120


def test_a_video_that_is_a_manifest_too(odd_videos, tmp_path):
    """Its first box has no zero byte in its size, so that FFmpeg reads on in it as text."""
    path = tmp_path / "both.mp4"
    size = 0x01010101
    with open(path, "wb") as file:
        file.write(struct.pack(">I4s", size, b"free") + manifest("dash", odd_videos["base"]))
        file.seek(size)  # a hole: takes no room
        file.write(odd_videos["base"].read_bytes())
    assert container_kind(str(path)) == "MP4" and names_other_files(str(path))
    for name in set(video_backends()) - {"pyav"}:
        if BACKENDS[name].missing() is None:
            with pytest.raises(DecodeError, match="cannot be opened|may be taken for a manifest"):
                open_video(path, name)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    "name", ["http://{}/x.mp4", "http:/{}/x.mp4", "12:30.mp4", "file:x.mp4", "concat:a|b.mp4", "%3d.mp4"]
)
def test_names_that_look_like_addresses_are_files(
    odd_videos, server, tmp_path, monkeypatch, read_numbers, name, backend
):
    address, asked = server
    monkeypatch.chdir(tmp_path)
    name = name.format(address)
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "wb") as file:
        file.write(odd_videos["cut" if backend == "pyav" else "base"].read_bytes())
    with open_video(name, backend) as reader:
        assert read_numbers(reader.frames([7])) == [40 if backend == "pyav" else 7]
        assert read_numbers(np.stack(list(reader.iterate()))[3:4]) == [36 if backend == "pyav" else 3]
    if backend == "pyav":
        assert pack_video(name, tmp_path / "packed.mp4", PackConfig(preset="ultrafast")) == 87
    assert asked == []


def external(data, conftest, other):
    """MP4 `data` whose samples are said to lie in the file `other` (QuickTime's alias of a volume and a
    path)."""
    path = os.fsencode(other)
    path += bytes(len(path) % 2)
    alias = bytes(10 + 28 + 12) + b"\1x".ljust(64, b"\0") + bytes(16 + 4 + 16)
    alias += struct.pack(">HH", 2, len(path)) + path + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    return conftest.replace_box(
        data, "moov.trak.mdia.minf.dinf.dref", lambda box: struct.pack(">II", 0, 1) + entry
    )


def test_samples_in_another_file_are_not_read(odd_videos, tmp_path, conftest):
    path, base = tmp_path / "x.mp4", odd_videos["base"].read_bytes()
    (tmp_path / "other.mp4").write_bytes(base)
    path.write_bytes(external(base, conftest, tmp_path / "other.mp4"))
    with av.open(str(path), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert len(list(container.decode(video=0))) == 120  # FFmpeg can
    for name in video_backends():
        if BACKENDS[name].missing() is None:
            with pytest.raises(DecodeError, match="x.mp4"):
                open_video(path, name)


def png(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "cover.png")
    return (tmp_path / "cover.png").read_bytes()


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def cover(data, conftest, picture):
    """MP4 `data` with a cover picture."""
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    covers = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 14, 0) + picture)))
    return conftest.replace_box(
        data, "moov", lambda moov: moov + box(b"udta", box(b"meta", bytes(4) + handler + covers))
    )


def write_sound(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        for packet in [*stream.encode(silence), *stream.encode(None)]:
            out.mux(packet)
    return path.read_bytes()


def write_still(path):
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("needs an AV1 encoder")
    with av.open(str(path), "w", format="avif") as out:
        stream = out.add_stream("libsvtav1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "avif", "heic", "mp3", "m4a", "wav"])
def test_pictures_and_sound_are_no_videos(tmp_path, conftest, kind):
    path = tmp_path / f"x.{kind}"
    if kind in ("png", "jpg", "webp"):
        Image.new("RGB", (64, 48), "red").save(path)
    elif kind in ("avif", "heic"):  # one layout; the brand says which codec
        path.write_bytes(write_still(path).replace(b"avif", kind.encode(), 1))
    elif kind == "m4a":
        path.write_bytes(cover(write_sound(tmp_path / "s.mp4"), conftest, png(tmp_path)))
    elif kind == "mp3":
        frame = b"\0image/png\0\3\0" + png(tmp_path)
        tag = b"APIC" + struct.pack(">IH", len(frame), 0) + frame
        size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\3\0\0" + size + tag + (b"\xff\xfb\x90\0" + bytes(413)) * 30)
    else:
        path.write_bytes(
            b"RIFF"
            + struct.pack("<I", 36)
            + b"WAVEfmt "
            + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
        )
        path.write_bytes(path.read_bytes() + b"data" + struct.pack("<I", 800) + bytes(800))
    for name in video_backends():
        if BACKENDS[name].missing() is None:
            with pytest.raises(DecodeError, match="not a video|no video stream"):
                open_video(path, name)


def test_a_cover_is_not_the_film(odd_videos, tmp_path, conftest, read_numbers):
    path = tmp_path / "x.mp4"
    path.write_bytes(cover(odd_videos["base"].read_bytes(), conftest, png(tmp_path)))
    with open_container(path) as container:
        assert len(container.streams.video) == 2
    with open_video(path) as reader:
        assert len(reader) == 120 and read_numbers(reader.frames([99])) == [99]


LIES = {
    "stts entries": ("stts", lambda table: table[:4] + MOST + table[8:]),
    "stts samples": ("stts", lambda table: table[:4] + struct.pack(">III", 1, 0xFFFFFFFF, 512)),
    "stts fewer samples": ("stts", lambda table: table[:4] + struct.pack(">III", 1, 1 << 26, 512)),
    "ctts entries": ("ctts", lambda table: table[:4] + MOST + table[8:]),
    "ctts samples": ("ctts", lambda table: table[:8] + MOST + table[12:]),
    "stsz samples": ("stsz", lambda table: table[:8] + MOST + table[12:]),
    "stsz of one size": ("stsz", lambda table: table[:4] + struct.pack(">II", 1, 1 << 26)),
    "stss": ("stss", lambda table: table[:4] + MOST + table[8:]),
    "stsc": ("stsc", lambda table: table[:4] + MOST + table[8:]),
}


@pytest.mark.parametrize("lie", LIES)
def test_counts_that_the_file_cannot_hold(odd_videos, tmp_path, conftest, lie):
    """decord was ended by the system for "stts samples"; PyAV took 5 GB for "stsz of one size"."""
    resource = pytest.importorskip("resource")
    table, make = LIES[lie]
    path = tmp_path / "x.mp4"
    path.write_bytes(conftest.replace_box(odd_videos["base"].read_bytes(), TABLES + table, make))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in video_backends():
        if BACKENDS[name].missing() is None:
            with pytest.raises(
                DecodeError, match="x.mp4: cannot be opened: (its index counts more samples|Invalid data)"
            ):
                open_video(path, name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_no_memory_is_an_error_of_the_video(odd_videos, monkeypatch):
    def none(*args, **settings):
        raise MemoryError

    with open_video(odd_videos["base"], "pyav") as reader:
        monkeypatch.setattr(PyavReader, "_decode_timed", none)
        with pytest.raises(DecodeError, match="base.mp4: cannot be decoded"):
            reader.frames([1])
    monkeypatch.setattr("vmae.data.readers.pyav.read_packets", none)
    with pytest.raises(DecodeError, match="base.mp4: cannot be opened") as error:
        open_video(odd_videos["base"], "pyav")
    assert error.value.library == "pyav"


def test_boxes_that_do_not_fit(odd_videos, tmp_path):
    base, path = odd_videos["base"].read_bytes(), tmp_path / "x.mp4"
    for content, kind in {
        base: "MP4",
        base[:-9]: "MP4",  # the index is cut off
        base[:20]: "unknown",
        b"\0\0\0\x18ftypheic" + bytes(500): "unknown",
        struct.pack(">I4s", 1 << 20, b"skip") + base: "unknown",  # longer than the file
        struct.pack(">I4s", 7, b"free") + base: "unknown",  # shorter than its head
        struct.pack(">I4sQ", 1, b"wide", 16) + base: "MP4",
        struct.pack(">I4sQ", 1, b"wide", 15) + base: "unknown",
        struct.pack(">I4s", 16, b"skip") + b"<!MPD>\0\0" + base: "MP4",
        struct.pack(">I4s", 0, b"mdat") + base: "unknown",
    }.items():
        path.write_bytes(content)
        assert container_kind(str(path)) == kind, content[:16]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(DecodeError, match="x.mp4: is a pipe, not a file"):
        open_video(tmp_path / "x.mp4")


def test_formats_are_known_to_ffmpeg_and_name_no_files():
    named = {name for names in containers.FORMATS.values() for name in names.split(",")}
    assert not named & {
        "dash",
        "hls",
        "concat",
        "sdp",
        "rtsp",
        "image2",
        "lavfi",
        "imf",
        "webm_dash_manifest",
        "vobsub",
    }
    known = {name for formats in av.formats_available for name in formats.split(",")}
    assert {
        "mov",
        "mp4",
        "matroska",
        "webm",
        "avi",
        "mpegts",
        "mpeg",
        "flv",
        "asf",
        "ogg",
        "gif",
    } <= named & known
    assert VideoEntry("x").kind == "video"
