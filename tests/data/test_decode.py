"""Decoding: pixels against PyAV, frame folders against what was written, and every kind of broken file."""

import os
import sys

import numpy as np
import pytest
from PIL import Image

from vmae.cli import main
from vmae.data import decode, video_reader
from vmae.data.decode import Backend, DecodeError, VideoReader, open_video, register_backend
from vmae.data.manifest import VideoEntry
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos
from vmae.tools import doctor

CARPHONE = sample_videos()[2]
ORDER = tuple(decode.video_backends())  # of auto
VIDEO_BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(lack is not None, reason=str(lack)))
    for name, lack in ((name, decode.BACKENDS[name].missing()) for name in ORDER)
]


@pytest.fixture
def frames_entry(tmp_path):
    """(entry, pixels): five PNG images, numbered from 3."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels, 3):
        Image.fromarray(image).save(tmp_path / f"f_{number}.png")
    return VideoEntry(str(tmp_path), "frames", 3, 5, None, "f_{}.png"), pixels


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folder of broken videos that need PyAV to make."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("broken")
    options = {"movflags": "faststart"}
    with av.open(str(CARPHONE)) as source, av.open(str(folder / "x.mp4"), "w", options=options) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    whole = (folder / "x.mp4").read_bytes()  # index first, so that a cut file opens and fails later
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(folder / "audio.mp4"), "w") as audio:
        stream = audio.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        for packet in [*stream.encode(silence), *stream.encode(None)]:
            audio.mux(packet)
    return folder


@pytest.mark.parametrize("backend", VIDEO_BACKENDS)
def test_video_pixels_are_those_of_pyav(backend):
    av = pytest.importorskip("av")
    with av.open(str(CARPHONE)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with open_video(CARPHONE, backend) as reader:
        assert len(reader) == len(expected) == 120
        assert reader.fps == pytest.approx(29.97, abs=0.01)
        for indices in ([0], [119], [7, 11, 15, 19], range(0, 120, 40)):
            frames = reader.frames(indices)
            assert frames.dtype == np.uint8
            assert np.array_equal(frames, expected[list(indices)])


def write_noise(path, total=60):
    """A video coded as most are: B pictures that others refer to, several references, weighted prediction."""
    av = pytest.importorskip("av")
    options = {
        "preset": "medium",
        "crf": "30",
        "threads": "1",
        "x264-params": "keyint=30:b-adapt=0:bframes=3:b-pyramid=normal",
    }
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        still = rng.integers(0, 256, (64, 160, 3), dtype=np.uint8)
        for number in range(total):
            moved = (
                still[:, number : number + 96] // 2
                + rng.integers(0, 64, (64, 96, 3), dtype=np.uint8)
                + number
            )
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(moved), format="rgb24"))
            )
        container.mux(stream.encode(None))
    return path


def disposable_pictures(path):
    """Indices of the H.264 pictures that no other refers to, with the place in the file and the bytes of
    each."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        times = sorted(packet.pts for packet in packets)
        heads = {times.index(packet.pts): (packet.pos, packet.size, bytes(packet)[4]) for packet in packets}
    return {
        index: (place, size)
        for index, (place, size, head) in heads.items()
        if head & 31 == 1 and not head & 0x60
    }


def test_pyav_leaves_out_pictures_and_keeps_the_pixels(tmp_path):
    av = pytest.importorskip("av")
    path = write_noise(tmp_path / "noise.mp4")
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    disposable = disposable_pictures(path)
    assert len(expected) == 60 and 20 < len(disposable) < 40
    reads = [[index] for index in range(60)] + [
        list(range(start, 60, step)) for start in range(4) for step in (2, 3, 4, 7)
    ]
    with open_video(path, "pyav") as reader:
        assert [read for read in reads if not np.array_equal(reader.frames(read), expected[read])] == []

    damaged = bytearray(path.read_bytes())  # pictures that are never decoded may hold anything
    for place, size in disposable.values():
        damaged[place + 5 : place + size] = bytes(size - 5)
    path.write_bytes(damaged)
    others = [index for index in range(60) if index not in disposable]
    with open_video(path, "pyav") as reader:
        assert np.array_equal(reader.frames(others), expected[others])
        with pytest.raises(DecodeError, match="noise.mp4: cannot be decoded"):
            reader.frames([others[5], min(disposable)])


@pytest.mark.parametrize("backend", VIDEO_BACKENDS)
def test_backends_agree_on_colours(backend):
    """1280 x 720, which some would take for BT.709 though the file does not say so."""
    pytest.importorskip("av")
    with open_video(sample_videos()[1], "pyav") as reader, open_video(sample_videos()[1], backend) as other:
        one, two = (r.frames([40, 90]).astype(int) for r in (reader, other))
    assert np.abs(one - two).max() <= 2


def test_any_order_and_repetitions():
    with open_video(CARPHONE) as reader:
        frames = reader.frames([50, 3, 50, 50, 99])
        alone = {index: reader.frames([index])[0] for index in (3, 50, 99)}
    assert not np.array_equal(alone[3], alone[50])
    for frame, index in zip(frames, (50, 3, 50, 50, 99), strict=True):
        assert np.array_equal(frame, alone[index])


def test_frame_folder(frames_entry):
    entry, pixels = frames_entry
    with open_video(entry) as reader:
        assert len(reader) == 5 and reader.fps is None
        assert np.array_equal(reader.frames([4, 0, 0]), pixels[[4, 0, 0]])


def test_frame_folder_converts_to_rgb(frames_entry):
    entry, _ = frames_entry
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16)).save(entry.frame_path(1))
    with open_video(entry) as reader:
        frame = reader.frames([1])[0]
    assert frame.shape == (12, 16, 3) and np.array_equal(frame[..., 0], np.arange(192).reshape(12, 16))
    assert np.array_equal(frame[..., 0], frame[..., 2])


def test_a_named_video_decoder_still_lets_frame_folders_through(frames_entry):
    entry, pixels = frames_entry
    with open_video(entry, "decord") as reader:
        assert np.array_equal(reader.frames([2])[0], pixels[2])


@pytest.mark.parametrize("indices", [[5], [-1], [], [0, 5]])
def test_frames_that_are_not_there(frames_entry, indices):
    with open_video(frames_entry[0]) as reader, pytest.raises(IndexError):
        reader.frames(indices)


@pytest.mark.parametrize("backend", VIDEO_BACKENDS)
def test_closed_reader(backend):
    reader = open_video(CARPHONE, backend)
    reader.close()
    with pytest.raises(DecodeError, match="closed"):
        reader.frames([0])


@pytest.mark.parametrize("backend", VIDEO_BACKENDS)
def test_readers_leave_no_file_open(backend):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    with open_video(CARPHONE, backend) as reader:
        reader.frames([0])
    before = open_files()
    for _ in range(5):
        with open_video(CARPHONE, backend) as reader:
            reader.frames([0])
    assert open_files() == before


@pytest.mark.parametrize("content", [b"", b"hello" * 1000], ids=["empty", "text"])
@pytest.mark.parametrize("backend", VIDEO_BACKENDS)
def test_undecodable_file(tmp_path, content, backend, capfd):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(DecodeError) as error:
        open_video(path, backend)
    assert str(error.value).startswith(f"{path}: cannot be opened: ")
    assert "Invalid data found" in str(error.value) and "\n" not in str(error.value)
    assert error.value.library == backend
    output = capfd.readouterr()
    assert output.out == "" and output.err == ""


def test_without_stderr(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"")
    saved = os.dup(2)
    os.close(2)
    try:
        with pytest.raises(DecodeError, match="bad.mp4"):
            open_video(tmp_path / "bad.mp4")
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_other_lines_on_stderr_are_passed_on(capfd):
    with video_reader.library_stderr() as captured:
        os.write(
            2, b"[08:41:57] /src/video_reader.cc:83: ERROR opening: x.mp4, No such luck\nsomething else\n"
        )
    assert capfd.readouterr().err == "something else\n"
    assert video_reader.first_reason("RuntimeError", captured) == "No such luck"


@pytest.mark.parametrize("backend", VIDEO_BACKENDS)
def test_cut_file(broken, capfd, backend):
    """decord refuses the file, decord2 and the others open what is left of it, or find out when they
    decode."""
    try:
        with open_video(broken / "cut.mp4", backend) as reader:
            assert len(reader) < 100 and len(reader.frames([0, len(reader) - 1])) == 2
    except DecodeError as error:
        assert ".cc" not in str(error)
        # Of a library that counts by the index, and PyAV by what is there: refused.
        assert "cut.mp4: cannot be" in str(error) or "cut.mp4: refused" in str(error)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("backend", VIDEO_BACKENDS)
def test_file_without_pictures(broken, capfd, backend):
    with pytest.raises(DecodeError) as error:
        open_video(broken / "audio.mp4", backend)
    assert "audio.mp4: cannot be opened" in str(error.value) and ".cc" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_reason_without_source_files_and_codes():
    raw = (
        "[08:41:57] /github/a/threaded_decoder.cc:292: [08:41:57] /github/a/threaded_decoder.cc:218: Check "
        "failed: "
        "avcodec_send_packet(dec_ctx_.get(), pkt.get()) >= 0 (-1094995529 vs. 0) Thread worker: Error "
        "sending packet.\n"
        "Stack trace:\n  0: x"
    )
    assert video_reader.first_reason(raw, []) == "Thread worker: Error sending packet."
    raw = "[08:41:57] /github/a/video_reader.cc:486: Error: av_read_frame failed with 1094995529"
    assert video_reader.first_reason(raw, []) == "Error: av_read_frame failed: invalid data"
    assert video_reader.first_reason("", []) == "unknown reason"


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DecodeError, match="none.mp4: does not exist"):
        open_video(tmp_path / "none.mp4")
    with pytest.raises(DecodeError, match="is a folder"):
        open_video(tmp_path)


def test_broken_frame_folders(frames_entry):
    entry, _ = frames_entry
    Image.new("RGB", (8, 8)).save(entry.frame_path(1))
    with open(entry.frame_path(2), "wb") as file:
        file.write(b"not a picture")
    os.remove(entry.frame_path(3))
    with open_video(entry) as reader:
        with pytest.raises(DecodeError, match="f_4.png: 8 x 8 pixels, unlike"):
            reader.frames([0, 1])
        with pytest.raises(DecodeError, match="f_5.png: cannot be decoded: cannot identify"):
            reader.frames([2])
        with pytest.raises(DecodeError, match="f_6.png: does not exist; the list promises 5 frames"):
            reader.frames([3])
    with pytest.raises(DecodeError, match="has no frames"):
        open_video(VideoEntry(entry.path, "frames", 0, 0))


def test_decoders_are_not_installed(monkeypatch, uninstall):
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(sys.modules, "av", None)
    for name in set(ORDER) - {"pyav", "decord"}:
        uninstall(name)
    for backend in ("auto", "decord"):
        with pytest.raises(InputError, match="pip install decord`.*decord2") as error:
            open_video(CARPHONE, backend)
        assert not isinstance(error.value, DecodeError)  # no video is to blame, none may be replaced for it
    with pytest.raises(InputError, match="pip install av"):
        open_video(CARPHONE, "pyav")


def test_auto_goes_down_the_list(uninstall):
    for gone in ORDER:
        with open_video(CARPHONE) as reader:
            first = next(name for name in ORDER if decode.BACKENDS[name].missing() is None)
            assert reader.backend == first
        uninstall(gone)
        if all(decode.BACKENDS[name].missing() for name in ORDER):
            break


def test_torchcodec_that_does_not_load(monkeypatch):
    import builtins

    original = builtins.__import__

    def failing(name, *arguments, **keywords):
        if name.startswith("torchcodec"):
            raise RuntimeError("Could not load libtorchcodec\nlong story")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", failing)
    lack = decode.BACKENDS["torchcodec"].missing.__wrapped__()
    assert (
        "libtorchcodec" in lack and "apt-get install ffmpeg" in lack and "0.13" in lack and "\n" not in lack
    )


def test_backend_names():
    assert ORDER[:3] == ("pyav", "torchcodec", "decord")
    known = ", ".join(("auto", *decode.BACKENDS))
    with pytest.raises(InputError, match=f"unknown decoding backend 'nvdec'; known: {known}$"):
        open_video(CARPHONE, "nvdec")
    with pytest.raises(InputError, match="'frames' does not read entries of kind 'video'"):
        open_video(CARPHONE, "frames")


READER = """
from vmae.data.readers import Backend, Library

GREY = Library(name="Grey", module="no_such", packages=("grey",), install="pip install grey", without="grey")
BACKEND = Backend("grey", ("video",), None, lambda: "`pip install grey`", order=15, library=GREY)
"""


def test_a_file_of_readers_is_a_backend(tmp_path, monkeypatch, capsys):
    (tmp_path / "grey.py").write_text(READER)
    monkeypatch.setattr(decode.readers, "__path__", [*decode.readers.__path__, str(tmp_path)])
    found = decode._load_backends()
    monkeypatch.delitem(sys.modules, "vmae.data.readers.grey")
    assert list(found)[:3] == ["pyav", "grey", "torchcodec"]
    assert {name: found[name] for name in decode.BACKENDS} == decode.BACKENDS
    monkeypatch.setattr(decode, "BACKENDS", found)
    with pytest.raises(InputError, match="pip install grey"):
        open_video(CARPHONE, "grey")
    monkeypatch.setattr(doctor, "VIDEO_BACKENDS", found)
    assert {"name": "Grey", "group": "video", "found": False, "without": "grey"}.items() <= (
        doctor.look_for(doctor.video_parts()[1]).items()
    )
    with pytest.raises(SystemExit):
        main(["check-data", "--help"])
    assert "auto, pyav, grey, torchcodec, decord" in " ".join(capsys.readouterr().out.split())


def test_another_backend_joins(monkeypatch, uninstall):
    class Grey(VideoReader):
        path = "grey"

        def __len__(self):
            return 9

        def _decode(self, indices):
            return np.repeat(indices.astype(np.uint8), 12).reshape(-1, 2, 2, 3)

        def close(self):
            pass

    for name in set(ORDER) - {"decord"}:
        uninstall(name)
    register_backend(Backend("grey", ("video",), lambda entry: Grey(), lambda: None))
    register_backend(Backend("absent", ("video",), lambda entry: Grey(), lambda: "`pip install absent`"))
    with open_video(CARPHONE, "grey") as reader:
        assert reader.frames([7, 2])[:, 0, 0, 0].tolist() == [7, 2]
    with open_video(CARPHONE) as reader:
        assert len(reader) == 120  # auto: the first that was registered
    with pytest.raises(InputError, match="pip install absent"):
        open_video(CARPHONE, "absent")
    monkeypatch.setitem(sys.modules, "decord", None)
    with open_video(CARPHONE) as reader:
        assert len(reader) == 9  # auto: the next one that is installed
