"""`python -m vmae plan`: what a pre-training run will need, told before it is started.

It takes the flags and settings file of `pretrain`, whose batch, masks, samples and length it plans, and the
machines. A table
for people, JSON for machines, and one line of recommendation. Nothing is measured; what is assumed is
printed. With --checkpointing or --parallel only that choice is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmae.config import ModelSettings, SpeedConfig
from vmae.data import Mix, VideoEntry, read_data
from vmae.data.needs import Load, open_files
from vmae.data.shapes import ClipShape, source_shapes
from vmae.data.shards.entries import is_address
from vmae.data.shared_memory import FOLDER, batches_bytes, remedy
from vmae.data.shared_memory import describe as describe_bytes
from vmae.errors import InputError
from vmae.flags import Settings, chosen
from vmae.model.cost import masked_macs, peak_flops, token_counts
from vmae.model.target import Target
from vmae.planning.budget import (
    MACHINES,
    UNLABELED_HYBRID,
    Cluster,
    Plan,
    Row,
    Workload,
    make_plan,
    published_recipe,
)
from vmae.planning.storage import (
    Storage,
    StoragePlan,
    need_line,
    node_load,
    plan_storage,
    storage_lines,
    with_known_bytes,
)
from vmae.settings import Real, setting
from vmae.targets.building import build_target
from vmae.targets.settings import Wanted
from vmae.train import pretrain_settings
from vmae.train.pretrain_settings import PretrainConfig, RunConfig
from vmae.train.recompute_choice import recompute_ways

SCHEMA = "vmae-plan/1"
_MEMORY = ("parameters", "gradients", "optimizer", "gathered", "activations", "working")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(ModelSettings):
    """Of `plan`, beside the configurations of `pretrain` and of the machines."""

    peak: float | None = setting(
        None,
        "of one GPU",
        Real(above=0, most=1e6),
        metavar="TFLOPS",
        unset="the device's in bf16",
        group=MACHINES,
    )
    json: str | None = setting(
        None,
        "write everything there too; - for the terminal, and nothing else",
        metavar="FILE",
        group=MACHINES,
    )


def published_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The published recipe of the model that the flags name (vit_g): what is planned without `--config`."""
    model = flags.get("model", "vit_g")
    recipe = published_recipe(model)
    usual = {"model": model, "num_sample": 4, "epochs": 300, "dtype": "bfloat16"}
    return usual | (SETTINGS.read(recipe) if recipe else {})


SETTINGS = Settings(
    PretrainConfig,
    RunConfig,
    Cluster,
    Workload,
    Storage,
    PlanSettings,
    defaults={**pretrain_settings.SETTINGS.defaults, "data": "", "output": ""},
    without_file=published_settings,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    SETTINGS.add_to(parser)
    parser.epilog = (
        "The flags and settings file of `pretrain` say what is planned: without --config, the published "
        "recipe of --model (vit_g). --device may name a GPU here (h100, a100, ...; by default h100)."
    )


def run(args: argparse.Namespace) -> int:
    config, plan, entries = plan_from_args(args)
    storage = with_known_bytes(Storage(**chosen(Storage, args)), entries)
    data = plan_storage(plan, storage, args.videos or len(entries) or UNLABELED_HYBRID)
    load = node_load(plan, node_batch_bytes(plan, config), args.keep + 1, is_address(args.data or ""))
    content = describe(plan, config, data, load)
    if args.json == "-":
        print(json.dumps(content, indent=1))
        return 0
    for line in report(plan, config, args):
        print(line)
    for line in [need_line(load), *storage_lines(data, storage, plan.cluster.gpus)]:
        print(line)
    for line in [*list_lines(args.data, entries), *shape_lines(config, entries)]:
        print(line)
    if args.json:
        _write(Path(args.json), content)
    return 0


def plan_from_args(args: argparse.Namespace) -> tuple[PretrainConfig, Plan, Sequence[VideoEntry]]:
    """The plan of a command line, with the settings of `pretrain` it is for, and the list's videos (none
    without --data)."""
    SETTINGS.complete(args)
    given = args.given
    effective = given.pop("effective_batch", None)  # as planned: it need not be divided without a rest
    if effective is None or "accumulate" in given:
        effective = args.gpus * args.batch_size * args.accumulate
    args.effective_batch = None
    config, settings = pretrain_settings.configs_from_args(args)
    machines = {
        "gpus_per_node": min(args.gpus_per_node, args.gpus),
        "shard_size": args.shard_size,
        "peak_flops": _peak_flops(args),
    }
    cluster = Cluster(**{**chosen(Cluster, args), **machines})
    entries = read_data(args.data, args.data_root) if args.data else []
    workload = Workload(
        batch_size=settings.batch_size,
        num_sample=config.num_sample,
        effective_batch=effective,
        videos=config.repeat * (args.videos or len(entries) or UNLABELED_HYBRID),
        epochs=config.epochs,
        steps=config.steps,
        dtype=config.dtype,
        num_workers=settings.speed.num_workers,
    )
    plan = make_plan(
        config.model,
        config.mask,
        cluster,
        workload,
        checkpointing=given.get("checkpointing"),
        parallel=args.parallel,
        recompute=recompute_ways(args.recompute, args.device, compiled=args.compile is not False),
        optim=config.optim,
        target=planned_target(config),
    )
    return config, plan, entries


def planned_target(config: PretrainConfig) -> Target:
    """What is predicted, with attention that keeps what fused kernels on a GPU do.

    Raises:
        InputError: it cannot be built, see `vmae.targets`.
    """
    speed = SpeedConfig(backend="torch", attention="sdpa")
    return build_target(Wanted(config.model, config.target, config.normalize_target, speed))


def _peak_flops(args: argparse.Namespace) -> float | None:
    if args.peak is not None or args.device == "cpu":
        return args.peak and args.peak * 1e12
    found = peak_flops("h100" if args.device in ("auto", "cuda") else args.device, args.dtype)
    if found is None:
        raise InputError(f"the peak FLOP/s of --device {args.device!r} are not known; give --peak TFLOPS")
    return found


# --- For people ---


def report(plan: Plan, config: PretrainConfig, args: argparse.Namespace) -> list[str]:
    """The plan in lines."""
    cluster, work, model = plan.cluster, plan.workload, plan.config
    tokens, (height, width) = token_counts(model, plan.mask), model.image_hw
    optim = config.optim.scaled_to(work.effective_batch)
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    return [
        f"model: {args.model}, {plan.parameters / 1e6:.1f} M parameters, {work.dtype}; {cluster.gpus} GPU"
        f"{'s' * (cluster.gpus > 1)} of {gib(cluster.memory)} GiB on {nodes}",
        f"clip: {model.num_frames} x {height} x {width}, {tokens.total} tokens ({tokens.visible} visible, "
        f"{tokens.decoded} decoded, {tokens.counted} counted by the loss); {work.num_sample} clips a video",
        f"step: effective batch {work.effective_batch} videos = {cluster.gpus} x {work.batch_size} x "
        f"{work.accumulate(cluster.gpus)} accumulated, {work.clips_per_step} clips; learning rate "
        f"{config.optim.lr:g} x {work.effective_batch} / 256 = {optim.lr:.4g} at its peak; "
        f"{_number(plan.model_flops / 1e12)} "
        f"TFLOP ({_passes(plan)})",
        f"run: {work.total_steps} steps, {work.total_steps * work.clips_per_step / 1e6:.4g} M clips"
        + (f" ({work.videos} videos x {work.epochs} epochs)" if work.steps is None else ""),
        *_mismatch(work, cluster),
        *about_target(plan),
        "",
        f"memory of one GPU in GiB at {work.batch_size} videos ({work.batch_size * work.num_sample} clips), "
        "and a step's cost:",
        *table(plan),
        "",
        assumptions(cluster),
        recommendation(plan),
        *shared_memory(plan, config),
    ]


def _passes(plan: Plan) -> str:
    return "3 x forward, and the target's" if plan.target_macs else "3 x forward"


def about_target(plan: Plan) -> list[str]:
    """What is predicted and what that costs, in a line; nothing where these are pixels."""
    held = plan.rows[0].memory.target
    if plan.target_width == plan.config.tubelet_pixels and not plan.target_macs and not held:
        return []
    share = 2 * plan.target_macs / (6 * plan.student_macs + 2 * plan.target_macs)
    return [
        f"target: {plan.target}, {plan.target_width} values a token; forward GMACs of a clip: student "
        f"{plan.student_macs / 1e9:.4g}, target {plan.target_macs / 1e9:.4g} ({share:.1%} of the FLOPs); "
        f"it holds {describe_bytes(int(held))} on each GPU"
    ]


def node_batch_bytes(plan: Plan, config: PretrainConfig) -> int:
    """A micro-batch's clips; 0 where no workers make them."""
    work = plan.workload
    return work.batch_size * work.num_sample * plan.config.most_clip_bytes if config.loader == "cpu" else 0


def node_batches_bytes(plan: Plan, config: PretrainConfig) -> int:
    """The most that the workers' batches take of a node's shared memory."""
    ranks = min(plan.cluster.gpus_per_node, plan.cluster.gpus)
    return ranks * batches_bytes(node_batch_bytes(plan, config), plan.workload.num_workers)


def shared_memory(plan: Plan, config: PretrainConfig) -> list[str]:
    """What the workers' batches take of /dev/shm, in a line; nothing where there are no workers."""
    needed = node_batches_bytes(plan, config)
    if not needed:
        return []
    return [
        f"shared memory of a node: {describe_bytes(needed)} at most for the batches of "
        f"{plan.workload.num_workers} workers a GPU; where {FOLDER} has less, {remedy(needed)}"
    ]


def assumptions(cluster: Cluster) -> str:
    """What the figures rest on, in a line."""
    rate = "no peak FLOP/s known, so no time (--peak tells it)"
    if cluster.peak_flops:
        rate = (
            f"{cluster.mfu:.0%} of {cluster.peak_flops / 1e12:g} TFLOP/s a GPU for all that is executed, "
            "made again or not"
        )
    left = f"{cluster.reserve:.0%} of the memory left to CUDA, NCCL and the allocator"
    return f"assumed: {rate}; {left}; not measured"


def _mismatch(work: Workload, cluster: Cluster) -> list[str]:
    reached = cluster.gpus * work.batch_size * work.accumulate(cluster.gpus)
    if reached == work.effective_batch:
        return []
    return [
        f"note: {cluster.gpus} x {work.batch_size} videos do not divide {work.effective_batch}; "
        f"{work.accumulate(cluster.gpus)} accumulated make {reached}"
    ]


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def table(plan: Plan) -> list[str]:
    """One line a row, columns aligned."""
    titles = ["TFLOP", "MFU %", "s/step", "hours", "clips/s"]
    parts = (*_MEMORY, *(["target"] if any(row.memory.target for row in plan.rows) else []))
    lines = [["checkpointing", "recompute", "sharding", *parts, "total", "fits", "largest batch", *titles]]
    for row in plan.rows:
        memory = [gib(getattr(row.memory, name)) for name in parts]
        cost = [row.executed_flops / 1e12, 100 * row.mfu, row.step_s, row.hours, row.clips_per_s]
        fits = [gib(row.memory.total), "yes" if row.fits else "no", str(row.largest_batch)]
        lines.append([row.checkpointing, row.recompute, row.sharding, *memory, *fits, *map(_number, cost)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    return [aligned[0], "-" * len(aligned[0]), *aligned[1:]]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def recommendation(plan: Plan) -> str:
    """One line: the flags to start with, and what they cost."""
    row, work, cluster = plan.best, plan.workload, plan.cluster
    if row is None:
        lack = f"not one video fits {gib(cluster.memory)} GiB"
        return f"recommendation: none: {lack}; more GPUs (--gpus) share the state"
    flags = " ".join(recommended_flags(plan, row))
    if row.hours is None or row.clips_per_s is None:
        return f"recommendation: {flags}"
    clips, videos = row.clips_per_s, row.clips_per_s / work.num_sample
    return (
        f"recommendation: {flags}: {_number(row.hours)} hours ({_number(row.hours / 24)} days); data must "
        "supply "
        f"{clips:.0f} clips/s, from {videos:.0f} videos/s ({videos / cluster.gpus:.1f} a GPU)"
    )


def recommended_flags(plan: Plan, row: Row) -> list[str]:
    """Flags of `pretrain` for a row, with a batch that fits and makes up the effective batch."""
    work, gpus = plan.workload, plan.cluster.gpus
    batch = work.batch_size if row.fits else work.batch_within(row.largest_batch, gpus)
    accumulate = dataclasses.replace(work, batch_size=batch).accumulate(gpus)
    flags = dict(
        parallel=row.sharding, checkpointing=row.checkpointing, batch_size=batch, accumulate=accumulate
    )
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def list_lines(data: str, entries: Sequence[VideoEntry], count: int = 3) -> list[str]:
    """The first videos of the list, if there is one."""
    if not data:
        return []
    shown = [entries[i] for i in range(min(count, len(entries)))]
    lines = [f"  {e.path}" + (f" ({e.total} frames)" if e.kind == "frames" else "") for e in shown]
    return [f"data: {data}, {len(entries)} entries, the first:", *lines]


def shape_lines(config: PretrainConfig, entries: Sequence[VideoEntry]) -> list[str]:
    """What the clips of a mix's sources cost, where some have another shape than the model's."""
    model = config.model
    usual = ClipShape(model.num_frames, *model.image_hw)
    shapes = source_shapes(entries, usual, model.grid)
    if not isinstance(entries, Mix) or {*shapes} == {usual}:
        return []
    lines, mean = [], 0.0
    for source, share, shape in zip(entries.sources, entries.shares(), shapes):
        one = model.replace(num_frames=shape.frames, img_size=shape[1:])
        macs = masked_macs(one, config.mask)
        mean += share * macs
        lines.append(
            f"  {source.name}: {share:.1%} of the clips, of {shape}, {one.num_tokens} tokens, "
            f"{macs / 1e9:.3g} GMACs forward"
        )
    ratio = mean / masked_macs(model, config.mask)
    return [
        "clips of the sources:",
        *lines,
        f"all figures above are for clips of {usual}; those of this mix cost {ratio:.2f} of it in the mean",
    ]


# --- For machines ---


def describe(plan: Plan, config: PretrainConfig, data: StoragePlan, load: Load) -> dict[str, Any]:
    """Everything in plain containers; bytes, FLOPs, seconds."""
    work, cluster, best = plan.workload, plan.cluster, plan.best
    rows = [dataclasses.asdict(row) for row in plan.rows]
    for content, row in zip(rows, plan.rows):
        content["memory"]["total"] = row.memory.total
    return {
        "schema": SCHEMA,
        "model": plan.config.to_dict(),
        "mask": plan.mask.to_dict(),
        "parameters": plan.parameters,
        "cluster": cluster.to_dict(),
        "workload": {
            **work.to_dict(),
            "total_steps": work.total_steps,
            "clips_per_step": work.clips_per_step,
            "accumulate": work.accumulate(cluster.gpus),
            "peak_lr": config.optim.scaled_to(work.effective_batch).lr,
        },
        "model_flops_per_step": plan.model_flops,
        "target": {
            "about": plan.target,
            "width": plan.target_width,
            "macs_per_clip": plan.target_macs,
            "student_macs_per_clip": plan.student_macs,
        },
        "shared_memory_per_node": node_batches_bytes(plan, config),
        "needs_per_node": {
            "memory": load.memory_bytes,
            "shared_memory": load.shared_bytes,
            "open_files_per_process": open_files(load.workers, load.world),
            "cores": load.cores,
            "disk": load.disk_bytes,
        },
        "data": dataclasses.asdict(data),
        "rows": rows,
        "recommended": None
        if best is None
        else {"row": plan.rows.index(best), "flags": recommended_flags(plan, best)},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    print(f"json: {path}")
