"""Runs of several ranks on this machine's CPU: each is a fork of the test, so nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank_main(function: Callable[..., Any], arguments: tuple, environment: dict[str, str], pipe) -> None:
    os.environ.update(environment)
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def run_on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    context, port = multiprocessing.get_context("fork"), free_port()
    started = []
    for rank in range(count):
        pipe, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(function, arguments, rank_environment(rank, count, port), theirs)
        )
        process.start()
        theirs.close()
        started.append((process, pipe))
    deadline, results = time.monotonic() + TIMEOUT_S, []
    try:
        for rank, (_, pipe) in enumerate(started):
            assert pipe.poll(max(deadline - time.monotonic(), 0)), (
                f"rank {rank} of {count} did not end in {TIMEOUT_S} s"
            )
            good, result = pipe.recv()
            assert good, f"rank {rank} of {count} failed:\n{result}"
            results.append(result)
    finally:
        for process, _ in started:
            process.join(5)
            process.kill()
    return results
