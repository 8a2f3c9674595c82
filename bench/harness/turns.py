"""Training steps of several (variant, masking) in turn: A B C A B C ..., so that what disturbs the machine
disturbs all, each in a process of its own, so that its memory is its own.

On a GPU a process leaves the device between its turns (`Stepper.park`): the one whose turn it is has the
device to itself, but for some half a GB of driver memory for each of the others, and "does not fit" means
that it does not fit alone. A turn is a copy of the fresh weights to the device, a step that is not timed, and
some that are. On a CPU a process keeps its weights and moments, and a turn is one step.

At most `resident` processes exist at once. Where there are more jobs, groups of one masking follow each
other, and one job, the anchor, takes turns in every group: jobs of a group are compared run by run, jobs of
different groups by their ratios to the anchor's runs of the same turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from harness.checking import Expected, expect
from harness.progress import at
from harness.results.steps import Check, Memory, SweptBatch
from harness.stepping import Gradients, StepJob, StepWorker
from harness.variants import resolve_variant
from harness.worker import WorkerError

RESIDENT = 8
STEPS_PER_TURN = 4  # on a GPU
Run = dict[str, float]  # milliseconds of a step and of its parts


@dataclass(kw_only=True)
class Measured:
    """What a job gave so far; no runs where it was wrong or failed.

    Attributes:
        wrong: why its loss or gradients are not the reference's.
        failed: why it could not be stepped.
        group: number of the group it took turns in.
        anchor: name of the anchor, and its runs of the same turns.
    """

    loss: float | None = None
    runs: list[Run] = field(default_factory=list)
    memory: Memory | None = None
    check: Check | None = None
    wrong: str | None = None
    failed: str | None = None
    group: int = 0
    anchor: str = ""
    anchor_runs: list[Run] = field(default_factory=list)

    @property
    def lost(self) -> str | None:
        """Why it has no runs."""
        return self.wrong or self.failed


Results = dict[str, Measured]  # by the job's name


def measure(jobs: Sequence[StepJob], steps: int, warmup: int) -> tuple[list[Measured], dict[str, str]]:
    """Runs of all jobs in the same turns, and why some have none."""
    *_, results = measure_in_groups(jobs, steps, warmup, len(jobs))
    reasons = {job.name: results[job.name].lost for job in jobs}
    return [results[job.name] for job in jobs], {name: why for name, why in reasons.items() if why}


def measure_in_groups(
    jobs: Sequence[StepJob], steps: int, warmup: int, resident: int = RESIDENT
) -> Iterator[Results]:
    """What is known of all jobs, after each check and each timed round."""
    jobs = [replace(job, parked=job.device.startswith("cuda")) for job in jobs]
    results: Results = {}
    expected = _expected(jobs)
    anchor = jobs[0]
    for number, others in enumerate(make_groups(jobs, resident)):
        members = [anchor, *others]
        known = results
        for found in take_turns(members, expected, number, steps, warmup):
            results = {**found, **known}  # an anchor's first group counts
            yield results
        # What ran in this group can be the anchor of the next.
        anchor = next((job for job in members if found[job.name].runs), anchor)


def make_groups(jobs: Sequence[StepJob], resident: int) -> list[list[StepJob]]:
    """The jobs that take turns with the first one: all of them, or some of one masking, at most `resident`
    with the first; dual masking comes first."""
    others = jobs[1:]
    if len(jobs) <= resident:
        return [[*others]]
    groups, size = [], max(resident - 1, 1)
    for masking in sorted({job.masking for job in others}, key=lambda name: (name != "dual", name)):
        own = [job for job in others if job.masking == masking]
        groups += [own[start : start + size] for start in range(0, len(own), size)]
    return groups


def _expected(jobs: Sequence[StepJob]) -> dict[str, Expected] | WorkerError:
    """What each masking must give; the error where the reference itself failed."""
    try:
        return expect(jobs[0], list(dict.fromkeys(job.masking for job in jobs)))
    except WorkerError as error:
        return error


class Group:
    """Workers that take turns; one that fails leaves, and the others go on."""

    def __init__(self, jobs: Sequence[StepJob], number: int):
        self.found: Results = {job.name: Measured(group=number) for job in jobs}
        self.workers = {job.name: StepWorker(job) for job in jobs}

    def each(self, what: str, ask: Callable[[StepWorker, Measured], None]) -> None:
        """Ask one worker after the other."""
        for name, worker in list(self.workers.items()):
            at(f"{what}, {name}")
            found = self.found[name]
            try:
                ask(worker, found)
            except WorkerError as error:
                found.failed = why_failed(error, worker.job.batch)
            if found.lost:
                found.runs.clear()
                self.workers.pop(name).close()

    def label(self) -> None:
        """Name the anchor: the first that runs."""
        names = [name for name in self.workers if self.found[name].runs]
        for name in names:
            self.found[name].anchor = names[0]
            self.found[name].anchor_runs = self.found[names[0]].runs

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def take_turns(
    jobs: Sequence[StepJob],
    expected: dict[str, Expected] | WorkerError,
    number: int,
    steps: int,
    warmup: int,
) -> Iterator[Results]:
    """What is known of a group's jobs, after the check and after each timed round."""

    def check(worker: StepWorker, found: Measured) -> None:
        if isinstance(expected, WorkerError):
            found.failed = f"not checked: {expected}"
            return
        gradients: Gradients = worker.ask("gradients")
        found.loss = gradients.loss
        allowance = resolve_variant(worker.job.variant).allowance
        found.check = expected[worker.job.masking].check(gradients, allowance)
        found.wrong = found.check.why_wrong(worker.job.dtype)

    def remember(worker: StepWorker, found: Measured) -> None:
        found.memory = worker.ask("memory")

    with contextlib.closing(Group(jobs, number)) as group:
        group.each("building", lambda worker, found: worker.wait_ready())
        group.each("loss and gradients", check)
        yield group.found
        rounds = [(size, False) for size in turn_sizes(jobs[0], warmup, whole=True)]
        rounds += [(size, True) for size in turn_sizes(jobs[0], steps)]
        for place, (size, timed) in enumerate(rounds):

            def turn(worker: StepWorker, found: Measured, size: int = size, timed: bool = timed) -> None:
                runs: list[Run] = worker.ask("turn", size)
                found.runs += runs if timed else []

            group.each(f"round {place + 1} of {len(rounds)}", turn)
            if timed:
                group.each("memory", remember)
                group.label()
                yield group.found


def turn_sizes(job: StepJob, steps: int, whole: bool = False) -> list[int]:
    """Steps of each turn; a parked model takes several in a row (`whole`: all of them)."""
    size = (steps if whole else STEPS_PER_TURN) if job.parked else 1
    return [min(size, steps - done) for done in range(0, steps, max(size, 1))]


def why_failed(error: WorkerError, batch: int) -> str:
    """A line; memory that lacked is named first."""
    reason = " ".join(error.reason.split())
    reason = reason if len(reason) <= 160 else reason[:157] + "..."
    return f"does not fit at batch {batch}: {reason}" if error.out_of_memory else reason


def sweep_batches(job: StepJob, steps: int, largest: int) -> tuple[list[SweptBatch], str]:
    """Steps at 1, 2, 4, ... clips up to `largest` or to what fits, then at one batch between the last two;
    the smallest first. And why it ended before `largest`, where it was not for memory that the process itself
    lacked."""
    found: list[SweptBatch] = []
    with contextlib.closing(StepWorker(job)) as worker:
        batch = 1
        try:
            worker.wait_ready()
            while batch <= largest:
                at(f"{worker.name}, batches of {batch}")
                result = worker.ask("try_batch", batch, steps)
                if result is None:
                    break
                found.append(result)
                batch *= 2
            between = 3 * batch // 4
            if found and batch <= largest and between > found[-1].batch:
                result = worker.ask("try_batch", between, steps)
                found += [result] if result else []
        except WorkerError as error:
            return sorted(found, key=lambda run: run.batch), why_failed(error, batch)
    return sorted(found, key=lambda run: run.batch), ""
