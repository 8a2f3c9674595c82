"""vmae index: tars that others wrote, by their headers; what is wrong with them in one line."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.data.small_videos import make_video
from vmae.cli import main
from vmae.data import open_video, pack_command
from vmae.data.shards import packing
from vmae.data.shards.index import read_index
from vmae.data.shards.tar_places import expand_ranges
from vmae.errors import InputError
from vmae.files.folder_lock import FolderLock

pytest.importorskip("av")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "v.mp4").read_bytes()


def jpg(level, size=(24, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(file, "jpeg")
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path, video):
    """Two tars as people write them."""
    first = [
        ("./train/a.b/k.x.mp4", video),
        ("./train/a.b/k.x.cls", b"7\n"),
        ("./train/a.b/k.x.txt", b"a caption"),
        ("one.MP4", video),
        ("one.json", json.dumps({"label": [3, 1], "caption": "x"}).encode()),
        ("two.json", json.dumps({"label": "dog"}).encode()),
        ("two.webm", video),
    ]
    second = [
        ("frames.json", b'{"label": 2}'),
        *((f"frames/img_{number}.jpg", jpg(20 * number)) for number in (1, 2, 10)),
        *((f"dotted.img_{number:05}.png", jpg(number)) for number in (1, 2)),
        ("picture.jpg", jpg(1)),
        ("picture.cls", b"3"),
        ("set/0001.jpg", jpg(1)),
        ("set/0001.cls", b"1"),
        ("README", b"no key"),
        (".hidden.mp4", video),
        ("thumb.mp4", video),
        ("thumb.jpg", jpg(4)),
    ]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", first)
    write_tar(tmp_path / "tars" / "1.tar", second, tarfile.GNU_FORMAT)
    return tmp_path / "tars"


def run(*words):
    return main(["index", *map(str, words), "--workers", "1"])


def test_what_others_wrote(tars, video, capsys):
    output = tars / "index.vmae"
    assert run(tars, "-o", output) == 0
    index = read_index(output)
    assert [entry.key for entry in index] == ["train/a.b/k", "one", "two", "frames", "dotted", "thumb"]
    assert [index.labels(number) for number in range(6)] == [(7,), (3, 1), (), (2,), (), ()]
    assert [index.suffixes[n] for n in index.columns["suffix"]] == [".mp4", ".mp4", ".webm", "", "", ".mp4"]
    assert [(entry.frames, entry.width, entry.height) for entry in index] == [
        (6, 128, 96), (6, 128, 96), (6, 128, 96), (3, 24, 16), (2, 24, 16), (6, 128, 96),
    ]  # fmt: skip
    assert (
        index[0].fps == 25
        and index[3].fps == 0
        and [shard.name for shard in index.relative] == ["0.tar", "1.tar"]
    )
    for entry in index:
        with open_video(entry, "pyav") as reader:
            assert len(reader) == entry.frames
            if entry.kind == "frames":
                assert np.all(np.diff(reader.frames(range(len(reader)))[:, 0, 0, 0].astype(int)) >= 0)
    with open(index[1].shard.name, "rb") as file:
        file.seek(index[1].video.offset)
        assert file.read(index[1].video.length) == video
    told = capsys.readouterr()
    assert "4 videos and 2 folders of frames, with labels, in 2 tars" in told.out
    assert "members are no part of a video (.jpg 3, .cls 2, .txt 1)" in told.out
    assert "1 samples have a label that is no class's number" in told.out
    assert "2 members have names without a key" in told.out
    assert not list(tars.glob("*.unfinished*"))


def test_quick_opens_no_video(tars):
    (tars / "2.tar").write_bytes(
        (tars / "0.tar").read_bytes().replace(b"one.", b"new.").replace(b"two.", b"six.")
    )
    write_tar(
        tars / "2.tar", [("bad.mp4", b"no video"), ("bad.json", b'{"frames": 9, "fps": 25, "width": 4.5}')]
    )
    assert run(tars, "-o", tars / "index.vmae", "--quick") == 0
    index = read_index(tars / "index.vmae")
    assert [entry.frames for entry in index] == [0, 0, 0, 3, 2, 0, 9] and (index[6].fps, index[6].width) == (
        25,
        0,
    )
    assert run(tars, "-o", tars / "other.vmae") == 1
    assert [entry.key for entry in read_index(tars / "other.vmae")] == [entry.key for entry in index][:6]
    assert "2.tar/bad.mp4" in (tars / "quarantine.jsonl").read_text()


def test_words_of_others_mean_nothing(tmp_path, video):
    """A source for each sample, as crawled data has, is not one of the few sources of a mix."""
    about = {"source": "http://x/1", "stride": 4, "keep_every": 2, "phase": 1, "frames": 11}
    write_tar(tmp_path / "x.tar", [("a.1.mp4", video), ("a.1.json", json.dumps(about).encode())])
    assert run(tmp_path / "x.tar", "-o", tmp_path / "index.vmae") == 0
    index = read_index(tmp_path / "index.vmae")
    assert (index.sources, index.suffixes, index[0].stride) == ([""], [".mp4"], None)
    assert (index[0].keep_every, index[0].phase, index[0].frames) == (1, 0, 6)


def test_our_own_shards_have_the_same_index(tmp_path, video, monkeypatch):
    monkeypatch.setattr(packing, "videos_for", lambda size, sizes: 2)
    monkeypatch.setattr(pack_command, "report_gain", lambda pairs: {"videos": 0})
    (tmp_path / "frames").mkdir()
    for number in (1, 2):
        (tmp_path / "frames" / f"img_{number:05}.jpg").write_bytes(jpg(number))
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(video)
    (tmp_path / "list.txt").write_text("a.mp4 1\n#! stride=2\nb.mp4 2;3\nframes 2 0\n")
    arguments = ["pack", str(tmp_path / "list.txt"), str(tmp_path / "out"), "--shards", "--keep-every", "2"]
    assert main([*arguments, "--preset", "ultrafast", "--workers", "1"]) == 0
    packed = read_index(tmp_path / "out" / "index.vmae")
    assert run(tmp_path / "out", "-o", tmp_path / "out" / "again.vmae") == 0
    again = read_index(tmp_path / "out" / "again.vmae")
    assert again.relative == packed.relative and again.sources == packed.sources
    assert again.suffixes == packed.suffixes
    for name, column in packed.columns.items():
        assert np.array_equal(column, again.columns[name]), name


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_make_the_index_of_one_run(tars, tmp_path, parts, capsys):
    assert run(tars, "-o", tars / "index.vmae") == 0
    for number in range(1, parts + 1):
        assert run(tars, "-o", tars / "parts.vmae", "--part", f"{number}/{parts}") == 0
    if parts > 1:
        assert run(tars, "-o", tars / "parts.vmae", "--merge") == 0
    assert (tars / "parts.vmae").read_bytes() == (tars / "index.vmae").read_bytes()


def test_missing_parts_and_two_at_once(tars, capsys):
    output = tars / "x.vmae"
    assert run(tars, "-o", output, "--part", "1/2") == 0
    assert run(tars, "-o", output, "--merge") == 2
    assert "2/2 (1 tars, not started)" in capsys.readouterr().err
    with FolderLock(tars / "x.vmae.unfinished" / "parts" / "2-of-2"):
        assert run(tars, "-o", output, "--part", "2/2") == 2
    assert "is in use by" in capsys.readouterr().err


def test_a_stopped_run_goes_on(tars, video, capsys):
    """The tars that were read are not read again."""
    write_tar(tars / "2.tar", [("a.mp4", video), ("a.mp4", video)])
    assert run(tars, "-o", tars / "x.vmae") == 2
    pieces = sorted((tars / "x.vmae.unfinished").glob("*.vmae"))
    before = [piece.stat().st_mtime_ns for piece in pieces]
    assert len(before) == 2
    assert run(tars, "-o", tars / "x.vmae") == 2
    assert [piece.stat().st_mtime_ns for piece in pieces] == before


def test_other_tars_after_a_run_that_failed(tars, video, capsys):
    """Who takes the bad tar away need not remove what the run left; a part of other tars is refused."""
    write_tar(tars / "2.tar", [("a.mp4", video), ("a.mp4", video)])
    assert run(tars, "-o", tars / "x.vmae") == 2
    (tars / "2.tar").unlink()
    assert run(tars, "-o", tars / "x.vmae", "--part", "1/2") == 2
    assert "holds an index of other tars" in capsys.readouterr().err
    assert run(tars, "-o", tars / "x.vmae") == 0
    assert "unfinished index of other tars is dropped" in capsys.readouterr().out
    assert not list(tars.glob("*.unfinished*"))


def test_an_index_that_is_there(tars, video, capsys):
    output = tars / "index.vmae"
    assert run(tars, "-o", output) == 0
    capsys.readouterr()
    assert run(tars, "-o", output) == 0 and "6 samples in the same 2 tars" in capsys.readouterr().out
    write_tar(tars / "2.tar", [("z.mp4", video)])
    assert run(tars, "-o", output) == 2
    assert "is the index of other tars: remove it" in capsys.readouterr().err
    (tars / "2.tar").unlink()
    os.utime(tars / "1.tar", (2e9, 2e9))
    assert run(tars, "-o", output) == 2
    assert "1.tar was changed since: remove it" in capsys.readouterr().err
    output.write_bytes(b"something")
    assert run(tars, "-o", output) == 2


@pytest.mark.parametrize(
    "members, told",
    [
        ([("a.mp4", b"1"), ("a.mp4", b"2")], "key 'a' comes twice, at bytes"),
        ([("a.mp4", b"1"), ("b.mp4", b"2"), ("a.json", b"{}")], "key 'a' comes twice, at bytes"),
        ([("a.mp4", b"1"), ("a.MKV", b"2")], "key 'a' has several videos (a.mp4 and a.MKV)"),
        ([("a.mp4", b"1"), ("a.json", b'{"label": -1}')], "label -1 of 'a' is out of range"),
        ([("a.mp4", b"1"), ("a.cls", b"99999999")], "label 99999999 of 'a' is out of range"),
        ([("a.jpg", b"1"), ("a.txt", b"2")], "no videos in 1 tars; 2 members are no part of a video"),
        ([("set/poster1.jpg", jpg(1))], "no videos in 1 tars; 1 members are no part of a video (.jpg 1)"),
        ([("\udcff.mp4", b"1")], "is no UTF-8; rename it"),
        ([], "no videos in 1 tars"),
        ([("a.mp4", b"no video")], "1 cannot be decoded, the first: "),
    ],
)
def test_what_is_wrong_is_told(tmp_path, capsys, members, told):
    write_tar(tmp_path / "x.tar", members)
    assert run(tmp_path / "x.tar", "-o", tmp_path / "index.vmae") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and not (tmp_path / "index.vmae").exists()


def test_a_key_in_two_tars(tmp_path, video, capsys):
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, [("k.mp4", video)])
    assert run(tmp_path / "*.tar", "-o", tmp_path / "index.vmae") == 2
    told = capsys.readouterr().err
    assert f"key 'k' comes twice: in {tmp_path}/x.tar and in {tmp_path}/y.tar" in told


def test_what_is_no_tar(tmp_path, tars, capsys):
    def error(*words):
        assert run(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    output = tmp_path / "index.vmae"
    assert "no tar file" in error(tmp_path / "none.tar", "-o", output)
    assert "holds no .tar files" in error(tmp_path, "-o", output)
    assert "is named twice" in error(tars, tars / "0.tar", "-o", output)
    assert "ends with .vmae" in error(tars, "-o", tmp_path / "index.json")
    assert "name tar files" in error(tars) and "name tar files" in error("-o", output)
    (tmp_path / "text.tar").write_text("text" * 500)
    assert "is not a tar file" in error(tmp_path / "text.tar", "-o", output)
    os.mkfifo(tmp_path / "pipe.tar")
    assert "is a pipe" in error(tmp_path / "pipe.tar", "-o", tmp_path / "p.vmae")
    cut = (tars / "0.tar").read_bytes()[:9000]
    (tmp_path / "cut.tar").write_bytes(cut)
    assert "is cut off: it ends at byte 9000" in error(tmp_path / "cut.tar", "-o", tmp_path / "c.vmae")


def test_verify(tars, capsys):
    output = tars / "index.vmae"
    assert run(tars, "-o", output) == 0
    capsys.readouterr()
    assert run("--verify", output) == 0 and "6 of 6 samples are what" in capsys.readouterr().out
    index = read_index(output)
    data = bytearray((tars / "1.tar").read_bytes())
    data[int(index[3].images[1, 0])] ^= 1
    (tars / "1.tar").write_bytes(data)
    assert run("--verify", output) == 1
    told = capsys.readouterr().out
    assert "wrong: frames: " in told and "CRC-32" in told and "5 of 6 samples" in told
    assert run("--verify", output, "--part", "1/3") == 1
    assert "part 1/3: 1 of 2 samples" in capsys.readouterr().out
    assert run(tars, "--verify", output) == 2
    assert run("--verify", tars / "none.vmae") == 2


def test_ranges_of_names():
    assert list(expand_ranges("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert len(list(expand_ranges("s3://b/{0..9}/{000..010}.tar"))) == 110
    assert list(expand_ranges("a{b}.tar")) == ["a{b}.tar"]
    with pytest.raises(InputError, match="is no range"):
        list(expand_ranges("a-{3..1}.tar"))


@pytest.mark.slow  # some 3 s beside the store's own
def test_tars_in_a_store(tars, store, tmp_path, capsys):
    for name in ("0.tar", "1.tar"):
        store.put(f"tests/writing/{name}", (tars / name).read_bytes())
    store.put("tests/writing/more/2.tar", b"of another prefix")
    store.put("tests/writing/notes.txt", b"no tar")
    assert run(tars, "-o", tmp_path / "local.vmae") == 0
    local = read_index(tmp_path / "local.vmae")
    whole = "s3://tests/writing/"
    served = f"{store.files}/tests/writing/{{0..1}}.tar"
    for number, names in enumerate((whole, f"{whole}*.tar", f"{whole}{{0..1}}.tar", served)):
        assert run(names, "-o", tmp_path / f"{number}.vmae") == 0, capsys.readouterr().err
        remote = read_index(tmp_path / f"{number}.vmae")
        assert [shard.size for shard in remote.relative] == [shard.size for shard in local.relative]
        for name, column in local.columns.items():
            assert np.array_equal(column, remote.columns[name]), name
    index = read_index(tmp_path / "0.vmae")
    assert [shard.name for shard in index.shards] == [f"{whole}0.tar", f"{whole}1.tar"]
    assert all(shard.etag for shard in index.shards)
    assert run("--verify", tmp_path / "0.vmae") == 0
    assert run(whole, "-o", tmp_path / "0.vmae") == 0  # it is there
    capsys.readouterr()
    for names, told in (
        (f"{whole}none.tar", "there is no such object"),
        (f"{whole}none/", "no tar file at"),
        (f"{whole}x*.tar", "no tar file at"),
        ("s3://nobucket/x/", "nobucket"),
        ("https://example.invalid/x/", "lists no files"),
    ):
        assert run(names, "-o", tmp_path / "x.vmae") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
