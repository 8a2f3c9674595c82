"""How long calls take on a device, and how long the host takes to launch them: two numbers, timed apart.

A call of some microseconds is over before the host has launched the next one: events around it measure the
host. So calls on several sets of inputs are captured in one CUDA graph, whose replays stand between two
events. The sets together are larger than the L2, so no call finds its input there. What cannot be captured
is launched while the device is held busy, and the record says so (`timed_by`). After every turn it is known
whether the queue ran dry in it: then the first event was reached before the host had launched the last call.

`DeviceClock` is all that this needs of a device. `CudaClock` is a GPU; `FakeClock` computes a queue with
invented times, so that this file is tested, and rehearsed, where there is no GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from harness.environment import rehearsing

Work = Callable[[], object]  # one call on one set of inputs

TURN_US = 2_000.0  # a turn takes at least that long on the device
MOST_LAUNCHES = 256  # calls, or replays, of a turn: some 1,000 launches fill the queue, and the host waits
GRAPH_CALLS = 16  # calls in a graph, at least: a replay takes longer than its launch
ATTEMPTS = 3
HOLD_LIMIT_US = 50_000.0
HOST_CALLS, HOST_ROUNDS = 4, 5


class CannotCapture(RuntimeError):
    """A call that cannot be part of a CUDA graph; the message says why."""


class DeviceClock(Protocol):
    """A device's queue and its times, in microseconds."""

    def launch(self, work: Work) -> None:
        """Put one call into the queue."""

    def capture(self, works: Sequence[Work]) -> Work:
        """A function that puts all of `works` into the queue at once.

        Raises:
            CannotCapture: one of them waits for the device, or allocates in a way that a graph cannot repeat.
        """

    def hold(self, us: float) -> None:
        """Keep the device busy for about `us`, so that the host gets ahead."""

    def mark(self) -> Any:
        """A point in the queue."""

    def reached(self, mark: Any) -> bool:
        """Whether the device has come to the point by now."""

    def elapsed_us(self, first: Any, last: Any) -> float:
        """From one point to the other, once both are reached."""

    def wait(self) -> None:
        """Until the queue is empty."""

    def now_us(self) -> float:
        """The host's clock."""

    def kernels_us(self, works: Sequence[Work]) -> dict[str, float]:
        """Time of a call by the name of its kernels, a mean over `works`."""


class CudaClock:
    """A GPU and its current stream."""

    # Cycles a microsecond at the highest clock of any GPU; at a lower one the device is held longer.
    CYCLES = 2_000

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)

    def launch(self, work: Work) -> None:
        work()

    def capture(self, works: Sequence[Work]) -> Work:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device):
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    works[0]()  # on a stream that is not the default one, as in the capture
                torch.cuda.current_stream().wait_stream(side)
                with torch.cuda.graph(graph):
                    for work in works:
                        work()
            except RuntimeError as error:
                torch.cuda.synchronize()
                raise CannotCapture(_first_line(error)) from error
        return graph.replay

    def hold(self, us: float) -> None:
        with torch.cuda.device(self.device):
            torch.cuda._sleep(int(us * self.CYCLES))  # private, in torch 2.0 to 2.13: a kernel that counts

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def elapsed_us(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return first.elapsed_time(last) * 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def now_us(self) -> float:
        return time.perf_counter() * 1e6

    def kernels_us(self, works: Sequence[Work]) -> dict[str, float]:
        self.wait()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for work in works:
                work()
            self.wait()
        found: dict[str, float] = {}
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / len(works)
        return found


@dataclass
class FakeClock:
    """A queue on paper: the host launches, the device works off what it has, one after the other.

    Every work really runs, once, so that its lines are executed; how long that takes is not looked at.

    Attributes:
        device_us: of a call on the device; a function of the work, or the same for all.
        host_us: of the host to launch a call.
        replay_us: of the host to launch a graph.
        captures: a graph can be captured.
        synchronous: each call waits for the device.
    """

    device_us: float | Callable[[Work], float] = 10.0
    host_us: float = 100.0
    replay_us: float = 8.0
    captures: bool = True
    synchronous: bool = False
    host: float = 0.0  # the host's time
    free: float = 0.0  # when the device will have worked off its queue
    ran: dict[int, Work] = field(default_factory=dict)

    def _cost(self, work: Work) -> float:
        if id(work) not in self.ran:
            self.ran[id(work)] = work  # kept: another work must not get its id
            work()
        return self.device_us(work) if callable(self.device_us) else self.device_us

    def _enqueue(self, host_us: float, device_us: float) -> None:
        self.host += host_us
        self.free = max(self.free, self.host) + device_us

    def launch(self, work: Work) -> None:
        self._enqueue(self.host_us, self._cost(work))
        if self.synchronous:
            self.wait()

    def capture(self, works: Sequence[Work]) -> Work:
        if not self.captures or self.synchronous:
            raise CannotCapture("operation not permitted when stream is capturing")
        device_us = sum(self._cost(work) for work in works)
        return lambda: self._enqueue(self.replay_us, device_us)

    def hold(self, us: float) -> None:
        self._enqueue(1.0, us)

    def mark(self) -> float:
        return max(self.free, self.host)

    def reached(self, mark: float) -> bool:
        return self.host >= mark

    def elapsed_us(self, first: float, last: float) -> float:
        return last - first

    def wait(self) -> None:
        self.host = max(self.host, self.free)

    def now_us(self) -> float:
        return self.host

    def kernels_us(self, works: Sequence[Work]) -> dict[str, float]:
        total = sum(self._cost(work) for work in works) / len(works)
        return {"first_kernel": 0.75 * total, "second_kernel": 0.25 * total}


def clock_of(device: torch.device | str) -> DeviceClock:
    """The clock of a GPU, or of none in a rehearsal."""
    return FakeClock() if rehearsing() else CudaClock(device)


class DeviceTimer:
    """One way to do something, ready to take turns with others.

    Args:
        works: the call, on each set of inputs.

    Attributes:
        timed_by: "graph" (replays between events), or "events: REASON" (calls launched while the device was
            held busy); with "; host included" where the queue ran dry all the same.
        host_us: of the host to launch one call, the queue not full; the median of some rounds.
        calls: of a turn.
    """

    def __init__(self, clock: DeviceClock, works: Sequence[Work], turn_us: float = TURN_US) -> None:
        self.clock, self._works = clock, works
        for work in works:  # compiled, loaded, memory at hand
            clock.launch(work)
        clock.wait()
        self.host_us = self._launch_us(works)
        self._dry = False
        try:
            self._launch: Work
            captured = [*works] * max(1, math.ceil(GRAPH_CALLS / len(works)))
            self._launch, self._batch, self._how = clock.capture(captured), len(captured), "graph"
            launch_us = self._graph_launch_us()
        except CannotCapture as error:
            most = min(MOST_LAUNCHES // 8, int(HOLD_LIMIT_US / 4 / max(self.host_us, 1.0)))
            self._works = works[: max(most, 1)]  # what the device can be held for
            self._launch = self._launch_each
            self._batch, self._how = len(self._works), f"events: {error}"
            launch_us = self.host_us * self._batch
        most = MOST_LAUNCHES if self._how == "graph" else MOST_LAUNCHES // 8 // self._batch
        most = max(1, min(most, int((HOLD_LIMIT_US - 50) / 2 / max(launch_us, 0.1))))
        self._repeats, self._hold_us = 1, 50.0 + 2 * launch_us
        once = self.turn() * self._batch
        self._repeats = min(most, max(1, math.ceil(turn_us / max(once, 0.1))))
        self._hold_us = min(50.0 + 2 * launch_us * self._repeats, HOLD_LIMIT_US)

    @property
    def timed_by(self) -> str:
        return self._how + ("; host included" if self._dry else "")

    @property
    def calls(self) -> int:
        return self._batch * self._repeats

    def turn(self) -> float:
        """Microseconds of one call, a mean over `calls`."""
        for _ in range(ATTEMPTS):
            us, filled = self._timed()
            if filled:
                self._dry = False
                return us
            self._hold_us = min(2 * self._hold_us, HOLD_LIMIT_US)
        self._dry = True
        return us

    def _launch_each(self) -> None:
        for work in self._works:
            self.clock.launch(work)

    def _timed(self) -> tuple[float, bool]:
        """Microseconds of one call, and whether all were launched before the device came to the first."""
        clock = self.clock
        clock.wait()
        clock.hold(self._hold_us)
        first = clock.mark()
        for _ in range(self._repeats):
            self._launch()
        filled = not clock.reached(first)
        last = clock.mark()
        clock.wait()
        return clock.elapsed_us(first, last) / self.calls, filled

    def _launch_us(self, works: Sequence[Work]) -> float:
        """Microseconds of the host to launch one call into an empty queue."""
        found = []
        for _ in range(HOST_ROUNDS):
            self.clock.wait()
            start = self.clock.now_us()
            for turn in range(HOST_CALLS):
                self.clock.launch(works[turn % len(works)])
            found.append((self.clock.now_us() - start) / HOST_CALLS)
        self.clock.wait()
        return statistics.median(found)

    def _graph_launch_us(self) -> float:
        self._launch()  # the first replay of a graph uploads it
        self.clock.wait()
        start = self.clock.now_us()
        self._launch()
        used = self.clock.now_us() - start
        self.clock.wait()
        return used


class HostTimer:
    """The same on a CPU, where a call is over when it returns: wall time of repeated calls."""

    timed_by = "wall clock"
    host_us = None

    def __init__(self, work: Work, turn_us: float) -> None:
        self.work, self.calls = work, 1
        self.turn()
        self.calls = max(1, math.ceil(turn_us / max(self.turn(), 1.0)))

    def turn(self) -> float:
        """Microseconds of one call, a mean over `calls`."""
        start = time.perf_counter()
        for _ in range(self.calls):
            self.work()
        return (time.perf_counter() - start) * 1e6 / self.calls


def time_in_turn(timers: Mapping[str, DeviceTimer], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call of each, turn by turn: A B C A B C ..."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer.turn())
    return found


def sets_past_cache(set_bytes: int, cache_bytes: int, most: int = 64) -> int:
    """Sets of inputs to go round: three times the cache passes before one comes again; at least two."""
    return min(most, 2 + 3 * cache_bytes // max(set_bytes, 1))


def cache_bytes(device: torch.device | str) -> int:
    """The L2 of a GPU; in a rehearsal there is none."""
    return 0 if rehearsing() else torch.cuda.get_device_properties(device).L2_cache_size


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
