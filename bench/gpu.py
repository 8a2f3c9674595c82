"""All that a GPU is wanted for, in stages of at most 8 minutes: `make gpu`.

    python bench/gpu.py                       # a, b, c, d
    python bench/gpu.py --stage a             # one of them; results of the same folder are kept
    python bench/gpu.py --rehearse            # on a CPU: every line runs, nothing is measured

    a  the kernels' tests on the device, dual against encoder-only masking (ViT-B, ViT-g), compute-sanitizer
    b  kernels and attention against their floors and rivals, autotuned launches
    c  training for 90 s on packed and on synthetic clips, a step's parts, two ranks where there are two GPUs
    d  every prediction held against what was measured, tables for the documents

Each command has a time limit, is ended where it takes longer, and keeps what it had; the next one runs all
the same. Results go to bench/results/DEVICE/DATE-COMMIT/, where `gpu.json` says what ran. torch, triton,
numpy and pytest suffice. The exit code is 1 where a command failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from harness.command import exit_code
from harness.environment import REHEARSE, find_environment
from harness.headlines import headlines
from harness.progress import at
from harness.report import write_report
from harness.results import RESULTS, read_result
from harness.results.gpu import CommandRecord, GpuResult, StageRecord
from harness.results.suite import PartRecord, SuiteResult
from harness.running import ended_by_sigterm, run_command
from harness.stages import STAGE_S, STAGES, Command, Day
from harness.table import show
from suite import missing_packages, result_folder

from vmae import InputError

NAME = "gpu.json"
# No GPU is looked for, nothing is compiled, one thread.
OF_A_REHEARSAL = {
    REHEARSE: "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
}


def run_stage(letter: str, day: Day, result: GpuResult) -> GpuResult:
    """The result with all commands of a stage, written after each."""
    stage, start = STAGES[letter], time.monotonic()
    record = StageRecord(stage=letter, title=stage.title, limit_s=STAGE_S)
    for command in stage.commands:
        at(f"stage {letter}, {command.name}")
        left = STAGE_S * day.patience - (time.monotonic() - start)
        done = run_one(command, day, left)
        record = replace(record, commands=[*record.commands, done], seconds=time.monotonic() - start)
        result = with_stage(result, record)
        result.write(day.folder / NAME)
    return result


def run_one(command: Command, day: Day, left_s: float) -> CommandRecord:
    """Run a command within its own time and the stage's; a reason where it cannot run."""
    known: dict[str, Any] = dict(
        name=command.name, limit_s=command.limit_s, environment=dict(command.environment)
    )
    try:
        reason = command.needs(day)
    except Exception as error:  # a broken package must not end the day
        reason = f"{type(error).__name__}: {error}"
    print(f"\n== {command.name} ==", flush=True)
    if reason:
        print(f"left out: {reason}")
        return CommandRecord(**known, status="skipped", reason=reason)
    if left_s < 1:
        return CommandRecord(**known, status="cut off", reason="the stage's time was over before it began")
    target, line = day.file(command.name), command.line(day)
    if command.writes:
        target.unlink(missing_ok=True)  # of an earlier run
    limit = min(command.limit_s * day.patience, left_s)
    extra = {**(OF_A_REHEARSAL if day.rehearsed else {}), **command.environment}
    outcome = run_command(line, day.folder / f"{command.name}.log", limit, extra)
    return CommandRecord(
        **known,
        status=outcome.status,
        reason=outcome.reason,
        seconds=outcome.seconds,
        code=outcome.code,
        command=[word.replace(f"{ROOT}{os.sep}", "") for word in line[1:]],
        file=target.name if command.writes and target.is_file() else None,
    )


def with_stage(result: GpuResult, record: StageRecord) -> GpuResult:
    """The result with a stage in its place."""
    others = [stage for stage in result.records if stage.stage != record.stage]
    return replace(result, records=sorted([*others, record], key=lambda stage: stage.stage))


def begun(day: Day, result: GpuResult) -> GpuResult:
    """The result with the stages that an earlier start left in the same folder."""
    path = day.folder / NAME
    if not path.is_file():
        return result
    try:
        before = read_result(path, "gpu")
    except ValueError as error:
        print(f"left out: {error}")
        return result
    if before.environment.rehearsed != day.rehearsed:
        raise InputError(f"{path} is of a {'rehearsal' if before.environment.rehearsed else 'real day'}: "
                         "another --output, please")  # fmt: skip
    return replace(result, records=before.records)


def write_page(day: Day, result: GpuResult) -> Path:
    """`report.html`: every result of the folder."""
    parts = []
    for command in (command for stage in result.records for command in stage.commands):
        if command.name.partition(".")[0] in RESULTS:
            known: dict[str, Any] = dict(name=command.name, status=command.status, reason=command.reason)
            parts.append(PartRecord(**known, seconds=command.seconds, file=command.file))
    suite = SuiteResult(environment=result.environment, parts=parts, missing=result.missing)
    return write_report(day.folder, suite)


def find_day(args: argparse.Namespace) -> tuple[Day, GpuResult]:
    """The day, and a result without stages.

    Raises:
        InputError: there is no GPU, and it is no rehearsal.
    """
    if args.rehearse:
        os.environ.update(OF_A_REHEARSAL)
    elif not torch.cuda.is_available():
        raise InputError("torch sees no GPU here; --rehearse runs every stage on a CPU")
    known = find_environment("cpu" if args.rehearse else "cuda")
    folder = args.output
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="gpu-")) if args.rehearse else result_folder(known)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    gpus = 2 if args.rehearse else torch.cuda.device_count()
    day = Day(folder=folder, rehearsed=args.rehearse, device_name=known.device, gpus=gpus)
    return day, GpuResult(environment=known, records=[], missing=missing_packages())


def run(args: argparse.Namespace) -> int:
    day, result = find_day(args)
    result = begun(day, result)
    what = "REHEARSAL: nothing is measured" if day.rehearsed else f"{day.gpus} x {day.device_name}"
    print(f"{what}; torch {result.environment.torch}, triton {result.environment.triton}; {day.folder}")
    for name, cost in result.missing.items():
        print(f"  without {name}: {cost}")
    start = time.monotonic()
    for letter in args.stage:
        shutil.rmtree(day.folder / "two_ranks", ignore_errors=True)  # of a start that was ended
        print(f"\n===== stage {letter}: {STAGES[letter].title} =====", flush=True)
        result = run_stage(letter, day, result)
        shutil.rmtree(day.folder / "two_ranks", ignore_errors=True)  # weights and checkpoints
    at("summary")
    page = write_page(day, result)
    show(*result.tables())
    print()
    for line in headlines(day.folder, result):
        print(line)
    print(f"\nin {time.monotonic() - start:.0f} s; {day.folder / NAME}, page: {page}")
    ran = [stage for stage in result.records if stage.stage in args.stage]
    return 0 if all(command.good for stage in ran for command in stage.commands) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, letters = parser.add_argument, list(STAGES)
    titles = "; ".join(f"{letter}: {stage.title}" for letter, stage in STAGES.items())
    add("--stage", nargs="+", choices=letters, default=letters, metavar="STAGE", help=f"all ({titles})")
    add("--rehearse", action="store_true", help="on a CPU, with tiny shapes and invented device times")
    where = "where results go (bench/results/DEVICE/DATE-COMMIT; of a rehearsal, a temporary folder)"
    add("--output", type=Path, metavar="DIR", help=where)
    args = parser.parse_args(argv)

    def guarded() -> int:
        with ended_by_sigterm():
            return run(args)

    return exit_code(guarded)


if __name__ == "__main__":
    raise SystemExit(main())
