"""Device time and host time, on a device that is only computed: what events alone would have shown, and what
is shown instead."""

import pytest
import torch


@pytest.fixture
def timing(benches):
    return benches("device_timing")


def work():
    return None


def test_a_replay_does_not_show_the_host(timing):
    """10 us on the device, 100 us to launch: events around launched calls would say 100."""
    clock = timing.FakeClock(device_us=10.0, host_us=100.0)
    clock.wait()
    first = clock.mark()
    for _ in range(8):
        clock.launch(work)
    assert clock.elapsed_us(first, clock.mark()) / 8 > 100

    timer = timing.DeviceTimer(clock, [work])
    assert timer.turn() == pytest.approx(10.0) and timer.timed_by == "graph"
    assert timer.host_us == pytest.approx(100.0)
    assert timer.calls >= timing.GRAPH_CALLS and timer.calls * 10 >= timing.TURN_US


def test_what_cannot_be_captured_is_launched_into_a_full_queue(timing):
    clock = timing.FakeClock(device_us=10.0, host_us=100.0, captures=False)
    timer = timing.DeviceTimer(clock, [work, lambda: None])
    assert timer.turn() == pytest.approx(10.0) and timer.host_us == pytest.approx(100.0)
    assert timer.timed_by == "events: operation not permitted when stream is capturing"


def test_no_more_is_launched_than_the_device_can_be_held_for(timing):
    clock = timing.FakeClock(device_us=10.0, host_us=2000.0, captures=False)
    timer = timing.DeviceTimer(clock, [lambda: None for _ in range(64)])
    assert timer.turn() == pytest.approx(10.0) and timer.timed_by.endswith("capturing")
    assert timer.calls * 2000 <= timing.HOLD_LIMIT_US


def test_a_hold_that_was_too_short_is_doubled(timing):
    clock = timing.FakeClock(device_us=10.0, host_us=100.0, captures=False)
    timer = timing.DeviceTimer(clock, [work])
    timer._hold_us = timer._repeats * 100.0 / 3
    assert timer.turn() == pytest.approx(10.0) and timer.timed_by.endswith("capturing")


def test_a_call_that_waits_for_the_device_is_told(timing):
    clock = timing.FakeClock(device_us=10.0, host_us=100.0, synchronous=True)
    timer = timing.DeviceTimer(clock, [work])
    assert timer.turn() > 100 and timer.timed_by.endswith("; host included")


def test_variants_take_turns_and_every_set_of_inputs_is_used(timing):
    seen = []
    works = {
        name: [lambda name=name, i=i: seen.append((name, i)) for i in range(3)] for name in ("slow", "fast")
    }
    slow = set(map(id, works["slow"]))
    clock = timing.FakeClock(device_us=lambda each: 30.0 if id(each) in slow else 4.0)
    timers = {name: timing.DeviceTimer(clock, each) for name, each in works.items()}
    asked = []
    for name, timer in timers.items():
        turn = timer.turn
        timer.turn = lambda name=name, turn=turn: asked.append(name) or turn()
    times = timing.time_in_turn(timers, 3)
    assert asked == ["slow", "fast"] * 3
    assert times["slow"] == pytest.approx([30.0] * 3) and times["fast"] == pytest.approx([4.0] * 3)
    assert {*seen} == {(name, i) for name in works for i in range(3)}


def test_sets_of_inputs_pass_three_times_the_cache(timing):
    for size in (1 << 20, 20 << 20, 80 << 20):
        count = timing.sets_past_cache(size, 50 << 20)
        assert count == 64 or count >= 2 and (count - 1) * size >= 3 * (50 << 20)
    assert timing.sets_past_cache(1 << 10, 50 << 20) == 64 and timing.sets_past_cache(10, 0) == 2


def test_a_cpu_has_the_wall_clock(timing):
    timer = timing.HostTimer(lambda: sum(range(2000)), turn_us=500.0)
    assert timer.calls > 1 and timer.turn() > 1 and timer.timed_by == "wall clock" and timer.host_us is None


def test_a_rehearsal_has_a_fake_clock_and_no_cache(timing, monkeypatch):
    monkeypatch.setenv("VMAE_REHEARSE", "1")
    assert isinstance(timing.clock_of("cpu"), timing.FakeClock) and timing.cache_bytes("cpu") == 0
    monkeypatch.delenv("VMAE_REHEARSE")
    assert isinstance(timing.clock_of("cuda"), timing.CudaClock)


class StubGraph:
    """CUDA graphs, streams and events without CUDA: who did what, in order."""

    def __init__(self, log, fails=False):
        self.log, self.fails = log, fails

    def install(self, monkeypatch):
        import contextlib
        from types import SimpleNamespace

        log = self.log
        stream = SimpleNamespace(wait_stream=lambda other: log.append("wait_stream"))

        @contextlib.contextmanager
        def entered(name, *arguments):
            log.append(name)
            yield
            log.append(f"end of {name}")
            if self.fails and name == "graph":
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

        graph = SimpleNamespace(replay=lambda: log.append("replay"))
        for name, value in {
            "CUDAGraph": lambda: graph,
            "Stream": lambda device: stream,
            "current_stream": lambda device=None: stream,
            "device": lambda device: entered("device"),
            "stream": lambda stream: entered("stream"),
            "graph": lambda graph: entered("graph"),
            "synchronize": lambda device=None: log.append("synchronize"),
            "_sleep": lambda cycles: log.append(cycles),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)


def test_capture_on_a_gpu_in_the_order_that_torch_documents(timing, monkeypatch):
    log = []
    StubGraph(log).install(monkeypatch)
    replay = timing.CudaClock().capture([lambda: log.append("a"), lambda: log.append("b")])
    inside = ["graph", "a", "b", "end of graph"]
    assert log == [
        "device",
        "wait_stream",
        "stream",
        "a",
        "end of stream",
        "wait_stream",
        *inside,
        "end of device",
    ]
    replay()
    assert log[-1] == "replay"
    timing.CudaClock().hold(10.0)
    assert 20_000 in log


def test_a_capture_that_fails_says_why_in_a_line(timing, monkeypatch):
    log = []
    StubGraph(log, fails=True).install(monkeypatch)
    with pytest.raises(timing.CannotCapture, match=r"^operation not permitted when stream is capturing$"):
        timing.CudaClock().capture([work])
    assert "synchronize" in log
