"""Stage two: a student that predicts a frozen encoder's latents trains, resumes and spreads as one that
predicts pixels."""

import json
import multiprocessing
import os
import signal

import pytest
import torch

from vmae import ModelConfig, build_pretrainer
from vmae.checkpoint import export_weights, read_checkpoint
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import read_group, read_manifest
from vmae.cli import main
from vmae.train.metrics import read_log

# Both random: clips count unequally many tokens, so rows of weight 0 are among those that are compared.
RANDOM = ("--encoder-mask", "random", "--decoder-mask", "random")


STEPS = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Weights of stage one, of the student's architecture."""
    torch.manual_seed(0)
    size = dict(
        embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
    )
    model = build_pretrainer(ModelConfig(img_size=32, patch_size=8, num_frames=8, **size))
    path = tmp_path_factory.mktemp("stage-one") / "weights.pth"
    export_weights(path, model.state_dict(), config={"model": model.config.to_dict()})
    return path


@pytest.fixture
def stage_two(pretrain, teacher):
    """`stage_two(output, *flags)`: the command with this teacher."""

    def start(output, *flags):
        return pretrain(output, "--target", "teacher", "--teacher", teacher, "--steps", STEPS, *flags)

    return start


def losses(folder):
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def group_of(folder, group="model"):
    return read_group(folder / f"checkpoint-{STEPS:08}", group)


def assert_same(folder, other):
    assert len(losses(folder)) == STEPS and losses(folder) == losses(other)
    for group in ("model", "optimizer"):
        one, two = (group_of(place, group) for place in (folder, other))
        assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_says_what_it_predicts(stage_two, teacher, tmp_path, capsys):
    """In its first lines, run.json, the checkpoint, the weights and config.yaml, which repeats it."""
    assert stage_two(tmp_path / "s2", "--init", teacher, "--target-loss", "l1") == 0
    text = capsys.readouterr().out
    assert "predicted: latents of " in text and "it predicts pixels, this model latents of" in text
    assert "(48 values a token): the head starts fresh" in text
    start = json.loads((tmp_path / "s2" / "run.json").read_text())["starts"][0]
    manifest = read_manifest(tmp_path / "s2" / f"checkpoint-{STEPS:08}")
    for told in (start["config"]["results"]["target"], manifest["config"]["target"]):
        assert (told["name"], told["target_loss"]) == ("teacher", "l1")
    assert read_checkpoint(tmp_path / "s2" / "weights.pth").target == "teacher"
    assert group_of(tmp_path / "s2")["decoder.head.weight"].shape == (48, 32)
    again = [
        "pretrain",
        "--config",
        str(tmp_path / "s2" / "config.yaml"),
        "--output",
        str(tmp_path / "again"),
    ]
    assert main(again) == 0
    assert_same(tmp_path / "s2", tmp_path / "again")
    capsys.readouterr()
    assert main([*again[:-1], str(tmp_path / "dry"), "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["results"]["target"]["name"] == "teacher" and not (tmp_path / "dry").exists()


def test_a_killed_run_goes_on_bit_for_bit(stage_two, at_step, tmp_path):
    flags = ("--drop-path", "0.2", "--save-every", "2", *RANDOM)
    assert stage_two(tmp_path / "straight", *flags) == 0
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(
        target=stage_two, args=(tmp_path / "killed", *flags)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert CheckpointFolder(tmp_path / "killed").latest().name == "checkpoint-00000002"
    at_step(4, lambda: None)
    assert stage_two(tmp_path / "killed", *flags) == 0
    assert_same(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ("--batch-size", "2", "--accumulate", "2")),
        (2, ("--batch-size", "2", "--parallel", "ddp")),
        pytest.param(
            2, ("--batch-size", "1", "--accumulate", "2", "--parallel", "fsdp"), marks=pytest.mark.slow
        ),
    ],
)
def test_ranks_and_accumulation_agree(stage_two, run_ranks, tmp_path, ranks, flags):
    """With two clips of a video and unequal counts."""
    shared = ("--num-sample", "2", "--eps", "1e-6", *RANDOM)
    assert stage_two(tmp_path / "one", "--batch-size", "4", *shared) == 0
    assert run_ranks(ranks, stage_two, tmp_path / "several", *shared, *flags) == [0] * ranks
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    one, several = (group_of(tmp_path / name) for name in ("one", "several"))
    assert all((several[name] - value).abs().max() < 1e-5 for name, value in one.items())


@pytest.mark.parametrize("how", ["selective", "full"])
def test_checkpointing_changes_nothing(stage_two, tmp_path, how):
    assert stage_two(tmp_path / "plain", "--drop-path", "0.2") == 0
    assert stage_two(tmp_path / how, "--drop-path", "0.2", "--checkpointing", how) == 0
    assert_same(tmp_path / "plain", tmp_path / how)


def test_bfloat16_trains_close_to_float32(stage_two, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert stage_two(tmp_path / dtype, "--dtype", dtype) == 0
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=0.03)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--target-loss l2", "target.target_loss smooth_l1 in the checkpoint, l2 now"),
        ("", "target.name teacher in the checkpoint, pixels now"),
    ],
)
def test_another_target_is_refused_at_a_resume(pretrain, stage_two, tmp_path, capsys, flags, words):
    assert stage_two(tmp_path / "s2", "--steps", "2") == 0
    before = (tmp_path / "s2" / "run.json").read_bytes()
    start = stage_two if flags else pretrain
    assert start(tmp_path / "s2", *flags.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: checkpoint {tmp_path / 's2' / 'checkpoint-00000002'} learned another target: " in error
    assert words in error and "start a new run with --init" in error
    assert (tmp_path / "s2" / "run.json").read_bytes() == before


def test_a_checkpoint_of_before_targets_predicted_pixels(pretrain, stage_two, tmp_path, monkeypatch, capsys):
    older = tmp_path / "older"
    assert pretrain(older, "--steps", "2") == 0

    def read_older(path):
        manifest = read_manifest(path)
        del manifest["config"]["target"]
        return manifest

    monkeypatch.setattr("vmae.train.prepare.read_manifest", read_older)
    assert stage_two(older) == 2
    assert "target.name pixels in the checkpoint, teacher now" in capsys.readouterr().err
    assert pretrain(older, "--steps", "4") == 0
    text = capsys.readouterr().out
    assert "steps 2 in the checkpoint, 4 now" in text and "target" not in text.split("model:")[0]
    assert len(losses(older)) == 4


def test_flops_of_a_step_are_those_of_student_and_teacher(stage_two, tmp_path, monkeypatch):
    """Three forward passes of the student, one of the teacher."""
    from vmae.model.cost import classifier_macs, masked_macs
    from vmae.train.tasks.pretrain import PretrainTask

    tasks, plain = [], PretrainTask.flops_per_clip

    def spied(self):
        tasks.append(self)
        return plain(self)

    monkeypatch.setattr(PretrainTask, "flops_per_clip", spied)
    assert stage_two(tmp_path / "s2", "--steps", "1") == 0
    task = tasks[-1]
    model, mask = task.config.model, task.config.mask
    student = masked_macs(model, mask, width=48)
    head = task.one.keep.shape[1] * model.decoder_embed_dim * (model.tubelet_pixels - 48)
    assert student == masked_macs(model, mask) - head
    assert plain(task) == 6 * student + 2 * classifier_macs(model, 0)
    assert task.bytes_beside() == task.target.state_bytes() > 0  # what `--recompute auto` leaves room for
