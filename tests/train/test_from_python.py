"""`vmae.train(config)` is the command without the command line; tasks stand in one place."""

import importlib
import json
import os
import signal

import pytest
import torch

import vmae
import vmae.train.task
from vmae import InputError, MaskConfig, ModelConfig
from vmae.cli import COMMANDS
from vmae.config import _Checked
from vmae.data.augment_classify import AugmentConfig
from vmae.data.classify_dataset import ClipConfig
from vmae.train import compiled
from vmae.train.optim import OptimConfig
from vmae.train.pretrain_settings import PretrainConfig, RunConfig
from vmae.train.tasks import TASKS, task_of
from vmae.train.tasks.distil import DistilConfig
from vmae.train.tasks.finetune import FinetuneConfig, FinetuneTask

MODEL = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
RUN = {"batch_size": 4, "device": "cpu", "num_workers": 0, "tensorboard": False, "log_every": 1}
RATES = OptimConfig(lr=0.01, warmup_epochs=0, betas=(0.9, 0.999), min_lr=1e-6)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def supervised(kind, world, **own):
    settings = {
        "model": MODEL,
        "clip": ClipConfig(num_frames=4, image_size=32, stride=2),
        "augment": AugmentConfig.none(),
        "optim": RATES,
        "data": str(world / "train.txt"),
        "num_classes": 3,
        "num_sample": 1,
        "steps": 3,
    }
    return kind(**{**settings, **own})


def test_it_is_the_command(labelled_world, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("".join(f"{labelled_world}/v{video:02} 1 10\n" for video in range(12)))
    data = str(tmp_path / "list.txt")
    mask = MaskConfig(encoder_ratio=0.5)
    optim = OptimConfig(lr=0.01, warmup_epochs=0)
    config = PretrainConfig(model=MODEL, mask=mask, optim=optim, data=data, stride=1, steps=3, num_sample=2)
    result = vmae.train(config, output=tmp_path / "python", **RUN)
    words = "--model vit_tiny --image-size 32 --num-frames 4 --encoder-ratio 0.5 --lr 0.01 --warmup-epochs 0"
    words += " --stride 1 --steps 3 --num-sample 2 --batch-size 4 --device cpu --workers 0 --no-tensorboard"
    where = ["--data", data, "--output", str(tmp_path / "command"), "--log-every", "1"]
    assert vmae.cli.main(["pretrain", *words.split(), *where]) == 0
    assert (
        losses(tmp_path / "python") == losses(tmp_path / "command") and len(losses(tmp_path / "python")) == 3
    )
    assert (result.folder, result.steps, result.stopped_by) == (tmp_path / "python", 3, None)
    assert result.loss == losses(tmp_path / "python")[-1] and result.weights.is_file()
    again = ["--config", str(tmp_path / "python" / "config.yaml"), "--output", str(tmp_path / "again")]
    assert vmae.cli.main(["pretrain", *again]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "python")
    capsys.readouterr()
    run = RunConfig(output=str(tmp_path / "python"), batch_size=4, device="cpu")
    assert vmae.train(config, run, num_workers=0) == result
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("asked, recompute", [("auto", "on"), ("budget", "budget")])
def test_a_compiled_run_tells_what_was_decided_and_compiled(
    labelled_world, tmp_path, capsys, monkeypatch, asked, recompute
):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    config = supervised(FinetuneConfig, labelled_world, model=MODEL.replace(drop_path_rate=0.3))
    try:
        vmae.train(config, output=tmp_path / "run", compile=True, recompute=asked, **RUN)
    finally:
        torch.compiler.reset()
        compiled.set_compiler()
    output = capsys.readouterr()
    assert f"checkpointing none, recompute {recompute}, blocks compiled, " in output.out
    assert "compiled by step 1: 2 graphs, 1 recompilations, 0 graph breaks" in output.err
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["config"]["run"]["speed"]["recompute"] == recompute
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert f"recompute: {asked}\n" in kept and "compile: true\n" in kept  # as asked, for other machines
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    counts = {"graphs": 2, "recompilations": 1, "breaks": 0, "failed": 0}
    assert [record.get("compiled") for record in records] == [counts, None, None]


def test_by_default_nothing_is_compiled_on_a_cpu(labelled_world, tmp_path, capsys):
    vmae.train(supervised(FinetuneConfig, labelled_world), output=tmp_path / "run", **RUN)
    assert "checkpointing none, recompute on, 0 workers" in capsys.readouterr().out
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert "recompute: auto\n" in kept and "compile:" not in kept
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["config"]["run"]["speed"]["compile"] is False


def test_a_stop_is_told_and_the_next_call_goes_on(labelled_world, tmp_path, monkeypatch):
    config = supervised(FinetuneConfig, labelled_world, ema_decay=0.5)
    plain = FinetuneTask.after_step

    def stop(self, step):
        plain(self, step)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(FinetuneTask, "after_step", stop)
    result = vmae.train(config, output=tmp_path / "run", **RUN)
    assert (result.steps, result.stopped_by, result.weights) == (1, signal.SIGUSR1, None)
    monkeypatch.setattr(FinetuneTask, "after_step", plain)
    assert vmae.train(config, output=tmp_path / "run", **RUN).steps == 3
    assert (tmp_path / "run" / "weights_ema.pth").is_file()


def test_checkpoints_that_the_settings_name_are_read(labelled_world, tmp_path, capsys):
    teacher = vmae.train(supervised(FinetuneConfig, labelled_world), output=tmp_path / "teacher", **RUN)
    larger = MODEL.replace(num_frames=8)
    clip = ClipConfig(num_frames=8, image_size=32, stride=1)
    own = {
        "model": larger,
        "clip": clip,
        "init": str(tmp_path / "teacher"),
        "teacher": str(tmp_path / "teacher"),
    }
    result = vmae.train(supervised(DistilConfig, labelled_world, **own), output=tmp_path / "student", **RUN)
    assert result.steps == 3 and "tensors loaded" in capsys.readouterr().out
    starts = json.loads((tmp_path / "student" / "run.json").read_text())["starts"]
    about = starts[0]["config"]["results"]
    assert about["model"]["pos_grid"] == list(MODEL.grid)  # positions are those of the checkpoint
    weights = torch.load(teacher.weights, weights_only=True)["model"]
    assert len(about["teacher_identity"]["weights"]) == 64 and "head.weight" in weights


def test_bad_settings(labelled_world, tmp_path):
    config = supervised(FinetuneConfig, labelled_world)
    with pytest.raises(InputError, match="unknown setting batchsize; known: accumulate, "):
        vmae.train(config, output=tmp_path / "run", batchsize=4)
    with pytest.raises(InputError, match="folder is missing: output="):
        vmae.train(config, batch_size=4)
    with pytest.raises(TypeError, match="_Checked is of no task here .PretrainConfig, "):
        vmae.train(_Checked(), output=tmp_path / "run")
    with pytest.raises(InputError, match="effective_batch is 32, but batch_size 4 "):
        vmae.train(
            supervised(FinetuneConfig, labelled_world, effective_batch=32), output=tmp_path / "run", **RUN
        )
    assert not (tmp_path / "run").exists()


def test_a_task_stands_in_one_place(labelled_world):
    for command, (module, task, settings) in TASKS.items():
        found = importlib.import_module(module)
        assert COMMANDS[command][0] == module and found.add_arguments and found.run
        assert issubclass(getattr(found, task), vmae.train.task.Task) and getattr(found, settings)
    assert type(task_of(supervised(FinetuneConfig, labelled_world))) is FinetuneTask
