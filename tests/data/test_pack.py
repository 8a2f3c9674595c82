"""pack: every frame is kept, in place and in time; GOPs are closed and short; what was done is not done
again."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.data.small_videos import LOSSLESS, make_video, picture, with_matrix, write_stream
from vmae.cli import main
from vmae.data import pack_command, pack_lists
from vmae.data.decode import DecodeError, open_video
from vmae.data.inspection import inspect_video
from vmae.data.labels import read_labelled_list
from vmae.data.manifest import VideoEntry, read_list
from vmae.data.pack import PackConfig, pack_video, packed_size
from vmae.data.pack_gain import measure_gain
from vmae.data.pack_lists import pack_list
from vmae.errors import InputError
from vmae.files.folder_lock import FolderLock
from vmae.synthetic.samples import sample_videos

av = pytest.importorskip("av")


def packets(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(float(p.pts * p.time_base), p.is_keyframe) for p in container.demux(stream) if p.size]


@pytest.mark.parametrize("name", ["h264_open", "hevc_open", "vp9", "vfr", "avi", "ts"])
def test_frames_keep_number_and_time(bar_videos, read_numbers, tmp_path, name):
    target = tmp_path / "packed.mp4"
    assert pack_video(bar_videos[name], target, PackConfig(preset="ultrafast")) == 120
    with open_video(target) as reader:
        assert len(reader) == 120
        for start in (0, 17, 56):
            read = list(range(start, start + 64, 4))
            assert read_numbers(reader.frames(read)) == read
    found = packets(target)
    keys = [place for place, (_, key) in enumerate(found) if key]
    assert keys == list(range(0, 120, 25))
    assert inspect_video(target).open_gop is False
    if name == "vfr":
        before, after = (sorted(time for time, _ in packets(path)) for path in (bar_videos[name], target))
        assert [t - after[0] for t in after] == pytest.approx([t - before[0] for t in before], abs=2e-3)


def test_sizes():
    assert packed_size(1280, 720, 256) == (456, 256) and packed_size(720, 1281, 256) == (256, 456)
    assert packed_size(176, 144, 256) == (176, 144) and packed_size(641, 479, 480) == (640, 478)


def test_picture_stays(tmp_path):
    bikes = sample_videos()[0]
    pack_video(bikes, tmp_path / "p.mp4", PackConfig(short_side=136))
    with open_video(bikes) as one, open_video(tmp_path / "p.mp4") as other:
        assert len(one) == len(other) and other.frames([0]).shape[1:3] == (136, 320)
        small = Image.fromarray(one.frames([100])[0]).resize((320, 136), Image.Resampling.BOX)
        error = abs(other.frames([100])[0].astype(int) - small).mean()
    assert error < 4


@pytest.fixture
def source(tmp_path, bar_videos):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16)).save(images / f"{number}.png")
    (tmp_path / "bad.mp4").write_bytes(bar_videos["h264_closed"].read_bytes()[:3000])
    text = f"{sample_videos()[2]} 0 -1\n#! stride=2 pattern={{}}.png\n{images} 0 3\n"
    text += f"bad.mp4 0 -1\n{bar_videos['vp9']} 0 -1\n"
    (tmp_path / "list.txt").write_text(text)
    return tmp_path / "list.txt"


def test_command(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["pack", str(source), str(out), "--preset", "ultrafast", "--workers", "2"]
    assert main(arguments) == 1
    output = capsys.readouterr().out
    assert "2 of 3 videos packed" in output and "clips/s before" in output and "size: " in output
    entries = read_list(out / "list.txt")
    assert [(entry.kind, entry.stride) for entry in entries] == [("video", None), ("frames", 2), ("video", 2)]
    report = json.loads((out / "report.json").read_text())
    assert report["packed"] == 2 and report["decoding"]["gain"]["median"] > 0 and report["bytes_after"] > 0
    assert "bad.mp4" in (out / "quarantine.jsonl").read_text()
    assert not list(out.rglob("*.part*"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("videos/*/*.mp4")}
    assert main(arguments) == 1 and len(before) == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("videos/*/*.mp4")}
    assert main([*arguments, "--gop", "24"]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_the_same_bytes_each_time(tmp_path):
    """x264's lookahead read what earlier work had left in memory: each packed file of a clip was another."""
    config = PackConfig(short_side=128, preset="veryfast")
    for name in ("a.mp4", "b.mp4"):
        pack_video(sample_videos()[0], tmp_path / name, config)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_an_unfinished_video_is_made_again(upright, tmp_path):
    """What a kill left is removed, but not what another part is writing."""
    (tmp_path / "list.txt").write_text(f"{upright}\n" * 2)
    folder = tmp_path / "out" / "videos" / "000"
    folder.mkdir(parents=True)
    left, others = (folder / f"{number:06}_v_0123456789.77.part.mp4" for number in range(2))
    left.write_text("left by a kill")
    others.write_text("of another part")
    assert run_pack(tmp_path / "list.txt", tmp_path / "out", "--part", "1/2") == 0
    assert sorted(path.name[:8] for path in folder.iterdir()) == ["000000_v", "000001_v"]
    assert not left.exists() and others.exists()


def test_errors(tmp_path, bar_videos, monkeypatch):
    cut = tmp_path / "cut.mp4"
    cut.write_text("text")
    with pytest.raises(DecodeError, match="cut.mp4"):
        pack_video(cut, tmp_path / "p.mp4", PackConfig())
    assert not list(tmp_path.glob("p.*"))
    for wrong in ({"short_side": 4}, {"gop": 0}, {"crf": 60}):
        with pytest.raises(InputError, match="must be a whole number from"):
            PackConfig(**wrong)
    with pytest.raises(InputError, match="cannot write"):
        pack_list([], cut, PackConfig())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / pack_lists.SETTINGS_NAME).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        pack_list([], tmp_path / "out", PackConfig())
    assert main(["pack", str(cut), str(tmp_path / "x"), "--workers", "0"]) == 2
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(InputError, match="needs PyAV 17 or newer"):
        pack_video(bar_videos["vp9"], tmp_path / "p.mp4", PackConfig())


# --- Frames as a player shows them, in their own colours ---

QUICK = PackConfig(crf=1, preset="ultrafast")


def first_frame(path):
    with av.open(str(path)) as container:
        return next(container.decode(container.streams.best("video")))


def read(path, frames=(0, 2, 5)):
    with open_video(path, "pyav") as reader:
        return reader.frames(frames).astype(int)


@pytest.fixture(scope="module")
def upright(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("upright") / "v.mp4", sample_aspect_ratio=Fraction(4, 3))


ORIENTATIONS = {
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (1, 2))),
    "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2, (1, 2))),
    "anticlockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(1, 2)),
    "transposed and turned": ((0, -1, -1, 0), lambda x: np.rot90(x, 2, (1, 2)).swapaxes(1, 2)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_rotation_is_baked_in(upright, tmp_path, name):
    matrix, shown = ORIENTATIONS[name]
    turned = with_matrix(upright, tmp_path / "v.mp4", *matrix)
    assert pack_video(turned, tmp_path / "p.mp4", PackConfig(short_side=48, crf=1, preset="ultrafast")) == 6
    pack_video(upright, tmp_path / "upright.mp4", PackConfig(short_side=48, crf=1, preset="ultrafast"))
    packed, expected = read(tmp_path / "p.mp4"), shown(read(tmp_path / "upright.mp4"))
    assert packed.shape == expected.shape and abs(packed - expected).mean() < 0.5
    frame = first_frame(tmp_path / "p.mp4")
    assert frame.side_data.get("DISPLAYMATRIX") is None
    with av.open(str(tmp_path / "p.mp4")) as container:
        aspect = container.streams.video[0].sample_aspect_ratio
    assert aspect == (Fraction(3, 4) if frame.height > frame.width else Fraction(4, 3))


def test_an_angle_between_is_refused(upright, tmp_path):
    tilted = with_matrix(upright, tmp_path / "v.mp4", 1, 1, -1, 1)
    with pytest.raises(DecodeError, match="no multiple of 90 degrees"):
        pack_video(tilted, tmp_path / "p.mp4", QUICK)
    assert not list(tmp_path.glob("p.*"))


def colours(range_, matrix, primaries, transfer):
    return dict(color_range=range_, colorspace=matrix, color_primaries=primaries, color_trc=transfer)


HEVC = {**LOSSLESS, "x265-params": "log-level=none"}
# name: tags, how the numbers are made (swscale's word for the matrix), what the file is, bound on the mean
# error in grey levels
COLOURS = {
    "untagged": ({}, 5, {}, 0.3),
    "BT.709": (colours(1, 1, 1, 1), 1, {}, 0.3),
    "BT.709, full range": (colours(2, 1, 1, 1), 1, {}, 0.3),
    "BT.601, full range": (colours(2, 6, 6, 6), 5, {}, 0.3),
    "full range and nothing else": (colours(2, 2, 2, 2), 5, {}, 0.3),
    "BT.2020, PQ, 10 bits": (
        colours(1, 9, 9, 16),
        9,
        dict(codec="libx265", pixels="yuv420p10le", options=HEVC),
        2.5,
    ),
    "BT.2020, HLG, full, 10 bits": (
        colours(2, 9, 9, 18),
        9,
        dict(codec="libx265", pixels="yuv420p10le", options=HEVC),
        2.5,
    ),
    "BT.709, 4:4:4": (colours(1, 1, 1, 1), 1, dict(pixels="yuv444p"), 2),
    "MJPEG": (
        colours(2, 5, 2, 2),
        5,
        dict(codec="mjpeg", pixels="yuvj420p", options={"qmin": "1", "qmax": "2"}),
        0.3,
    ),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_keep_their_meaning(tmp_path, name):
    tags, matrix, about, bound = COLOURS[name]
    source = make_video(tmp_path / "v.mp4", matrix=matrix, **about, **tags)
    pack_video(source, tmp_path / "p.mp4", QUICK)
    before, after = first_frame(source), first_frame(tmp_path / "p.mp4")
    for tag in ("color_range", "colorspace", "color_primaries", "color_trc"):
        assert getattr(after, tag) == getattr(before, tag) == tags.get(tag, getattr(before, tag)), tag
    original, packed = read(source), read(tmp_path / "p.mp4")
    assert abs(packed - original).mean() < bound
    if matrix != 9:  # which PyAV 17 cannot make
        assert abs(packed[0] - picture()).mean() < 2  # of what was encoded in the first place
    turned = with_matrix(source, tmp_path / "t.mp4", -1, 0, 0, -1)
    pack_video(turned, tmp_path / "q.mp4", QUICK)
    assert abs(read(tmp_path / "q.mp4") - original[:, ::-1, ::-1]).mean() < bound


def test_rgb_becomes_tagged_yuv(tmp_path):
    source = make_video(
        tmp_path / "v.mp4", codec="libx264rgb", pixels="rgb24", options={"crf": "0"}, color_range=2
    )
    pack_video(source, tmp_path / "p.mp4", QUICK)
    after = first_frame(tmp_path / "p.mp4")
    assert (after.color_range, after.colorspace, after.format.name) == (1, 6, "yuv420p")
    assert abs(read(tmp_path / "p.mp4") - read(source)).mean() < 1.5


def test_the_best_of_several_streams(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        encoders = [write_stream(out, size=(32, 32)), write_stream(out)]
        out.streams.video[1].disposition = av.stream.Disposition.default
        for encode in encoders:
            encode()
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.best("video").index == 1
    pack_video(tmp_path / "v.mp4", tmp_path / "p.mp4", QUICK)
    assert first_frame(tmp_path / "p.mp4").width == 128


def test_a_full_disk_is_no_fault_of_the_video(upright, tmp_path):
    (tmp_path / f"p.{os.getpid()}.part.mp4").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        pack_video(upright, tmp_path / "p.mp4", PackConfig(crf=0, preset="ultrafast"))
    assert not (tmp_path / "p.mp4").exists()


# --- Lists in, lists and reports out ---


def run_pack(source, out, *more):
    return main(["pack", str(source), str(out), "--preset", "ultrafast", "--workers", "1", *more])


def test_labels_are_kept(upright, tmp_path):
    for name in ("a.mp4", "#b, c.mp4"):
        (tmp_path / name).write_bytes(upright.read_bytes())
    (tmp_path / "bad.mp4").write_text("text")
    (tmp_path / "list.csv").write_text('a.mp4,3;1\nbad.mp4,2\n"#b, c.mp4",7\n')
    assert run_pack(tmp_path / "list.csv", tmp_path / "out") == 1
    packed = read_labelled_list(tmp_path / "out" / "list.txt")
    assert packed.labels == [(3, 1), (7,)] and all(entry.kind == "video" for entry in packed.entries)
    (tmp_path / "plain.txt").write_text("a.mp4 0 -1 17\n#b, c.mp4\n")
    assert run_pack(tmp_path / "plain.txt", tmp_path / "plain") == 0
    lines = (tmp_path / "plain" / "list.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines if line[0] != "#"] == ["0 -1 17", "0 -1"]
    assert len(read_list(tmp_path / "plain" / "list.txt")) == 2


def test_a_folder(upright, tmp_path, capsys):
    videos = tmp_path / "videos"
    (videos / "x").mkdir(parents=True)
    (videos / "x" / "A.MP4").write_bytes(upright.read_bytes())
    (videos / "12:30.mp4").write_bytes(upright.read_bytes())
    assert run_pack(videos, tmp_path / "out") == 0
    assert len(read_list(tmp_path / "out" / "list.txt")) == 2
    assert run_pack(videos, videos / "out") == 2
    assert "is inside" in capsys.readouterr().err


def test_a_list_in_another_order_finds_its_own_videos(upright, tmp_path):
    """Two videos of one name, as in folders of classes, were taken for one another when a list was
    reordered."""
    make_video(tmp_path / "short.mp4", frames=3)
    for folder, source in (("a", upright), ("b", tmp_path / "short.mp4")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "v.mp4").write_bytes(source.read_bytes())
    for lines, lengths in (("a/v.mp4\nb/v.mp4\n", [6, 3]), ("b/v.mp4\na/v.mp4\n", [3, 6])):
        (tmp_path / "list.txt").write_text(lines)
        assert run_pack(tmp_path / "list.txt", tmp_path / "out") == 0
        assert [len(packets(entry.path)) for entry in read_list(tmp_path / "out" / "list.txt")] == lengths
    (tmp_path / "b" / "v.mp4").write_bytes(upright.read_bytes())  # changed after it was packed
    os.utime(tmp_path / "b" / "v.mp4", (2e9, 2e9))
    assert run_pack(tmp_path / "list.txt", tmp_path / "out") == 0
    assert [len(packets(entry.path)) for entry in read_list(tmp_path / "out" / "list.txt")] == [6, 6]


def test_the_report_is_written_whatever_becomes_of_the_originals(upright, tmp_path, monkeypatch, capsys):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(upright.read_bytes())
    (tmp_path / "list.txt").write_text("a.mp4\nb.mp4\n")
    assert run_pack(tmp_path / "list.txt", tmp_path / "out") == 0
    real = pack_command._write_report

    def damage(folder, report):  # between packing and measuring
        (tmp_path / "a.mp4").write_bytes(b"not a video any more")
        real(folder, report)

    monkeypatch.setattr(pack_command, "_write_report", damage)
    assert run_pack(tmp_path / "list.txt", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        report["packed"] == 2
        and report["decoding"]["videos"] == 1
        and report["decoding"]["gain"]["median"] > 0
    )
    assert [os.path.basename(failure["path"]) for failure in report["decoding"]["unmeasured"]] == ["a.mp4"]
    assert "not measured: " in capsys.readouterr().out


def test_an_original_that_cannot_be_measured(upright, tmp_path):
    (tmp_path / "bad.mp4").write_text("text")
    good = VideoEntry(str(upright))
    paths = [str(upright), str(tmp_path / "bad.mp4"), str(tmp_path / "gone.mp4")]
    measured = measure_gain([(VideoEntry(path), good) for path in paths], rounds=1, hang_s=60)
    assert measured["videos"] == 1 and [failure["path"] for failure in measured["unmeasured"]] == paths[1:]
    assert measure_gain([(VideoEntry(paths[1]), good)], rounds=1)["videos"] == 0


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_make_the_list_of_one_run(source, tmp_path, capsys, monkeypatch, parts):
    monkeypatch.setattr(pack_command, "report_gain", lambda pairs: {"videos": len(pairs)})
    for number in range(1, parts + 1):
        bad = run_pack(source, tmp_path / "parts", "--part", f"{number}/{parts}")
        assert bad == (number == 2)  # the bad video is the second one
    assert (
        f"part 1/{parts}: {4 - parts} of {4 - parts} videos packed; --merge joins" in capsys.readouterr().out
    )
    assert run_pack(source, tmp_path / "parts", "--merge") == 1
    assert run_pack(source, tmp_path / "whole") == 1
    for name in ("list.txt", "quarantine.jsonl", "pack.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    files = [{p.name: p.read_bytes() for p in (tmp_path / f).rglob("*.mp4")} for f in ("parts", "whole")]
    assert files[0] == files[1] and len(files[0]) == 2
    assert not (tmp_path / "parts" / "parts").exists()


def test_missing_parts_are_named(source, tmp_path, capsys):
    assert run_pack(source, tmp_path / "out", "--part", "3/3") == 0
    assert run_pack(source, tmp_path / "out", "--merge") == 2
    assert "parts 1/3 (1 videos, not started), 2/3 (1 videos, not started)" in capsys.readouterr().err
    with FolderLock(tmp_path / "out" / "parts" / "2-of-3", "part 2/3"):
        assert run_pack(source, tmp_path / "out", "--part", "2/3") == 2
        assert "is in use by" in capsys.readouterr().err
    assert run_pack(source, tmp_path / "out", "--part", "3/2") == 2
