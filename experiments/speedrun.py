"""Speedrun (`make speedrun`): FLOPs of pre-training, from nothing, until a frozen probe reaches a goal.

Rules and records are in docs/speedrun.md. An entry is one or more runs of `vmae pretrain`, one after the
other (legs; a teacher's pre-training is a leg, and counts). Counted are forward, backward and what the target
costs, of all steps until a probe reaches the goal: exact, and the same on every machine.

    python experiments/speedrun.py                                 # the baseline, three seeds
    python experiments/speedrun.py --entry lean --records FILE     # an entry; add it to a file of records
    python experiments/speedrun.py --data videos.txt --labels train.txt --queries val.txt --goal 40 \\
        -- --model vit_b --batch-size 32 --steps 50000 --probe-every 500 --device cuda

With `--data` the videos are real ones: the entry's method is kept (masks, targets, legs), and model, rates
and length are what follows `--`; `--steps` are those of the last leg, and earlier ones keep their share.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
from harness.command import check_least, exit_code
from harness.environment import find_environment
from harness.json_records import from_json, to_json, write_json
from harness.results import read_result
from harness.results.speedrun import EntryRecord, Pass, SeedRun, SpeedrunResult
from harness.table import show
from tiny_world import CLIP, Stages, run, run_flags, run_jobs, write_stacks

from vmae.errors import InputError
from vmae.synthetic.moving_shapes import WorldConfig, write_world
from vmae.train.metrics import read_log

WORLD = WorldConfig(size=32, frames=20, unlabeled=1400, few=40, many=1, shared=0, validation=100, seed=2026)
SMOKE = WorldConfig(size=32, frames=16, unlabeled=14, few=2, many=1, shared=0, validation=1, seed=2026)
SEEDS, GOAL, EVERY = 3, 68.0, 100
MODEL = ("--model", "vit_tiny", *CLIP, "--stride", 2)
PACE = ("--batch-size", 16, "--num-sample", 1, "--lr", 0.032, "--min-lr", 0.00015, "--clip-grad", 1)
MADE = (*MODEL, *PACE)
CELLS = ("--decoder-mask", "running_cell", "--decoder-ratio", 0.5)
PUBLISHED = ("--encoder-mask", "tube", "--encoder-ratio", 0.9, *CELLS)
RANDOM, AS_THEY_ARE = ("--encoder-mask", "random", "--encoder-ratio", 0.75), ("--no-normalize-target",)
OURS = (*RANDOM, *CELLS, *AS_THEY_ARE)
LEAN = (*RANDOM, "--decoder-mask", "random_hidden", "--decoder-ratio", 0.5, *AS_THEY_ARE)
LATENTS = ("--target", "teacher", "--teacher", "{0}", "--teacher-layers", 2, "--target-loss", "l1")
STUDENT = (*RANDOM, "--decoder-mask", "none", *LATENTS, "--teacher-dtype", "float32", "--init", "{0}")


@dataclass(frozen=True)
class Leg:
    """A run of `vmae pretrain`.

    Attributes:
        steps: at most.
        method: masks, target, and what else goes for any videos; "{0}" is the folder of the first leg.
        made: model and rates, for the made world.
    """

    steps: int
    method: tuple[object, ...]
    made: tuple[object, ...] = MADE


@dataclass(frozen=True)
class Entry:
    """What it is, for the table, and its legs."""

    about: str
    legs: tuple[Leg, ...]


# Trials, seed 100 (attentive probe, %; random weights: 46). Tubes with --lean-decoder, 3/4 or half of the
# spots hidden: 50 and 46 at best in 1,600 and 2,000 steps; so the lean entry is random_hidden. Latents of a
# teacher of 800 steps (54): a fresh student 46 and 47 at best, at both learning rates; one that starts from
# it 69 after 600 steps, 3.2 TFLOP in all; the same with half of the hidden tokens predicted 68 after 700,
# 3.3; that of a teacher of 650 steps (49), still on its plateau, 38 at best. So: it starts from it, and the
# teacher has 1,000 steps.
ENTRIES = {
    "published": Entry("masks and target as published", (Leg(2000, PUBLISHED),)),
    "baseline": Entry("running cells; a random 3/4 hidden, pixels as they are", (Leg(2000, OURS),)),
    "lean": Entry("a lean decoder: half of the hidden tokens, nothing that is seen", (Leg(2000, LEAN),)),
    "continued": Entry(
        "latents of a teacher, which the student starts from; the teacher: 1,000 steps of the baseline",
        (Leg(1000, OURS), Leg(1500, STUDENT, (*MADE, "--lr", 0.064))),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Race:
    """What the entries and seeds of a folder have in common.

    Attributes:
        goal: percent of the attentive probe.
        flags: of the lists and the probe.
        own: model, rates and more of a user, in place of the entry's; None: the made world.
        steps: of the last leg, in place of the entry's.
    """

    goal: float
    flags: list[str]
    own: list[str] | None = None
    steps: int | None = None

    def told(self) -> dict[str, Any]:
        """What a file of records holds: all, but not where the made world lies."""
        return {**to_json(self), "flags": self.flags if self.own is not None else None}


# --- A seed ---


def run_seed(out: Path, job: str) -> int:
    """A seed of an entry ("baseline_0"), leg by leg until the goal is reached, to `out / JOB / run.json`."""
    name, _, seed = job.rpartition("_")
    race = from_json(Race, json.loads((out / "race.json").read_text()))
    stages, folders = Stages(out / job), []
    passes: list[Pass] = []
    flops = seconds = probe_s = 0.0
    for number in range(len(ENTRIES[name].legs)):
        folder = stages.folder / f"leg-{number + 1}"
        folders.append(folder)
        flags = leg_flags(race, ENTRIES[name], number, int(seed), folders)
        command = partial(run, "pretrain", "--output", folder, *flags)
        stages.once(folder.name, folder / "weights.pth", command)
        found = [one for one in read_log(folder / "log.jsonl") if one.get("probe_attentive") is not None]
        passes += [Pass(flops=flops + one["probe_flops"], top1=one["probe_attentive"]) for one in found]
        flops += found[-1]["probe_flops"]
        probed = sum(one["probe_s"] for one in found)
        seconds, probe_s = seconds + stages.seconds[folder.name] - probed, probe_s + probed
        if passes[-1].top1 >= race.goal:
            break
    result = SeedRun(seed=int(seed), seconds=seconds, probe_s=probe_s, passes=passes)
    write_json(stages.folder / "run.json", to_json(result))
    return 0


def leg_flags(race: Race, entry: Entry, number: int, seed: int, folders: list[Path]) -> list[object]:
    """Flags of a leg's `vmae pretrain`, but for its output; `folders` are those of the legs so far."""
    leg, last = entry.legs[number], entry.legs[-1]
    steps = leg.steps if race.steps is None else max(round(race.steps * leg.steps / last.steps), 1)
    made = [*leg.made, "--repeat", 100, *run_flags(steps)] if race.own is None else race.own
    method = [str(flag).format(*folders) for flag in leg.method]
    return [*made, *method, *race.flags, "--steps", steps, "--seed", seed, "--probe-goal", race.goal]


# --- The race ---


def made_race(out: Path, smoke: bool) -> Race:
    """The race on the made world, which is made where it is not there."""
    world = out / "world"
    write_world(world, SMOKE if smoke else WORLD, workers=os.cpu_count() or 1)
    found = write_stacks(world, ("unlabeled", "train_a", "val_a"))
    lists = ["--data", str(found["unlabeled"]), "--probe-data", str(found["train_a"])]
    probe = ["--probe-val", str(found["val_a"]), "--probe-videos", "100000"]
    every = ["--probe-every", str(2 if smoke else EVERY)]
    return Race(goal=GOAL, flags=[*lists, *probe, *every], steps=4 if smoke else None)


def own_race(args: argparse.Namespace) -> Race:
    """The race on a user's videos.

    Raises:
        InputError: labels, a goal or a length is missing.
    """
    if args.labels is None or args.goal is None:
        raise InputError("--data needs --labels LIST, to probe on, and --goal PERCENT, to reach")
    own = [word for each in args.own for word in (each.split("=", 1) if each[:2] == "--" else [each])]
    if "--steps" not in own[:-1]:
        raise InputError("--data needs a model and a length: -- --model NAME --steps N ...")
    at = own.index("--steps")
    steps = own[at + 1]
    if not steps.isdecimal() or int(steps) < 1:
        raise InputError(f"--steps {steps}: must be a whole number from 1")
    del own[at : at + 2]
    lists = ["--data", args.data, "--probe-data", args.labels]
    if args.queries is not None:
        lists += ["--probe-val", args.queries]
    if "--probe-every" not in own:
        lists += ["--probe-every", str(EVERY)]
    return Race(goal=args.goal, flags=lists, own=own, steps=int(steps))


def find_race(args: argparse.Namespace) -> Race:
    """The race that was asked for, written down for its jobs.

    Raises:
        InputError: flags that do not fit together; the folder holds runs of another race.
    """
    if args.data is None:
        if args.own or args.labels or args.queries or args.goal is not None:
            raise InputError("--labels, --queries, --goal and flags after `--` go with --data")
        race = made_race(args.out, args.scale == "smoke")
    else:
        race = own_race(args)
    path = args.out / "race.json"
    begun = path.exists() and any(args.out.glob("*/leg-1"))  # what failed before its first leg binds nothing
    if begun and json.loads(path.read_text()) != to_json(race):
        raise InputError(f"{args.out} holds runs of another race; remove it, or give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(path, to_json(race))
    return race


def run_all(args: argparse.Namespace) -> int:
    check_least(args, "seeds")
    check_least(args, "first_seed", least=0)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.records and args.data is None and args.scale == "full" and seeds != range(SEEDS):
        raise InputError(
            f"a record has the seeds 0 to {SEEDS - 1}: no --seeds and no --first-seed with --records"
        )
    race = find_race(args)
    before = read_records(args.records, race)
    jobs = {f"{name}_{seed}": len(ENTRIES[name].legs) for name in args.entry for seed in seeds}
    left = {job: legs for job, legs in jobs.items() if not (args.out / job / "run.json").exists()}
    if race.own is None:  # a core for each; of a user's machine, all of it for one after the other
        run_jobs(__file__, left, args.out, args.scale)
    else:
        for job in left:
            run_seed(args.out, job)
    environment = find_environment()
    records = [make_record(args.out, name, seeds, race.goal, environment) for name in args.entry]
    path = args.records or args.out / "speedrun.json"
    records = [*(one for one in before if one.entry not in args.entry), *records]
    result = SpeedrunResult(environment=environment, records=records, race=race.told())
    show(*result.tables())
    result.write(path)
    draw(result, args.out / "speedrun.png")
    print(f"\n{path}; {args.out}/speedrun.png")
    return 0


def read_records(path: Path | None, race: Race) -> list[EntryRecord]:
    """Of a file of records, if there is one.

    Raises:
        InputError: they are of another race, or none can be read.
    """
    if path is None or not path.exists():
        return []
    try:
        result = read_result(path, "speedrun")
    except ValueError as error:
        raise InputError(str(error)) from None
    assert isinstance(result, SpeedrunResult)
    if result.race != race.told():
        raise InputError(f"{path} holds records of another race: other videos, goal or settings")
    return result.records


def make_record(out: Path, name: str, seeds: range, goal: float, environment: Any) -> EntryRecord:
    """An entry, over its seeds."""
    files = [out / f"{name}_{seed}" / "run.json" for seed in seeds]
    return EntryRecord(
        entry=name,
        about=ENTRIES[name].about,
        date=environment.date[:10],
        commit=environment.commit,
        goal=goal,
        legs=[asdict(leg) for leg in ENTRIES[name].legs],
        runs=[from_json(SeedRun, json.loads(file.read_text())) for file in files],
    )


def draw(result: SpeedrunResult, path: Path) -> None:
    """The probe against FLOPs, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    for number, record in enumerate(result.records):
        for seed, one in enumerate(record.runs):
            points = [(probe.flops / 1e12, probe.top1) for probe in one.passes]
            label = None if seed else record.entry
            axes.plot(*zip(*points), color=f"C{number}", linewidth=1, label=label)
    goal = result.records[-1].goal
    axes.axhline(goal, color="#a33", linestyle="--", linewidth=1, label=f"goal: {goal:g} %")
    axes.set(xlabel="TFLOP of pre-training", ylabel="frozen attentive probe, top-1 %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("speedrun"), help="folder of everything (speedrun)")
    add("--entry", nargs="+", choices=ENTRIES, default=["baseline"], help="what runs (baseline)")
    add("--seeds", type=int, default=SEEDS, help=f"runs of an entry; a record has {SEEDS}")
    add("--first-seed", type=int, default=0, help="the first of them (0); from 100 on: for trials")
    add("--scale", default="full", choices=("full", "smoke"), help="smoke: of seconds")
    add("--records", type=Path, metavar="FILE", help="add the entries to this file")
    add("--data", metavar="LIST", help="real videos to train on, in place of the made world")
    add("--labels", metavar="LIST", help="labelled videos that the probe's reader is trained on")
    add("--queries", metavar="LIST", help="those that it is asked about (half of --labels)")
    add("--goal", type=float, metavar="PERCENT", help=f"of the probe, with --data ({GOAL:g} without)")
    add("--job", help=argparse.SUPPRESS)
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.own = words[cut + 1 :]
    if args.job:
        return exit_code(lambda: run_seed(args.out, args.job))
    return exit_code(lambda: run_all(args))


if __name__ == "__main__":
    sys.exit(main())
