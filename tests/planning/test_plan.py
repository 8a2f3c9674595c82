"""`python -m vmae plan`: rows that add up, the largest batch, hours, the recommendation, and wrong input."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from vmae import InputError, MaskConfig, ModelConfig, build_pretrainer
from vmae.checkpoint import export_weights
from vmae.cli import build_parser, main
from vmae.config import CHECKPOINTING
from vmae.model.cost import classifier_macs, forward_macs, masked_macs
from vmae.planning import budget
from vmae.planning.budget import Cluster, Workload, make_plan, published_recipe
from vmae.planning.memory import count_activations
from vmae.planning.plan import plan_from_args
from vmae.settings import limits

TINY = ModelConfig.preset("vit_tiny", img_size=64, num_frames=8)
MASK = MaskConfig(encoder_ratio=0.75)
NODES = Cluster(gpus=16, gpus_per_node=8, memory=2**30, reserve=0.1, peak_flops=1e12, mfu=0.4)
WORK = Workload(batch_size=4, num_sample=2, effective_batch=128, videos=1000, epochs=3)
counted_once = functools.lru_cache(count_activations)
SMALL = "--model vit_tiny --image-size 64 --num-frames 8 --encoder-ratio 0.75".split()


@pytest.fixture(autouse=True)
def _counted_once(monkeypatch):
    monkeypatch.setattr(budget, "count_activations", counted_once)


def plan_of(*flags: str):
    return plan_from_args(build_parser("plan").parse_args(["plan", *SMALL, *flags]))[1]


@pytest.mark.slow
def test_every_checkpointing_with_every_sharding():
    plan = make_plan(TINY, MASK, NODES, WORK)
    kinds = [(row.checkpointing, row.sharding) for row in plan.rows]
    assert kinds == [(c, s) for c in CHECKPOINTING for s in ("ddp", "hybrid", "fsdp")]
    ddp, hybrid, fsdp = (row.memory for row in plan.rows[:3])
    assert ddp.parameters > 7 * hybrid.optimizer / 2 and hybrid.optimizer > 1.5 * fsdp.optimizer
    assert ddp.optimizer == pytest.approx(8 * plan.parameters, rel=1e-3) and ddp.gathered == 0 < fsdp.gathered
    assert ddp.activations == hybrid.activations == fsdp.activations
    assert fsdp.total == sum(dataclasses.astuple(fsdp))


@pytest.mark.slow  # 4 s
def test_flops_hours_and_clips_follow_from_each_other():
    plan = make_plan(TINY, MASK, NODES, WORK)
    assert plan.model_flops == 3 * 2 * forward_macs(TINY, 0.75, 0.5, fused=True) * 256
    none, full = plan.rows[0], plan.rows[-1]
    assert none.executed_flops == plan.model_flops and none.mfu == 0.4
    # The blocks' forward once more: less than the whole forward, which has the embedding and the head too.
    assert 1.2 < full.executed_flops / plan.model_flops < 4 / 3
    assert full.mfu * full.executed_flops == pytest.approx(0.4 * plan.model_flops)
    assert none.step_s == plan.model_flops / (16 * 1e12 * 0.4)
    assert none.hours == pytest.approx(3 * (1000 // 128) * none.step_s / 3600)
    assert none.clips_per_s == pytest.approx(256 / none.step_s)


@pytest.mark.parametrize("number", range(9))
@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not(number):
    largest = make_plan(TINY, MASK, NODES, WORK).rows[number].largest_batch
    assert largest > 100

    def fits(batch: int) -> bool:  # a large effective batch, so that both accumulate alike
        work = WORK.replace(batch_size=batch, effective_batch=10**9, videos=10**9)
        return make_plan(TINY, MASK, NODES, work).rows[number].fits

    work = WORK.replace(effective_batch=10**9, videos=10**9)
    largest = make_plan(TINY, MASK, NODES, work).rows[number].largest_batch
    assert fits(largest) and not fits(largest + 1)


@pytest.mark.slow
def test_norms_are_made_again_where_the_batch_does_not_fit_without():
    def rows(memory: float, **more):
        cluster = dataclasses.replace(NODES, memory=memory, reserve=0.0)
        return make_plan(TINY, MASK, cluster, WORK, parallel="ddp", **more).rows

    kept, again, *others = (*rows(2**30, recompute=["off"]), *rows(2**30, recompute=["on"]))[::3]
    assert not others and 1.2 < kept.memory.activations / again.memory.activations < 2
    roomy, tight = rows(kept.memory.total)[0], rows(kept.memory.total - 1)[0]
    assert (roomy.recompute, tight.recompute) == ("off", "budget") and roomy.fits and tight.fits
    assert roomy.memory == kept.memory and tight.memory == again.memory
    assert {row.recompute for row in rows(kept.memory.total)[1:]} == {"budget"}  # memory is short there
    tight, *_ = rows(1.0)
    assert tight.recompute == "budget" and not tight.fits
    assert rows(kept.memory.total)[0].largest_batch == again_largest(kept.memory.total)


def again_largest(memory: float) -> int:
    cluster = dataclasses.replace(NODES, memory=memory, reserve=0.0)
    return make_plan(TINY, MASK, cluster, WORK, parallel="ddp", recompute=["on"]).rows[0].largest_batch


@pytest.mark.slow
def test_flags_say_which_ways_are_planned():
    assert {row.recompute for row in plan_of("--gpus", "8").rows} == {"off", "budget"}
    assert {row.recompute for row in plan_of("--gpus", "8", "--no-compile").rows} == {"off", "on"}
    assert {row.recompute for row in plan_of("--gpus", "8", "--recompute", "on").rows} == {"on"}
    assert {row.recompute for row in plan_of("--device", "cpu").rows} == {"on"}


def test_recommended_is_the_least_work_that_fits():
    def best(memory: float):
        return make_plan(TINY, MASK, dataclasses.replace(NODES, memory=memory), WORK).best

    assert (best(2**30).checkpointing, best(2**30).sharding) == ("none", "ddp")
    plan = make_plan(TINY, MASK, NODES, WORK, recompute=["budget"])
    by_kind = {(row.checkpointing, row.sharding): row.memory.total / 0.9 for row in plan.rows}
    row = best(by_kind["none", "fsdp"] * 1.001)  # too little for a whole copy of the state
    assert (row.checkpointing, row.sharding) == ("none", "fsdp")
    row = best(by_kind["full", "fsdp"] * 1.001)
    assert (row.checkpointing, row.sharding) == ("full", "fsdp")
    assert best(2**20) is None


def test_recommended_batch_makes_up_the_effective_batch(capsys):
    flags = (
        "--gpus 4 --batch-size 1024 --effective-batch 4096 --videos 100000 --memory 512MiB --json -".split()
    )
    assert main(["plan", *SMALL, *flags]) == 0
    content = json.loads(capsys.readouterr().out)
    assert not any(row["fits"] for row in content["rows"])
    chosen = dict(zip(content["recommended"]["flags"][::2], content["recommended"]["flags"][1::2]))
    row = content["rows"][content["recommended"]["row"]]
    assert int(chosen["--batch-size"]) * int(chosen["--accumulate"]) * 4 == 4096
    assert int(chosen["--batch-size"]) <= row["largest_batch"] < 1024


def test_the_optimizers_own_state_is_counted():
    plans = {opt: plan_of("--opt", opt, "--checkpointing", "none") for opt in ("adamw", "sgd", "muon")}
    held = {opt: plan.rows[0].memory.optimizer for opt, plan in plans.items()}
    assert held["sgd"] == 4 * plans["sgd"].parameters < held["muon"] < 0.8 * held["adamw"]


def test_table_and_json_say_the_same(tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = (
        "--gpus 2 --batch-size 4 --accumulate 2 --num-sample 2 --videos 1000 --epochs 2 --mfu 0.25".split()
    )
    assert main(["plan", *SMALL, *flags, "--lr", "1e-3", "--device", "a100", "--json", str(out)]) == 0
    text, content = capsys.readouterr().out, json.loads(out.read_text())
    assert (
        "effective batch 16 videos = 2 x 4 x 2 accumulated, 32 clips; learning rate 0.001 x 16 / 256 = "
        "6.25e-05" in text
    )
    assert "64 tokens (16 visible, 32 decoded, 24 counted by the loss); 2 clips a video" in text
    assert "25% of 312 TFLOP/s" in text and "run: 124 steps" in text and f"json: {out}" in text
    assert content["schema"] == "vmae-plan/1" and content["workload"]["total_steps"] == 124
    lines = [line.split() for line in text.splitlines() if line.startswith(CHECKPOINTING)]
    assert [line[:3] for line in lines] == [
        [row["checkpointing"], row["recompute"], row["sharding"]] for row in content["rows"]
    ]
    assert [int(line[11]) for line in lines] == [row["largest_batch"] for row in content["rows"]]
    memory = content["rows"][0]["memory"]
    assert memory["total"] == sum(memory[key] for key in memory if key != "total")
    assert "recommendation: --parallel ddp --checkpointing none --batch-size 4 --accumulate 2: " in text


def test_named_choices_alone_are_shown():
    plan = plan_of("--gpus", "8", "--parallel", "hybrid", "--shard-size", "2", "--checkpointing", "full")
    assert [(row.checkpointing, row.sharding) for row in plan.rows] == [("full", "hybrid")]
    two = plan.rows[0].memory.optimizer
    eight = plan_of("--gpus", "8", "--parallel", "fsdp", "--checkpointing", "full").rows[0].memory.optimizer
    assert two == pytest.approx(4 * eight, rel=0.01)


@pytest.mark.slow
def test_without_a_peak_there_is_no_time(capsys):
    assert main(["plan", *SMALL, "--gpus", "1", "--device", "cpu", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert (
        "no peak FLOP/s known" in text and "hours (" not in text and "recommendation: --parallel none" in text
    )


def test_published_runs_are_the_default(monkeypatch):
    monkeypatch.setattr(
        "vmae.planning.plan.make_plan", lambda config, mask, cluster, workload, **chosen: workload
    )
    runs = {"vit_b": (1024, 200, 1e-3), "vit_h": (2048, 300, 1e-3), "vit_s": (8 * 32, 300, 1.5e-4)}
    for name, (batch, epochs, lr) in runs.items():
        args = build_parser("plan").parse_args(["plan", "--model", name, "--gpus", "8"])
        config, work, _ = plan_from_args(args)
        assert (work.effective_batch, work.num_sample, work.epochs) == (batch, 4, epochs)
        assert (work.videos, config.optim.lr, work.dtype) == (1_350_000, lr, "bfloat16")
    assert published_recipe("vit_g").is_file() and published_recipe("vit_tiny") is None


def test_a_settings_file_is_planned_as_pretrain_reads_it(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "vmae.planning.plan.make_plan", lambda config, mask, cluster, workload, **chosen: workload
    )

    def planned(*flags):
        config, work, _ = plan_from_args(build_parser("plan").parse_args(["plan", "--gpus", "2", *flags]))
        return work.effective_batch, work.num_sample, work.dtype, work.epochs, config.model.embed_dim

    recipe = str(Path(__file__).parents[2] / "recipes" / "pretrain_vitg.yaml")
    assert planned("--config", recipe) == planned() == (2048, 4, "bfloat16", 300, 1408)
    assert planned("--config", recipe, "--accumulate", "3")[0] == 2 * 32 * 3
    (tmp_path / "own.yaml").write_text("batch_size: 3\nepochs: 7\n")
    assert planned("--config", str(tmp_path / "own.yaml")) == (6, 1, "float32", 7, 768)


def test_a_list_is_counted_and_its_first_lines_shown(tmp_path, capsys):
    for number in range(5):
        (tmp_path / f"{number}.mp4").touch()
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{number}.mp4 0 -1\n" for number in range(5)))
    flags = [
        "--gpus",
        "1",
        "--batch-size",
        "2",
        "--effective-batch",
        "2",
        "--epochs",
        "3",
        "--data",
        str(path),
    ]
    assert main(["plan", *SMALL, *flags, "--data-root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "run: 6 steps" in text and f"data: {path}, 5 entries, the first:" in text
    assert str(tmp_path / "2.mp4") in text and str(tmp_path / "3.mp4") not in text


@pytest.mark.parametrize(
    "text, size", [("80GiB", 80 * 2**30), ("80", 80 * 2**30), ("40GB", 40e9), ("512 MiB", 2**29)]
)
def test_memory_sizes(text, size):
    assert limits(Cluster, "memory")(text) == size


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--gpus 12", "12 GPUs do not fill nodes of 8"),
        ("--gpus 0", "--gpus: must be a whole number from 1"),
        ("--mfu 2", "--mfu: must be a number above 0 and at most 1, not 2"),
        ("--epochs 0", "--epochs: must be a whole number from 1"),
        (
            "--memory much",
            "--memory: must be a memory size above 0 and at most 1 PiB, such as 80GiB or 80GB, not much",
        ),
        ("--memory 2000000GiB", "--memory: must be a memory size"),
        ("--memory 0", "--memory: must be a memory size"),
        ("--gpus 4 --parallel none", "--parallel none does not fit 4 GPUs; known there: ddp, hybrid, fsdp"),
        ("--gpus 8 --shard-size 3", "--shard-size 3 does not divide 8 GPUs"),
        ("--device toaster", "'toaster' are not known; give --peak"),
        ("--videos 3 --effective-batch 8", "3 videos do not fill one step of 8"),
        ("--checkpointing some", "unknown checkpointing 'some'"),
        ("--data nothing.txt", "'nothing.txt' does not exist"),
        ("--json no/where.json", "cannot write no/where.json"),
    ],
)
def test_wrong_input_is_named(flags, told, capsys):
    assert main(["plan", *SMALL, *flags.split()]) == 2
    assert told in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_told(capsys):
    assert main(["plan", *SMALL, *"--gpus 1 --batch-size 3 --effective-batch 8".split()]) == 0
    assert "note: 1 x 3 videos do not divide 8; 3 accumulated make 9" in capsys.readouterr().out


def test_settings_check_themselves():
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        Workload(dtype="int8")
    with pytest.raises(InputError, match="epochs must be a whole number from 1"):
        Workload(epochs=0)


@pytest.mark.slow  # 2 s
def test_a_teacher_is_planned_as_an_entry_of_its_own(tmp_path, capsys):
    """Its MACs once and the student's three times, its weights on each GPU whatever is sharded, and the room
    that its tokens take; pixels have none of these."""
    path = tmp_path / "teacher.pth"
    export_weights(path, build_pretrainer(TINY).state_dict(), config={"model": TINY.to_dict()})
    flags = "--gpus 8 --gpus-per-node 8 --batch-size 4 --checkpointing none --parallel fsdp --json -".split()
    plans = {}
    for name, more in (("pixels", ()), ("teacher", ("--teacher", str(path)))):
        assert main(["plan", *SMALL, *flags, "--target", name, *more]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
    pixels, teacher = plans["pixels"], plans["teacher"]
    assert pixels["target"]["macs_per_clip"] == 0 and pixels["rows"][0]["memory"]["target"] == 0
    told, clips = teacher["target"], teacher["workload"]["clips_per_step"]
    assert told["width"] == 128 and told["macs_per_clip"] == classifier_macs(TINY, 0)
    assert told["student_macs_per_clip"] == masked_macs(TINY, MASK, width=128)
    flops = 6 * told["student_macs_per_clip"] + 2 * told["macs_per_clip"]
    assert teacher["model_flops_per_step"] == pytest.approx(flops * clips)
    memory = teacher["rows"][0]["memory"]
    assert memory["target"] > TINY.depth * 12 * 128**2 * 2  # in bf16 at least
    assert memory["total"] == pytest.approx(sum(memory.values()) - memory["total"])


def test_a_teacher_that_is_not_there_is_named(capsys):
    assert main(["plan", *SMALL, "--target", "teacher", "--teacher", "gone.pth"]) == 2
    assert "gone.pth does not exist" in capsys.readouterr().err
