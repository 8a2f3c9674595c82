"""The loop's promises on a toy model: order of steps, exact resume, stops, and no bad step taken."""

import json
import os
import signal
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from vmae import InputError
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import read_manifest
from vmae.checkpoint.saver import Saver
from vmae.train.loop import LoopConfig, NonFiniteError, StepRecord, Trainer
from vmae.train.metrics import read_log
from vmae.train.optim import CosineSchedule, OptimConfig, build_optimizer
from vmae.train.signals import StopSignals
from vmae.train.step import Exchange, Read


@dataclass
class ToyBatch:
    clips: torch.Tensor
    ids: list = field(default_factory=list)
    replaced: list = field(default_factory=list)

    def to(self, device, non_blocking=False):
        return self


class ToyBatches:
    """Step k's batch is a function of k."""

    def __init__(self, start_step: int) -> None:
        self.step, self.closed = start_step, False

    def __next__(self) -> ToyBatch:
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        return ToyBatch(torch.randn(4, 8, generator=generator), ids=[(0, self.step - 1, "toy.mp4")])

    def close(self) -> None:
        self.closed = True


def toy_trainer(
    folder,
    *,
    total=8,
    trainer_class=Trainer,
    open_batches=ToyBatches,
    more=None,
    fused=True,
    opt="adamw",
    **loop,
) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8))
    given = dict(
        model=model,
        optimizer=build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.01, opt=opt), fused=fused),
        schedule=CosineSchedule(lr=0.1, min_lr=0.01, total_steps=total, warmup_steps=2),
        open_batches=open_batches,
        compute_loss=lambda batch: (model(batch.clips) - batch.clips).float().square().mean(),
        config=LoopConfig(total_steps=total, **{"log_every": 1, "seed": 3, **loop}),
        saver=Saver(CheckpointFolder(folder)),
        about={"kind": "toy"},
        tensorboard=False,
    )
    return trainer_class(**{**given, **(more or {})})


def stopping(after: int, number: int):
    """A Trainer that gets a signal while it does step number `after`."""

    class Stopping(Trainer):
        def clip(self, record):
            if record.step + 1 == after:
                os.kill(os.getpid(), number)
            return super().clip(record)

    return Stopping


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def test_a_run_logs_every_step_and_leaves_a_checkpoint(tmp_path):
    trainer = toy_trainer(tmp_path, steps_per_epoch=4, save_every=3)
    assert trainer.run() is None
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    wanted = "step epoch loss grad_norm lr loss_mean clips_per_s data_share step_s data_s replaced mfu memory"
    assert set(records[0]) == set(wanted.split())
    assert records[7]["epoch"] == 2.0 and records[0]["lr"] == 0.0 and records[1]["lr"] == 0.1
    steps = [path.name for path in CheckpointFolder(tmp_path).paths()]
    assert steps == ["checkpoint-00000003", "checkpoint-00000006", "checkpoint-00000008"]


def test_named_steps_run_in_order(tmp_path, monkeypatch):
    called = []

    def noting(name):
        plain = getattr(Trainer, name)

        def noted(self, *args, **values):
            called.append(name)
            return plain(self, *args, **values)

        return noted

    for name in ("fetch", "forward_backward", "clip", "optimizer_step", "log", "checkpoint"):
        monkeypatch.setattr(Trainer, name, noting(name))
    toy_trainer(tmp_path, total=2, save_every=2, accumulate=2).run()
    once = ["fetch", "forward_backward"] * 2 + ["clip", "optimizer_step"]
    assert called == [
        *once,
        *once,
        "log",
        "log",
        "checkpoint",
    ]  # a step's numbers are read during the next one


def test_log_lines_hold_means_between_them(tmp_path):
    for name, log_every in (("each", 1), ("third", 3)):
        (tmp_path / name).mkdir()
        toy_trainer(tmp_path / name, log_every=log_every).run()
    every, third = losses(tmp_path / "each"), read_log(tmp_path / "third" / "log.jsonl")
    assert [record["step"] for record in third] == [3, 6, 8]  # the last step is always there
    assert third[1]["loss"] == every[5] and third[1]["loss_mean"] == pytest.approx(sum(every[3:6]) / 3)


@pytest.mark.parametrize(
    ("stop_after", "opt"),
    [(1, "adamw"), (4, "adamw"), (7, "adamw"), (1, "sgd"), (4, "momentum")],
)  # in the warm-up, half way, before the last step
def test_stop_and_resume_is_bit_identical(tmp_path, stop_after, opt):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    straight.mkdir()
    halves.mkdir()
    whole = toy_trainer(straight, clip_grad=0.5, opt=opt)
    whole.run()
    first = toy_trainer(halves, trainer_class=stopping(stop_after, signal.SIGTERM), clip_grad=0.5, opt=opt)
    assert first.run() == signal.SIGTERM
    torch.randn(5)  # whatever else draws random numbers must not matter
    second = toy_trainer(halves, clip_grad=0.5, opt=opt)
    latest = CheckpointFolder(halves).latest()
    saved = read_manifest(latest)
    assert saved["step"] == stop_after and saved["config"] == {"kind": "toy"}
    second.resume(latest)
    second.run()
    assert losses(straight) == losses(halves)
    assert_same_training(whole, second)


def test_weight_decay_follows_its_schedule_in_groups_that_decay(tmp_path):
    trainer = toy_trainer(tmp_path, total=3, more={"weight_decay": lambda step: 0.5 + step})
    seen, plain = [], trainer.guard.step

    def step(loss, norm):
        seen.append([group["weight_decay"] for group in trainer.optimizer.param_groups])
        plain(loss, norm)

    trainer.guard.step = step
    trainer.run()
    assert seen == [[0.5, 0.0], [1.5, 0.0], [2.5, 0.0]]
    assert [record["weight_decay"] for record in read_log(tmp_path / "log.jsonl")] == [0.5, 1.5, 2.5]


def test_dropout_differs_between_steps(tmp_path):
    trainer = toy_trainer(tmp_path)
    batch = next(ToyBatches(0))
    found = []
    for trainer.step in (0, 1, 0):
        record = StepRecord(trainer.step, lr=0.1)
        trainer.forward_backward(batch, 1.0, record, 0)
        found.append(record.loss_sum.item())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_restores_handlers(tmp_path, number):
    before = signal.getsignal(number)
    opened = []

    def open_batches(start_step):
        opened.append(ToyBatches(start_step))
        return opened[-1]

    trainer = toy_trainer(tmp_path, trainer_class=stopping(3, number), open_batches=open_batches)
    assert trainer.run() == number
    assert CheckpointFolder(tmp_path).latest().name == "checkpoint-00000003"
    assert signal.getsignal(number) == before and opened[0].closed


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    class Impatient(Trainer):
        def clip(self, record):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().clip(record)

    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path, trainer_class=Impatient).run()


def test_worker_deaths_are_raised_only_while_waiting_for_a_batch():
    def loader_handler(number, frame):
        raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, loader_handler)
    try:
        with StopSignals() as stop:
            stop.guard_workers()
            os.kill(os.getpid(), signal.SIGCHLD)
            stop.waiting = True
            with pytest.raises(RuntimeError, match="worker is killed"):
                os.kill(os.getpid(), signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is loader_handler
    finally:
        signal.signal(signal.SIGCHLD, before)


class DyingBatches(ToyBatches):
    """The workers die at step 2, with or without a signal to the run itself."""

    signalled = True

    def __next__(self):
        if self.step == 2:
            if self.signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated")
        return super().__next__()


def test_workers_that_die_of_the_same_signal_do_not_lose_the_checkpoint(tmp_path):
    assert toy_trainer(tmp_path, open_batches=DyingBatches).run() == signal.SIGTERM
    assert CheckpointFolder(tmp_path).latest().name == "checkpoint-00000002"


def test_workers_that_die_alone_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(DyingBatches, "signalled", False)
    with pytest.raises(RuntimeError, match="is killed by signal"):
        toy_trainer(tmp_path, open_batches=DyingBatches).run()


class NanBatches(ToyBatches):
    def __next__(self):
        batch = super().__next__()
        if self.step == 4:
            batch.clips[0, 0] = float("nan")
        return batch


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
@pytest.mark.parametrize("fused", [True, False])  # looks at the flag on the device; on the host
def test_nan_is_noticed_a_step_late_with_the_weights_as_before_it(tmp_path, fused, opt):
    """Step 3 fails; step 4 has run by then, and has moved nothing either."""
    (tmp_path / "good").mkdir()
    good = toy_trainer(tmp_path / "good", total=3, fused=fused, opt=opt)
    good.schedule = (
        trainer := toy_trainer(tmp_path, open_batches=NanBatches, save_every=2, fused=fused, opt=opt)
    ).schedule
    good.run()
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan.*nonfinite.json.*checkpoint-00000002"):
        trainer.run()
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 3 and report["ids"] == [[0, 3, "toy.mp4"]] and report["loss"] == "nan"
    assert_same_training(good, trainer)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def assert_same_training(one: Trainer, other: Trainer) -> None:
    """Weights and optimizer state, bit for bit."""
    one, other = one.state.tensors(), other.state.tensors()
    for group, tensors in one.items():
        assert tensors.keys() == other[group].keys()
        assert all(torch.equal(value, other[group][name]) for name, value in tensors.items()), group


def test_a_bad_last_step_is_not_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="step 3"):
        toy_trainer(tmp_path, total=4, open_batches=NanBatches).run()
    assert CheckpointFolder(tmp_path).latest() is None


def test_infinite_gradient_stops_too(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.clip = lambda record: torch.tensor(float("inf"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="step 0.*norm inf.*there is no checkpoint yet"):
        trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_bfloat16_keeps_float32_weights(tmp_path):
    trainer = toy_trainer(tmp_path, dtype="bfloat16")
    seen = []
    trainer.model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in trainer.model.state_dict().values()} == {torch.float32}
    assert {value.dtype for state in trainer.optimizer.state.values() for value in state.values()} == {
        torch.float32
    }


def test_first_batch_is_shown_once(tmp_path):
    trainer, shown = toy_trainer(tmp_path), []
    trainer.on_first_batch = lambda batch: shown.append(batch.ids)
    trainer.run()
    assert shown == [[(0, 0, "toy.mp4")]]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(dtype="float16"),
        dict(total_steps=0),
        dict(log_every=0),
        dict(save_every=-1),
        dict(steps_per_epoch=0),
    ],
)
def test_loop_config_names_a_wrong_setting(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        LoopConfig(**{"total_steps": 5, **wrong})


def test_cuda_graphs_learn_where_a_forward_begins(tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
    assert toy_trainer(tmp_path / "without", total=3).run() is None and not marks
    assert toy_trainer(tmp_path / "with", total=3, accumulate=2, cuda_graphs=True).run() is None
    assert len(marks) == 6


def test_ranks_exchange_named_numbers():
    one = Read(True, 0.5, 1.0, 4, ["a failure"], [3, 1]).row([False, True, False])
    other = Read(True, 2.0, 0.5, 2, [], [2, 0]).row([False, False, False])
    rows = torch.tensor([one, other], dtype=torch.float64)
    assert Exchange.of(rows, 3) == Exchange(True, [False, True, False], 2.0, 1.5, 6, 1, [5, 1])
    rows[1, 0] = 0
    assert not Exchange.of(rows, 3).all_present
