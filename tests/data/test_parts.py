"""`--part i/n`: what a part is, and check-data in parts."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.data.small_videos import make_video
from vmae.cli import main
from vmae.data import check
from vmae.data.part_folder import PartFolder, Records
from vmae.data.parts import Part, read_part
from vmae.data.ranks import Ranks
from vmae.errors import InputError
from vmae.files.folder_lock import LOCK_NAME, FolderLock


@pytest.mark.parametrize("items", [0, 1, 5, 23])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("together", [1, 4])
def test_each_item_is_in_one_part(items, count, together):
    parts = [Part(number, count) for number in range(1, count + 1)]
    shares = [list(part.share(items, together)) for part in parts]
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert all(
        Part.having(item, count, together) == part for part, share in zip(parts, shares) for item in share
    )


@pytest.mark.parametrize(
    "text",
    ["0/3", "4/3", "1", "1/", "-1/3", "1/3/5", "a/b", "1/0", " 1/3", "1/9999999999", "\u0661/3"],
)
def test_what_is_no_part(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be i/n"):
        read_part(text)


# --- Folders of parts ---------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """`place(i, n)` is a part's folder in a folder with a directory that no part made."""
    (tmp_path / "parts" / "mine").mkdir(parents=True)
    (tmp_path / "parts" / "01-of-4").mkdir()
    return lambda *part: PartFolder(tmp_path, Part(*part), "a test", "another test", "test.json")


def write(records, *items):
    with records.writer(0) as add:
        for item in items:
            add({"item": item})


def records_of(place):
    return Records(place, "items.jsonl", "item", "items-{}.part.jsonl")


def test_only_parts_are_joined_and_removed(place, tmp_path):
    for number in (1, 2):
        part = place(number, 2)
        with part.hold(Ranks()):
            part.settle({"a": 1})
            write(records_of(part), *part.share(5))
        if number == 1:
            with pytest.raises(InputError, match="2 of 5 items are missing .* 2/2 .2 items, not started"):
                records_of(part).join(5, "items")
    whole = records_of(place(1, 1))
    with place(1, 1).hold(Ranks(), merge=True):
        assert [record["item"] for record in whole.join(5, "items")] == list(range(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.jsonl", "parts", "test.json"]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["01-of-4", "mine"]


def test_a_merge_that_was_stopped_goes_on(place, tmp_path, monkeypatch):
    """After the records were joined, before the parts were removed."""
    part = place(1, 2)
    with part.hold(Ranks()):
        write(records_of(part), 0, 2, 1)
    monkeypatch.setattr(PartFolder, "remove_parts", lambda self: None)
    whole = records_of(place(1, 1))
    assert whole.join(3, "items") == whole.join(3, "items") == [{"item": 0}, {"item": 1}, {"item": 2}]
    monkeypatch.undo()
    assert len(whole.join(3, "items")) == 3 and not part.own.exists()
    assert (tmp_path / "items.jsonl").read_text() == '{"item": 0}\n{"item": 1}\n{"item": 2}\n'


def test_parts_of_something_else(place, tmp_path):
    other = tmp_path / "parts" / "1-of-2"
    other.mkdir()
    (other / LOCK_NAME).write_text("{}")  # a part that begins: it has said nothing yet
    place(2, 2).settle({"a": 1})
    (other / "other.json").write_text("{}")
    with pytest.raises(InputError, match="holds a part of something else .other.json.; choose another"):
        place(2, 2).settle({"a": 1})
    (tmp_path / "parts" / "1-of-3").mkdir()
    with pytest.raises(InputError, match=r"different numbers of parts \(2, 3\)"):
        place(2, 2).found()


def test_a_record_is_torn_and_the_disk_is_full(place, tmp_path):
    part = place(1, 1)
    (tmp_path / "items-0.part.jsonl").write_text('{"item": 3}\n17\n{"item": true}\n{"item": 4, "te')
    assert records_of(part).collect() == [{"item": 3}]
    if os.path.exists("/dev/full"):
        (tmp_path / "items-0.part.jsonl").symlink_to("/dev/full")
        with pytest.raises(InputError, match="cannot write to .*No space left"):
            write(records_of(part), 5)


# --- check-data ---------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    """A list of six good videos, one that is none, one that is not there, and a line that names none."""
    for number in range(6):
        make_video(tmp_path / f"a {number}.mp4", frames=6 + number)
    (tmp_path / "bad.mp4").write_text("text")
    names = ["a 0.mp4", "bad.mp4", *(f"a {number}.mp4" for number in range(1, 6)), "gone.mp4"]
    (tmp_path / "list.csv").write_text("# mine\n" + "".join(f'"{tmp_path}/{name}",3\n' for name in names))
    return ["check-data", str(tmp_path / "list.csv"), "--workers", "1", "--output"]


def files(folder):
    """Content of what is in a folder, but for what took how long."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("timings.")
    }


def untimed(text):
    return [line for line in text.replace("whole", "out").splitlines() if "clips a second" not in line]


def test_parts_give_the_files_of_one_check(words, tmp_path, capsys):
    assert main([*words, str(tmp_path / "whole")]) == 1
    said = untimed(capsys.readouterr().out)
    out = [*words, str(tmp_path / "out")]
    assert [main([*out, "--part", f"{number}/3"]) for number in (2, 1, 3)] == [1, 0, 0]
    assert "part 3/3 is done" in capsys.readouterr().out
    assert main([*out, "--merge"]) == 1
    assert untimed(capsys.readouterr().out) == said
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert main([*out, "--merge"]) == 1  # again: nothing changes
    assert untimed(capsys.readouterr().out) == said
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(files(tmp_path / "out")) == ["clean.txt", "histogram.png", "report.json"]
    times = json.loads((tmp_path / "out" / "timings.json").read_text())["clip_s"]
    assert [seconds is None for seconds in times] == [False, True, *[False] * 5, True]


def test_missing_and_foreign_parts(words, tmp_path, capsys):
    out = [*words, str(tmp_path / "out")]
    assert main([*out, "--merge"]) == 2
    assert "has no parts to join: 7 of 7 videos are missing" in capsys.readouterr().err
    assert main([*out, "--part", "1/3"]) == 0
    (tmp_path / "other.csv").write_text((tmp_path / "list.csv").read_text().replace("# mine\n", "", 1))
    other = ["check-data", str(tmp_path / "other.csv"), *words[2:], str(tmp_path / "out")]
    for command, text in (
        ([*out, "--merge"], "parts 2/3 (2 videos, not started), 3/3 (2 videos, not started); run them"),
        ([*out, "--part", "2/4"], "holds parts of 3 (1/3), and this is 2/4"),
        (out, "holds parts of 3 (1/3), and this is 1/1"),
        (
            [*other, "--part", "2/3"],
            "holds an unfinished check of another list (there and now: list differs)",
        ),
        ([*other, "--merge"], "holds an unfinished check of another list"),
    ):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    with FolderLock(tmp_path / "out" / "parts" / "2-of-3", "part 2/3"):
        assert main([*out, "--part", "2/3"]) == 2
        assert "is in use by part 2/3" in capsys.readouterr().err


def stopped(words, monkeypatch, after):
    """Check until Ctrl-C comes after some videos."""
    original, done = check.check_each, []

    def stop(*args, **options):
        for answer in original(*args, **options):
            yield answer
            done.append(answer)
            if len(done) == after:
                raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_each", stop)
    assert main(words) == 130
    monkeypatch.setattr(check, "check_each", original)


@pytest.mark.slow
def test_a_stopped_check_goes_on(words, tmp_path, monkeypatch, capsys):
    out = [*words, str(tmp_path / "out")]
    assert main([*words, str(tmp_path / "whole")]) == 1
    stopped(out, monkeypatch, 4)
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "a 0.mp4").read_bytes())  # mended, and not read again
    capsys.readouterr()
    assert main(out) == 1
    assert "goes on: 3 videos are left" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert main(out) == 1  # a new check sees what was mended
    assert "8 videos: 7 good, 1 bad" in capsys.readouterr().out


@pytest.mark.slow
def test_another_list_after_a_stop(words, tmp_path, monkeypatch, capsys):
    out = [*words, str(tmp_path / "out")]
    stopped(out, monkeypatch, 2)
    (tmp_path / "list.csv").write_text(f'"{tmp_path}/a 3.mp4",1\n')
    assert main(out) == 0
    told = capsys.readouterr().out
    assert "note: an unfinished check of another list" in told and "1 videos: 1 good" in told


def test_a_folder_that_cannot_be_written(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flags in ([], ["--part", "1/2"], ["--merge"]):
        assert main([*words, str(tmp_path / "file"), *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("count, ranks", [(1, [2]), (1, [4]), (7, [1]), (3, [2, 1, 4])])
def test_any_number_of_parts_and_ranks(words, run_ranks, tmp_path, count, ranks):
    assert main([*words, str(tmp_path / "whole")]) == 1
    out = [*words, str(tmp_path / "out")]
    for number in range(count):
        run_ranks(ranks[number % len(ranks)], main, [*out, "--part", f"{number + 1}/{count}"])
    assert main([*out, "--merge"]) == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_alone_write_the_report(words, run_ranks, tmp_path):
    assert main([*words, str(tmp_path / "whole")]) == 1
    assert run_ranks(2, main, [*words, str(tmp_path / "out")]) == [1, 1]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_part_goes_on_in_another_process(words, tmp_path, number):
    """Two parts at once; one is killed in the middle, and started again."""
    assert main([*words, str(tmp_path / "whole")]) == 1
    out = [*words, str(tmp_path / "out")]
    slow = (
        f"import vmae.data.check as c, time; f = c.check_entry; "
        "c.check_entry = lambda *a, **k: (time.sleep(0.3), f(*a, **k))[1]; "
        f"from vmae.cli import main; raise SystemExit(main({[*out, '--part', '1/2']!r}))"
    )
    victim = subprocess.Popen([sys.executable, "-c", slow], env=os.environ)
    other = subprocess.Popen([sys.executable, "-m", "vmae", *out, "--part", "2/2"], env=os.environ)
    own, patience = tmp_path / "out" / "parts" / "1-of-2", time.monotonic() + 60
    log = own / "videos-0.part.jsonl"
    while not (log.exists() and log.read_text()) and time.monotonic() < patience:
        time.sleep(0.05)
    victim.send_signal(number)
    assert victim.wait(timeout=30) == (143 if number == signal.SIGTERM else -9)
    assert (own / LOCK_NAME).exists() == (number == signal.SIGKILL)
    assert other.wait(timeout=60) in (0, 1)
    again = subprocess.run(
        [sys.executable, "-m", "vmae", *out, "--part", "1/2"], capture_output=True, text=True
    )
    assert again.returncode in (0, 1) and "goes on: " in again.stdout, again.stderr
    assert main([*out, "--merge"]) == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")
