"""Steps that are left out: they move nothing, the others go on as without them, a resumed run knows them."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from test_loop import ToyBatches, stopping, toy_trainer
from test_parallel import GLOBAL_BATCH, make_trainer, whole

from vmae import InputError
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import read_group
from vmae.config import OptimConfig
from vmae.train.guard import FiniteGuard, LateNumbers
from vmae.train.loop import NonFiniteError, Trainer
from vmae.train.metrics import StepMeter, read_log
from vmae.train.parallel import open_parallel
from vmae.train.skipping import Outcome, Skipping, SkippingGuard, write_report

SPIKES = Skipping(deviations=6.0, window=8, spikes=3)


def spoiled(factors):
    """Batches of the toy; step k's first micro-batch is multiplied by `factors[k]`."""

    class Spoiled(ToyBatches):
        def __next__(self):
            batch = super().__next__()
            batch.clips[0] *= factors.get(self.step - 1, 1.0)
            return batch

    return Spoiled


def without(*steps):
    """A Trainer that does not take these steps."""

    class Without(Trainer):
        def optimizer_step(self, record, norm):
            if record.step not in steps:
                super().optimizer_step(record, norm)
            else:
                record.numbers = LateNumbers(torch.stack([record.loss_sum, norm, torch.tensor(0.0)]))

    return Without


def assert_same_training(one, other):
    """Weights and optimizer state, bit for bit."""
    for group in ("model", "optimizer"):
        found, wanted = one.state.tensors()[group], other.state.tensors()[group]
        assert found.keys() == wanted.keys() and found
        assert all(torch.equal(value, wanted[name]) for name, value in found.items()), group


def losses(folder):
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def nan_at(*steps):
    return spoiled(dict.fromkeys(steps, float("nan")))


# Read on the device; by the host. Several micro-batches; low precision.
@pytest.mark.parametrize(
    "loop",
    [
        *({"opt": opt, "fused": fused} for opt in ("adamw", "sgd") for fused in (True, False)),
        {"accumulate": 2, "dtype": "bfloat16"},
    ],
)
def test_only_the_bad_step_is_left_out(tmp_path, loop):
    (tmp_path / "other").mkdir()
    bad = 2 if "accumulate" in loop else 3  # number of its micro-batch, over `accumulate`
    known = nan_at(bad * loop.get("accumulate", 1))
    trainer = toy_trainer(tmp_path, open_batches=known, more={"skipping": Skipping(nonfinite=1)}, **loop)
    assert trainer.run() is None
    other = toy_trainer(tmp_path / "other", trainer_class=without(bad), **loop)
    other.run()
    assert_same_training(trainer, other)
    lines = read_log(tmp_path / "log.jsonl")
    records = [line for line in lines if "loss_mean" in line]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["skipped"] for record in records] == [0] * bad + [1] * (8 - bad)
    assert records[bad]["loss"] is None and records[bad]["loss_mean"] is None
    assert [record["lr"] for record in records] == [
        record["lr"] for record in read_log(tmp_path / "other" / "log.jsonl")
    ]
    told = next(line for line in lines if "left_out" in line)
    assert told["step"] == bad + 1 and told["left_out"]["why"] == "nonfinite"
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == bad and report["ids"] == told["left_out"]["ids"] and "earlier" not in report


def test_a_weight_without_a_number_stops_the_run_after_as_many_as_are_allowed(tmp_path, capsys):
    class Broken(Trainer):
        def forward_backward(self, batch, weight, record, part):
            if record.step == 3:
                with torch.no_grad():
                    self.model[0].weight[0, 0] = float("inf")
            super().forward_backward(batch, weight, record, part)

    trainer = toy_trainer(
        tmp_path, trainer_class=Broken, save_every=2, more={"skipping": Skipping(nonfinite=2)}
    )
    with pytest.raises(
        NonFiniteError,
        match="step 5: the loss is nan.*left out before it: 2, as many as --on-nonfinite allows.*"
        "checkpoint-00000004",
    ):
        trainer.run()
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 5 and [one["step"] for one in report["earlier"]] == [3, 4]
    assert [one["ids"] for one in report["earlier"]] == [[[0, 3, "toy.mp4"]], [[0, 4, "toy.mp4"]]]
    assert "note: step 3: the loss is nan" in capsys.readouterr().err


def resumed(folder, more):
    trainer = toy_trainer(folder, more=more.pop("own", None), **more)
    trainer.resume(CheckpointFolder(folder).latest())
    return trainer


def test_a_stopped_run_knows_what_it_left_out(tmp_path):
    """Steps 2, 5 and 6 are bad; it stops after step 4."""
    for name in ("straight", "halves"):
        (tmp_path / name).mkdir()
    given = {"open_batches": nan_at(2, 5, 6)}
    straight = toy_trainer(tmp_path / "straight", more={"skipping": Skipping(nonfinite=3)}, **given)
    straight.run()
    halves = tmp_path / "halves"
    first = toy_trainer(
        halves,
        trainer_class=stopping(4, signal.SIGTERM),
        more={"skipping": Skipping(nonfinite=3)},
        **given,
    )
    assert first.run() == signal.SIGTERM
    stopped = CheckpointFolder(halves).latest()
    assert read_group(stopped, "guard")["counts"].tolist() == [1, 0]
    fewer = resumed(halves, {"own": {"skipping": Skipping(nonfinite=2)}, **given})
    with pytest.raises(NonFiniteError, match="step 6: the loss is nan.*left out before it: 2"):
        fewer.run()
    again = resumed(halves, {"own": {"skipping": Skipping(nonfinite=3)}, **given})
    assert again.run() is None
    assert_same_training(again, straight)
    assert losses(halves) == losses(tmp_path / "straight") and losses(halves).count(None) == 3
    reports = [
        json.loads((tmp_path / name / "nonfinite.json").read_text()) for name in ("halves", "straight")
    ]
    assert reports[0] == reports[1] and len(reports[0]["earlier"]) == 2


def test_it_may_be_asked_for_once_a_run_has_stopped(tmp_path):
    """And left out again: a checkpoint without counts, or with some that nobody asks for."""
    with pytest.raises(NonFiniteError, match="step 5"):
        toy_trainer(tmp_path, open_batches=nan_at(5), save_every=4).run()
    trainer = resumed(
        tmp_path,
        {
            "own": {"skipping": Skipping(nonfinite=1, deviations=6.0, window=8, spikes=1)},
            "open_batches": nan_at(5),
            "total": 7,
        },
    )
    assert trainer.run() is None and trainer.guard.counts.tolist() == [1, 0]
    last = CheckpointFolder(tmp_path).latest()
    assert read_group(last, "guard")["recent"].shape == (2, 8)
    other = resumed(tmp_path, {"own": {"skipping": Skipping(deviations=6.0, window=4, spikes=1)}})
    assert other.guard.counts.tolist() == [1, 0] and other.guard.recent.isnan().all()
    assert resumed(tmp_path, {}).run() is None


def test_without_it_the_guard_is_the_plain_one(tmp_path):
    trainer = toy_trainer(tmp_path)
    assert type(trainer.guard) is FiniteGuard and set(trainer.state.tensors()) == {"model", "optimizer"}
    assert trainer.guard.numbers(torch.tensor(1.0), torch.tensor(2.0)).tolist() == [1, 2, 0]


# --- spikes


def guarded(losses_norms, rules, sum_ranks=lambda value: value):
    """Outcomes of a guard that sees these losses and norms, and the number of steps that it took."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    guard = SkippingGuard(
        torch.optim.SGD([weight], lr=1.0, fused=True), torch.device("cpu"), rules, sum_ranks
    )
    outcomes = []
    for loss, norm in losses_norms:
        values = torch.tensor(loss), torch.tensor(norm)
        guard.step(*values)
        outcomes.append(Outcome.of(guard.numbers(*values).tolist()))
    return outcomes, -int(weight.item())


def test_a_spike_lies_above_mean_and_deviations_of_the_steps_taken():
    rng = np.random.default_rng(0)
    pairs = rng.normal([2.0, 0.5], [0.1, 0.02], (40, 2)).astype(np.float32)
    pairs[20, 0], pairs[25, 1], pairs[30] = 9.0, 3.0, np.nan
    pairs[2, 0] = 50.0  # too early to be found
    rules = Skipping(nonfinite=1, deviations=4.0, window=10, spikes=5)
    outcomes, taken = guarded(pairs.tolist(), rules)
    window = []
    for step, (pair, outcome) in enumerate(zip(pairs.astype(float), outcomes)):
        last = np.array(window[-10:])
        if len(last) >= 5:
            bounds = last.mean(0) + 4 * last.std(0, ddof=1)
            assert outcome.bounds == pytest.approx(tuple(bounds), rel=1e-4)
        else:
            assert outcome.bounds == (math.inf, math.inf)
        kind = {20: "spike", 25: "spike", 30: "nonfinite"}.get(step)
        assert outcome.left_out == kind and not outcome.failed, step
        if kind is None:
            window.append(pair)
    assert taken == 37 and outcomes[-1].counts == (1, 2)


def test_a_spike_too_many_stops_for_good():
    steady = [(1.0 + 0.01 * (step % 2), 1.0) for step in range(10)]
    outcomes, taken = guarded(steady + [(5.0, 1.0)] * 4 + steady, SPIKES)
    assert [one.failed for one in outcomes] == [False] * 13 + [True] * 11
    assert taken == 10


def test_what_one_rank_leaves_out_all_do():
    """Here the other rank finds a spike in every step, this one in none."""
    outcomes, taken = guarded([(1.0, 1.0)] * 3, SPIKES, lambda value: value + torch.tensor([0.0, 1.0]))
    assert [one.left_out for one in outcomes] == ["spike"] * 3 and taken == 0


def test_a_spike_is_left_out_and_known_after_a_stop(tmp_path, capsys):
    """Batches of step 14 and 17 are 30 times as bright; the run is stopped after step 16."""
    given = {"total": 24, "open_batches": spoiled({14: 30.0, 17: 30.0})}
    for name in ("straight", "other", "halves"):
        (tmp_path / name).mkdir()
    straight = toy_trainer(tmp_path / "straight", more={"skipping": SPIKES}, **given)
    straight.run()
    assert "note: step 14: the loss is " in (said := capsys.readouterr().err)
    assert "above what is no spike (" in said and "2 left out so far" in said
    other = toy_trainer(tmp_path / "other", trainer_class=without(14, 17), total=24)
    other.run()
    assert_same_training(straight, other)
    records = read_log(tmp_path / "straight" / "log.jsonl", skipped=int)
    assert [record["skipped"] for record in records] == [0] * 14 + [1] * 3 + [2] * 7
    told = [line["left_out"] for line in read_log(tmp_path / "straight" / "log.jsonl") if "left_out" in line]
    assert [(one["why"], one["ids"]) for one in told] == [
        ("spike", [[0, step, "toy.mp4"]]) for step in (14, 17)
    ]
    assert not (tmp_path / "straight" / "nonfinite.json").exists()
    halves = tmp_path / "halves"
    toy_trainer(halves, trainer_class=stopping(16, signal.SIGTERM), more={"skipping": SPIKES}, **given).run()
    again = resumed(halves, {"own": {"skipping": SPIKES}, **given})
    again.run()
    assert_same_training(again, straight)
    guards = [read_group(CheckpointFolder(one).latest(), "guard") for one in (halves, tmp_path / "straight")]
    assert torch.equal(guards[0]["recent"], guards[1]["recent"]) and guards[0]["counts"].tolist() == [0, 2]
    limited = Skipping(deviations=6.0, window=8, spikes=1)
    with pytest.raises(
        NonFiniteError, match="step 17: the loss is .*left out before it: 1, as many as --spike-limit"
    ):
        toy_trainer(tmp_path / "other", more={"skipping": limited}, **given).run()


class SpoiledOnOneRank(Trainer):
    def forward_backward(self, batch, weight, record, part):
        super().forward_backward(batch, weight, record, part)
        if self.parallel.rank == self.parallel.world_size - 1 and record.step in (11, 13):
            record.loss_sum = record.loss_sum * (float("nan") if record.step == 11 else 30.0)


def train_spoiled(kind, folder):
    folder.mkdir(exist_ok=True)
    rules = Skipping(nonfinite=1, deviations=6.0, window=8, spikes=1)
    with open_parallel(kind, "cpu") as parallel:
        trainer = make_trainer(
            parallel, folder, trainer_class=SpoiledOnOneRank, more={"skipping": rules}, total_steps=16
        )
        trainer.run()
        weights = {name: whole(value).numpy() for name, value in trainer.state.tensors()["model"].items()}
        return weights, trainer.guard.counts.tolist(), trainer.guard.recent.numpy()


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_all_ranks_leave_out_the_same(tmp_path, run_ranks, kind):
    """One rank's loss is spoiled; the samples of all are told."""
    found = run_ranks(2, train_spoiled, kind, tmp_path / "ranks")
    assert [counts for _, counts, _ in found] == [[1, 1], [1, 1]]
    assert np.array_equal(found[0][2], found[1][2])
    assert all((found[1][0][name] == value).all() for name, value in found[0][0].items())
    told = [line["left_out"] for line in read_log(tmp_path / "ranks" / "log.jsonl") if "left_out" in line]
    assert [(one["why"], one["ids"]) for one in told] == [
        (why, [[step, index, "clip"] for index in range(GLOBAL_BATCH)])
        for why, step in (("nonfinite", 11), ("spike", 13))
    ]
    alone = train_spoiled("none", tmp_path / "alone")
    assert all(abs(value - alone[0][name]).max() < 2e-5 for name, value in found[0][0].items())


# --- what is written, and the settings


def test_reports_of_steps_made_again_stand_once(tmp_path):
    path = tmp_path / "nonfinite.json"
    for step in (3, 5, 9, 5):
        write_report(path, {"step": step})
    assert json.loads(path.read_text()) == {"step": 5, "earlier": [{"step": 3}]}
    path.write_text("[1")
    write_report(path, {"step": 7})
    assert json.loads(path.read_text()) == {"step": 7}


def test_the_mean_is_of_losses_that_are_numbers():
    meter = StepMeter()
    for loss in (1.0, float("nan"), 2.0):
        meter.add(loss=loss, clips=1, step_s=1.0, data_s=0.0)
    assert meter.means()["loss_mean"] == 1.5 and meter.means()["step_s"] == 1


def test_settings(pretrain, tmp_path, capsys):
    assert OptimConfig().on_nonfinite == "stop" and not Skipping.of(OptimConfig())
    assert Skipping.of(OptimConfig(on_nonfinite="skip:3")) == Skipping(nonfinite=3)
    spikes = OptimConfig(skip_spikes=6, spike_window=64, spike_limit=9)
    assert Skipping.of(spikes) == Skipping(deviations=6, window=64, spikes=9)
    for wrong in ("skip", "skip:0", "skip:-1", "skip:1.5", "go on"):
        with pytest.raises(InputError, match="on_nonfinite must be stop, or skip:K with K a whole number"):
            OptimConfig(on_nonfinite=wrong)
    assert pretrain(tmp_path / "run", "--on-nonfinite", "skip:0") == 2
    assert "--on-nonfinite: must be stop, or skip:K with K a whole number from 1" in capsys.readouterr().err


def test_a_command_goes_on_over_a_bad_step(pretrain, tmp_path, capsys, monkeypatch):
    plain = Trainer.clip
    monkeypatch.setattr(
        Trainer,
        "clip",
        lambda self, record: plain(self, record) * (float("inf") if record.step == 2 else 1.0),
    )
    assert pretrain(tmp_path, "--on-nonfinite", "skip:1", "--skip-spikes", "6", "--opt", "muon") == 0
    assert "note: step 2: the loss is" in capsys.readouterr().err
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 2 and report["grad_norm"] == "inf" and len(report["ids"]) == 2
    assert pretrain(tmp_path, "--on-nonfinite", "skip:1", "--skip-spikes", "6", "--opt", "muon") == 0
    assert "nothing to do" in capsys.readouterr().out
