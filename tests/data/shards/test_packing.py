"""pack --shards: the same bytes whoever packs, nothing lost by a kill, tar files that others read."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.data.small_videos import make_video
from vmae.cli import main
from vmae.data import open_video, pack_command
from vmae.data.manifest import VideoEntry
from vmae.data.shards import packing
from vmae.data.shards.index import read_index
from vmae.data.shards.packing import Failure
from vmae.data.shards.plan import Origin, ShardPlan, hash_list, probes, videos_for
from vmae.files.folder_lock import FolderLock

pytest.importorskip("av")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Seven small videos of different lengths, one that is none, a folder of frames, and their list."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        make_video(folder / f"v.{number} ü.mp4", frames=3 + number)
    (folder / "bad.mp4").write_bytes((folder / "v.0 ü.mp4").read_bytes()[:900])
    (folder / "frames").mkdir()
    for number in range(1, 4):
        Image.new("RGB", (24, 16), (50 * number, 0, 0)).save(folder / "frames" / f"img_{number:05}.jpg")
    lines = [f"v.{number} ü.mp4 {number}" for number in range(4)]
    lines += ["bad.mp4 1", "#! stride=2", "frames 3 2;5", "#! stride=default"]
    lines += [f"v.{number} ü.mp4 {number}" for number in range(4, 7)]
    (folder / "list.txt").write_text("\n".join(lines))
    return folder


def run(clips, out, *more, workers=1):
    """`vmae pack --shards`."""
    arguments = [
        "pack",
        str(clips / "list.txt"),
        str(out),
        "--preset",
        "ultrafast",
        "--workers",
        str(workers),
    ]
    return main([*arguments, "--shards", *more])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of two videos; clips a second are the business of test_pack.py."""
    monkeypatch.setattr(packing, "videos_for", lambda size, sizes: 2)
    monkeypatch.setattr(pack_command, "report_gain", lambda pairs: {"videos": len(pairs)})


def content(out):
    """{name: hash} of what a folder holds, without the report, which has timings."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.name != "report.json"
    }


@pytest.fixture(scope="module")
def packed(clips, tmp_path_factory):
    """What one run makes of the clips."""
    patch = pytest.MonkeyPatch()
    patch.setattr(packing, "videos_for", lambda size, sizes: 2)
    patch.setattr(pack_command, "report_gain", lambda pairs: {"videos": len(pairs)})
    out = tmp_path_factory.mktemp("packed") / "out"
    assert run(clips, out, workers=2) == 1
    patch.undo()
    return out


def test_what_is_in_it(clips, packed, capsys):
    index = read_index(packed / "index.vmae")
    assert [shard.name for shard in index.relative] == [f"shard-{number:05}.tar" for number in range(5)]
    assert [index[n].key for n in range(8)] == [
        *(f"{n:06}_v_{n}__" for n in range(4)),
        "000005_frames",
        *(f"{n:06}_v_{n - 2}__" for n in range(6, 9)),
    ]
    assert [index.labels(n) for n in range(8)] == [(0,), (1,), (2,), (3,), (2, 5), (4,), (5,), (6,)]
    assert (
        {index.source(n) for n in range(8)} == {"list"} and index[4].stride == 2 and index[5].stride is None
    )
    assert [entry.frames for entry in index] == [3, 4, 5, 6, 3, 7, 8, 9]
    assert {(entry.width, entry.height) for entry in index if entry.kind == "video"} == {(128, 96)}
    assert index[0].fps == 25 and (index[4].width, index[4].height, index[4].total) == (24, 16, 3)
    assert all(entry.table is not None for entry in index if entry.kind == "video")
    assert index.settings == {"short_side": 256, "gop": 25, "crf": 20, "preset": "ultrafast", "keep_every": 1}
    (line,) = (packed / "quarantine.jsonl").read_text().splitlines()
    assert os.path.basename(json.loads(line)["path"]) == "bad.mp4"
    report = json.loads((packed / "report.json").read_text())
    assert (report["videos"], report["packed"], report["shards"]) == (9, 8, 5)
    assert not (packed / "unfinished").exists() and not (packed / "parts").exists()


def test_pixels_are_those_of_packed_files(clips, packed, tmp_path):
    assert (
        main(["pack", str(clips / "list.txt"), str(tmp_path), "--preset", "ultrafast", "--workers", "1"]) == 1
    )
    index = read_index(packed / "index.vmae")
    files = sorted(tmp_path.glob("videos/*/*.mp4"))
    for file, entry in zip(files, [entry for entry in index if entry.kind == "video"], strict=True):
        with open_video(file, "pyav") as plain, open_video(entry, "pyav") as stored:
            assert len(plain) == len(stored)
            assert np.array_equal(plain.frames([0, 2]), stored.frames([0, 2]))
    with open_video(index[4], "pyav") as stored, Image.open(clips / "frames" / "img_00002.jpg") as image:
        assert np.array_equal(stored.frames([1])[0], np.asarray(image))


def test_others_read_the_shards(packed):
    with tarfile.open(packed / "shard-00002.tar") as tar:
        names = tar.getnames()
        about = json.load(tar.extractfile("000005_frames.json"))
    assert names == ["000005_frames.json", *(f"000005_frames.img_{n:05}.jpg" for n in (1, 2, 3))]
    assert about == {
        "label": [2, 5], "source": "list", "name": "frames", "frames": 3, "fps": 0.0, "width": 24,
        "height": 16, "stride": 2,
    }  # fmt: skip
    with tarfile.open(packed / "shard-00000.tar") as tar:
        assert [name.split(".", 1) for name in tar.getnames()[:3]] == [
            ["000000_v_0__", ending] for ending in ("json", "packets", "mp4")
        ]
        assert json.load(tar.extractfile("000000_v_0__.json"))["label"] == 0


def test_webdataset_reads_the_shards(packed):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, packed.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    index = read_index(packed / "index.vmae")
    assert [sample["__key__"] for sample in samples] == [entry.key for entry in index]
    assert samples[0]["json"]["label"] == 0 and len(samples[0]["mp4"]) == index[0].video.length


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_parts_give_the_same_bytes(clips, packed, tmp_path, capsys, parts):
    out = tmp_path / "out"
    for number in reversed(range(1, parts + 1)):
        assert run(clips, out, "--part", f"{number}/{parts}") in (0, 1)
    if parts > 1:
        assert "videos packed" in capsys.readouterr().out
        assert run(clips, out, "--merge") == 1
    assert content(out) == content(packed)


def test_missing_parts_are_named(clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(clips, out, "--merge") == 2
    assert "has no parts to join" in capsys.readouterr().err
    assert run(clips, out, "--part", "2/3") == 0
    assert run(clips, out, "--merge") == 2
    told = capsys.readouterr().err
    assert (
        "3 of 5 shards are missing" in told
        and "1/3 (2 shards, not started), 3/3 (1 shards, not started)" in told
    )
    assert run(clips, out, "--part", "1/2") == 2
    assert "holds parts of 3" in capsys.readouterr().err


def test_a_complete_shard_is_left_alone_and_a_missing_one_made_again(clips, packed, tmp_path):
    out = tmp_path / "out"
    run(clips, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard*")}
    (out / "shard-00001.vmae").unlink()
    (out / ".shard-00001.tar.77.unfinished").write_bytes(b"left by a kill")
    run(clips, out)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard*")}
    assert {name for name in before if before[name] != after[name]} == {"shard-00001.tar", "shard-00001.vmae"}
    assert content(out) == content(packed)


@pytest.mark.slow  # two processes from scratch
def test_a_killed_run_loses_no_video_and_changes_no_byte(clips, packed, tmp_path):
    """Killed before its first shard is written, the run makes no video again but the one under way."""
    out, made = tmp_path / "out", tmp_path / "made"
    code = f"""if True:
        import os, sys
        from vmae.data import pack_command
        from vmae.data.shards import packing
        packing.videos_for = lambda size, sizes: 2
        packing._count_each = lambda job: [2]
        real, leader = pack_command.pack_video, os.getpid()
        def once(source, *given):
            frames = real(source, *given)
            with open({str(made)!r}, "a") as file:
                file.write(os.path.basename(source) + chr(10))
            return frames
        pack_command.pack_video = once
        def write(*given):
            if os.path.exists({str(tmp_path / "kill")!r}):
                os.kill(leader, 9)
            return written(*given)
        written, packing.write_shard = packing.write_shard, write
        from vmae.cli import main
        sys.exit(main(sys.argv[1:]))
    """
    arguments = [
        "pack",
        str(clips / "list.txt"),
        str(out),
        "--preset",
        "ultrafast",
        "--workers",
        "1",
        "--shards",
    ]
    (tmp_path / "kill").touch()
    killed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and list(out.rglob("unfinished/*/*.mp4"))
    assert not list(out.glob("shard*"))
    (tmp_path / "kill").unlink()
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    names = made.read_text().splitlines()
    assert len(set(names)) == 7 and len(names) <= 8
    assert content(out) == content(packed)


def test_the_same_part_twice_at_once_is_refused(clips, tmp_path, capsys):
    out = tmp_path / "out"
    with FolderLock(out / "parts" / "1-of-2", "part 1/2"):
        assert run(clips, out, "--part", "1/2") == 2
        assert "is in use by" in capsys.readouterr().err
        assert run(clips, out, "--part", "2/2") in (0, 1)
        assert run(clips, out, "--merge") == 2
        assert "1/2 (3 shards, at work)" in capsys.readouterr().err


def test_another_list_or_other_settings_are_refused(clips, packed, tmp_path, capsys):
    assert run(clips, packed, "--crf", "30") == 2
    assert "choose another folder" in capsys.readouterr().err
    other = tmp_path / "list.txt"
    other.write_text((clips / "list.txt").read_text().replace("v.6 ü.mp4 6", "v.6 ü.mp4 7"))
    for clip in clips.iterdir():
        (tmp_path / clip.name).exists() or (tmp_path / clip.name).symlink_to(clip)
    assert run(tmp_path, packed) == 2
    assert "holds shards of another list" in capsys.readouterr().err
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    before = content(out)
    other.write_text((clips / "list.txt").read_text())  # the same list in another folder
    assert run(tmp_path, out) == 1 and before == content(out)
    (out / "shard-00000.tar").write_bytes(b"changed")
    assert run(clips, out) == 2
    assert "is not the shard that was packed here" in capsys.readouterr().err


def test_a_mix_keeps_its_sources(clips, tmp_path, capsys):
    one, two = f"{{name: one, list: one.txt, root: {clips}, stride: 3}}", f"{{list: two.txt, root: {clips}}}"
    (tmp_path / "mix.yaml").write_text(f"sources:\n- {one}\n- {two}\n")
    (tmp_path / "one.txt").write_text("".join(f"v.{n} ü.mp4 0 -1\n" for n in range(3)))
    (tmp_path / "two.txt").write_text("frames 1 3\n")
    out = tmp_path / "out"
    assert main(["pack", str(tmp_path / "mix.yaml"), str(out), "--shards", "--workers", "1", "--as-is"]) == 0
    index = read_index(out / "index.vmae")
    assert [index.source(n) for n in range(4)] == ["one", "one", "one", "two"]
    assert [entry.stride for entry in index] == [3, 3, 3, None]
    assert len(index.shards) == 3  # a shard has one source
    (tmp_path / "again.yaml").write_text(f"sources:\n- {one}\n- {{list: out/index.vmae}}\n")
    assert main(["pack", str(tmp_path / "again.yaml"), str(tmp_path / "x"), "--shards"]) == 2
    assert "has an index among its sources" in capsys.readouterr().err


def test_videos_go_in_as_they_are(clips, bar_videos, tmp_path, capsys):
    names = {"h264_open_mkv": ".mkv", "vp9": ".webm", "avi": ".avi"}
    (tmp_path / "list.txt").write_text("".join(f"{bar_videos[name]} 4\n" for name in names))
    out = tmp_path / "out"
    assert run(tmp_path, out, "--as-is") == 2
    assert "--as-is stores videos as they are" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "list.txt"), str(out), "--shards", "--as-is", "--workers", "1"]) == 0
    index = read_index(out / "index.vmae")
    for entry, (name, suffix) in zip(index, names.items(), strict=True):
        assert entry.path.endswith(suffix)
        with open(entry.shard.name, "rb") as file:
            file.seek(entry.video.offset)
            assert file.read(entry.video.length) == bar_videos[name].read_bytes()
        with open_video(entry, "pyav") as stored, open_video(bar_videos[name], "pyav") as plain:
            assert len(stored) == len(plain) == entry.frames
    assert "decoding" not in json.loads((out / "report.json").read_text())
    assert main(["pack", str(tmp_path / "list.txt"), str(tmp_path / "x"), "--as-is"]) == 2
    assert main(["pack", str(tmp_path / "list.txt"), str(tmp_path / "x"), "--shard-size", "3"]) == 2
    assert "give --shards too" in capsys.readouterr().err


def test_every_third_frame(clips, packed, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(clips, out, "--keep-every", "3") == 1
    for entry, whole in zip(read_index(out / "index.vmae"), read_index(packed / "index.vmae"), strict=True):
        assert (entry.frames, entry.fps, entry.key) == (whole.frames, whole.fps, whole.key)
        assert (entry.keep_every, entry.phase < 3) == (3 if entry.kind == "video" else 1, True)
        with open_video(entry, "pyav") as some, open_video(whole, "pyav") as all_of_them:
            assert len(some) == len(all_of_them)
    with tarfile.open(out / "shard-00000.tar") as tar:
        about = json.load(tar.extractfile("000000_v_0__.json"))
    assert (about["frames"], about["keep_every"]) == (3, 3) and 0 <= about["phase"] < 3
    assert run(clips, packed, "--keep-every", "3") == 2
    assert main(["pack", str(clips / "list.txt"), str(tmp_path / "x"), "--keep-every", "3"]) == 2
    assert "give --shards too" in capsys.readouterr().err


def test_a_changed_image_or_a_lost_one_leaves_the_folder_out(clips, tmp_path):
    (tmp_path / "f").mkdir()
    for number in (1, 2):
        Image.new("RGB", (8 * number, 8)).save(tmp_path / "f" / f"img_{number:05}.jpg")
    (tmp_path / "list.txt").write_text(f"f 2 0\n{clips}/frames 3 1\n{clips}/frames 4 1\n")
    assert (
        main(["pack", str(tmp_path / "list.txt"), str(tmp_path / "out"), "--shards", "--workers", "1"]) == 1
    )
    index = read_index(tmp_path / "out" / "index.vmae")
    assert [entry.key for entry in index] == ["000001_frames"]
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "16 x 8 pixels, unlike" in lines and "img_00004.jpg: does not exist" in lines


def test_one_rank_packs(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(clips, tmp_path / "out") == 0 and not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(clips, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(clips, tmp_path / "file") == 2
    assert run(clips, tmp_path / "file" / "x") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_file_that_changes_or_goes_meanwhile(clips, tmp_path, monkeypatch, capsys):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / "v.0 ü.mp4", tmp_path / name)
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 1\n")
    arguments = ["pack", str(tmp_path / "list.txt"), str(tmp_path / "out"), "--shards", "--as-is"]
    real = packing._add_file
    for change, told in (
        (lambda: (tmp_path / "b.mp4").unlink(True), "b.mp4 cannot be read: No such file"),
        (lambda: None, None),
    ):
        monkeypatch.setattr(packing, "_add_file", lambda *given, change=change: (change(), real(*given))[1])
        assert main([*arguments, "--workers", "1"]) == (2 if told else 0)
        assert (told or "") in capsys.readouterr().err
        assert bool(list((tmp_path / "out").glob("*.tar"))) == (told is None)
        shutil.copy(clips / "v.1 ü.mp4", tmp_path / "b.mp4")
    assert main(["pack", str(tmp_path / "list.txt"), "s3://bucket/out", "--shards"]) == 2
    assert "is an address: pack into a folder" in capsys.readouterr().err


def test_no_good_video(clips, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{clips}/bad.mp4 0\n")
    assert run(tmp_path, tmp_path / "out") == 1
    assert "0 of 1 videos packed" in capsys.readouterr().out
    assert len(read_index(tmp_path / "out" / "index.vmae")) == 0


def test_the_plan():
    plan = ShardPlan((Origin("a", 0, 5), Origin("b", 5, 4), Origin("c", 9, 1)), (2, 4, 7))
    assert len(plan) == 5
    assert [list(numbers) for _, numbers in plan] == [[0, 1], [2, 3], [4], [5, 6, 7, 8], [9]]
    assert [source.name for source, _ in plan] == ["a", "a", "a", "b", "c"]
    assert probes(Origin("a", 10, 3)) == [10, 11, 12] and len(probes(Origin("a", 0, 999))) == 16
    assert videos_for(1 << 30, [300_000] * 16) == 3500 and videos_for(10, [30]) == 1
    assert videos_for(100, [1]) == 100 and videos_for(1 << 30, []) == 1000


def test_what_decides_the_list():
    entries = [VideoEntry("/data/a.mp4"), VideoEntry("/data/f", "frames", 1, 3)]
    moved = [VideoEntry("/other/a.mp4"), VideoEntry("/other/f", "frames", 1, 3)]

    def hashed(entries, labels=None, root="/data"):
        return hash_list(entries, labels, [Origin("l", 0, 2, root)])

    assert hashed(entries) == hashed(moved, root="/other") != hashed(moved)
    others = [hashed(entries, [(1,), None]), hashed(entries, [(1, 2), None]), hashed(entries[::-1])]
    assert len({hashed(entries), *others}) == 4


def test_failures_are_kept_as_they_were():
    assert Failure(*list(Failure("a", "b", None))) == Failure("a", "b", None)
