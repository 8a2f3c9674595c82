"""Runs that are killed (SIGKILL) again and again and started again each time, against undisturbed ones.

    python experiments/kill_runs.py             # 30 kills, half of them of one rank of two; some minutes
    python experiments/kill_runs.py --kills 4   # a taste

Kills come at random moments: while the run starts, between steps, and while a checkpoint is being written
(there its folder is waited for, and then a random part of the time that a write takes). Every other start
saves in the background. After each kill, every checkpoint that looks complete is read and compared with its
hashes. In the end the losses of all steps and the weights must be those of the undisturbed run, to the last
bit. Exits with 1 where anything is not as it should be, with 2 where a run fails of itself.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

import bench_path  # noqa: F401
import torch
from harness.command import add_json, check_least, exit_code, write_result
from harness.environment import find_environment
from harness.progress import at
from harness.results.kill_runs import Kill, KillResult
from harness.table import show

from vmae.checkpoint.folder import CheckpointFolder, step_of
from vmae.checkpoint.format import find_damage, read_group
from vmae.cli import main as main_of_vmae
from vmae.synthetic.samples import sample_videos
from vmae.train.metrics import read_log

MODEL = "--model vit_tiny --decoder-depth 1 --image-size 32 --patch-size 8 --num-frames 8 --stride 1"
TRAINING = "--encoder-ratio 0.75 --drop-path 0.1 --lr 0.1 --clip-grad 1 --device cpu --workers 0"
FILES = "--log-every 1 --save-every 4 --keep 3 --no-tensorboard"
FLAGS = f"{MODEL} {TRAINING} {FILES}".split()
MOMENTS = ("start", "step", "write", "write")  # half of the kills during a write
GIVE_UP_S = 240.0
FORK = multiprocessing.get_context("fork")


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Variables that torchrun would set for a rank; none for a run of one."""
    if ranks == 1:
        return {}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def start(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """The command, in a process forked from this one, so that nothing has to be imported again."""
    with open(output, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    code = main_of_vmae(arguments)
    sys.stdout.flush()
    os._exit(code)


class Run:
    """A pre-training run of one or two ranks in `folder`."""

    def __init__(
        self, folder: Path, ranks: int, steps: int, videos: Path, *, background: bool = False
    ) -> None:
        self.folder = CheckpointFolder(folder)
        batch = ["--batch-size", str(2 // ranks), "--parallel", "fsdp" if ranks == 2 else "none"]
        more = ["--async-save"] if background else []
        place = ["--data", str(videos), "--output", str(folder), "--steps", str(steps)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.output = folder.with_suffix(".txt")
        arguments = ["pretrain", *place, *FLAGS, *batch, *more]
        environments = [rank_environment(rank, ranks, port) for rank in range(ranks)]
        places = [(arguments, environment, self.output) for environment in environments]
        self.processes = [FORK.Process(target=start, args=place) for place in places]
        for process in self.processes:
            process.start()
        self.began = time.monotonic()

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    @property
    def newest(self) -> int:
        latest = self.folder.latest()
        return step_of(latest) if latest else 0

    def wait(self) -> None:
        """Wait for the end of the run.

        Raises:
            RuntimeError: a rank failed.
        """
        for process in self.processes:
            process.join(GIVE_UP_S)
        codes = [process.exitcode for process in self.processes]
        if any(code != 0 for code in codes):
            raise RuntimeError(f"exit codes {codes}:\n{self.tail()}")

    def tail(self) -> str:
        return self.output.read_text()[-3000:]

    def wait_for(self, moment: str, chance: random.Random) -> bool:
        """Until the moment; False if the run ended before."""
        if moment == "start":
            self._sleep(chance.uniform(0, 3))
            return self.running
        begun = self.newest
        while self.running and self.newest == begun:  # a checkpoint later: some way is made between two kills
            self._sleep(0.005)
        if moment == "step":
            self._sleep(chance.uniform(0, 0.5))
        else:
            while self.running and not self.folder.unfinished():
                pass
            self._sleep(chance.uniform(0, 0.04))
        return self.running

    def _sleep(self, seconds: float) -> None:
        if time.monotonic() - self.began > GIVE_UP_S:
            self.kill(0)
            raise RuntimeError(f"the run hangs:\n{self.tail()}")
        time.sleep(seconds)

    def kill(self, rank: int) -> float | None:
        """SIGKILL to one rank; seconds until the others had ended by themselves."""
        self.processes[rank].kill()
        began = time.monotonic()
        others = [process for process in self.processes if process is not self.processes[rank]]
        for process in (self.processes[rank], *others):
            process.join(30)
            if process.is_alive():
                process.kill()
                raise RuntimeError("the other rank went on waiting for 30 s")
        return time.monotonic() - began if others else None


def check_all(folder: CheckpointFolder) -> int:
    """How many complete checkpoints there are.

    Raises:
        RuntimeError: one of them is not as it was written.
    """
    for path in folder.paths():
        if damage := find_damage(path):
            raise RuntimeError(f"{path} is complete by name, but {'; '.join(damage)}")
        read_group(path)
    return len(folder.paths())


def disturb(
    folder: Path, ranks: int, kills: int, steps: int, videos: Path, chance: random.Random
) -> list[Kill]:
    """Kill one run up to `kills` times, then let it end."""
    done: list[Kill] = []
    while True:
        at(f"{ranks} ranks, {folder.name}: {len(done)} of {kills} kills")
        run = Run(folder, ranks, steps, videos, background=len(done) % 2 == 1)
        moment = chance.choice(MOMENTS)
        if len(done) == kills or not run.wait_for(moment, chance):
            run.wait()
            return done
        seconds = time.monotonic() - run.began
        others = run.kill(chance.randrange(ranks))
        unfinished = bool(run.folder.unfinished())
        kill = Kill(
            ranks=ranks,
            moment=moment,
            seconds=round(seconds, 2),
            unfinished=unfinished,
            newest=run.newest,
            readable=check_all(run.folder),
            others_ended_s=others,
        )
        done.append(kill)
        half = ", a checkpoint half written" if unfinished else ""
        what = f"killed in {moment}{half}; goes on from {kill.newest}"
        print(f"  {ranks} ranks, {len(done)} of {kills}: {what}", flush=True)


def differences(folder: Path, reference: Path, steps: int) -> list[str]:
    """What is not the same in two complete runs."""
    found = []
    losses = [[record["loss"] for record in read_log(run / "log.jsonl")] for run in (folder, reference)]
    if losses[0] != losses[1] or len(losses[0]) != steps:
        found.append(f"losses differ ({len(losses[0])} and {len(losses[1])} of {steps} steps)")
    for group in ("model", "optimizer"):
        ours, theirs = (read_group(newest_of(run), group) for run in (folder, reference))
        wrong = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
        if wrong:
            found.append(f"{len(wrong)} tensors of {group} differ")
    return found


def newest_of(folder: Path) -> Path:
    """Its newest complete checkpoint.

    Raises:
        RuntimeError: there is none.
    """
    latest = CheckpointFolder(folder).latest()
    if latest is None:
        raise RuntimeError(f"{folder} has no complete checkpoint")
    return latest


def run(kills: int, steps: int, seed: int, folder: Path) -> tuple[list[Kill], list[str]]:
    """The kills, and what differs from undisturbed runs."""
    chance, videos = random.Random(seed), folder / "videos.txt"
    done: list[Kill] = []
    wrong: list[str] = []
    fastest = sample_videos()[2:]  # to decode
    videos.write_text("".join(f"{video} 0 -1\n" for video in fastest))
    for ranks, share in ((1, kills - kills // 2), (2, kills // 2)):
        reference = folder / f"undisturbed-{ranks}"
        if share:
            at(f"{ranks} ranks, undisturbed")
            Run(reference, ranks, steps, videos).wait()
        number = 0
        while share > 0:  # a run that ends before its kills are spent is followed by another one
            number += 1
            place = folder / f"killed-{ranks}-{number}"
            found = disturb(place, ranks, share, steps, videos, chance)
            share, done = share - len(found), done + found
            wrong += [f"{place.name}: {text}" for text in differences(place, reference, steps)]
    return done, wrong


def run_all(args: argparse.Namespace) -> int:
    check_least(args, "kills", "steps")
    torch.set_num_threads(1)
    importlib.import_module("vmae.train.tasks.pretrain")  # once, before the forks
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done, wrong = run(args.kills, args.steps, args.seed, Path(folder))
    known = find_environment()
    result = KillResult(environment=known, records=done, steps=args.steps, seed=args.seed, differences=wrong)
    show(*result.tables())
    print(f"{len(done)} kills in {time.monotonic() - began:.0f} s")
    write_result(result, args.json)
    return 1 if wrong or len(done) < args.kills else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=30, help="in total (30)")
    add("--steps", type=int, default=100, help="of a run (100)")
    add("--seed", type=int, default=0, help="of the moments (0)")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run_all(args))


if __name__ == "__main__":
    raise SystemExit(main())
