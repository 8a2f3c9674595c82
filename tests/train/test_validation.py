"""Validation while a run trains: what it measures, that it changes nothing else, the best checkpoint, kills,
the early end, and the test that follows."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vmae
from vmae import ModelConfig, build_classifier
from vmae.checkpoint.classifier import load_classifier
from vmae.checkpoint.folder import CheckpointFolder, export_weights
from vmae.checkpoint.format import read_group, read_manifest
from vmae.checkpoint.published import load_weights
from vmae.cli import main
from vmae.config import OptimConfig
from vmae.data.augment_classify import AugmentConfig
from vmae.data.classify_dataset import ClipConfig, MiddleClipDataset, spatial_views
from vmae.data.labels import read_labelled_list
from vmae.data.sampling import sample_dense_indices
from vmae.evaluate import classify
from vmae.tools.curves import describe, draw, read_curve, table
from vmae.train.finetune_settings import FinetuneConfig
from vmae.train.loop import Trainer
from vmae.train.metrics import read_log
from vmae.train.parallel import Parallel
from vmae.train.passes import Stopped
from vmae.train.validation import ValidationSet

ROOT = Path(__file__).parents[2]
SIZE = dict(img_size=32, num_frames=4)
CLIP = ClipConfig(num_frames=4, image_size=32, stride=2)
MODEL = "--model vit_tiny --image-size 32 --num-frames 4 --stride 2".split()
RUN = "--batch-size 4 --num-sample 1 --workers 0 --save-every 100 --log-every 1 --no-tensorboard".split()
# Two steps an epoch, on labels that mean nothing: top-1 goes up and down.
LEARNING = "--augment none --lr 0.3 --layer-decay 1 --warmup-steps 0 --epochs 4 --seed 2 --device cpu".split()


@pytest.fixture(scope="module")
def world(labelled_world, tmp_path_factory):
    """A folder with train.csv (nine videos, any classes) and val.csv (ten videos)."""
    folder = tmp_path_factory.mktemp("lists")
    lines = (labelled_world / "train.txt").read_text().splitlines()
    trained = [f"{line[:-1]}{number**2 % 7 % 3}\n" for number, line in enumerate(lines[:9])]
    (folder / "train.csv").write_text("".join(trained))
    (folder / "val.csv").write_text("".join(f"{line[:-1]}{(int(line[-1]) + 2) % 3}\n" for line in lines[2:]))
    return folder


@pytest.fixture
def finetune(world, tmp_path):
    """`finetune(*flags, out=name, data=folder)`: the command; its exit code."""

    def start(*flags, out="run", data=None):
        where = ["--data", str(data or world), "--output", str(tmp_path / out)]
        return main(["finetune", *where, *MODEL, *RUN, *LEARNING, *map(str, flags)])

    return start


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run with an average of its weights; not tested at the end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    where = ["--data", str(world), "--output", str(folder)]
    assert main(["finetune", *where, *MODEL, *RUN, *LEARNING, "--ema", "0.7", "--no-test"]) == 0
    return folder


def lines(folder):
    return read_log(folder / "log.jsonl")


def losses(folder):
    return [(line["step"], line["loss"]) for line in lines(folder) if "loss" in line]


def validations(folder):
    """All that a run found on its list, without how long it took."""
    found = [line for line in lines(folder) if "val_list" in line]
    return [{key: value for key, value in line.items() if key != "val_s"} for line in found]


def plain_scores(model, labelled, multi=False):
    """Top-1, top-5 (percent) and loss, one video after the other."""
    data, hits, loss = MiddleClipDataset(labelled.entries, CLIP), [], []
    for video, own in enumerate(labelled.labels):
        with torch.no_grad():
            logits = model(data[video])[0].double()
        order = logits.argsort(descending=True).tolist()
        hits.append((order[0] in own, bool(set(order[:5]) & set(own))))
        if multi:
            truth = torch.zeros(len(logits), dtype=torch.float64)
            truth[list(own)] = 1
            loss.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, truth).item())
        else:
            loss.append(-logits.log_softmax(0)[own[0]].item())
    return (*(100 * np.mean(hits, axis=0)).tolist(), float(np.mean(loss)))


# --- What is measured ---


def test_a_middle_clip_is_the_published_one(labelled_world):
    """The middle of the span of training, its frames spread evenly, the middle crop."""
    labelled = read_labelled_list(labelled_world / "val.txt")
    indices = sample_dense_indices(10, 4, 2, None)
    assert indices.tolist() == [1, 3, 6, 8]  # (8 + 10) // 2 = 9 ends a span of 8
    data = MiddleClipDataset(labelled.entries, CLIP)
    with data._open(labelled.entries[3]) as reader:
        frames = reader.frames(indices)
    assert np.array_equal(data[3].numpy(), spatial_views(frames, 32, 1)) and data[3].shape == (
        1,
        4,
        32,
        32,
        3,
    )
    sparse = MiddleClipDataset(labelled.entries, CLIP.replace(sampling="sparse"))
    assert sparse.view_indices(10, labelled.entries[0]).tolist() == [[1, 3, 5, 7]]


def test_every_epoch_has_a_line_with_the_scores_of_its_weights(whole, world):
    found = validations(whole)
    assert [line["step"] for line in found] == [2, 4, 6, 8] and [line["epoch"] for line in found] == [
        1,
        2,
        3,
        4,
    ]
    assert all(line["val_videos"] == 10 and line["val_undecodable"] == 0 for line in found)
    assert len({line["val_top1"] for line in found}) > 1  # else the comparisons below say little
    labelled = read_labelled_list(world / "val.csv")
    for averaged, prefix in ((False, "val_"), (True, "val_ema_")):
        model = load_classifier(whole, averaged=averaged).model
        top1, top5, loss = plain_scores(model, labelled)
        assert (found[-1][f"{prefix}top1"], found[-1][f"{prefix}top5"]) == (top1, top5)
        assert found[-1][f"{prefix}loss"] == pytest.approx(loss, rel=1e-5)
    assert found[-1]["val_loss"] != found[-1]["val_ema_loss"]
    assert all(line["val_s"] > 0 for line in lines(whole) if "val_list" in line)


def test_a_run_with_validation_trains_as_one_without(whole, finetune, tmp_path):
    assert finetune("--ema", "0.7", "--no-val", "--no-test", out="plain") == 0
    assert losses(tmp_path / "plain") == losses(whole) and validations(tmp_path / "plain") == []
    for name in ("weights.pth", "weights_ema.pth"):
        one, two = load_weights(whole / name), load_weights(tmp_path / "plain" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "plain" / "checkpoint-best").exists()


@pytest.mark.slow
def test_drop_path_and_dropout_see_no_validation(finetune, tmp_path):
    """Random numbers of training are drawn on, and the model trains on in its mode."""
    flags = ["--drop-path", "0.3", "--head-drop", "0.4", "--augment", "published", "--no-test"]
    assert finetune(*flags, out="a") == 0 and finetune(*flags, "--no-val", out="b") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(validations(tmp_path / "a")) == 4


@pytest.mark.slow
def test_the_time_of_a_validation_is_in_no_step(finetune, tmp_path, monkeypatch):
    plain = ValidationSet.score

    def slow(self, *args):
        __import__("time").sleep(0.5)
        return plain(self, *args)

    monkeypatch.setattr(ValidationSet, "score", slow)
    assert finetune("--no-test", "--epochs", "1") == 0
    assert all(line["step_s"] < 0.4 for line in lines(tmp_path / "run") if "loss" in line)
    assert [line["val_s"] > 0.5 for line in lines(tmp_path / "run") if "val_list" in line] == [True]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_share_and_batch_counts_each_video_once(world, workers):
    """Ranks one after the other: their shares together are the list, whatever the batch."""
    labelled, model = (
        read_labelled_list(world / "val.csv"),
        build_classifier(ModelConfig.preset("vit_tiny", **SIZE), 3),
    )
    torch.nn.init.normal_(model.head.weight)
    options = dict(dtype="float32", multi_label=False, num_workers=workers)
    expected = plain_scores(model.eval(), labelled)

    class One(Parallel):
        """A rank that is alone, and told what the others found."""

        def exchange(self, numbers):
            return torch.tensor([list(map(float, numbers))])

        def gather(self, value, group=None):
            self.own = value
            return [value, *others]

    for ranks, batch in ((1, 3), (3, 2), (12, 64)):
        others: list = []
        for rank in reversed(range(ranks)):
            parallel = One(rank=rank, world_size=ranks)
            videos = ValidationSet(labelled, CLIP, parallel=parallel, batch_size=batch, **options)
            with videos.opened():
                scores, _ = videos.score(model)
            others.append(parallel.own)
        assert scores["videos"] == 10 and (scores["top1"], scores["top5"]) == expected[:2], (ranks, batch)
        assert scores["loss"] == pytest.approx(expected[2], rel=1e-5)


@pytest.mark.slow
def test_several_labels_are_measured_by_average_precision(world, finetune, tmp_path):
    several = tmp_path / "several"
    several.mkdir()
    for name in ("train.csv", "val.csv"):
        first, *rest = (world / name).read_text().splitlines()
        (several / name).write_text("\n".join([f"{first[:-1]}0;2", *rest]) + "\n")
    assert finetune("--no-test", data=several) == 0
    found = validations(tmp_path / "run")
    model, labelled = load_classifier(tmp_path / "run").model, read_labelled_list(several / "val.csv")
    data = MiddleClipDataset(labelled.entries, CLIP)
    with torch.no_grad():
        scores = torch.cat([model(data[video]) for video in range(10)]).sigmoid().numpy()
    truth = labelled.targets(range(10)).numpy() > 0
    precision = (
        100
        * classify.score(
            [{"video": v, "top": [[0, 1.0]], "scores": row.tolist()} for v, row in enumerate(scores)],
            labelled.labels,
            3,
        )["mean_average_precision"]
    )
    assert found[-1]["val_map"] == pytest.approx(precision / 100) and truth[0].sum() == 2
    assert found[-1]["val_loss"] == pytest.approx(plain_scores(model, labelled, multi=True)[2], rel=1e-5)
    best = max(found, key=lambda line: line["val_map"])
    assert (tmp_path / "run" / "checkpoint-best").resolve().name == f"checkpoint-{best['step']:08}"


@pytest.mark.slow
def test_broken_videos_are_counted_and_said_and_stop_nothing(world, finetune, tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    (folder / "train.csv").write_text((world / "train.csv").read_text())
    good = (world / "val.csv").read_text().splitlines()
    (folder / "val.csv").write_text("\n".join([*good[:4], f"{tmp_path}/bad.mp4 1", *good[4:]]) + "\n")
    assert finetune("--epochs", "1", "--workers", "1", data=folder) == 0
    (found,) = validations(tmp_path / "run")
    assert (found["val_videos"], found["val_undecodable"]) == (10, 1)
    said = capsys.readouterr()
    assert "10 videos (1 not decoded)" in said.err and f"left out: {tmp_path}/bad.mp4" in said.err
    assert "could not be decoded, and does not count" in said.out  # by the test at the end


def test_weights_that_are_no_numbers_hit_nothing(world):
    labelled, model = (
        read_labelled_list(world / "val.csv"),
        build_classifier(ModelConfig.preset("vit_tiny", **SIZE), 3),
    )
    torch.nn.init.constant_(model.head.bias, float("nan"))
    options = dict(parallel=Parallel(), dtype="float32", multi_label=False, batch_size=4)
    scores, _ = ValidationSet(labelled, CLIP, **options).score(model)
    assert (scores["top1"], scores["top5"], scores["loss"]) == (0, 0, None)
    json.dumps(scores, allow_nan=False)


@pytest.mark.slow
def test_other_epochs_and_the_last_step(finetune, tmp_path):
    assert finetune("--val-every", "3", "--no-test") == 0
    assert [line["step"] for line in validations(tmp_path / "run")] == [6, 8]


# --- The best checkpoint ---


def best_step(found):
    """The first of the best."""
    return max(found, key=lambda line: (line["val_top1"], -line["step"]))["step"]


def test_the_best_checkpoint_stays_and_is_the_first_of_the_best(finetune, tmp_path):
    run = tmp_path / "run"
    assert finetune("--keep", "1", "--save-every", "1", "--no-test") == 0
    found = validations(run)
    best, last = best_step(found), found[-1]["step"]
    assert best < last, [line["val_top1"] for line in found]  # else it stays as the newest one
    assert os.readlink(run / "checkpoint-best") == f"checkpoint-{best:08}"
    assert [path.name for path in CheckpointFolder(run).paths()] == [
        f"checkpoint-{best:08}",
        f"checkpoint-{last:08}",
    ]
    weights, state = load_weights(run / "weights_best.pth"), read_group(run / "checkpoint-best")
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert read_manifest(run / "checkpoint-best")["step"] == best
    newest, chosen = load_classifier(run), load_classifier(run / "checkpoint-best")
    assert newest.path.name == f"checkpoint-{last:08}" and chosen.path.name == "checkpoint-best"
    assert not torch.equal(newest.model.head.weight, chosen.model.head.weight)


def test_a_file_system_without_links(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.path_of(step).mkdir()
        (folder.path_of(step) / "manifest.json").write_text("{}")
    assert folder.set_best(1) == "" and os.readlink(tmp_path / "checkpoint-best") == "checkpoint-00000001"
    (tmp_path / ".checkpoint-best.new").symlink_to("gone")  # of a kill
    assert (
        folder.set_best(2) == "" and (tmp_path / "checkpoint-best").resolve() == folder.path_of(2).resolve()
    )
    assert "checkpoint-00000003, is gone" in folder.set_best(3)

    def refuse(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    assert "the best checkpoint is checkpoint-00000001" in folder.set_best(1)


@pytest.mark.slow
def test_a_fresh_start_moves_all_of_it_aside(finetune, tmp_path):
    run = tmp_path / "run"
    assert finetune("--epochs", "1") == 0
    first = validations(run)
    assert finetune("--epochs", "1", "--no-resume", "--seed", "3", "--no-test") == 0
    old = run / "previous-1"
    assert validations(old) == first and (old / "checkpoint-best" / "manifest.json").is_file()
    assert (old / "test" / "results.json").is_file() and (old / "weights_best.pth").is_file()
    assert validations(run) != first and not (run / "test").exists()


# --- Kills and stops ---


def expect_the_same(run, whole):
    assert losses(run) == losses(whole) and validations(run) == validations(whole)
    assert os.readlink(run / "checkpoint-best") == os.readlink(whole / "checkpoint-best")
    for name in ("weights.pth", "weights_ema.pth", "weights_best.pth"):
        one, two = load_weights(run / name), load_weights(whole / name)
        assert all(torch.equal(one[key], two[key]) for key in two), name


EMA = ["--ema", "0.7", "--no-test"]


def raise_at(monkeypatch, owner, name, count):
    """Let the call number `count` of a method end the run, as a kill does for what is on the disk."""
    plain, calls = getattr(owner, name), []

    def method(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return lambda: monkeypatch.setattr(owner, name, plain)


@pytest.mark.parametrize(
    "owner, name, count",
    [
        (ValidationSet, "_round", 11),  # in the middle of the averaged weights of step 4
        pytest.param(
            CheckpointFolder, "set_best", 1, marks=pytest.mark.slow
        ),  # the log tells of it, no link does
        pytest.param(Trainer, "clip", 6, marks=pytest.mark.slow),  # in the step after a validation
    ],
)
def test_a_run_that_is_cut_short_ends_as_the_whole_one(
    whole, finetune, tmp_path, monkeypatch, owner, name, count
):
    again = raise_at(monkeypatch, owner, name, count)
    assert finetune(*EMA, "--save-every", "2") == 130
    again()
    assert not (tmp_path / "run" / "weights.pth").exists()
    assert finetune(*EMA, "--save-every", "2") == 0
    expect_the_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_stop_in_a_validation_is_taken_at_once_and_made_good(
    whole, finetune, tmp_path, monkeypatch, capsys
):
    plain, rounds = ValidationSet._round, []

    def stop(self, *args):
        rounds.append(1)
        if len(rounds) == 8:  # of the second validation
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args)

    monkeypatch.setattr(ValidationSet, "_round", stop)
    assert finetune(*EMA) == 0
    run = tmp_path / "run"
    assert "stopped by SIGTERM after step 4" in capsys.readouterr().out and len(rounds) == 8
    assert [line["step"] for line in validations(run)] == [2]
    assert CheckpointFolder(run).latest().name == "checkpoint-00000004"
    monkeypatch.setattr(ValidationSet, "_round", plain)
    assert finetune(*EMA) == 0
    expect_the_same(run, whole)


@pytest.mark.slow
def test_from_an_earlier_checkpoint_later_validations_are_made_again(whole, finetune, tmp_path, capsys):
    run = tmp_path / "run"
    assert finetune(*EMA, "--save-every", "2", "--keep", "9") == 0
    (run / "weights.pth").unlink()
    assert finetune(*EMA, "--save-every", "2", "--keep", "9", "--resume", run / "checkpoint-00000002") == 0
    expect_the_same(run, whole)
    assert (run / "previous-1" / "checkpoint-00000004").is_dir()


@pytest.mark.slow
def test_another_list_has_a_best_of_its_own(finetune, tmp_path, world):
    run, other = tmp_path / "run", tmp_path / "other.csv"
    assert finetune("--epochs", "2", "--no-test") == 0
    other.write_text("".join(f"{line}\n" for line in (world / "val.csv").read_text().splitlines()[:6]))
    assert finetune("--epochs", "4", "--no-test", "--val", other) == 0
    found = validations(run)
    assert [line["val_videos"] for line in found] == [10, 10, 6, 6, 6]  # step 4 has one on the new list too
    own = [line for line in found if line["val_videos"] == 6]
    assert os.readlink(run / "checkpoint-best") == f"checkpoint-{best_step(own):08}"


SCRIPT = """
import os, signal, sys
from pathlib import Path
from vmae.checkpoint.saver import Saver
from vmae.cli import main
from vmae.train.loop import Trainer
from vmae.train.validation import ValidationSet

where, once = sys.argv.pop(1), Path(sys.argv.pop(1))
owner, name, count = dict(step=(Trainer, "clip", 5), validation=(ValidationSet, "_round", 8),
                          saving=(Saver, "_complete", 2))[where]
plain, calls = getattr(owner, name), []

def method(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == count and self.parallel.rank == self.parallel.world_size - 1 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args, **kwargs)

setattr(owner, name, method)
raise SystemExit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "validation", "saving"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_kill_leaves_the_same_record(world, tmp_path, where, ranks):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            "--standalone",
        ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}

    def start(out, once):
        place = ["--data", str(world), "--output", str(tmp_path / out)]
        flags = [
            *MODEL,
            *RUN,
            *LEARNING,
            *EMA,
            "--workers",
            "1",
            "--batch-size",
            str(4 // ranks),
            "--save-every",
            "2",
        ]
        command = [*launcher, str(tmp_path / "script.py"), where, str(once), "finetune", *place, *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = tmp_path / "done"
    done.touch()
    assert (result := start("whole", done)).returncode == 0, result.stderr
    assert start("run", tmp_path / "once").returncode != 0 and (tmp_path / "once").exists()
    assert not (tmp_path / "run" / "weights.pth").exists()
    assert (result := start("run", tmp_path / "once")).returncode == 0, result.stderr
    expect_the_same(tmp_path / "run", tmp_path / "whole")
    assert len(validations(tmp_path / "run")) == 4


EVEN = ["--drop-path", "0", "--lr", "0.05"]  # nothing is drawn for a micro-batch; rounding stays small


def train_on_ranks(world, output, parallel, *flags):
    torch.set_num_threads(1)
    place = ["--data", str(world), "--output", str(output), "--parallel", parallel]
    return main(["finetune", *place, *MODEL, *RUN, *LEARNING, "--ema", "0.7", "--epochs", "2", *EVEN, *flags])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_find_what_one_does(run_ranks, world, tmp_path, parallel):
    """Ten videos in batches of 4 and 2; sharded weights, averaged ones among them, are those of the step."""
    assert run_ranks(1, train_on_ranks, world, tmp_path / "one", "none") == [0]
    assert run_ranks(2, train_on_ranks, world, tmp_path / "two", parallel, "--batch-size", "2") == [0, 0]
    for one, two in zip(validations(tmp_path / "one"), validations(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys() and one["val_videos"] == two["val_videos"] == 10
        for key in ("val_loss", "val_ema_loss"):
            assert one[key] == pytest.approx(two[key], rel=1e-3), key
    results = [json.loads((tmp_path / run / "test" / "results.json").read_text()) for run in ("one", "two")]
    assert results[0]["videos"] == results[1]["videos"] == 10


# --- The early end ---


@pytest.mark.slow
def test_patience_ends_a_run_and_a_larger_one_goes_on(finetune, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--epochs", "6", "--no-test"]
    assert finetune(*flags, out="whole") == 0
    found = validations(tmp_path / "whole")
    seen, waited, end = -1.0, 0, None
    for line in found:
        waited = 0 if line["val_top1"] > seen else waited + 1
        seen = max(seen, line["val_top1"])
        if waited == 2:
            end = line["step"]
            break
    assert end is not None and end < found[-1]["step"]
    capsys.readouterr()
    assert finetune(*flags, "--patience", "2") == 0
    assert f"ended early at step {end} of 12: 2 validations without a better one" in capsys.readouterr().out
    assert validations(run) == [line for line in found if line["step"] <= end]
    assert (run / "weights.pth").is_file() and CheckpointFolder(run).latest().name == f"checkpoint-{end:08}"
    assert finetune(*flags, "--patience", "2") == 0 and losses(run)[-1][0] == end  # nothing more
    assert finetune(*flags) == 0
    assert losses(run) == losses(tmp_path / "whole") and validations(run) == found


# --- The test at the end ---


@pytest.mark.slow
def test_the_best_weights_are_tested_once(finetune, tmp_path, capsys, monkeypatch, world):
    run, seen, plain = tmp_path / "run", [], classify.view_probabilities
    monkeypatch.setattr(classify, "view_probabilities", lambda *a, **k: seen.append(1) or plain(*a, **k))
    assert finetune("--test_num_segment", "2", "--test_num_crop", "1") == 0
    said = capsys.readouterr().out
    assert f"test of {run / 'checkpoint-best'}, into {run / 'test'}" in said and len(seen) == 10
    assert "to test: python -m vmae evaluate" not in said
    results = json.loads((run / "test" / "results.json").read_text())
    assert results["settings"]["views"] == {"segments": 2, "crops": 1} and results["videos"] == 10
    folder = tmp_path / "by_hand"
    views = ["--segments", "2", "--crops", "1", "--workers", "0", "--device", "cpu"]
    checkpoint = ["--checkpoint", str(run / "checkpoint-best"), "--output", str(folder)]
    assert main(["evaluate", str(world), *checkpoint, *views]) == 0
    assert json.loads((folder / "results.json").read_text())["top1"] == results["top1"]
    seen.clear()
    assert finetune("--test_num_segment", "2", "--test_num_crop", "1") == 0  # all is done
    said = capsys.readouterr().out
    assert "nothing to do" in said and "has the predictions of all videos" in said and not seen
    assert finetune("--test_num_segment", "2", "--test_num_crop", "1", "--test-weights", "last") == 0
    said = capsys.readouterr().out
    assert f"moved an earlier test with other weights or settings to {run / 'previous-1' / 'test'}" in said
    assert (run / "previous-1" / "test" / "results.json").is_file() and len(seen) == 10


@pytest.mark.slow
def test_a_test_that_was_killed_goes_on(finetune, tmp_path, monkeypatch):
    flags = ["--epochs", "1", "--test_num_segment", "1", "--test_num_crop", "1"]
    seen, plain = [], classify.view_probabilities

    def cut(*args, **kwargs):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(classify, "view_probabilities", cut)
    assert finetune(*flags) == 130 and (tmp_path / "run" / "weights.pth").is_file()
    assert finetune(*flags) == 0 and len(seen) == 11  # four of ten were done
    assert json.loads((tmp_path / "run" / "test" / "results.json").read_text())["videos"] == 10


@pytest.mark.slow
def test_lists_to_test_on(finetune, world, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(world, folder)
    (folder / "test.csv").write_text(
        "".join(f"{line}\n" for line in (world / "val.csv").read_text().splitlines()[:3])
    )
    for flags, expected in (
        ([], folder / "test.csv"),
        (["--test", folder / "val.csv"], folder / "val.csv"),
        (["--no-test"], None),
    ):
        assert finetune("--dry-run", *flags, data=folder) == 0
        derived = json.loads(capsys.readouterr().out)["derived"]
        assert derived["test"]["list"] == (expected and str(expected)) and derived["test"]["segments"] == 5
    assert finetune("--dry-run", "--sparse_sample", data=folder) == 0
    assert json.loads(capsys.readouterr().out)["derived"]["test"]["segments"] == 2
    assert finetune("--epochs", "1", data=folder / "train.csv") == 0  # a list alone: as ever
    assert "to test: python -m vmae evaluate" in capsys.readouterr().out
    assert validations(tmp_path / "run") == [] and not (tmp_path / "run" / "test").exists()


@pytest.mark.slow
def test_a_run_is_repeated_by_its_settings_file(finetune, world, tmp_path):
    flags = ["--epochs", "1", "--test_num_segment", "1", "--test_num_crop", "1"]
    assert finetune(*flags) == 0 and finetune("--epochs", "1", "--no-val", "--no-test", out="none") == 0
    for out in ("run", "none"):
        again = tmp_path / f"{out}-again"
        assert (
            main(["finetune", "--config", str(tmp_path / out / "config.yaml"), "--output", str(again)]) == 0
        )
        assert validations(again) == validations(tmp_path / out) and losses(again) == losses(tmp_path / out)
        assert (again / "test").exists() == (tmp_path / out / "test").exists()


@pytest.mark.slow
def test_the_test_alone_and_the_validation_alone(whole, finetune, world, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    views = ["--test_num_segment", "1", "--test_num_crop", "1"]
    assert finetune("--eval", *views) == 0
    said = capsys.readouterr().out
    assert f"test of {tmp_path}/run/checkpoint-best" in said and losses(tmp_path / "run") == losses(whole)
    assert json.loads((tmp_path / "run" / "test" / "results.json").read_text())["videos"] == 10
    assert finetune("--validation", "--test-weights", "last") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation of")]
    last = validations(whole)[-1]
    assert f"top-1 {last['val_top1']:.2f} %" in line and f"loss {last['val_loss']:.4f}" in line
    assert finetune("--eval", *views, "--finetune", whole / "weights_ema.pth", out="other") == 0
    assert f"test of {whole / 'weights_ema.pth'}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["test"]
    assert finetune("--eval", *views, "--resume", whole / "checkpoint-00000008", out="third") == 0
    assert "checkpoint-00000008" in capsys.readouterr().out
    assert finetune("--eval", "--dry-run", out="dry") == 0 and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eval"], "holds no weights, and no --init (--finetune) names some"),
        (["--eval", "--no-test"], "--eval needs a list to test on"),
        (["--validation", "--no-val"], "--validation needs a list"),
        (["--patience", "2", "--no-val"], "--patience counts validations: name a list to validate on"),
        (["--patience", "0"], "--patience: must be a whole number from 1"),
        (["--val", "gone.csv"], "list to validate on: list file 'gone.csv' does not exist"),
        (["--test", "gone.csv"], "list to test on: list file 'gone.csv' does not exist"),
        (["--val-every", "0"], "--val-every: must be a whole number from 1"),
        (["--test-weights", "worst"], "unknown weights to test"),
        (["--num-classes", "2"], "label 2 is out of range"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(finetune, tmp_path, capsys, flags, message):
    assert finetune(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_other_bad_lists(finetune, world, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(world, folder)
    for content, message in (
        ("gone.mp4 1\n", "--no-val goes on without one"),
        ((world / "val.csv").read_text().replace(" 1\n", " 7\n"), "label 7 is out of range"),
        ((world / "val.csv").read_text().replace(" 1\n", " 1;2\n"), "has videos of several labels"),
    ):
        (folder / "val.csv").write_text(content)
        assert finetune(data=folder) == 2
        error = capsys.readouterr().err
        assert message in error and str(folder / "val.csv") in error and not (tmp_path / "run").exists()
    assert finetune("--no-val", "--no-test", "--epochs", "1", data=folder) == 0


def test_weights_without_a_fitting_head_are_not_tested(finetune, tmp_path, capsys):
    config = ModelConfig.preset("vit_tiny", **SIZE)
    state = build_classifier(config, 5).state_dict()
    export_weights(tmp_path / "five.pth", state, config={"model": config.to_dict()})
    bare = {name: value for name, value in state.items() if not name.startswith("head.")}
    export_weights(tmp_path / "bare.pth", bare, config={"model": config.to_dict()})
    for flags, message in (
        (["--init", tmp_path / "five.pth"], "head of 5 classes, the labels have 3"),
        (["--resume", tmp_path / "five.pth"], "head of 5 classes, the labels have 3"),
        (["--init", tmp_path / "bare.pth"], "has no head"),
        (["--init", tmp_path / "five.pth", "--new-head"], "--new-head leaves out the head"),
    ):
        assert finetune("--eval", *flags) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run" / "test").exists()


# --- Elsewhere ---


@pytest.mark.slow
def test_from_python(world, tmp_path):
    config = FinetuneConfig(
        model=ModelConfig.preset("vit_tiny", **SIZE),
        optim=OptimConfig(lr=0.05, warmup_epochs=0),
        clip=CLIP,
        augment=AugmentConfig.none(),
        data=str(world / "train.csv"),
        num_classes=3,
        num_sample=1,
        epochs=2,
        val=str(world / "val.csv"),
    )
    result = vmae.train(
        config, output=tmp_path / "run", batch_size=4, num_workers=0, device="cpu", tensorboard=False
    )
    assert result.steps == 4 and [line["step"] for line in validations(tmp_path / "run")] == [2, 4]
    assert isinstance(result.loss, float) and (tmp_path / "run" / "checkpoint-best").is_dir()


@pytest.mark.slow
def test_tensorboard_has_the_scores(finetune, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert finetune("--epochs", "1", "--no-test", "--tensorboard") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (found,) = events.Scalars("val_top1")
    assert found.step == 2 and found.value == pytest.approx(validations(tmp_path / "run")[0]["val_top1"])
    assert "val_list" not in events.Tags()["scalars"]


def test_curves_show_top_1(whole, tmp_path):
    curve = read_curve(whole)
    found = [line["val_top1"] for line in validations(whole)]
    assert curve.values("val_top1") == ([2, 4, 6, 8], found)
    header, row = table([curve])
    assert header.endswith("best top-1") and row.endswith(f"{max(found):.2f}")
    assert describe([curve])["curves"][0]["values"]["val_top1"]["value"] == found
    draw([curve], tmp_path / "curves.svg")
    plain = read_curve(whole)
    plain.records[:] = [record for record in plain.records if "loss_mean" in record]
    draw([plain], tmp_path / "plain.svg")
    panels = [(tmp_path / f"{name}.svg").read_text().count('<g id="axes_') for name in ("curves", "plain")]
    assert panels == [6, 4]


@pytest.mark.slow
def test_distillation_validates_too(whole, world, tmp_path):
    place = ["--data", str(world), "--output", str(tmp_path / "run"), "--teacher", str(whole)]
    flags = ["--epochs", "1", "--test_num_segment", "1", "--test_num_crop", "1"]
    assert main(["distil", *place, *MODEL, *RUN, *LEARNING, *flags]) == 0
    assert [line["step"] for line in validations(tmp_path / "run")] == [2]
    assert json.loads((tmp_path / "run" / "test" / "results.json").read_text())["videos"] == 10


def test_a_stop_is_no_error(world):
    """A signal that another rank received ends the pass here too."""
    labelled, model = (
        read_labelled_list(world / "val.csv"),
        build_classifier(ModelConfig.preset("vit_tiny", **SIZE), 3),
    )

    class Told(Parallel):
        def exchange(self, numbers):
            other = [0.0] * len(numbers)
            other[1] = 1.0  # SIGTERM
            return torch.tensor([list(map(float, numbers)), other])

    options = dict(dtype="float32", multi_label=False, batch_size=4)
    model.train()
    with pytest.raises(Stopped) as stopped:
        ValidationSet(labelled, CLIP, parallel=Told(), **options).score(model)
    assert stopped.value.args[0] == signal.SIGTERM and model.training
