"""Logs that survive kills, an honest data share, and trivial predictors that agree with a plain
computation."""

import io
import json
import subprocess
import sys

import pytest
import torch

from vmae import DualMask, ModelConfig
from vmae.train import metrics
from vmae.train.metrics import RunLog, StepMeter, loss_of_last_tenth, read_log, trivial_losses, write_run_file

STEP = dict(loss=0.5, clips=4, step_s=1.0, data_s=0.02)


def open_log(folder, start_step=0, total_steps=10, **options) -> RunLog:
    return RunLog(folder, start_step, total_steps, tensorboard=False, stream=io.StringIO(), **options)


def test_meter_means_are_over_steps_and_time():
    meter = StepMeter()
    meter.add(loss=1.0, clips=8, step_s=1.0, data_s=0.5)
    meter.add(loss=3.0, clips=8, step_s=3.0, data_s=0.5, replaced=2)
    assert meter.means() == dict(
        loss_mean=2.0, clips_per_s=4.0, data_share=0.25, step_s=2.0, data_s=0.5, replaced=2
    )
    assert StepMeter().means()["data_share"] == 0.0


def test_log_of_a_killed_run_is_cut_back_to_the_start_step(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    log = open_log(tmp_path, start_step=4)
    log.record({"step": 6, "loss": 9.0})
    log.close()
    assert [(record["step"], record["loss"]) for record in read_log(log.path)] == [
        (2, 1.0),
        (4, 1.0),
        (6, 9.0),
    ]
    assert read_log(tmp_path / "absent.jsonl") == []


def test_floats_in_the_log_are_exact(tmp_path):
    log = open_log(tmp_path)
    loss = torch.rand((), dtype=torch.float32).item()
    log.record({"step": 1, "loss": loss})
    log.close()
    assert read_log(log.path)[0]["loss"] == loss


def test_plain_progress_names_loss_rate_share_and_time_left(tmp_path):
    log = open_log(tmp_path, quiet_s=0.0)
    log.step(1, **STEP)
    log.close()
    assert log.stream.getvalue() == "step 1/10: loss 0.5000, clips/s 4.0, data 2%, 0:00:09 left\n"


def test_progress_bar_on_a_terminal(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    log = RunLog(tmp_path, 0, 2, tensorboard=False, stream=Terminal())
    for done in (1, 2):
        log.step(done, **STEP)
    log.close()
    shown = log.stream.getvalue()
    assert all(word in shown for word in ("loss=0.5000", "clips/s=4.0", "data=2%", "2/2")), shown


@pytest.mark.parametrize(("data_s", "warnings"), [(0.05, 0), (0.2, 1)])  # shares below and above 10 %
def test_high_data_share_is_warned_about_once(tmp_path, data_s, warnings):
    log = open_log(tmp_path, total_steps=100)
    for done in range(1, 60):
        log.step(done, **{**STEP, "data_s": data_s})
    log.close()
    assert log.stream.getvalue().count("warning: ") == warnings


def test_slow_start_of_the_workers_is_no_reason_to_warn(tmp_path):
    log = open_log(tmp_path, total_steps=100)
    for done in range(1, 60):
        log.step(done, **{**STEP, "step_s": 101.0, "data_s": 100.0} if done == 1 else STEP)
    log.close()
    assert "warning" not in log.stream.getvalue()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, 10, stream=io.StringIO())
    log.record({"step": 3, "loss": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.25)]


def test_tensorboard_gets_groups_of_numbers_and_no_unknown_ones(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, 10, stream=io.StringIO())
    log.record({"step": 3, "mfu": None, "samples": {"kinetics": 5, "web": 2}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"samples/kinetics", "samples/web"}
    assert read_log(log.path)[0]["mfu"] is None


def test_utilisation_is_of_the_devices_peak_where_that_is_known(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert metrics.flops_utilisation(989e12 / 2, gpu, "bfloat16") == pytest.approx(0.5)
    assert metrics.flops_utilisation(None, gpu, "bfloat16") is None
    assert metrics.flops_utilisation(1e12, torch.device("cpu"), "float32") is None


def test_missing_tensorboard_is_said_and_survived(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, 0, 10, stream=io.StringIO())
    log.record({"step": 1, "loss": 0.5})
    log.close()
    assert "no TensorBoard logs" in log.stream.getvalue() and len(read_log(log.path)) == 1


def test_final_loss_is_the_mean_of_the_last_tenth():
    records = [{"step": step, "loss_mean": float(step)} for step in range(10, 110, 10)]
    assert loss_of_last_tenth(records, 100) == 100.0
    assert loss_of_last_tenth(records, 40) == pytest.approx((40 + 50 + 60 + 70 + 80 + 90 + 100) / 7)
    assert loss_of_last_tenth([], 100) is None


def test_run_file_keeps_every_start(tmp_path):
    write_run_file(tmp_path, {"start_step": 0})
    write_run_file(tmp_path, {"start_step": 5})
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "starts": [{"start_step": 0}, {"start_step": 5}]
    }
    (tmp_path / "run.json").write_text("{")
    write_run_file(tmp_path, {"start_step": 7})
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


def test_description_of_a_start_names_versions_and_device():
    about = metrics.describe_start({"a": 1}, device=torch.device("cpu"), start_step=3)
    assert about["torch"] == torch.__version__ and about["start_step"] == 3 and about["config"] == {"a": 1}
    assert about["device"].startswith("cpu") and "commit" in about and "clean" in about


def test_code_version_without_git(monkeypatch):
    def no_git(*args, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert metrics.code_version() == {"commit": None, "clean": None}


# Encoder-only and dual masks; random masks weigh tokens; grids that are not square.
@pytest.mark.parametrize("kinds", [("tube", "none"), ("tube", "running_cell"), ("random", "random")])
@pytest.mark.parametrize("normalize", [True, False])
def test_trivial_losses_agree_with_a_plain_computation(kinds, normalize):
    config = ModelConfig.preset("vit_tiny", img_size=(32, 64), num_frames=8, patch_size=8)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 8, 32, 64, 3), dtype=torch.uint8, generator=generator)
    mask = DualMask.sample(
        2, config.grid, encoder=kinds[0], decoder=kinds[1], encoder_ratio=0.75, generator=generator
    )
    split = clips.double().div(255).view(2, 4, 2, 4, 8, 8, 8, 3).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6)
    if normalize:
        split = (split - split.mean(4, keepdim=True)) / (split.std(4, keepdim=True) + 1e-6)
    target = split.flatten(1, 3).flatten(2)
    hidden_from_encoder, not_picked = mask.to_bool()
    counted = hidden_from_encoder & ~not_picked
    mean = torch.stack([target[clip][~hidden_from_encoder[clip]].mean(0) for clip in range(2)])[:, None]
    found = trivial_losses(clips, mask, config, normalize)
    assert found["zero"] == pytest.approx(target.square().mean(-1)[counted].mean().item(), rel=1e-5)
    assert found["mean of the visible tubelets"] == pytest.approx(
        (target - mean).square().mean(-1)[counted].mean().item(), rel=1e-5
    )
    if normalize:
        assert found["zero"] == pytest.approx(1.0, abs=0.02)
