"""`pretrain --target teacher`: what a run says of its teacher, and with which it goes on."""

import json
import shutil

import pytest
import torch

from vmae import ModelConfig, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import load_weights
from vmae.model.cost import classifier_macs, masked_macs
from vmae.train.pretrain_settings import RunConfig
from vmae.train.tasks.pretrain import PretrainConfig, PretrainTask

TEACHER = dict(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture
def teachers(tmp_path):
    """a.pth, b.pth of other weights, large.pth of other patches."""
    for seed, (name, patch) in enumerate((("a", 8), ("b", 8), ("large", 16))):
        config = ModelConfig(**TEACHER, img_size=32, num_frames=8, patch_size=patch)
        torch.manual_seed(seed)
        state = build_pretrainer(config).state_dict()
        export_weights(tmp_path / f"{name}.pth", state, config={"model": config.to_dict(), "stride": 1})
    return tmp_path


def test_a_run_says_what_its_teacher_is(pretrain, teachers, capsys):
    assert pretrain("run", "--target", "teacher", "--teacher", teachers / "large.pth", "--dry-run") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["results"]["target"]["teacher_identity"]["model"]["frames"] == 8
    output, flags = (
        teachers / "run",
        ["--target", "teacher", "--teacher", teachers / "large.pth", "--steps", "1"],
    )
    assert pretrain(output, *flags) == 0
    out = capsys.readouterr().out
    place = teachers / "large.pth"
    assert f"teacher: {place}: latents resampled from 4 x 2 x 2 tokens to 4 x 4 x 4, trilinear" in out
    assert f"predicted: latents of {place}, layer-normalised (32 wide, smooth_l1)" in out
    assert load_weights(output / "weights.pth")["decoder.head.weight"].shape == (32, 32)


def test_a_run_goes_on_with_its_teacher_alone(pretrain, teachers, capsys):
    """A teacher that was moved is the same; another one, other layers or another loss are named."""
    output, flags = teachers / "run", ["--target", "teacher"]
    assert pretrain(output, *flags, "--teacher", teachers / "a.pth", "--steps", "2") == 0
    capsys.readouterr()
    for changed, named in (
        (["--teacher", teachers / "b.pth"], "target.teacher_identity.weights"),
        (["--teacher", teachers / "a.pth", "--teacher-layers", "1"], "target.teacher_layers last in the"),
        (["--teacher", teachers / "a.pth", "--target-loss", "l2"], "target.target_loss smooth_l1 in the"),
    ):
        assert pretrain(output, *flags, *changed, "--steps", "4") == 2
        err = capsys.readouterr().err
        assert "learned another target: " in err and named in err and err.count("\n") == 1
    shutil.move(teachers / "a.pth", teachers / "moved.pth")
    moved = ["--teacher", teachers / "moved.pth", "--teacher-attention", "softmax", "--teacher-batch", "1"]
    assert pretrain(output, *flags, *moved, "--steps", "4") == 0
    assert "resuming from" in capsys.readouterr().out


def test_flops_count_the_teachers_forward(teachers):
    student = ModelConfig(**TEACHER, img_size=32, num_frames=8, patch_size=8)
    target = {"name": "teacher", "teacher": str(teachers / "a.pth"), "teacher_layers": "1"}
    config = PretrainConfig.from_dict(
        {"model": student.to_dict(), "mask": {}, "optim": {}, "target": target, "data": "list"}
    )
    task = PretrainTask(config)
    task.run = RunConfig(output="run", device="cpu")
    task.parallel = type("One", (), {"device": torch.device("cpu")})()
    task.check()
    own = masked_macs(student, config.mask, width=32)
    assert task.flops_per_clip() == 6 * own + 2 * classifier_macs(student.replace(depth=1), 0)


def test_wrong_flags(pretrain, teachers, capsys):
    for flags, message in (
        (["--target", "teacher"], "--target teacher needs one: --teacher CHECKPOINT"),
        (["--teacher", "a.pth"], "--teacher is of --target teacher, and the target is pixels"),
        (["--target", "teacher", "--teacher", teachers / "none"], "--teacher: "),
        (
            ["--target", "teacher", "--teacher", teachers / "a.pth", "--teacher-layers", "3"],
            "has 2 blocks, 1 to 2",
        ),
        (["--target", "teacher", "--target-loss", "huber"], "unknown target loss 'huber'"),
    ):
        assert pretrain(teachers / "run", *flags) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and not (teachers / "run").exists()
