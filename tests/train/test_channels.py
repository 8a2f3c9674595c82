"""Runs on clips of other channels: pre-training, fine-tuning, features, a resume; and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vmae
from vmae import ModelConfig
from vmae.checkpoint.format import read_manifest
from vmae.cli import main
from vmae.config import PRESETS, MaskConfig
from vmae.planning.memory import count_activations
from vmae.train.metrics import read_log

MICRO = dict(embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
SMALL = "--model micro --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75".split()
RUN = "--batch-size 2 --workers 0 --log-every 1 --device cpu --no-tensorboard".split()
STATISTICS = "--in-channels 4 --channel-mean 0.5 0.4 0.5 0.6 --channel-std 0.3 0.3 0.2 0.3".split()


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(PRESETS, "micro", MICRO)


@pytest.fixture(scope="module")
def stacks(tmp_path_factory) -> Path:
    """A list of four stacks of 4 channels, and labelled.txt beside it."""
    folder = tmp_path_factory.mktemp("stacks")
    for number in range(4):
        frames = np.random.default_rng(number).integers(0, 2**16, (10, 36, 40, 4)).astype(np.uint16)
        np.save(folder / f"{number}.npy", frames)
    (folder / "list.txt").write_text("".join(f"{number}.npy 0 -1\n" for number in range(4)))
    (folder / "labelled.txt").write_text("".join(f"{number}.npy {number % 2}\n" for number in range(4)))
    return folder


def pretrain(data: Path, output: Path, *flags: str) -> int:
    return main(["pretrain", "--data", str(data), "--output", str(output), *SMALL, *RUN, *flags])


@pytest.fixture(scope="module")
def run(stacks, tmp_path_factory) -> Path:
    """A pre-training run of 4 channels."""
    output = tmp_path_factory.mktemp("runs") / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", MICRO)
        assert pretrain(stacks / "list.txt", output, "--steps", "3", *STATISTICS) == 0
    return output


def test_a_run_keeps_channels_and_statistics(run, stacks, tmp_path):
    model = read_manifest(run / "checkpoint-00000003")["config"]["model"]
    assert model["in_channels"] == 4 and model["channel_std"] == [0.3, 0.3, 0.2, 0.3]
    output = tmp_path / "again"
    assert pretrain(stacks / "list.txt", output, "--steps", "3", *STATISTICS, "--save-every", "2") == 0
    for name in ("checkpoint-00000003", "weights.pth"):
        target = output / name
        if target.is_dir():
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        else:
            target.unlink()
    assert pretrain(stacks / "list.txt", output, "--steps", "3", *STATISTICS) == 0
    losses = [[record["loss"] for record in read_log(folder / "log.jsonl")] for folder in (run, output)]
    assert losses[0] == losses[1]
    states = [torch.load(folder / "weights.pth")["model"] for folder in (run, output)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_finetuning_features_and_predictions(run, stacks, tmp_path, capsys):
    output = tmp_path / "tuned"
    flags = ["--init", str(run), "--data", str(stacks / "labelled.txt"), "--output", str(output), *RUN]
    flags += ["--val", str(stacks / "labelled.txt"), "--steps", "2", "--stride", "1"]
    assert main(["finetune", *flags]) == 2
    said = capsys.readouterr().err
    assert "published augmentation (--augment none, or --aa none --erase 0) is for clips of 3" in said
    assert main(["finetune", *flags, "--augment", "none"]) == 0
    features = ["features", str(stacks / "list.txt"), "--checkpoint", str(output), "--step", "2"]
    assert main([*features, "--output", str(tmp_path / "features"), "--device", "cpu"]) == 0
    model = vmae.load(output, device="cpu")
    assert model.config.in_channels == 4
    frames = np.load(stacks / "0.npy")
    stored = np.load(tmp_path / "features" / "0.npy")
    assert model.embed(frames, step=2).features == pytest.approx(stored, abs=1e-5)
    scaled = (frames / 65535).astype(np.float32)
    assert model.embed(scaled, step=8).features == pytest.approx(
        model.embed(frames, step=8).features, abs=1e-4
    )
    assert len(model.predict(str(stacks / "0.npy"), segments=1, crops=1)) == 2
    assert model.tokens(str(stacks / "0.npy")).shape == (4, 4, 4, 24)
    report = ["evaluate", str(stacks / "labelled.txt"), "--checkpoint", str(output), "--segments", "1"]
    assert main([*report, "--crops", "1", "--output", str(tmp_path / "test"), "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--in-channels", "4"], "--in-channels 4 needs the mean and deviation of each channel"),
        ([*STATISTICS, "--backend", "triton"], "--backend triton: its kernels are for 3 channels"),
        ([*STATISTICS, "--loader", "dali"], "--loader dali is for clips of 3 channels"),
        ([*STATISTICS, "--resize", "pil"], "--resize pil is for clips of 3 channels"),
        ([], "0.npy: has 4 channels (uint16 frames of 40 x 36), and the model takes 3"),
        ([*STATISTICS, "--channel-mean", "0.5"], "channel_mean has 1 numbers, but clips have 4"),
    ],
)
def test_what_is_refused_before_a_run(stacks, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr("vmae.train.tasks.pretrain.check_loader", lambda *_: None)  # as where DALI is there
    assert pretrain(stacks / "list.txt", tmp_path / "run", "--steps", "1", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_start_from_other_channels_is_refused(run, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((10, 36, 40, 1), np.uint8))
    (tmp_path / "list.txt").write_text("a.npy 0 -1\n")
    grey = "--in-channels 1 --channel-mean 0.5 --channel-std 0.3 --steps 1".split()
    assert pretrain(tmp_path / "list.txt", tmp_path / "run", *grey, "--init", str(run)) == 2
    assert "is of clips of 4 channels, and the model takes 1" in capsys.readouterr().err
    taught = ["--target", "teacher", "--teacher", str(run)]
    assert pretrain(tmp_path / "list.txt", tmp_path / "run", *grey, *taught) == 2
    assert "takes clips of 4 channels, the student of 1" in capsys.readouterr().err


def test_a_teacher_of_the_same_channels(run, stacks, tmp_path):
    taught = ["--target", "teacher", "--teacher", str(run), "--steps", "1"]
    assert pretrain(stacks / "list.txt", tmp_path / "run", *STATISTICS, *taught) == 0


def test_bytes_of_a_clip_are_the_most_that_its_values_take():
    many, usual = (ModelConfig.preset("vit_tiny", in_channels=count) for count in (12, 3))
    assert many.most_clip_bytes == 4 * many.clip_bytes == 16 * usual.clip_bytes == 16 * usual.most_clip_bytes


@pytest.mark.slow
def test_memory_of_other_channels_is_planned():
    size = {**MICRO, "img_size": 32, "patch_size": 8, "num_frames": 8}
    mask = MaskConfig(encoder_ratio=0.75)
    many, few = (
        count_activations(ModelConfig.from_dict({**size, "in_channels": count}), mask, "float32", "none")
        for count in (12, 1)
    )
    assert many.per_clip > few.per_clip > 0


def test_pictures_and_other_programs_are_for_three_channels(run, stacks, tmp_path, capsys):
    video = str(stacks / "0.npy")
    commands = {
        "a picture of a reconstruction": ["reconstruct", video, "--checkpoint", str(run)],
        "a picture of features": ["pca", video, "--checkpoint", str(run)],
        "a picture of attention": ["attention", video, "--checkpoint", str(run)],
        "a graph": ["export", str(run), str(tmp_path / "x.pt2"), "--what", "tokens"],
        "`vmae serve`": ["serve", "--checkpoint", str(run)],
        "transformers' VideoMAE": ["convert", str(run), str(tmp_path / "hub")],
    }
    for what, command in commands.items():
        assert main(command) == 2, what
        said = capsys.readouterr().err
        assert "4" in said and "channels" in said, said


def test_settings_of_a_file_hold_any_number_of_channels(stacks, tmp_path, capsys):
    settings = tmp_path / "run.yaml"
    settings.write_text(
        "in_channels: 4\nchannel_mean: [0.5, 0.4, 0.5, 0.6]\nchannel_std: [0.3, 0.3, 0.2, 0.3]\n"
    )
    output = tmp_path / "run"
    flags = ["--steps", "1", "--config", str(settings)]
    assert pretrain(stacks / "list.txt", output, *flags) == 0
    model = read_manifest(output / "checkpoint-00000001")["config"]["model"]
    assert model["channel_mean"] == [0.5, 0.4, 0.5, 0.6]
    settings.write_text("channel_mean: 0.5\n")
    assert pretrain(stacks / "list.txt", tmp_path / "other", *flags) == 2
    assert "channel_mean must be some numbers, not 0.5" in capsys.readouterr().err
