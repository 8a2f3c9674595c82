"""Commands on an index of shards: the losses, scores and features of the list, wherever the shards lie."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from shard_files import write_shards

from vmae.cli import main
from vmae.data.labels import read_labelled_list
from vmae.data.manifest import read_list
from vmae.synthetic.samples import sample_videos
from vmae.train.metrics import read_log

SIZE = "--model vit_tiny --image-size 32 --num-frames 4 --device cpu".split()
FLAGS = "--stride 2 --batch-size 4 --workers 0 --log-every 1 --no-tensorboard".split()
TUNE = [*SIZE, *FLAGS, *"--steps 2 --num-sample 1 --warmup-steps 0 --lr 0.02".split()]


@pytest.fixture(scope="module")
def stored(labelled_world, tmp_path_factory):
    """A folder with `train` and `val`: shards of the labelled lists."""
    folder = tmp_path_factory.mktemp("stored")
    for name in ("train", "val"):
        found = read_labelled_list(labelled_world / f"{name}.txt")
        write_shards(folder / name, found.entries, found.labels, each=5)
    return folder


def losses(folder):
    return [record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record]


def test_pretraining_goes_on_where_the_shards_lie_now(pretrain, stored, tmp_path, capsys, at_step):
    assert pretrain(tmp_path / "files") == 0
    shutil.copytree(stored / "train", tmp_path / "here")
    run = tmp_path / "run"
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert pretrain(run, data=tmp_path / "here" / "index.vmae") == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert pretrain(run, data=tmp_path / "there" / "index.vmae") == 0
    assert "here: 12 videos, 120 images" in capsys.readouterr().out
    assert losses(run) == losses(tmp_path / "files")
    assert "data: " + str(tmp_path / "there" / "index.vmae") in (run / "config.yaml").read_text()
    assert pretrain(run, "--steps", "7") == 2
    error = capsys.readouterr().err
    assert "its videos lay in shards then and lie in files now" in error
    assert "(none do where the shards were packed of that list, in its order)" in error
    assert pretrain(run, "--steps", "7", "--allow-list-change") == 0


def test_fine_tuning_tests_and_distillation(labelled_world, stored, tmp_path, capsys):
    lists = {"files": [labelled_world / f"{name}.txt" for name in ("train", "val")]}
    lists["shards"] = [stored / name / "index.vmae" for name in ("train", "val")]
    test = ["--segments", "2", "--crops", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    for name, (train, val) in lists.items():
        where = ["--data", str(train), "--val", str(val), "--no-test", "--output", str(tmp_path / name)]
        assert main(["finetune", *where, *TUNE]) == 0
        where = [str(val), "--checkpoint", str(tmp_path / name), "--output", str(tmp_path / f"{name}-test")]
        assert main(["evaluate", *where, *test, "--scores"]) == 0
    out = capsys.readouterr().out
    assert f"7 of the 7 videos of {lists['shards'][1]} are trained on too" in out
    assert losses(tmp_path / "files") == losses(tmp_path / "shards")
    one, other = (
        [
            json.loads(line)
            for line in (tmp_path / f"{name}-test" / "predictions.jsonl").read_text().splitlines()
        ]
        for name in lists
    )
    assert [record["scores"] for record in one] == [record["scores"] for record in other]
    assert [record["path"] for record in other][:2] == ["00000000_v00", "00000001_v01"]
    shutil.copytree(stored / "val", tmp_path / "moved")
    again = [str(tmp_path / "moved" / "index.vmae"), "--checkpoint", str(tmp_path / "shards"), "--output"]
    assert main(["evaluate", *again, str(tmp_path / "shards-test"), *test, "--scores"]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A list of two videos and its index."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "list.txt").write_text("".join(f"{video} 0 -1\n" for video in sample_videos()[2:]))
    keys = ["carphone_pristine", "carphone_distorted"]
    write_shards(folder / "out", read_list(folder / "list.txt"), keys=keys)
    return folder


@pytest.mark.slow
def test_features_have_the_names_of_the_keys(films, tmp_path, labelled_world):
    torch.manual_seed(0)
    assert (
        main(
            [
                "finetune",
                "--data",
                str(labelled_world / "train.txt"),
                "--output",
                str(tmp_path / "run"),
                *TUNE,
            ]
        )
        == 0
    )
    flags = ["--checkpoint", str(tmp_path / "run"), "--step", "30", "--device", "cpu", "--output"]
    for name, data in (("files", films / "list.txt"), ("shards", films / "out" / "index.vmae")):
        assert main(["features", str(data), *flags, str(tmp_path / name)]) == 0
    for name in ("carphone_pristine", "carphone_distorted"):
        one, other = (np.load(tmp_path / kind / f"{name}.npy") for kind in ("files", "shards"))
        assert np.array_equal(one, other) and one.shape == (4, 128)
    shutil.copytree(films / "out", tmp_path / "moved")
    assert main(["features", str(tmp_path / "moved" / "index.vmae"), *flags, str(tmp_path / "shards")]) == 0


@pytest.mark.slow
def test_a_plan_of_an_index(films, capsys):
    assert (
        main(
            [
                "plan",
                "--data",
                str(films / "out" / "index.vmae"),
                "--gpus",
                "8",
                "--repeat",
                "2000",
                "--model",
                "vit_tiny",
            ]
        )
        == 0
    )
    assert "2 entries, the first:" in capsys.readouterr().out


@pytest.mark.slow
def test_check_data_finds_what_is_damaged(films, tmp_path, capsys):
    folder = shutil.copytree(films / "out", tmp_path / "out")
    assert main(["check-data", str(folder / "index.vmae"), "--workers", "1"]) == 0
    report = json.loads((tmp_path / "out" / "index-check" / "report.json").read_text())["videos"]
    assert [(record["frames"], record["codec"], record["container"]) for record in report] == [
        (120, "h264", "MP4")
    ] * 2
    with open(folder / "shard-00000.tar", "r+b") as shard:
        shard.seek(5000)
        shard.write(b"\0\0\0\0")
    assert (
        main(["check-data", str(folder / "index.vmae"), "--workers", "1", "--output", str(tmp_path / "c")])
        == 1
    )
    out = capsys.readouterr().out
    assert "bad: shard" in out and "clean.vmae (1 videos)" in out
    clean = tmp_path / "c" / "clean.vmae"
    assert main(["check-data", str(clean), "--workers", "1", "--output", str(tmp_path / "d")]) == 0
    report = json.loads((tmp_path / "d" / "report.json").read_text())["videos"]
    assert [record["path"] for record in report] == [f"{folder}/shard-00000.tar/carphone_distorted.mp4"]
