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
from vmae.files.flat_arrays import write_arrays
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


@pytest.mark.slow
def test_fine_tuning_and_tests(labelled_world, stored, tmp_path, capsys):
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


@pytest.mark.slow
def test_a_teacher_on_shards(labelled_world, stored, tmp_path):
    train = stored / "train" / "index.vmae"
    where = ["--data", str(labelled_world / "train.txt"), "--no-test", "--output", str(tmp_path / "teacher")]
    assert main(["finetune", *where, *TUNE]) == 0
    own = [*TUNE, "--teacher", str(tmp_path / "teacher"), "--no-test", "--output"]
    for name, data in (("files", labelled_world / "train.txt"), ("shards", train)):
        assert main(["distil", "--data", str(data), *own, str(tmp_path / name)]) == 0
    assert losses(tmp_path / "files") == losses(tmp_path / "shards")
    logits = ["--logits", str(tmp_path / "logits"), "--mixup", "0", "--cutmix", "0"]
    assert main(["distil", "--data", str(train), *own, str(tmp_path / "x"), *logits, "--store", "1"]) == 0
    shutil.copytree(stored / "train", tmp_path / "moved")
    moved = ["--data", str(tmp_path / "moved" / "index.vmae")]
    assert main(["distil", *moved, *own, str(tmp_path / "taught"), *logits]) == 0


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


@pytest.mark.slow
def test_shards_in_a_store_are_those_of_this_machine(store, pretrain, stored, tmp_path, capsys, at_step):
    address = store.upload(stored / "train" / "index.vmae", "commands")
    assert pretrain(tmp_path / "files") == 0
    run = tmp_path / "run"
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert pretrain(run, data=stored / "train" / "index.vmae") == 0
    assert pretrain(run, "--workers", "1", data=address) == 0
    assert losses(run) == losses(tmp_path / "files")
    assert f"data: {address}" in (run / "config.yaml").read_text()
    mixed = tmp_path / "mix.yaml"
    mixed.write_text(f"sources:\n- {{name: there, list: {address}}}\n- {{list: {stored}/val/index.vmae}}\n")
    assert pretrain(tmp_path / "mixed", data=mixed) == 0
    out = capsys.readouterr().out
    assert "train: 12 videos, 120 images" in out and "there: 12 videos, 120 images, 63.2% of samples" in out
    check = ["check-data", address, "--workers", "1", "--output"]
    assert main(check[:-1]) == 2 and "lies in a store: --output DIR says" in capsys.readouterr().err
    assert main([*check, str(tmp_path / "check")]) == 0
    assert "12 videos: 12 good, 0 bad" in capsys.readouterr().out
    local = shutil.copy(stored / "train" / "index.vmae", tmp_path / "copy.vmae")
    root = ["--data-root", address.rpartition("/")[0]]
    assert pretrain(tmp_path / "rooted", *root, data=local) == 0
    assert losses(tmp_path / "rooted") == losses(tmp_path / "files")


@pytest.mark.slow
def test_stores_that_cannot_be_read_are_one_line_before_the_run(
    store, pretrain, stored, tmp_path, capsys, asker
):
    address = store.upload(stored / "train" / "index.vmae", "refused")
    write_arrays(tmp_path / "old.vmae", {}, {"format": "vmae-index", "version": "2"})
    store.put("tests/old.vmae", (tmp_path / "old.vmae").read_bytes())

    def told(data):
        assert pretrain(tmp_path / "run", data=data) == 2 and not (tmp_path / "run").exists()
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        return error

    assert "s3://tests/old.vmae is of version 2" in told("s3://tests/old.vmae")
    assert "s3://no-such-bucket/index.vmae" in told("s3://no-such-bucket/index.vmae")
    assert "s3://tests/nothing/index.vmae" in told("s3://tests/nothing/index.vmae")
    store.delete(address.removeprefix("s3://").replace("index.vmae", "shard-00001.tar"))
    assert "shard-00001.tar" in told(address)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        asker.delenv(name)
    assert address in told(address)
