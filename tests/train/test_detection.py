"""Training a detector: through the same loop, from any checkpoint, stopped at any step, and what is
refused."""

import argparse
import json

import pytest
import torch

from vmae import ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder, export_weights
from vmae.checkpoint.format import read_group
from vmae.checkpoint.published import load_weights, read_settings_and_weights
from vmae.cli import main
from vmae.data.ava import write_actions
from vmae.synthetic.moving_actors import ACTIONS, ActorsConfig, write_actors
from vmae.train.detection_settings import DetectionConfig
from vmae.train.finetune_settings import model_from_args
from vmae.train.loop import Trainer
from vmae.train.resume import setting_changes, with_defaults
from vmae.train.tasks.detection import detection_loss

TINY = dict(img_size=32, num_frames=4)
FLAGS = [
    "--stride",
    "4",
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--save-every",
    "100",
    "--log-every",
    "1",
    "--no-tensorboard",
    "--device",
    "cpu",
    "--no-flip",
]


@pytest.fixture(scope="module")
def actors(tmp_path_factory):
    return write_actors(
        tmp_path_factory.mktemp("actors"), ActorsConfig(train=3, validation=1, scenes=3), workers=1
    )


@pytest.fixture
def finetune(actors, tmp_path):
    """Runs the command on the little videos; returns its exit code."""

    def start(*flags, out="run", model=True, **changed):
        size = ["--model", "vit_tiny", "--image-size", "32", "--num-frames", "4"] if model else []
        files = {
            "annotations": actors["train"],
            "videos": actors["videos"],
            "actions": actors["actions"],
            **changed,
        }
        where = [word for name, path in files.items() for word in (f"--{name}", str(path))]
        return main(
            ["finetune-detection", *where, "--output", str(tmp_path / out), *size, *FLAGS, *map(str, flags)]
        )

    return start


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_loss():
    logits, targets = torch.randn(2, 3, 4), torch.randint(0, 2, (2, 3, 4)).float()
    valid = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    p = logits.sigmoid()
    each = -(targets * p.log() + (1 - targets) * (1 - p).log())
    expected = (each[0, 0] + each[0, 1] + each[1, 0]).sum() / 12
    torch.testing.assert_close(detection_loss(logits, targets, valid), expected)


def test_it_trains_and_writes_what_it_is(finetune, tmp_path):
    assert (
        finetune("--steps", "14", "--lr", "0.06", "--layer-decay", "1", "--drop-path", "0", "--no-jitter")
        == 0
    )
    seen = losses(tmp_path / "run")
    assert (
        seen[0] == pytest.approx(0.6931, abs=1e-3) and seen[-1] < 0.62
    )  # a sigmoid of 0 for each action at first
    settings, state = read_settings_and_weights(tmp_path / "run" / "weights.pth")
    config = DetectionConfig.from_dict(settings)
    assert config.actions == ACTIONS and config.clip.stride == 4
    assert state["head.weight"].shape[0] == len(ACTIONS) and "norm.weight" in state


def test_stop_and_resume_is_bit_identical(finetune, tmp_path):
    flags = ["--steps", "5", "--warmup-steps", "1", "--lr", "0.01", "--min-crop", "0.5"]
    assert finetune(*flags, out="whole") == 0
    assert finetune(*flags, "--save-every", "3", out="parts") == 0
    parts = tmp_path / "parts"
    CheckpointFolder(parts).remove(CheckpointFolder(parts).latest())
    (parts / "weights.pth").unlink()
    assert finetune(*flags, "--save-every", "3", out="parts") == 0
    assert losses(tmp_path / "whole") == losses(parts)
    whole, again = load_weights(tmp_path / "whole" / "weights.pth"), load_weights(parts / "weights.pth")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_accumulating_is_the_same_batch(finetune, actors, tmp_path):
    # One actor of every first key frame is left out: micro-batches then differ in boxes, and each box must
    # count the same.
    lines = [line for line in actors["train"].read_text().splitlines() if not line.split(",")[-1] == "0"]
    (tmp_path / "uneven.csv").write_text("\n".join(lines) + "\n")
    flags = ["--steps", "3", "--warmup-steps", "0", "--lr", "0.01", "--drop-path", "0"]
    assert finetune(*flags, out="whole", annotations=tmp_path / "uneven.csv") == 0
    assert (
        finetune(
            *flags, "--batch-size", "1", "--accumulate", "4", out="split", annotations=tmp_path / "uneven.csv"
        )
        == 0
    )
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "split"), rel=1e-5)


# A rate of 0 at the first step: the weights are those that a run starts from.
STILL = ["--steps", "1", "--warmup-steps", "1", "--init-frames", "4", "--init-size", "32"]


def test_it_starts_from_a_pretrained_file(finetune, tmp_path, capsys):
    model = build_pretrainer(ModelConfig.preset("vit_tiny", **TINY))
    torch.nn.init.normal_(model.encoder.norm.weight)
    torch.save({"module": model.state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "official.pth")
    assert finetune("--init", tmp_path / "official.pth", *STILL) == 0
    said = capsys.readouterr().out
    assert "dropped (decoder)" in said and "start fresh (head)" in said
    state, official = load_weights(tmp_path / "run" / "weights.pth"), load_weights(tmp_path / "official.pth")
    for name in ("blocks.1.mlp.fc1.weight", "norm.weight", "patch_embed.proj.bias"):
        assert torch.equal(state[name], official[f"encoder.{name}"])


def test_it_starts_from_a_classifier(finetune, tmp_path, capsys):
    config = ModelConfig.preset("vit_tiny", **TINY)
    classifier = build_classifier(config, 9)
    torch.nn.init.normal_(classifier.fc_norm.weight)
    export_weights(tmp_path / "classifier.pth", classifier.state_dict(), config={"model": config.to_dict()})
    assert finetune("--init", tmp_path / "classifier.pth", *STILL[:4], model=False) == 0
    said = capsys.readouterr().out
    assert "norm starts fresh" in said and "start fresh (head)" in said and "2 dropped (head)" in said
    state = load_weights(tmp_path / "run" / "weights.pth")
    assert torch.equal(state["blocks.3.attn.qkv.weight"], classifier.blocks[3].attn.qkv.weight)
    assert (state["norm.weight"] == 1).all() and len(state["head.bias"]) == len(ACTIONS)


def test_it_goes_on_from_a_detector(finetune, tmp_path, capsys):
    assert finetune("--steps", "2", "--warmup-steps", "0", "--lr", "0.1") == 0
    first = load_weights(tmp_path / "run" / "weights.pth")
    assert finetune("--init", tmp_path / "run", *STILL[:4], out="kept", model=False) == 0
    assert torch.equal(load_weights(tmp_path / "kept" / "weights.pth")["head.weight"], first["head.weight"])
    other = ["--new-head", "--roi", "published"]
    assert "note: the checkpoint was trained with" not in capsys.readouterr().out
    assert finetune("--init", tmp_path / "run", *other, *STILL[:4], out="fresh", model=False) == 0
    note = "note: the checkpoint was trained with --roi aligned, this run has published"
    assert note in capsys.readouterr().out
    fresh = load_weights(tmp_path / "fresh" / "weights.pth")
    assert not torch.equal(fresh["head.weight"], first["head.weight"]) and torch.equal(
        fresh["norm.bias"], first["norm.bias"]
    )
    write_actions(tmp_path / "more.pbtxt", {**ACTIONS, 9: "fly"})
    capsys.readouterr()
    assert (
        finetune("--init", tmp_path / "run", out="other", model=False, actions=tmp_path / "more.pbtxt") == 2
    )
    assert "head of 6 actions, the action list has 7: --new-head" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ("train_0000,0001,0.1,0.2,1.5,0.4,1,0", "line {}: box [0.1, 0.2, 1.5, 0.4] leaves the frame"),
        (
            "train_0000,0001,0.1,0.2,0.3,0.4,7,0",
            "line {}: action 7 is not in the action list, which has 1, 2, 3, 4, 5, 6",
        ),
        ("train_0099,0001,0.1,0.2,0.3,0.4,1,0", "line {}: video 'train_0099' is not in"),
        ("train_0000,0006,0.1,0.2,0.3,0.4,1,0", "line {}: key frame at 6 s is outside of"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(finetune, actors, tmp_path, capsys, line, message):
    text = actors["train"].read_text()
    (tmp_path / "wrong.csv").write_text(text + line + "\n")
    assert finetune(annotations=tmp_path / "wrong.csv") == 2
    said = capsys.readouterr().err
    assert message.format(text.count("\n") + 1) in said and "wrong.csv" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--steps", 0, "--steps: must be a whole number from 1 to 10,000,000,000, not 0"),
        ("--repeat", 0, "--repeat: must be a whole number from 1 to 1,000,000,000, not 0"),
        ("--seed", -1, "--seed: must be a whole number from 0 to"),
        (
            "--layer-decay",
            1.5,
            "--layer-decay/--layer_decay: must be a number above 0 and at most 1, not 1.5",
        ),
        ("--fps", 0, "--fps: must be a number above 0"),
    ],
)
def test_wrong_settings_are_one_line_before_any_work(finetune, tmp_path, capsys, flag, value, message):
    assert finetune(f"{flag}={value}") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_leaving_out(finetune, actors, tmp_path, capsys):
    text = actors["train"].read_text()
    (tmp_path / "more.csv").write_text(
        text + "train_0099,0001,0.1,0.2,0.3,0.4,1,0\ntrain_0000,0001,0.1,0.2,0.3,0.4,80,0\n"
    )
    (tmp_path / "excluded.csv").write_text("train_0002,0001\n")
    flags = ["--skip-unlisted", "--skip-missing", "--excluded", tmp_path / "excluded.csv", "--steps", "1"]
    assert finetune(*flags, annotations=tmp_path / "more.csv") == 0
    said = capsys.readouterr().out
    assert (
        "annotations left out, on excluded key frames" in said
        and "annotations left out, of videos that are not in" in said
    )
    assert "data: 16 boxes on 8 key frames of 3 videos" in said


@pytest.fixture
def default_config():
    from vmae.train.detection_settings import add_arguments, configs_from_args

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--annotations", "a", "--videos", "v", "--actions", "l", "--output", "o"])
    return configs_from_args(args, model_from_args(args, None), {1: "stand"})[0]


def test_the_published_settings_of_training_are_the_defaults(default_config):
    """But for pixels and RoIAlign."""
    config = default_config
    assert (config.optim.lr, config.layer_decay, config.optim.weight_decay, config.epochs) == (
        5e-4,
        0.75,
        0.05,
        30,
    )
    assert (config.optim.warmup_epochs, config.model.drop_path_rate, config.optim.betas) == (
        5,
        0.2,
        (0.9, 0.999),
    )
    assert (config.clip.num_frames, config.clip.stride, config.init_scale, config.augment.min_crop) == (
        16,
        4,
        0.001,
        1,
    )
    assert (config.clip.preprocess, config.roi) == ("resize", "aligned")


def test_training_as_published(finetune, tmp_path, capsys):
    """The settings are kept with the weights; a resume tells where they changed."""
    flags = ["--preprocess", "published", "--lr", "0.01"]
    assert finetune(*flags, "--roi", "published", "--steps", "1") == 0
    settings, _ = read_settings_and_weights(tmp_path / "run" / "weights.pth")
    assert (settings["clip"]["preprocess"], settings["roi"]) == ("published", "published")
    capsys.readouterr()
    assert finetune(*flags, "--steps", "2") == 0
    assert "setting changed: roi published in the checkpoint, aligned now" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preprocess", "published", "--min-crop", "0.5"], "--min-crop is of --preprocess resize"),
        (["--preprocess", "published", "--image-size", "32x64"], "published trains on square clips"),
        (["--preprocess", "square"], "unknown preprocessing 'square'; known: resize, published"),
        (["--roi", "other"], "unknown RoIAlign 'other'; known: aligned, published"),
    ],
)
def test_what_published_training_refuses(finetune, tmp_path, capsys, flags, message):
    assert finetune(*flags) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_from_before_these_settings_goes_on(default_config):
    """Its settings are those of the old behaviour: a resume finds nothing changed."""
    now = json.loads(json.dumps(default_config.to_dict()))
    old = {name: value for name, value in now.items() if name != "roi"}
    old["clip"] = {name: value for name, value in now["clip"].items() if name != "preprocess"}
    old["augment"] = {name: value for name, value in now["augment"].items() if name != "colours"}
    assert setting_changes(with_defaults(old, default_config), now) == {}
    assert DetectionConfig.from_dict(old) == default_config


def test_muon_trains_and_goes_on_over_a_bad_step(finetune, tmp_path, monkeypatch):
    plain = Trainer.clip
    monkeypatch.setattr(
        Trainer, "clip", lambda self, record: plain(self, record) * (float("nan") if record.step == 1 else 1)
    )
    flags = "--steps 3 --lr 0.01 --opt muon --on-nonfinite skip:1 --save-every 1 --keep 3".split()
    assert finetune(*flags) == 0
    steps = [read_group(path) for path in CheckpointFolder(tmp_path / "run").paths()]
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(steps[0][name], steps[1][name]) and not torch.equal(steps[1][name], steps[2][name])
    held = read_group(CheckpointFolder(tmp_path / "run").latest(), "optimizer")
    assert f"{name}.momentum_buffer" in held and "patch_embed.proj.weight.exp_avg" in held


def test_sgd_and_dropouts_train_and_go_on(finetune, tmp_path, capsys):
    flags = "--steps 2 --lr 0.1 --opt momentum --drop 0.1 --attn_drop_rate 0.1 --save-every 1".split()
    assert finetune(*flags) == 0
    assert "SGD with plain momentum 0.9" in capsys.readouterr().out
    run = tmp_path / "run"
    straight = losses(run)
    CheckpointFolder(run).remove(CheckpointFolder(run).latest())
    assert finetune(*flags) == 0 and losses(run) == straight
