"""check-data: what it finds in good and bad lists, what it writes, and what it says of lists that do not
parse."""

import json
from fractions import Fraction

import pytest

from tests.data.small_videos import make_video, with_matrix, write_stream
from vmae.cli import main
from vmae.data import check
from vmae.data.check import check_entries, check_entry, explain_list
from vmae.data.labels import read_labelled_list
from vmae.data.manifest import VideoEntry, read_list
from vmae.synthetic.samples import sample_videos

BIKES, CARPHONE = sample_videos()[0], sample_videos()[2]


@pytest.fixture
def folder(tmp_path):
    """A list with two good videos, one that is no video, and one that is not there."""
    (tmp_path / "bad.mp4").write_text("text")
    lines = f"# mine\n{BIKES} 0 -1\nbad.mp4 0 -1\n#! stride=2\n{CARPHONE} 0 -1\ngone.mp4 0 -1\n"
    (tmp_path / "list.txt").write_text(lines)
    return tmp_path


def test_command(folder, capsys):
    assert main(["check-data", str(folder / "list.txt"), "--workers", "2"]) == 1
    output = capsys.readouterr().out
    assert "4 videos: 2 good, 2 bad (50.0%)" in output
    assert "bad: line 3" in output and "bad: line 6: 'gone.mp4' does not exist" in output
    assert "1 videos have key frames more than 60 apart" in output or "2 videos have key frames" in output
    report = json.loads((folder / "list-check" / "report.json").read_text())
    assert [bool(video["error"]) for video in report["videos"]] == [False, True, False, True]
    assert (folder / "list-check" / "histogram.png").stat().st_size > 1000
    clean = folder / "list-check" / "clean.txt"
    assert clean.read_text().startswith("# mine\n")
    entries = read_list(clean)
    assert [(entry.path, entry.stride) for entry in entries] == [(str(BIKES), None), (str(CARPHONE), 2)]
    assert main(["check-data", str(clean), "--workers", "1", "--output", str(folder / "again")]) == 0
    assert len(json.loads((folder / "again" / "report.json").read_text())["videos"]) == 2


def test_record():
    pytest.importorskip("av")
    record = check_entry(VideoEntry(str(BIKES)))
    expected = {
        "frames": 250,
        "width": 640,
        "height": 272,
        "codec": "h264",
        "container": "MP4",
        "error": None,
    }
    assert {key: record[key] for key in expected} == expected
    assert record["seconds"] == pytest.approx(10) and record["fps"] == pytest.approx(25)
    assert record["gop"] > 12 and 0 < record["clip_s"] < 60 and record["open_gop"] in (True, False)


@pytest.mark.slow
def test_a_file_that_hangs(monkeypatch):
    original = check.check_entry

    def hanging(entry, backend):
        if entry.path == "hang":
            import time

            time.sleep(1000)
        return original(entry, backend)

    monkeypatch.setattr(check, "check_entry", hanging)
    entries = [VideoEntry(str(CARPHONE)), VideoEntry("hang", line=7), VideoEntry(str(CARPHONE))]
    records = check_entries(entries, workers=1, hang_s=3, progress=False)
    assert [bool(record["error"]) for record in records] == [False, True, False]
    assert (
        records[1]["line"] == 7
        and records[1]["library"] == "worker"
        and "took more than 3 s" in records[1]["error"]
    )


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("films/a.mp4;0;-1\nfilms/b.mp4;0;-1\n", "apart by ';'"),
        ("films/a.mp4|0|-1\n", "apart by '|'"),
        ("'films/a.mp4' 0 -1\n", "quotes"),
        ("path,label\nfilms/a.mp4,3\nfilms/b.mp4,4\n", "table's head"),
        ("films/none.mp4 3;17\nfilms/gone.mp4 4;5\n", "none of the first 2 paths exists"),
        ("films\\a.mp4 0 -1\n", "backslashes"),
        ("a.mp4 0 -1\nb.mp4 0 -1\n", "none of the first 2 paths exists; --data-root"),
        ("/old/disk/films/a.mp4 0 -1\n", "is there as"),
        ("up/c.mp4 0 -1\n", "--data-root"),
    ],
)
def test_explained(tmp_path, capsys, text, hint):
    (tmp_path / "lists" / "films").mkdir(parents=True)
    (tmp_path / "up").mkdir()
    for path in ("lists/films/a.mp4", "lists/films/b.mp4", "up/c.mp4"):
        (tmp_path / path).write_text("text")
    path = tmp_path / "lists" / "list.txt"
    path.write_text(text)
    assert any(hint in line for line in explain_list(path))
    assert main(["check-data", str(path)]) == 2
    error = capsys.readouterr().err
    assert "likely: " in error and hint in error and "Traceback" not in error
    assert ("apart by" in error) == ("apart by" in hint)


def test_nothing_to_explain(folder, tmp_path):
    (tmp_path / "good.txt").write_text(f"{BIKES} 0 -1\n")
    assert explain_list(tmp_path / "good.txt") == []
    assert explain_list(tmp_path / "none.txt") == []
    (tmp_path / "k.csv").write_text("label,youtube_id,time_start,time_end,split\nzumba,abc,1,11,train\n")
    assert explain_list(tmp_path / "k.csv") == []


def test_bad_arguments(folder):
    path = str(folder / "list.txt")
    assert main(["check-data", path, "--workers", "0"]) == 2
    assert main(["check-data", path, "--hang", "0"]) == 2
    assert main(["check-data", str(folder / "none.txt")]) == 2
    assert main(["check-data", path, "--output", str(folder / "bad.mp4"), "--workers", "1"]) == 2
    assert main(["check-data", path, "--backend", "nvdec", "--workers", "1"]) == 2


# --- What is worth knowing, and lists of every kind ---


def test_what_is_not_shown_as_it_is_stored(tmp_path, capsys):
    av = pytest.importorskip("av")
    upright = make_video(tmp_path / "upright.mp4")
    matrices = {
        "a": (0, 1, -1, 0),
        "b": (-1, 0, 0, -1),
        "c": (0, -1, 1, 0),
        "d": (-1, 0, 0, 1),
        "e": (0, 1, 1, 0),
    }
    for name, matrix in matrices.items():
        with_matrix(upright, tmp_path / f"{name}.mp4", *matrix)
    make_video(tmp_path / "wide.mp4", sample_aspect_ratio=Fraction(4, 3))
    with av.open(str(tmp_path / "two.mp4"), "w") as out:
        for encode in [write_stream(out, size=(32, 32)), write_stream(out)]:
            encode()
    assert main(["check-data", str(tmp_path), "--workers", "1", "--output", str(tmp_path / "out")]) == 0
    videos = json.loads((tmp_path / "out" / "report.json").read_text())["videos"]
    found = {video["path"].rsplit("/", 1)[1]: video for video in videos}
    assert {name[0]: video["rotation"] for name, video in found.items() if "rotation" in video} == {
        "a": 90,
        "b": 180,
        "c": 270,
        "d": "mirrored",
        "e": "mirrored",
    }
    assert {name: video["sample_aspect"] for name, video in found.items() if "sample_aspect" in video} == {
        "wide.mp4": "4:3"
    }
    assert {name: video["video_streams"] for name, video in found.items() if video["video_streams"] > 1} == {
        "two.mp4": 2
    }
    output = capsys.readouterr().out
    assert "5 videos are displayed rotated or mirrored (180: 1, 270: 1, 90: 1, mirrored: 2)" in output
    assert (
        "1 videos have pixels that are not square (4:3: 1)" in output
        and "1 videos have several video streams" in output
    )


def test_a_cover_is_no_second_video(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        encoders = [write_stream(out), write_stream(out, frames=1, codec="png", pixels="rgb24", options={})]
        out.streams.video[1].disposition = av.stream.Disposition.attached_pic
        for encode in encoders:
            encode()
    record = check_entry(VideoEntry(str(tmp_path / "v.mp4")))
    assert record["error"] is None and record["video_streams"] == 1 and record["frames"] == 6


def test_labels_stay_in_the_clean_list(tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("text")
    for name in ("a.mp4", "#b, c.mp4"):
        (tmp_path / name).write_bytes(CARPHONE.read_bytes())
    text = '\ufeff# mine\r\na.mp4,3;1\r\nbad.mp4,2\r\n"#b, c.mp4",3\r\ngone.mp4,5\r\n'
    (tmp_path / "list.csv").write_text(text, newline="")
    assert main(["check-data", str(tmp_path / "list.csv"), "--workers", "1"]) == 1
    output = capsys.readouterr().out
    assert (
        "4 videos: 2 good, 2 bad" in output
        and "labels: 2 classes from 1 to 3; the rarest, 1, has 1 videos" in output
    )
    assert "pre-training" not in output and "apart by" not in output
    clean = read_labelled_list(tmp_path / "list-check" / "clean.txt")  # from another folder
    assert clean.labels == [(3, 1), (3,)]
    assert [entry.path for entry in clean.entries] == [
        str(tmp_path / name) for name in ("a.mp4", "#b, c.mp4")
    ]
    report = json.loads((tmp_path / "list-check" / "report.json").read_text())["videos"]
    assert [video.get("labels") for video in report] == [[3, 1], [2], [3], None]


def test_a_folder_is_checked_like_a_list(tmp_path, capsys, monkeypatch):
    videos = tmp_path / "videos.v2"
    (videos / "x").mkdir(parents=True)
    (videos / "x" / "b.MOV").write_bytes(CARPHONE.read_bytes())
    (videos / "a.mp4").write_text("text")
    monkeypatch.chdir(videos)
    assert main(["check-data", ".", "--workers", "1"]) == 1
    output = capsys.readouterr().out
    assert "2 videos: 1 good, 1 bad" in output and "bad: a.mp4: " in output
    (entry,) = read_list(tmp_path / "videos.v2-check" / "clean.txt")
    assert entry.path == str(videos / "x" / "b.MOV")
    (videos / "x" / "c\n.mp4").touch()
    assert main(["check-data", str(videos), "--workers", "1"]) == 2
    assert "rename the file" in capsys.readouterr().err
