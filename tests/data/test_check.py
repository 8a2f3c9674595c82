"""check-data: what it finds in good and bad lists, what it writes, and what it says of lists that do not parse."""

import json

import pytest

from vmae.cli import main
from vmae.data import check
from vmae.data.check import check_entries, check_entry, explain_list
from vmae.data.manifest import VideoEntry, read_list
from vmae.data.samples import sample_videos

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
    expected = {"frames": 250, "width": 640, "height": 272, "codec": "h264", "container": "MP4", "error": None}
    assert {key: record[key] for key in expected} == expected
    assert record["seconds"] == pytest.approx(10) and record["fps"] == pytest.approx(25)
    assert record["gop"] > 12 and 0 < record["clip_s"] < 60 and record["open_gop"] in (True, False)


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
    assert records[1]["line"] == 7 and records[1]["library"] == "worker" and "took more than 3 s" in records[1]["error"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("films/a.mp4;0;-1\nfilms/b.mp4;0;-1\n", "apart by ';'"),
        ("films/a.mp4|0|-1\n", "apart by '|'"),
        ('"films/a.mp4" 0 -1\n', "quotes"),
        ("path,label\nfilms/a.mp4,3\nfilms/b.mp4,4\n", "table's head"),
        ("films/a.mp4 3\nfilms/b.mp4 4\n", "`path label`"),
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


def test_nothing_to_explain(folder, tmp_path):
    (tmp_path / "good.txt").write_text(f"{BIKES} 0 -1\n")
    assert explain_list(tmp_path / "good.txt") == []
    assert explain_list(tmp_path / "none.txt") == []


def test_bad_arguments(folder):
    path = str(folder / "list.txt")
    assert main(["check-data", path, "--workers", "0"]) == 2
    assert main(["check-data", path, "--hang", "0"]) == 2
    assert main(["check-data", str(folder / "none.txt")]) == 2
    assert main(["check-data", path, "--output", str(folder / "bad.mp4"), "--workers", "1"]) == 2
    assert main(["check-data", path, "--backend", "nvdec", "--workers", "1"]) == 2
