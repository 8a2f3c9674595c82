"""Bad videos in a run: said once, counted at its end, and too many of them stop it, on all ranks at once."""

import contextlib
import dataclasses
import io
import json
import os

import pytest

from vmae.cli import main
from vmae.config import PRESETS
from vmae.data import video_dataset
from vmae.data.decode import open_video
from vmae.synthetic.samples import sample_videos

MICRO = dict(embed_dim=48, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
FLAGS = (
    "--model micro --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75 "
    "--no-tensorboard "
    "--batch-size 2 --lr 0.1 --log-every 1 --device cpu"
).split()


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(PRESETS, "micro", MICRO)


@pytest.fixture
def write_list(tmp_path):
    def write(good: int, bad: int):
        names = [f"good{number}.mp4" for number in range(good)] + [
            f"bad{number}.mp4" for number in range(bad)
        ]
        for name in names:
            if name.startswith("good"):
                (tmp_path / name).symlink_to(sample_videos()[2])
            else:
                (tmp_path / name).write_text("no video")
        (tmp_path / "list.txt").write_text("".join(f"{tmp_path / name}\n" for name in names))
        return tmp_path / "list.txt"

    return write


def pretrain(videos, *flags: str) -> int:
    return main(["pretrain", "--data", str(videos), "--output", str(videos.parent / "run"), *FLAGS, *flags])


def ends(folder):
    return [start.get("end") for start in json.loads((folder / "run" / "run.json").read_text())["starts"]]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_one_bad_video_is_said_once_and_counted(write_list, tmp_path, capsys, workers):
    videos = write_list(3, 1)
    assert pretrain(videos, "--steps", "4", "--workers", workers) == 0
    out, err = capsys.readouterr()
    (note,) = [
        line for line in (out + err).splitlines() if line.startswith("note: another video stands in for one")
    ]
    assert (
        f"{tmp_path / 'bad0.mp4'}: cannot be opened" in note
        and str(tmp_path / "run" / "quarantine.jsonl") in note
    )
    (end,) = ends(tmp_path)
    assert end == {"step": 4, "bad_videos": 1, "failed_reads": 2}  # 4 steps of 2 are two epochs of 4
    assert f"bad videos: 1, replaced by others 2 times; see {tmp_path / 'run' / 'quarantine.jsonl'}" in out
    (tmp_path / "bad0.mp4").unlink()
    (tmp_path / "bad0.mp4").symlink_to(sample_videos()[2])  # mended between two starts
    assert pretrain(videos, "--steps", "6", "--workers", workers) == 0
    assert ends(tmp_path) == [end, {"step": 6, "bad_videos": 0, "failed_reads": 0}]
    assert "bad videos: none" in capsys.readouterr().out


def test_three_bad_ones_of_four_stop_the_run(write_list, tmp_path, capsys):
    videos = write_list(1, 3)
    assert pretrain(videos, "--steps", "40", "--workers", "1") == 2
    err = capsys.readouterr().err
    assert "No more than 1 of 4 videos may be bad (--max-bad-share 0.05)" in err and "bad0.mp4" in err
    assert pretrain(videos, "--steps", "4", "--max-bad-share", "0.8") == 0
    assert ends(tmp_path)[-1]["bad_videos"] == 3


def _on_a_rank(videos):
    """A run whose rank 1 cannot see three of the videos, as where a node lacks a mount."""

    def open_here(entry, backend):
        lost = os.environ["RANK"] == "1" and entry.path[-5] in "012"
        return open_video(dataclasses.replace(entry, path=f"{entry.path}.gone") if lost else entry, backend)

    video_dataset.open_video = open_here  # of this fork
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = pretrain(videos, "--steps", "40", "--workers", "0", "--batch-size", "1")
    return code, err.getvalue()


def test_a_rank_that_finds_too_many_stops_all_with_the_same_line(write_list, run_ranks):
    (code, err), (other_code, other_err) = run_ranks(2, _on_a_rank, write_list(8, 0))
    assert code == other_code == 2
    for text in (err, other_err):
        assert (
            "error: rank 1: " in text
            and "No more than 1 of 8 videos may be bad" in text
            and "Traceback" not in text
        )
    assert err.count("note: another video stands in") == 1 and "note" not in other_err
