"""What is kept of a long list: read once on a machine, never of another list, never half written."""

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from vmae.data import list_cache, list_parsing, long_lists
from vmae.data.labels import read_any_list, read_labelled_list
from vmae.data.list_parsing import ListParser
from vmae.data.manifest import read_list, read_list_with_problems
from vmae.data.mix import read_data
from vmae.errors import InputError

COUNT = 60
IS_LOCAL = list_cache.is_local


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder of videos and a list of them; lists of 50 lines are long."""
    for number in range(COUNT):
        (tmp_path / "data" / f"v{number}").mkdir(parents=True)
        (tmp_path / "data" / f"v{number}" / "clip.mp4").write_bytes(b"video")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(long_lists, "LONG", 50)
    monkeypatch.setattr(list_cache, "is_local", lambda folder: True)
    monkeypatch.delenv("RANK", raising=False)
    write(tmp_path)
    return tmp_path


def write(folder, numbers=range(COUNT), start="", end=" 0 -1", name="list.txt"):
    (folder / "data" / name).write_text("".join(f"{start}v{number}/clip.mp4{end}\n" for number in numbers))
    return folder / "data" / name


def caches(folder):
    return sorted(folder.rglob("*.vmae-list*"))


@pytest.fixture
def parsed(monkeypatch):
    """Lists that are parsed from now on."""
    names, pieces = [], ListParser.pieces

    def counted(self, data):
        names.append(Path(self.name).name)
        return pieces(self, data)

    monkeypatch.setattr(ListParser, "pieces", counted)
    return names


def paths(folder, numbers=range(COUNT)):
    return [f"{folder}/data/v{number}/clip.mp4" for number in numbers]


def read(folder, **options):
    return [entry.path for entry in read_list(folder / "data" / "list.txt", folder / "data", **options)]


def test_a_list_is_parsed_once(world, parsed):
    assert read(world) == read(world) == paths(world) and parsed == ["list.txt"]
    (cache,) = caches(world)
    assert cache.parent == world / "data" and cache.name.startswith(".list.txt.")
    table = read_list(world / "data" / "list.txt", world / "data")
    assert not table._text.flags.owndata and not table._text.flags.writeable  # mapped
    write(world, range(49), name="short.txt")  # a short list needs no file
    assert len(read_list(world / "data" / "short.txt")) == 49 and len(caches(world)) == 1
    assert parsed == ["list.txt"]


def test_a_list_that_changed_is_read_anew(world, parsed):
    path = write(world)
    assert read(world) == paths(world)
    before, about = caches(world), os.stat(path)
    other = write(world, name="list.txt.2")
    assert len(read_list(other, world / "data")) == COUNT
    write(world, [*range(1, COUNT), 0])  # as long, and from the same moment
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert read(world) == paths(world, [*range(1, COUNT), 0])
    assert not before[0].exists() and len(caches(world)) == 2  # the other list's is still there
    write(world)
    assert read(world) == paths(world) and parsed == ["list.txt", "list.txt.2", "list.txt", "list.txt"]


def test_what_decides_beside_the_content(world, parsed, monkeypatch):
    path = write(world, start="", end=" 3")
    assert read_labelled_list(path, world / "data").labels == [(3,)] * COUNT
    assert read_labelled_list(path, world / "data", num_classes=9).num_classes == 9
    with pytest.raises(InputError, match="line 1: label 3 is out of range; labels are 0 to 2"):
        read_labelled_list(path, world / "data", num_classes=3)
    with pytest.raises(InputError, match="line 1: malformed: one number after the path"):
        read_list(path, world / "data")
    write(world, end="")
    assert read_list(path, world / "data")[0].pattern == "img_{:05}.jpg"
    assert read_list(path, world / "data", frame_pattern="f_{:03}.jpg")[0].pattern == "f_{:03}.jpg"
    assert read_list(path)[0].path == f"{world}/data/v0/clip.mp4"  # from the list's folder
    monkeypatch.chdir(world / "data")
    assert read_list(path)[0].path == "v0/clip.mp4"
    assert read_list("list.txt")[0].path == "v0/clip.mp4"
    assert len(caches(world)) == 5 and len(parsed) == 9


@pytest.mark.parametrize("damage", ["cut", "a byte", "empty", "other list", "text", "header"])
def test_a_damaged_cache_is_written_anew(world, parsed, damage):
    path = write(world)
    assert read(world) == paths(world)
    (cache,) = caches(world)
    whole = cache.read_bytes()
    if damage == "other list":
        read_list(write(world, range(5, COUNT), name="other.txt"), world / "data")
        os.replace(next(one for one in caches(world) if "other" in one.name), cache)
    else:
        flipped = bytearray(whole)
        flipped[whole.index(b"v30/clip")] ^= 1
        cache.write_bytes(
            {"cut": whole[:-9], "a byte": bytes(flipped), "empty": b"", "text": b"v1 0 -1\n" * 50}.get(
                damage, whole[:300]
            )
        )
    del parsed[:]
    assert read(world) == paths(world) and parsed == [path.name] and cache.read_bytes() == whole


def test_a_folder_that_cannot_be_written(world, parsed, monkeypatch):
    read(world)
    (name,) = caches(world)
    places = list_cache._places
    name.unlink()
    (world / "data" / name.name).mkdir()  # in the cache's place
    (world / "data" / name.name / "file").touch()
    assert read(world) == paths(world)
    (kept,) = caches(world / "cache" / "vmae" / "lists")
    del parsed[:]
    assert read(world) == paths(world) and parsed == []
    other = world / "other" / "list.txt"  # of the same name, in another such folder
    other.parent.mkdir()
    (other.parent / "data").symlink_to(world / "data")
    other.write_text("".join(f"{path}\n" for path in paths(world, range(1, COUNT))))
    monkeypatch.setattr(list_cache, "_places", lambda path: places(path)[1:])
    assert [entry.path for entry in read_list(other)] == paths(world, range(1, COUNT))
    assert len(caches(world / "cache")) == 2 and kept.exists() and read(world) == paths(world)
    assert parsed == ["list.txt"]
    (world / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "file"))
    assert read(world) == read(world) == paths(world) and parsed  # in memory


def test_on_a_network_what_others_may_map_stays_for_a_month(world, monkeypatch):
    monkeypatch.setattr(list_cache, "is_local", lambda folder: False)
    assert read(world) == paths(world)
    (before,) = caches(world)
    write(world, range(1, COUNT))
    assert read(world) == paths(world, range(1, COUNT)) and before.exists()
    os.utime(before, (0, 0))
    write(world)
    assert read(world) == paths(world)  # used again: from now on a month
    write(world, range(2, COUNT))
    assert read(world) == paths(world, range(2, COUNT)) and before.exists()
    os.utime(before, (0, 0))
    write(world, range(3, COUNT))
    assert read(world) == paths(world, range(3, COUNT)) and not before.exists()


def test_which_file_systems_are_local(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"22 21 0:40 / {tmp_path} rw,relatime shared:1 - nfs4 server:/data rw\n"
        f"23 22 0:41 / {tmp_path}/with\\040blank rw - xfs /dev/sdb rw\n"
    )
    (tmp_path / "with blank" / "in").mkdir(parents=True)
    assert not IS_LOCAL(tmp_path / "data", mounts) and IS_LOCAL("/usr", mounts)
    assert IS_LOCAL(tmp_path / "with blank" / "in", mounts)
    assert not IS_LOCAL(f"{tmp_path}/with", mounts)
    assert IS_LOCAL(f"{tmp_path}2", mounts)  # only its name begins so
    assert not IS_LOCAL("/", tmp_path / "none")


def start(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_processes_that_start_at_once_parse_once(world, monkeypatch):
    pieces = ListParser.pieces

    def slow(self, data):
        with open(world / "parsed", "a") as file:
            file.write("once\n")
        time.sleep(0.2)
        return pieces(self, data)

    monkeypatch.setattr(ListParser, "pieces", slow)

    def rank(number):
        os.environ["RANK"] = str(number)
        assert read(world) == paths(world)

    ranks = [start(rank, number) for number in range(4)]
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0] * 4
    assert (world / "parsed").read_text() == "once\n" and len(caches(world)) == 1


def test_a_process_that_is_killed_while_it_writes(world, monkeypatch):
    path = write(world)

    def killed(self, data):
        yield from pieces(self, data)
        os.kill(os.getpid(), signal.SIGKILL)

    pieces = ListParser.pieces
    with monkeypatch.context() as during:
        during.setattr(ListParser, "pieces", killed)
        process = start(read, world)
        process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (left,) = caches(world)
    assert read(world) == paths(world) and left.exists()  # it may be another machine's, at work on it
    os.utime(left, (0, 0))
    write(world, range(1, COUNT))
    assert read(world) == paths(world, range(1, COUNT)) and not left.exists() and len(caches(world)) == 1
    assert path.exists()


# --- Which files are looked up ---


@pytest.fixture
def asked(monkeypatch):
    """Videos that the file system is asked for."""
    names, stat = [], os.stat

    def counted(path, *arguments, **options):
        if str(path).endswith("clip.mp4"):
            names.append(str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", counted)
    return names


def test_rank_0_looks_up_a_sample_and_no_other_rank_a_file(world, asked, monkeypatch, caplog):
    monkeypatch.setattr(long_lists, "SAMPLE", 6)
    caplog.set_level(logging.INFO, "vmae.data")
    for _ in range(2):
        assert len(read(world)) == COUNT
        assert asked == paths(world, range(0, COUNT, 10))
        del asked[:]
    said = f"list {world}/data/list.txt: 6 of 60 paths looked up; `vmae check-data` looks at all"
    assert [record.message for record in caplog.records] == [said] * 2
    monkeypatch.setenv("RANK", "1")
    assert len(read(world)) == COUNT and asked == []
    write(world, range(1, COUNT))
    assert len(read(world)) == COUNT - 1 and asked == [] and len(caplog.records) == 2


def test_a_missing_file_of_the_sample_is_named(world, monkeypatch):
    monkeypatch.setattr(long_lists, "SAMPLE", 6)
    for number in (10, 11, 40):
        (world / "data" / f"v{number}" / "clip.mp4").unlink()
    with pytest.raises(InputError) as raised:
        read(world)
    assert "list.txt', line 11: 'v10/clip.mp4' does not exist (tried " in str(raised.value)
    assert "; 2 of the 6 entries looked up cannot be used (--data-root '" in str(raised.value)
    assert "`python -m vmae check-data` looks at all" in str(raised.value)
    (world / "data" / "v10" / "clip.mp4").touch()
    (world / "data" / "v40" / "clip.mp4").touch()
    assert len(read(world)) == COUNT  # 11 was not looked up; it is a bad video when it is read
    entries, problems = read_list_with_problems(world / "data" / "list.txt", world / "data")
    assert len(entries) == COUNT - 1 and problems[0][0] == 12  # as check-data reads it


def test_where_relative_paths_start_is_settled_by_a_sample(world, asked, monkeypatch):
    monkeypatch.setattr(list_parsing, "FEW", 10)
    monkeypatch.setattr(list_parsing, "SAMPLE", 4)
    monkeypatch.setenv("RANK", "1")
    path = write(world)
    assert [entry.path for entry in read_list(path)] == paths(world)
    assert len(asked) == 2 * 4  # not in the working directory, but in the list's folder
    del asked[:]
    (world / "v15").mkdir()
    (world / "v15" / "clip.mp4").write_bytes(b"video")  # one of the sample lies elsewhere: all are looked up
    write(world, range(COUNT), end="")
    expected = paths(world)
    expected[15] = "v15/clip.mp4"
    assert [entry.path for entry in read_list(path)] == expected and len(asked) > 100


def test_lines_of_two_readings_are_settled_by_a_sample(world, asked, monkeypatch):
    monkeypatch.setattr(list_parsing, "FEW", 10)
    monkeypatch.setattr(list_parsing, "SAMPLE", 4)
    monkeypatch.setattr(os.path, "isfile", lambda path: True)  # the first frames
    path = world / "data" / "frames.txt"
    path.write_text("".join(f"v{number} {number + 1} 7\n" for number in range(COUNT)))
    looked, resolve = [], list_parsing.resolve_line
    monkeypatch.setattr(
        list_parsing, "resolve_line", lambda line, *more: looked.append(line.number) or resolve(line, *more)
    )
    monkeypatch.setenv("RANK", "1")
    found = read_labelled_list(path, world / "data")
    assert [entry.total for entry in found.entries] == list(range(1, COUNT + 1))
    assert {entry.start for entry in found.entries} == {1} and sorted(looked) == [1, 16, 31, 46]
    (world / "data" / "v30").rename(world / "data" / "gone")
    (world / "data" / "v30 31").write_bytes(b"a video of this name")
    path.write_text(path.read_text() + "# again\n")
    found = read_labelled_list(path, world / "data")
    assert found.entries[30].kind == "video" and found.entries[30].path.endswith("v30 31")
    assert found.entries[29].total == 30 and set(looked) == set(range(1, COUNT + 1))


def test_files_that_moved_between_the_roots(world, parsed, monkeypatch):
    path = write(world)
    assert [entry.path for entry in read_list(path)] == paths(world)
    for number in range(COUNT):
        (world / "data" / f"v{number}").rename(world / f"v{number}")
    here = [f"v{number}/clip.mp4" for number in range(COUNT)]
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other rank may have read the old one
    with pytest.raises(InputError, match="its files moved since it was last read, .*: start again"):
        read_list(path)
    assert [entry.path for entry in read_list(path)] == here
    monkeypatch.setenv("WORLD_SIZE", "1")
    for number in range(COUNT):
        (world / f"v{number}").rename(world / "data" / f"v{number}")
    assert [entry.path for entry in read_list(path)] == paths(world) and len(parsed) == 3


def test_check_data_and_pack_look_at_every_line(world, asked, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (world / "data" / "v41" / "clip.mp4").unlink()
    for start, root in (("", world / "data"), (f"{world}/data/", None)):
        found = read_any_list(write(world, start=start), root)
        assert [entry.path for entry in found.entries] == paths(world, [*range(41), *range(42, COUNT)])
        ((line, problem),) = found.problems
        assert line == 42 and "v41/clip.mp4' does not exist" in problem and len(asked) >= COUNT
        assert found.labels == [None] * (COUNT - 1) and not found.labelled
        del asked[:]
    labelled = read_any_list(write(world, end=" 3;5"), world / "data")
    assert labelled.labels == [(3, 5)] * (COUNT - 1) and labelled.labelled and caches(world) == []


# --- Mixes ---


def test_a_mix_of_long_lists_copies_nothing(world):
    write(world, range(30, COUNT), name="short.txt")
    (world / "mix.yaml").write_text(
        "sources:\n"
        "  - {name: long, list: data/list.txt, stride: 3, weight: 2}\n"
        "  - {name: short, list: data/short.txt, kind: video}\n"
    )
    mix = read_data(world / "mix.yaml")
    assert [entry.path for entry in mix] == paths(world) + paths(world, range(30, COUNT))
    assert [entry.stride for entry in mix[58:62]] == [3, 3, None, None]
    table = mix.entries[:COUNT]
    (cache,) = caches(world)
    assert isinstance(table._text.base, object) and not table._text.flags.owndata
    assert np.array_equal(table._text, read_list(world / "data" / "list.txt")._text) and cache.exists()
    (world / "mix.yaml").write_text("sources:\n  - {list: data/list.txt, kind: frames}\n")
    with pytest.raises(InputError, match="line 1 of its list is of kind video, not frames, as are 60 of 60"):
        read_data(world / "mix.yaml")


def test_text_that_is_none_is_said_before_a_wrong_line(world, monkeypatch):
    lines = [f"v{number}/clip.mp4 0 -1".encode() for number in range(COUNT)]
    lines[3], lines[50] = b"v3/clip.mp4 5", b"v\xff/clip.mp4 0 -1"
    path = world / "data" / "list.txt"
    path.write_bytes(b"\n".join(lines))
    cut = [b"\n".join(lines[:10]) + b"\n", b"\n".join(lines[10:])]
    monkeypatch.setattr(list_cache, "read_pieces", lambda path: iter(cut))
    with pytest.raises(InputError, match="line 51: not UTF-8 text"):
        read(world)
    lines[50] = lines[0]
    path.write_bytes(b"\n".join(lines))
    cut[1] = b"\n".join(lines[10:])
    with pytest.raises(InputError, match="line 4: malformed: one number after the path"):
        read(world)
    assert caches(world) == []
