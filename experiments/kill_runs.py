"""Kill a run again and again with SIGKILL, start it again each time, and compare it with one that nobody
disturbed.

    python experiments/kill_runs.py             # 30 kills, half of them of one rank of two; some minutes
    python experiments/kill_runs.py --kills 4   # a taste

Kills come at random moments: while the run starts, between steps, and while a checkpoint is being written
(there its folder is waited for, and then a random part of the time that a write takes). Every other start
saves in the background. After each kill, every checkpoint that looks complete is read and compared with its
hashes. In the end the losses of all steps and the weights must be those of the undisturbed run, to the last
bit. Exits with 1 where anything is not as it should be.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import bench_path  # noqa: F401
from harness.common import print_table, write_json
from harness.telling import at, telling

from vmae.checkpoint.folder import CheckpointFolder, step_of
from vmae.checkpoint.format import find_damage, read_group
from vmae.cli import main as main_of_vmae
from vmae.synthetic.samples import sample_videos
from vmae.train.metrics import read_log

FLAGS = (
    "--model vit_tiny --decoder-depth 1 --image-size 32 --patch-size 8 --num-frames 8 --stride 1 "
    "--encoder-ratio 0.75 "
    "--drop-path 0.1 --lr 0.1 --clip-grad 1 --device cpu --workers 0 --log-every 1 --save-every 4 --keep 3 "
    "--no-tensorboard"
).split()
MOMENTS = ("start", "step", "write", "write")  # half of the kills during a write
GIVE_UP_S = 240.0
FORK = multiprocessing.get_context("fork")


@dataclass
class Kill:
    """One kill: of which run, when, and what it left.

    Attributes:
        moment: what it waited for.
        seconds: after the start.
        unfinished: whether a checkpoint was half written.
        newest: step of the newest complete checkpoint, 0 without any.
        readable: how many complete checkpoints there were, all as written.
        others_ended_s: until the other rank had gone too, by itself.
    """

    ranks: int
    moment: str
    seconds: float
    unfinished: bool
    newest: int
    readable: int
    others_ended_s: float | None


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would say to a rank; nothing to a run of one."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in place.items()} if ranks > 1 else {}


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
        self.processes = [
            FORK.Process(target=start, args=(arguments, environment(rank, ranks, port), self.output))
            for rank in range(ranks)
        ]
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
        """To the end of the run.

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
        kill = Kill(ranks, moment, round(seconds, 2), unfinished, run.newest, check_all(run.folder), others)
        done.append(kill)
        half = ", a checkpoint half written" if unfinished else ""
        print(
            f"  {ranks} ranks, {len(done)} of {kills}: killed in {moment}{half}; goes on from {kill.newest}",
            flush=True,
        )


def differences(folder: Path, reference: Path, steps: int) -> list[str]:
    """What is not the same in two complete runs."""
    found = []
    losses = [[record["loss"] for record in read_log(run / "log.jsonl")] for run in (folder, reference)]
    if losses[0] != losses[1] or len(losses[0]) != steps:
        found.append(f"losses differ ({len(losses[0])} and {len(losses[1])} of {steps} steps)")
    for group in ("model", "optimizer"):
        ours, theirs = (read_group(CheckpointFolder(run).latest(), group) for run in (folder, reference))
        wrong = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
        if wrong:
            found.append(f"{len(wrong)} tensors of {group} differ")
    return found


def run(kills: int, steps: int, seed: int, folder: Path) -> tuple[list[Kill], list[str]]:
    chance, videos, done, wrong = random.Random(seed), folder / "videos.txt", [], []
    videos.write_text(
        "".join(f"{video} 0 -1\n" for video in sample_videos()[2:])
    )  # those that decode fastest
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


def report(done: list[Kill], wrong: list[str], seconds: float) -> None:
    """A table, and what differs."""
    moments = list(dict.fromkeys(MOMENTS))
    rows = []
    for ranks in (1, 2):
        these = [kill for kill in done if kill.ranks == ranks]
        counts = [sum(kill.moment == moment for kill in these) for moment in moments]
        others = max((kill.others_ended_s or 0.0 for kill in these), default=0.0)
        half, readable = sum(kill.unfinished for kill in these), sum(kill.readable for kill in these)
        rows.append([ranks, len(these), *counts, half, readable, f"{others:.1f} s" if ranks > 1 else "-"])
    print_table(
        ["ranks", "kills", *moments, "left half written", "checkpoints read", "other rank gone in"], rows
    )
    same = "losses of every step, weights and optimizer state are those of the undisturbed runs, bit for bit"
    print(f"{len(done)} kills in {seconds:.0f} s; {'; '.join(wrong) or same}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="in total (30)")
    parser.add_argument("--steps", type=int, default=100, help="of a run (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    importlib.import_module("vmae.train.tasks.pretrain")  # once, before the forks
    began = time.monotonic()
    with telling(), tempfile.TemporaryDirectory() as folder:
        try:
            done, wrong = run(args.kills, args.steps, args.seed, Path(folder))
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    report(done, wrong, time.monotonic() - began)
    if args.json:
        records = [asdict(kill) for kill in done]
        write_json(args.json, records, "cpu", steps=args.steps, seed=args.seed, differences=wrong)
    return 1 if wrong or len(done) < args.kills else 0


if __name__ == "__main__":
    raise SystemExit(main())
