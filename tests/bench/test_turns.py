"""Turns: who runs with whom, what a failure leaves, and a model that leaves the device and comes back."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

OTHERS = """
from harness.variants import build_reference_sdpa, compile_blocks

GRAPHS = []  # shapes of the inputs of every graph


def counting(graph, inputs):
    GRAPHS.append([tuple(x.shape) if hasattr(x, "shape") else x for x in inputs])
    return graph


def compiled(config):
    return compile_blocks(build_reference_sdpa(config), backend=counting)
"""


@pytest.fixture
def turns(benches):
    return benches("turns")


@pytest.fixture
def job(turns, tiny, clips_of, tmp_path, monkeypatch):
    from harness.stepping import StepJob

    torch.save(clips_of(tiny, 2), tmp_path / "clips.pt")
    (tmp_path / "others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(model="tiny", config=tiny, variant="torch", masking="dual", device="cpu", dtype="float32")
    yield StepJob(**known, batch=2, threads=1, clips=str(tmp_path / "clips.pt"))
    sys.modules.pop("others", None)


def jobs_of(job, variants, maskings=("encoder_only", "dual")):
    return [replace(job, variant=v, masking=m) for m in maskings for v in variants]


def test_groups_hold_few_and_dual_masking_comes_first(turns, job):
    jobs = jobs_of(job, "abcd")

    def names(resident):
        return [[one.name for one in group] for group in turns.make_groups(jobs, resident)]

    assert names(8) == [[one.name for one in jobs[1:]]]
    assert names(5) == [
        ["a dual", "b dual", "c dual", "d dual"],
        ["b encoder_only", "c encoder_only", "d encoder_only"],
    ]
    assert names(3) == [
        ["a dual", "b dual"],
        ["c dual", "d dual"],
        ["b encoder_only", "c encoder_only"],
        ["d encoder_only"],
    ]
    assert turns.make_groups(jobs[:1], 2) == [[]]


def test_turns_of_parked_models_hold_several_steps(turns, job):
    parked = replace(job, parked=True)
    assert turns.turn_sizes(job, 3) == [1, 1, 1] and turns.turn_sizes(job, 0, whole=True) == []
    assert turns.turn_sizes(parked, 10) == [4, 4, 2]
    assert turns.turn_sizes(parked, 5, whole=True) == [5] and turns.turn_sizes(parked, 0, whole=True) == []


class FakeWorker:
    """Answers at once; `FAILS` names what fails when asked for how many turns, `LIVE` are those at work."""

    FAILS: dict = {}
    LIVE: set = set()
    MOST = 0

    def __init__(self, job):
        self.job, self.name, self.turns = job, job.name, 0
        self.LIVE.add(self)
        FakeWorker.MOST = max(FakeWorker.MOST, len(self.LIVE))

    def wait_ready(self):
        self._fail("build")

    def ask(self, method, *arguments):
        if method == "gradients":
            self._fail("check")
            return SimpleNamespace(loss=1.0)
        if method == "memory":
            return None
        self.turns += 1
        self._fail(self.turns)
        return [{"step": 3.0, "forward": 1.0, "backward": 1.0, "optimizer": 1.0}] * arguments[0]

    def _fail(self, when):
        from harness.worker import WorkerError

        if self.FAILS.get(self.name) == when:
            raise WorkerError(self.name, "OutOfMemoryError: no", True)

    def close(self):
        self.LIVE.discard(self)


@pytest.fixture
def fake(turns, monkeypatch):
    check = SimpleNamespace(why_wrong=lambda dtype: None)
    expected = SimpleNamespace(check=lambda found, allowance: check)
    monkeypatch.setattr(turns, "expect", lambda job, maskings: dict.fromkeys(maskings, expected))
    monkeypatch.setattr(turns, "StepWorker", FakeWorker)
    monkeypatch.setattr(turns, "resolve_variant", lambda name: SimpleNamespace(allowance=0.0))
    monkeypatch.setattr(FakeWorker, "FAILS", {})
    monkeypatch.setattr(FakeWorker, "MOST", 0)
    yield FakeWorker
    assert not FakeWorker.LIVE


@pytest.mark.parametrize("when", ["build", "check", 1, 3])
def test_what_fails_leaves_and_the_others_go_on(turns, job, fake, when):
    fake.FAILS["b dual"] = when
    found, why = turns.measure(jobs_of(job, "abc"), steps=3, warmup=1)
    assert why == {"b dual": "does not fit at batch 2: OutOfMemoryError: no"}
    assert [len(one.runs) for one in found] == [3, 3, 3, 3, 0, 3]


def test_few_exist_at_once_and_the_anchor_is_in_every_group(turns, job, fake):
    jobs = jobs_of(job, "abcd")
    *_, found = turns.measure_in_groups(jobs, steps=3, warmup=1, resident=3)
    assert fake.MOST == 3 and found.keys() == {one.name for one in jobs}
    assert {name: one.group for name, one in found.items()} == {
        "a encoder_only": 0,
        "a dual": 0,
        "b dual": 0,
        "c dual": 1,
        "d dual": 1,
        "b encoder_only": 2,
        "c encoder_only": 2,
        "d encoder_only": 3,
    }
    assert all(len(one.runs) == len(one.anchor_runs) == 3 for one in found.values())
    assert {one.anchor for one in found.values()} == {"a encoder_only"}


def test_another_is_the_anchor_where_the_first_does_not_fit(turns, job, fake):
    fake.FAILS["a encoder_only"] = 2
    *_, found = turns.measure_in_groups(jobs_of(job, "abcd"), steps=3, warmup=1, resident=3)
    assert found["a encoder_only"].failed and not found["a encoder_only"].runs
    assert {one.anchor for one in found.values() if one.runs} == {"a dual"}
    assert all(one.runs for name, one in found.items() if name != "a encoder_only")


def test_nothing_is_timed_where_the_reference_failed(turns, job, fake, monkeypatch):
    from harness.worker import WorkerError

    def no(job, maskings):
        raise WorkerError("reference", "OutOfMemoryError: no", True)

    monkeypatch.setattr(turns, "expect", no)
    found, why = turns.measure(jobs_of(job, "ab", ["dual"]), steps=1, warmup=0)
    assert set(why.values()) == {"not checked: reference: OutOfMemoryError: no"}
    assert not any(one.runs for one in found)


def test_ratios_of_different_groups_go_through_the_anchor(benches):
    records = benches("records")
    from harness.json_records import Runs
    from harness.results.steps import StepRecord

    known = dict(model="m", device="cpu", dtype="float32", batch=2, anchor="reference dual")
    counts = dict(saved_activation_bytes_per_clip=1, forward_macs_per_clip=1, masking="dual")

    def record(variant, group, runs, anchor):
        times = dict(step_ms=Runs.of(runs), group=group, anchor_ms=anchor)
        return StepRecord(**known, **counts, **times, variant=variant)

    # In the second group the machine is twice as slow; the last of its rounds was cut off.
    first = record("reference", 0, [10.0, 12.0, 14.0], [10.0, 12.0, 14.0])
    other = record("reference+sdpa", 0, [5.0, 4.0, 7.0], [10.0, 12.0, 14.0])
    ours = record("torch", 1, [4.0, 5.0], [20.0, 20.0])
    found = {(r.variant, r.baseline): r for r in records.compare([first, other, ours])}
    fastest = found["torch dual", "reference+sdpa dual"]
    assert fastest.fastest_competitor and fastest.through == "reference dual"
    assert fastest.speedup.max == pytest.approx((5 / 10) / (4 / 20))
    assert fastest.speedup.min == pytest.approx((4 / 12) / (5 / 20))
    direct = found["torch dual", "reference dual"]
    assert direct.through == "" and (direct.speedup.min, direct.speedup.max) == pytest.approx((4, 5))
    assert found["reference+sdpa dual", "reference dual"].speedup.max == pytest.approx(3)
    alone = replace(ours, anchor="torch dual", anchor_ms=[4.0, 5.0])
    assert records.speedup_of(first, alone) == (None, "")


# --- one model ----------------------------------------------------------------------------------------------


def test_a_parked_model_leaves_the_device_and_comes_back_the_same(turns, job):
    from harness.stepping import Stepper

    parked, plain = Stepper(replace(job, parked=True)), Stepper(job)
    assert not hasattr(parked, "clips")
    assert parked.gradients() == plain.gradients()
    fresh = [tensor.clone() for tensor in parked.model.parameters()]
    runs = parked.turn(2)
    assert len(runs) == 2 and all(run["step"] > 0 for run in runs)
    assert not hasattr(parked, "clips") and not parked.optimizer.state
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(parked.model.parameters(), fresh))
    memory = parked.memory()
    assert 1.9 < memory.optimizer / memory.parameters < 2.1
    assert parked.gradients() == plain.gradients()


@pytest.mark.slow
def test_compiled_blocks_have_static_shapes_and_nothing_is_compiled_after_the_check(turns, job, monkeypatch):
    from harness.stepping import Stepper

    torch._dynamo.reset()
    stepper = Stepper(replace(job, variant="compiled=others:compiled", parked=True))
    import others

    stepper.gradients()
    compiled = len(others.GRAPHS)
    assert 2 <= compiled <= 4  # an encoder's and a decoder's block, in one or two graphs
    stepper.turn(2)
    stepper.turn(1)
    assert len(others.GRAPHS) == compiled
    resets = []
    reset = torch._dynamo.reset
    monkeypatch.setattr(torch._dynamo, "reset", lambda: (resets.append(1), reset()))
    sweeping = Stepper(replace(job, variant="compiled=others:compiled"))
    for batch in (2, 1, 4):
        others.GRAPHS.clear()
        assert sweeping.try_batch(batch, 2).batch == batch
        assert len(others.GRAPHS) in (0, compiled)  # 0: of the check above
        sizes = [size for shapes in others.GRAPHS for shape in shapes for size in shape]
        assert all(type(size) is int for size in sizes)
    assert len(resets) == 2 and len(others.GRAPHS) == compiled


def test_on_a_gpu_events_are_read_after_the_last_step(turns, job, monkeypatch):
    from harness.stepping import Stepper

    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)
            log.append("event")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return float(end.at - self.at)

    stepper = Stepper(job)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    stepper.device = SimpleNamespace(type="cuda")
    runs = stepper.turn(2)
    assert log == ["event"] * 8 + ["synchronize"]
    assert runs == [{"step": 3.0, "forward": 1.0, "backward": 1.0, "optimizer": 1.0}] * 2


def test_a_numbered_gpu_becomes_the_process_s_own(turns, monkeypatch):
    from harness.stepping import use_device

    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [use_device(name).type for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda"]
    assert chosen == [torch.device("cuda:1")]  # torch refuses one without a number


def test_a_sweep_ends_where_memory_does(turns, job, monkeypatch):
    from harness.worker import WorkerError

    class Sweeping:
        name = "x dual"

        def __init__(self, job):
            pass

        wait_ready = close = lambda self: None

        def ask(self, method, batch, steps):
            if batch > limit:
                if dies:
                    raise WorkerError(self.name, "its process was killed (out of memory?)", True)
                return None
            return SimpleNamespace(batch=batch)

    monkeypatch.setattr(turns, "StepWorker", Sweeping)
    limit, dies = 6, False
    found, ended = turns.sweep_batches(job, 1, 64)
    assert [one.batch for one in found] == [1, 2, 4, 6] and ended == ""
    dies = True
    found, ended = turns.sweep_batches(job, 1, 64)
    assert [one.batch for one in found] == [1, 2, 4]
    assert ended == "does not fit at batch 8: its process was killed (out of memory?)"


# --- processes ----------------------------------------------------------------------------------------------

SERVED = """
import os
import signal


class Served:
    def __init__(self, job):
        self.job = job

    def echo(self, value):
        return [self.job, value]

    def grow(self):
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")

    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
def test_how_a_worker_ends_is_told(benches, tmp_path, monkeypatch):
    worker = benches("worker")
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.syspath_prepend(str(tmp_path))
    import served

    ends = {"end": "its process was killed (out of memory?)", "grow": "OutOfMemoryError: CUDA out of memory"}
    workers = [worker.Worker(served.Served, "job", "name") for _ in ends]
    for process, (method, reason) in zip(workers, ends.items()):
        process.wait_ready()
        assert process.ask("echo", 1) == ["job", 1]
        with pytest.raises(worker.WorkerError, match="^name: ") as failed:
            process.ask(method)
        assert failed.value.reason == reason and failed.value.out_of_memory
        with pytest.raises(worker.WorkerError):
            process.ask("echo", 2)
        process.close()
    sys.modules.pop("served")


def test_what_counts_as_lack_of_memory(benches):
    found = benches("worker").is_out_of_memory
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert found(error), error
    assert not found(RuntimeError("shape")) and not found(ValueError("out of memory"))
