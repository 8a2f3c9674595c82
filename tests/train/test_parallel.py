"""One large batch, whoever computes it: 1, 2 and 4 ranks, DDP, FSDP2, hybrid and accumulation train the same
model."""

import json
import os
import resource
import signal
from dataclasses import dataclass, field

import pytest
import torch
from torch.distributed import checkpoint as dcp

from vmae import DualMask, InputError, MaskConfig, ModelConfig, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import find_damage, read_group
from vmae.checkpoint.saver import Saver
from vmae.data.ranks import _LEFT
from vmae.train.activations import prepare_blocks
from vmae.train.loop import LoopConfig, NonFiniteError, Trainer
from vmae.train.metrics import read_log
from vmae.train.optim import CosineSchedule, OptimConfig, build_optimizer
from vmae.train.parallel import allow_connections, open_parallel, resolve_kind

MODEL = ModelConfig(
    img_size=32,
    patch_size=8,
    num_frames=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=2,
    decoder_num_heads=2,
)
# Both random: clips count unequally many tokens, so equal shares would be wrong.
MASK = MaskConfig(encoder="random", encoder_ratio=0.75, decoder="random", decoder_ratio=0.5)
STEPS, GLOBAL_BATCH = 20, 8


@dataclass
class Clips:
    clips: torch.Tensor
    mask: DualMask
    ids: list
    replaced: list = field(default_factory=list)

    def to(self, device, non_blocking=False):
        return self


def clip(step: int, index: int) -> Clips:
    """A function of its place in the run."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    pixels = torch.randint(
        0, 256, (1, MODEL.num_frames, *MODEL.image_hw, 3), dtype=torch.uint8, generator=generator
    )
    return Clips(
        pixels, DualMask.sample(1, MODEL.grid, **MASK.to_dict(), generator=generator), [(step, index, "clip")]
    )


def batches(parallel, accumulate, start_step):
    size = GLOBAL_BATCH // parallel.world_size // accumulate
    for step in range(start_step, STEPS):
        for part in range(accumulate):
            first = (parallel.rank * accumulate + part) * size
            found = [clip(step, index) for index in range(first, first + size)]
            mask = DualMask.cat([one.mask for one in found])
            yield Clips(
                torch.cat([one.clips for one in found]), mask, [key for one in found for key in one.ids]
            )


def make_trainer(
    parallel,
    folder,
    *,
    accumulate=1,
    trainer_class=Trainer,
    backend="torch",
    checkpointing="none",
    compiled=False,
    open_batches=batches,
    background=False,
    optim=None,
    more=None,
    **loop,
):
    torch.manual_seed(0)
    model = build_pretrainer(MODEL, backend=backend)
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    prepare_blocks(blocks, checkpointing=checkpointing, compiled=compiled)
    config = LoopConfig(
        **{"total_steps": STEPS, "log_every": 1, "clip_grad": 0.5, "accumulate": accumulate, **loop}
    )
    wrapped = parallel.wrap(model, blocks, config.dtype)
    return trainer_class(
        model=wrapped,
        optimizer=build_optimizer(model, optim or OptimConfig()),
        schedule=CosineSchedule(lr=1e-3, min_lr=1e-4, total_steps=STEPS, warmup_steps=3),
        open_batches=lambda start_step: open_batches(parallel, accumulate, start_step),
        compute_loss=lambda batch: wrapped(batch.clips, batch.mask),
        weigh=lambda batch: float(batch.mask.weight.sum()) / (24 * batch.clips.shape[0]),
        config=config,
        saver=Saver(CheckpointFolder(folder, keep=9), parallel, background=background),
        about={"kind": "test"},
        parallel=parallel,
        tensorboard=False,
        **(more or {}),
    )


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def train(kind, folder, options=None, resume=False, shard_size=None):
    """(weights, losses) after the run; the folder is made, and holds the log."""
    os.makedirs(folder, exist_ok=True)
    with open_parallel(kind, "cpu", shard_size=shard_size) as parallel:
        trainer = make_trainer(parallel, folder, **(options or {}))
        if resume:
            trainer.resume(CheckpointFolder(folder).latest())
        trainer.run()
        weights = {name: whole(value).numpy() for name, value in trainer.state.tensors()["model"].items()}
        return weights, [record["loss"] for record in read_log(f"{folder}/log.jsonl")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One process, one batch of 8."""
    return train("none", tmp_path_factory.mktemp("straight"))


def assert_agrees(found, straight, steps=STEPS):
    weights, losses = found
    assert len(losses) == steps
    assert losses == pytest.approx(straight[1][:steps], rel=1e-6)
    for name, value in weights.items():
        assert abs(value - straight[0][name]).max() < 2e-5, name  # each has moved by up to 2e-2


def test_accumulation_agrees(straight, tmp_path):
    assert_agrees(train("none", tmp_path, {"accumulate": 4}), straight)


@pytest.mark.parametrize(
    ("count", "kind", "options"),
    [
        (1, "fsdp", {}),
        (2, "ddp", {}),
        pytest.param(2, "fsdp", {"accumulate": 2}, marks=pytest.mark.slow),  # no exchange in between
        # Gathered again, and run again, in the backward.
        pytest.param(2, "fsdp", {"checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param(4, "ddp", {"accumulate": 2}, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", {}, marks=pytest.mark.slow),
        pytest.param(4, "hybrid", {}, marks=pytest.mark.slow),
    ],
)
def test_ranks_agree(straight, tmp_path, run_ranks, count, kind, options):
    found = run_ranks(count, train, kind, tmp_path, options, False, 2 if kind == "hybrid" else None)
    assert_agrees(found[0], straight)
    for name, value in found[0][0].items():
        assert all((other[0][name] == value).all() for other in found), f"{name} differs between ranks"


@pytest.mark.slow
def test_sgd_on_shards_agrees_and_goes_on(tmp_path, run_ranks):
    """On 2 ranks up to step 7, on 1 from there: the momentum of shards is that of the whole parameters."""
    options = {"optim": OptimConfig(opt="sgd", weight_decay=0.5)}
    alone = train("none", tmp_path / "alone", options)
    before = {**options, "trainer_class": stop_after(7)}
    run_ranks(2, train, "fsdp", tmp_path / "shards", before, False, None)
    held = {
        key.rpartition(".")[2]
        for key in read_group(CheckpointFolder(tmp_path / "shards").latest(), "optimizer")
    }
    assert held == {"momentum_buffer"}
    assert_agrees(train("none", tmp_path / "shards", options, True), alone)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_muon_agrees_and_goes_on(tmp_path, run_ranks, kind):
    """On 2 ranks up to step 3, on 1 from there. Its steps are made in bfloat16, so that the order of a sum
    shows: 1.3e-6 of the loss and 2e-4 of the weights, which are up to 1, were seen after 20 steps."""
    options = {"optim": OptimConfig(opt="muon", weight_decay=0.5), "total_steps": 6}
    weights, losses = train("none", tmp_path / "alone", options)
    before = {**options, "trainer_class": stop_after(3)}
    found = run_ranks(2, train, kind, tmp_path / "ranks", before, False, None)
    assert all((found[1][0][name] == value).all() for name, value in found[0][0].items())
    own_weights, own_losses = train("none", tmp_path / "ranks", options, True)
    assert own_losses == pytest.approx(losses, rel=1e-5)
    assert all(abs(value - weights[name]).max() < 2e-3 for name, value in own_weights.items())
    assert max(abs(value).max() for value in own_weights.values()) > 0.5


def stop_after(step):
    class Stopping(Trainer):
        """One rank is told to stop; all do, after the same step."""

        def clip(self, record):
            if record.step + 1 == step and self.parallel.rank == self.parallel.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().clip(record)

    return Stopping


# Written and read by different numbers of ranks, of different kinds; once in the background.
@pytest.mark.parametrize(
    ("before", "after", "background"),
    [
        ((2, "fsdp"), (1, "none"), False),
        pytest.param((1, "none"), (2, "fsdp"), False, marks=pytest.mark.slow),
        pytest.param((2, "ddp"), (4, "fsdp"), True, marks=pytest.mark.slow),
        pytest.param((4, "hybrid"), (2, "fsdp"), True, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_ranks(straight, tmp_path, run_ranks, before, after, background):
    options = {"trainer_class": stop_after(7), "background": background}
    run_ranks(before[0], train, before[1], tmp_path, options, False, 2 if before[1] == "hybrid" else None)
    assert CheckpointFolder(tmp_path).latest().name == "checkpoint-00000007"
    found = run_ranks(after[0], train, after[1], tmp_path, None, True)
    assert_agrees(found[0], straight)


def save_twice(kind, folder, shard_size):
    """(names given to torch by each of two background saves, global plans that were made)."""
    given, plans = [], []
    make_plan, async_save = dcp.DefaultSavePlanner._create_global_plan, dcp.async_save

    def plan(self, all_plans):
        plans.append(sum(len(one.items) for one in all_plans))
        return make_plan(self, all_plans)

    def save(tensors, **options):
        given.append({f"{group}.{name}" for group, values in tensors.items() for name in values})
        return async_save(tensors, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.DefaultSavePlanner, "_create_global_plan", plan)
        patch.setattr(dcp, "async_save", save)
        train(kind, folder, {"background": True, "save_every": 1, "total_steps": 2}, False, shard_size)
    return given, plans


@pytest.mark.parametrize(
    ("count", "kind", "copies"),
    [(3, "ddp", 3), pytest.param(4, "hybrid", 2, marks=pytest.mark.slow), (2, "fsdp", 1)],
)
def test_each_tensor_is_copied_and_planned_once(tmp_path, run_ranks, count, kind, copies):
    found = run_ranks(count, save_twice, kind, tmp_path, 2 if kind == "hybrid" else None)
    names = set().union(*(given[0] for given, _ in found))
    assert {"model.mask_token", "optimizer.mask_token.exp_avg"} < names
    for turn in (0, 1):
        assert sum(len(given[turn]) for given, _ in found) == len(names) * count // copies
        assert set().union(*(given[turn] for given, _ in found)) == names
    made = found[0][1]  # by rank 0, for all: at the first save alone
    assert len(made) == 1
    if kind == "ddp":
        assert made == [len(names)]
    last = CheckpointFolder(tmp_path).latest()
    assert {f"model.{name}" for name in read_group(last)} < names and find_damage(last) == []


@pytest.mark.slow
def test_fsdp_resumes_bit_for_bit(tmp_path, run_ranks):
    whole_run = run_ranks(2, train, "fsdp", tmp_path / "straight")[0]
    run_ranks(2, train, "fsdp", tmp_path / "halves", {"trainer_class": stop_after(9)})
    halves = run_ranks(2, train, "fsdp", tmp_path / "halves", None, True)[0]
    assert halves[1] == whole_run[1]
    assert all((value == whole_run[0][name]).all() for name, value in halves[0].items())


# Autocast alone; weights gathered in bfloat16. Both beside float32, whose rounding is 2^-16 of theirs.
@pytest.mark.parametrize(("count", "kind"), [(1, "none"), pytest.param(2, "fsdp", marks=pytest.mark.slow)])
def test_bfloat16_agrees_within_its_rounding(straight, tmp_path, run_ranks, count, kind):
    weights, losses = run_ranks(count, train, kind, tmp_path, {"dtype": "bfloat16"})[0]
    assert losses == pytest.approx(straight[1], rel=2**-7) and losses != straight[1]
    assert {str(value.dtype) for value in weights.values()} == {"float32"}


@pytest.mark.slow
def test_fused_kernels_read_gathered_weights(straight, tmp_path, run_ranks):
    """The head's weight and the embedding's go to kernels as they are, outside their modules."""
    options = {"backend": "triton", "total_steps": 2}
    found = run_ranks(2, train, "fsdp", tmp_path, options)[0]
    assert found[1] == pytest.approx(straight[1][:2], rel=1e-5)


@pytest.mark.parametrize("options", [{"checkpointing": "selective"}, {"checkpointing": "full"}])
def test_checkpointing_changes_nothing(straight, tmp_path, options):
    weights, losses = train("none", tmp_path, options)
    assert losses == straight[1] and all(
        (value == straight[0][name]).all() for name, value in weights.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "kind", "checkpointing"), [(1, "none", "selective"), (2, "fsdp", "full"), (2, "ddp", "none")]
)
def test_compiled_blocks_agree(straight, tmp_path, run_ranks, count, kind, checkpointing):
    options = {"compiled": True, "checkpointing": checkpointing, "total_steps": 4}
    found = run_ranks(count, train, kind, tmp_path, options)[0]
    assert found[1] == pytest.approx(straight[1][:4], rel=1e-5)


class BadOnOneRank(Trainer):
    def forward_backward(self, batch, weight, record, part):
        if record.step == 3 and self.parallel.rank == 1:
            weight = float("nan")
        super().forward_backward(batch, weight, record, part)


def train_badly(kind, folder):
    with open_parallel(kind, "cpu") as parallel:
        trainer = make_trainer(parallel, folder, trainer_class=BadOnOneRank, save_every=3)
        try:
            trainer.run()
        except NonFiniteError as error:
            weights = [whole(value) for value in trainer.state.tensors()["model"].values()]
            return str(error), all(value.isfinite().all() for value in weights)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_bad_loss_on_one_rank_stops_all_and_names_all_samples(tmp_path, run_ranks, kind):
    found = run_ranks(2, train_badly, kind, tmp_path)
    assert all("step 3: the loss is nan" in message and finite for message, finite in found)
    ids = json.loads((tmp_path / "nonfinite.json").read_text())["ids"]
    assert ids == [[3, index, "clip"] for index in range(GLOBAL_BATCH)]
    assert CheckpointFolder(tmp_path).latest().name == "checkpoint-00000003"


def leave_before_the_model():
    with open_parallel("ddp", "cpu") as parallel:
        model = parallel.wrap(torch.nn.Linear(2, 2))
    return any(group is model.process_group for group in _LEFT)


class Counting(Trainer):
    """Counts what the ranks tell each other in a step."""

    exchanges = 0

    def train_step(self, batches):
        exchange, self.exchanges = self.parallel.exchange, 0

        def counting(numbers):
            self.exchanges += 1
            return exchange(numbers)

        self.parallel.exchange = counting
        try:
            super().train_step(batches)
        finally:
            self.parallel.exchange = exchange


def broken_after(good):
    """`batches` of which rank 1 has only so many."""

    def open_batches(parallel, accumulate, start_step):
        for number, batch in enumerate(batches(parallel, accumulate, start_step)):
            if parallel.rank == 1 and number == good:
                raise InputError("the disk is gone")
            yield batch

    return open_batches


def fail_in_a_step(kind, folder, good):
    """(error, steps done, exchanges of the last step, whether the weights are those of the steps done)."""
    os.makedirs(folder, exist_ok=True)
    with open_parallel(kind, "cpu") as parallel:
        options = {"accumulate": 4, "open_batches": broken_after(good), "total_steps": 5, "save_every": 1}
        trainer = make_trainer(parallel, folder, trainer_class=Counting, **options)
        try:
            trainer.run()
        except InputError as error:
            text = str(error)
        saved = read_group(CheckpointFolder(folder).latest())
        own = trainer.state.tensors()["model"]
        same = all(torch.equal(whole(value), saved[name]) for name, value in own.items())
        return text, trainer.step, trainer.exchanges, same


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("good", "exchanges"), [(8, 1), (9, 2), pytest.param(11, 2, marks=pytest.mark.slow)])
def test_a_rank_without_its_micro_batch_ends_all_between_two_steps(
    tmp_path, run_ranks, kind, good, exchanges
):
    """In the first of a step's four, all know before they compute; in a later one, once they have."""
    for text, steps, told, same in run_ranks(2, fail_in_a_step, kind, tmp_path, good):
        assert text == "rank 1: the disk is gone"
        assert (steps, told, same) == (2, exchanges, True)


def test_a_group_is_held_longer_than_models_that_use_it(run_ranks):
    """Else the model would take it down holding Python's lock, and some ranks never end."""
    assert run_ranks(2, leave_before_the_model) == [True, True]


def counted_batches(parallel, accumulate, start_step):
    for batch in batches(parallel, accumulate, start_step):
        batch.replaced = [("bad.mp4", "error", "av")] * (parallel.rank + 1)
        yield batch


def train_counting(folder, resume):
    with open_parallel("ddp", "cpu") as parallel:
        more = dict(sources=("even", "odd"), count_sources=lambda batch: [2, batch.clips.shape[0] - 2])
        options = dict(open_batches=counted_batches, more=more)
        if not resume:
            options["trainer_class"] = stop_after(2)
        trainer = make_trainer(parallel, folder, total_steps=4, **options)
        if resume:
            trainer.resume(CheckpointFolder(folder).latest())
        trainer.run()


def test_logs_count_all_ranks_and_go_on_counting(tmp_path, run_ranks):
    for resume in (False, True):
        run_ranks(2, train_counting, tmp_path, resume)
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {record["replaced"] for record in records} == {3}
    assert records[-1]["samples"] == {"even": 16, "odd": 16}
    assert records[-1]["clips_per_s"] == pytest.approx(GLOBAL_BATCH / records[-1]["step_s"])


def limit_files(soft, hard, ranks):
    """(what is said, the limits after), in a process of its own."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return allow_connections(ranks), resource.getrlimit(resource.RLIMIT_NOFILE)


def test_many_ranks_may_open_many_connections(run_ranks):
    """Two to each other rank, and 1,024 files of the rest of the run."""
    assert run_ranks(1, limit_files, 1024, 4096, 1)[0] == (None, (1024, 4096))
    said, limits = run_ranks(1, limit_files, 1024, 4096, 1000)[0]
    assert limits == (3022, 4096) and "raised the limit of open files from 1024 to 3022" in said
    said, limits = run_ranks(1, limit_files, 1024, 2048, 1000)[0]
    assert limits == (2048, 2048) and "limited to 2048, and 1000 ranks need 3022" in said
    assert "ulimit -Hn 3022" in said


def test_kinds_are_checked(monkeypatch):
    assert resolve_kind("auto", 1) == "none" and resolve_kind("auto", 2) == "ddp"
    with pytest.raises(InputError, match="unknown --parallel 'tensor'"):
        resolve_kind("tensor", 2)
    with pytest.raises(InputError, match="--parallel none, but 2 processes were started"):
        resolve_kind("none", 2)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with (
        pytest.raises(InputError, match="--shard-size 4 does not divide 6 ranks"),
        open_parallel("hybrid", shard_size=4),
    ):
        pass
