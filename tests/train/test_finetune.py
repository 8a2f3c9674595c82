"""Supervised training: what it starts from, what it learns, that it can stop at any step, and what it
refuses."""

import argparse
import json

import pytest
import torch

from vmae import ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder, export_weights
from vmae.checkpoint.format import read_group
from vmae.checkpoint.published import load_weights, read_settings_and_weights
from vmae.cli import main
from vmae.data.augment_classify import AugmentConfig, RandAugmentText
from vmae.train.finetune_settings import FinetuneConfig
from vmae.train.tasks.finetune import classification_loss

TINY = dict(img_size=32, num_frames=4)
FLAGS = [
    "--stride",
    "2",
    "--batch-size",
    "4",
    "--num-sample",
    "1",
    "--workers",
    "0",
    "--save-every",
    "100",
    "--log-every",
    "1",
    "--no-tensorboard",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights of pre-training, written as the published ones are."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("official") / "pretrained.pth"
    model = build_pretrainer(ModelConfig.preset("vit_tiny", **TINY))
    torch.save({"module": model.state_dict(), "args": argparse.Namespace(lr=1.0), "epoch": 1}, path)
    return path


@pytest.fixture
def finetune(labelled_world, tmp_path):
    """Runs the command on the little world; returns its exit code."""

    def start(*flags, out="run", data="train.txt", model=True):
        size = ["--model", "vit_tiny", "--image-size", "32", "--num-frames", "4"] if model else []
        where = ["--data", str(labelled_world / data), "--output", str(tmp_path / out)]
        return main(["finetune", *where, *size, *FLAGS, *map(str, flags)])

    return start


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_the_colours(finetune, tmp_path, labelled_world):
    flags = [
        "--classes",
        labelled_world / "classes.txt",
        "--augment",
        "none",
        "--lr",
        "0.06",
        "--steps",
        "25",
    ]
    assert finetune(*flags, "--layer-decay", "1") == 0
    seen = losses(tmp_path / "run")
    assert seen[0] == pytest.approx(1.0986, abs=0.01) and seen[-1] < 0.5
    settings, state = read_settings_and_weights(tmp_path / "run" / "weights.pth")
    assert settings["class_names"] == ["red things", "green things", "blue things"] and "head.weight" in state
    assert (
        FinetuneConfig.from_dict(settings).to_dict()
        == FinetuneConfig.from_dict(json.loads(json.dumps(settings))).to_dict()
    )


def test_a_folder_is_trained_on_its_train_csv_and_that_is_said(finetune, tmp_path, labelled_world, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("val.csv", "test.csv"):
        (folder / name).write_text((labelled_world / "val.txt").read_text())
    assert finetune("--steps", "1", data=folder) == 2
    assert f"folder {folder} holds no train.csv; give a list" in capsys.readouterr().err
    (folder / "train.csv").write_text((labelled_world / "train.txt").read_text())
    assert finetune("--steps", "1", data=folder) == 0
    assert f"data: {folder / 'train.csv'}, 12 videos x 1 visits an epoch" in capsys.readouterr().out


def test_it_starts_from_a_published_file(finetune, tmp_path, pretrained, capsys):
    # A rate of 0 at the first step, as published: the weights are those it starts from.
    assert (
        finetune(
            "--init",
            pretrained,
            "--init-frames",
            "4",
            "--init-size",
            "32",
            "--steps",
            "1",
            "--warmup-steps",
            "1",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "dropped (decoder)" in said
        and "start fresh (fc_norm, head)" in said
        and "does not say the frames" not in said
    )
    state, official = load_weights(tmp_path / "run" / "weights.pth"), load_weights(pretrained)
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], official["encoder.blocks.1.mlp.fc1.weight"])
    assert finetune("--init", pretrained, "--init-size", "32", "--steps", "1", out="half_said") == 0
    assert (
        "it does not say the frames and size of its clips, taken as 16 frames of 32 pixels"
        in capsys.readouterr().out
    )


def test_a_micro_batch_of_one_clip_is_said_not_to_be_mixed(finetune, capsys):
    for flags, said in (
        (["--batch-size", "1"], True),
        (["--batch-size", "1", "--num-sample", "2"], False),
        ([], False),
    ):
        assert finetune(*flags, "--steps", "1", "--warmup-steps", "0", out="-".join(["run", *flags])) == 0
        assert ("mixup and cutmix have nothing to mix it with" in capsys.readouterr().out) == said


def test_stop_and_resume_is_bit_identical(finetune, tmp_path):
    flags = [
        "--steps",
        "6",
        "--warmup-steps",
        "2",
        "--lr",
        "0.01",
        "--ema",
        "0.5",
        "--drop-path",
        "0.2",
        "--head-drop",
        "0.3",
    ]
    assert finetune(*flags, out="whole") == 0
    assert finetune(*flags, "--save-every", "3", out="parts") == 0
    parts = tmp_path / "parts"
    CheckpointFolder(parts).remove(CheckpointFolder(parts).latest())
    (parts / "weights.pth").unlink()
    assert finetune(*flags, "--save-every", "3", out="parts") == 0
    assert losses(tmp_path / "whole") == losses(parts)
    for name in ("weights.pth", "weights_ema.pth"):
        whole, again = load_weights(tmp_path / "whole" / name), load_weights(parts / name)
        assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_published_flags_of_the_method_train_and_go_on(finetune, tmp_path, capsys):
    """Each at a value that is not its default; the second half after a stop is the same, to the bit."""
    flags = (
        "--steps 2 --warmup-steps 1 --lr 0.01 --opt sgd --momentum 0.8 --weight_decay_end 0.1 "
        "--warmup_lr 0.001 --drop 0.1 --attn_drop_rate 0.2 --fc_drop_rate 0.3 --use_cls --aa rand-m5-n2 "
        "--train_interpolation random --reprob 1 --remode rand --recount 2 --mixup_mode elem "
        "--mixup_prob 0.9 --mixup_switch_prob 0.7 --cutmix_minmax 0.2 0.8 --num-sample 3 --batch-size 1 "
        "--save-every 1"
    ).split()
    assert finetune(*flags) == 0
    assert (
        "of the 3 clips of a micro-batch, the middle one is mixed with the first" in capsys.readouterr().out
    )
    run = tmp_path / "run"
    straight, whole = losses(run), load_weights(run / "weights.pth")
    assert "norm.weight" in whole
    CheckpointFolder(run).remove(CheckpointFolder(run).latest())
    (run / "weights.pth").unlink()
    assert finetune(*flags) == 0 and losses(run) == straight
    again = load_weights(run / "weights.pth")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert main(["finetune", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == straight


def test_published_flags_in_the_resolved_settings(finetune, capsys):
    def resolved(*flags):
        assert finetune(*flags, "--dry-run") == 0
        return json.loads(capsys.readouterr().out)["results"]

    usual = resolved("--aa", "rand-m7-n4-mstd0.5-inc1", "--use_mean_pooling", "--opt", "AdamW")
    assert usual["augment"] == json.loads(json.dumps(AugmentConfig().to_dict()))
    assert usual["pooling"] == "mean" and usual["optim"]["opt"] == "adamw"
    assert (usual["drop_rate"], usual["attn_drop_rate"], usual["optim"]["warmup_lr"]) == (0, 0, 0)
    drawn = resolved("--aa", "rand-m9-n3-mstd1")["augment"]
    assert [drawn[name] for name in RandAugmentText.sets] == [3, 9, 1, False]
    assert resolved("--aa", "rand-m9-n3", "--magnitude", "4")["augment"]["magnitude"] == 4
    for off in ("", "None", "none"):
        assert resolved("--aa", off)["augment"]["operations"] == 0
    assert resolved("--augment", "none", "--aa", "rand-m9-n3")["augment"]["operations"] == 3


def test_accumulating_is_the_same_batch(finetune, tmp_path):
    """Without what is drawn for a micro-batch: stochastic depth, mixup and cutmix."""
    flags = [
        "--steps",
        "3",
        "--warmup-steps",
        "0",
        "--lr",
        "0.01",
        "--drop-path",
        "0",
        "--mixup",
        "0",
        "--cutmix",
        "0",
    ]
    assert finetune(*flags, out="whole") == 0
    assert finetune(*flags, "--batch-size", "2", "--accumulate", "2", out="split") == 0
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "split"), rel=1e-5)


def test_averaged_weights(finetune, tmp_path):
    flags = [
        "--steps",
        "2",
        "--warmup-steps",
        "0",
        "--lr",
        "0.1",
        "--ema",
        "0.75",
        "--save-every",
        "1",
        "--keep",
        "5",
    ]
    assert finetune(*flags) == 0
    steps = [read_group(path) for path in CheckpointFolder(tmp_path / "run").paths()]
    averages = [read_group(path, "ema") for path in CheckpointFolder(tmp_path / "run").paths()]
    name = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(averages[1][name], 0.75 * averages[0][name] + 0.25 * steps[1][name])
    assert torch.equal(load_weights(tmp_path / "run" / "weights_ema.pth")[name], averages[1][name])


@pytest.mark.parametrize(
    "probe, trained", [("linear", ("fc_norm.", "head.")), ("attentive", ("fc_norm.", "head.", "pool."))]
)
def test_probes_leave_the_encoder(finetune, tmp_path, pretrained, probe, trained, capsys):
    flags = ["--init", pretrained, "--init-frames", "4", "--init-size", "32", "--probe", probe]
    assert finetune(*flags, "--steps", "2", "--warmup-steps", "0", "--lr", "0.1") == 0
    assert finetune(*flags, "--opt", "muon", out="muon") == 2
    assert "none is trained here (a probe's encoder is frozen)" in capsys.readouterr().err
    assert not (tmp_path / "muon").exists()
    state, official = load_weights(tmp_path / "run" / "weights.pth"), load_weights(pretrained)
    kept = [name for name in state if not name.startswith(trained)]
    assert kept and all(torch.equal(state[name], official[f"encoder.{name}"]) for name in kept)
    assert state["head.bias"].any()


def test_another_frame_count_and_size(finetune, tmp_path, pretrained):
    flags = ["--model", "vit_tiny", "--num-frames", "6", "--image-size", "48x32", "--steps", "1"]
    assert finetune("--init", pretrained, "--init-frames", "4", "--init-size", "32", *flags, model=False) == 0
    settings, _ = read_settings_and_weights(tmp_path / "run" / "weights.pth")
    assert settings["model"]["pos_grid"] in ([2, 2, 2], (2, 2, 2)) and settings["model"]["num_frames"] == 6
    again = ["--init", tmp_path / "run", "--new-head", "--steps", "1"]
    assert finetune(*again, out="next", model=False) == 0  # the architecture comes from the run


def test_a_head_is_converted_by_a_map(finetune, tmp_path):
    config = ModelConfig.preset("vit_tiny", **TINY)
    large = build_classifier(config, 5)
    export_weights(tmp_path / "large.pth", large.state_dict(), config={"model": config.to_dict()})
    (tmp_path / "map.json").write_text("[4, 0, 2]")
    flags = ["--init", tmp_path / "large.pth", "--steps", "1", "--warmup-steps", "1"]
    assert finetune(*flags, "--label-map", tmp_path / "map.json") == 0
    assert torch.equal(
        load_weights(tmp_path / "run" / "weights.pth")["head.weight"], large.head.weight[[4, 0, 2]]
    )


def test_several_labels(labelled_world, finetune, tmp_path):
    lines = (labelled_world / "train.txt").read_text().splitlines()
    (labelled_world / "several.txt").write_text(
        "\n".join([lines[0].rsplit(" ", 1)[0] + " 0;2", *lines[1:]]) + "\n"
    )
    assert finetune("--steps", "2", "--smoothing", "0", data="several.txt") == 0
    assert losses(tmp_path / "run")[0] == pytest.approx(0.693, abs=0.01)  # a sigmoid of 0 for each class
    assert read_settings_and_weights(tmp_path / "run" / "weights.pth")[0]["multi_label"] is True


def test_loss():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    hard = torch.nn.functional.one_hot(targets, 3).float()
    torch.testing.assert_close(
        classification_loss(logits, hard, False), torch.nn.functional.cross_entropy(logits, targets)
    )
    smooth = hard * 0.9 + 0.1 / 3
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(classification_loss(logits, smooth, False), expected)
    several = torch.tensor([[1.0, 0, 1]] * 4)
    p = logits.sigmoid()
    expected = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
    torch.testing.assert_close(classification_loss(logits, several, True), expected)


def test_dry_run_writes_nothing(finetune, tmp_path, capsys):
    assert finetune("--dry-run", "--epochs", "10", "--augment", "none", "--mixup", "0.5") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["results"]["augment"] == AugmentConfig.none(mixup=0.5).to_dict()
    assert about["derived"]["total_steps"] == 30 and about["derived"]["peak_lr"] == pytest.approx(
        1e-3 * 4 / 256
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-classes", "2"], "label 2 is out of range; labels are 0 to 1"),
        (["--probe", "linear"], "name its checkpoint with --init"),
        (["--label-map", "x.json"], "about a checkpoint's head"),
        (["--init", "gone.pth"], "checkpoint gone.pth does not exist"),
        (["--classes", "gone.txt"], "'gone.txt' does not exist"),
        (["--sampling", "thick"], "unknown sampling 'thick'"),
        (
            ["--layer-decay", "2"],
            "--layer-decay/--layer_decay: must be a number above 0 and at most 1, not 2",
        ),
        (["--ema", "1.5"], "--ema/--model_ema_decay: must be a number at least 0 and below 1, not 1.5"),
        (["--model", "vit_q"], "unknown model preset"),
        (["--pooling", "max"], "unknown pooling"),
        (["--aa", "augmix-m3-w3"], "unknown augmentation 'augmix-m3-w3'; known: rand-m7-n4-mstd0.5-inc1"),
        (["--train_interpolation", "lanczos"], "unknown interpolation 'lanczos'; known: bicubic, bilinear"),
        (["--mixup_mode", "half"], "unknown mixing mode 'half'; known: batch, pair, elem"),
        (["--cutmix_minmax", "0.8", "0.2"], "cutmix_minmax must be a smaller and a larger share"),
        (["--cutmix_minmax", "0.01", "0.02"], "leaves no side for a box in 32 x 32 pixels"),
        (["--attn-drop", "0.1", "--attention", "sdpa_flash"], "'sdpa_flash' cannot run"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(finetune, tmp_path, capsys, flags, message):
    assert finetune(*flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_heads_that_do_not_fit(finetune, tmp_path, capsys):
    config = ModelConfig.preset("vit_tiny", **TINY)
    export_weights(
        tmp_path / "five.pth", build_classifier(config, 5).state_dict(), config={"model": config.to_dict()}
    )
    for flags, message in (
        ([], "head of 5 classes, the labels have 3: --label-map FILE.json converts it"),
        (["--label-map", tmp_path / "short.json"], "misses classes: it maps 2 classes, the target has 3"),
        (["--label-map", tmp_path / "wild.json"], "has 5"),
    ):
        (tmp_path / "short.json").write_text("[0, 1]")
        (tmp_path / "wild.json").write_text("[0, 1, 7]")
        assert finetune("--init", tmp_path / "five.pth", *flags) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert finetune("--init", tmp_path / "five.pth", "--new-head", "--steps", "1") == 0
