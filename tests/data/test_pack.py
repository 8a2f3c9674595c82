"""pack: every frame is kept, in place and in time; GOPs are closed and short; what was done is not done again."""

import json

import pytest
from PIL import Image

from vmae.cli import main
from vmae.data import pack
from vmae.data.containers import read_mp4_track
from vmae.data.decode import DecodeError, open_video
from vmae.data.manifest import read_list
from vmae.data.pack import PackConfig, pack_list, pack_video, packed_size
from vmae.data.samples import sample_videos
from vmae.errors import InputError

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
    assert keys == list(range(0, 120, 12))
    assert read_mp4_track(str(target)).open_gop is False
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
    text = f"{sample_videos()[2]} 0 -1\n#! stride=2 pattern={{}}.png\n{images} 0 3\nbad.mp4 0 -1\n{bar_videos['vp9']} 0 -1\n"
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


def test_an_unfinished_video_is_made_again(bar_videos, tmp_path):
    target = tmp_path / "p.mp4"
    (tmp_path / "p.part.mp4").write_text("left by a kill")
    pack_video(bar_videos["vp9"], target, PackConfig(preset="ultrafast"))
    assert target.exists() and not (tmp_path / "p.part.mp4").exists()


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
    (tmp_path / "out" / pack.SETTINGS_NAME).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        pack_list([], tmp_path / "out", PackConfig())
    assert main(["pack", str(cut), str(tmp_path / "x"), "--workers", "0"]) == 2
