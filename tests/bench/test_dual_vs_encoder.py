"""The benchmark as a user runs it, at sizes of seconds; its arithmetic by hand.

All but the first work in this process, where a worker is a plain object.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "dual_vs_encoder.py"

WRONG_VARIANTS = '''
import torch

from vmae import build_pretrainer
from vmae.model.pretrainer import Pretrainer


class Off(Pretrainer):
    """Its loss is 0.1 % too high."""

    def forward(self, clips, mask):
        return super().forward(clips, mask) * 1.001


def off(config):
    return Off(config)


def right(config):
    return build_pretrainer(config)


class Large(Pretrainer):
    """Runs out of memory when asked for real numbers (counting runs on fake tensors)."""

    def forward(self, clips, mask):
        if type(clips) is torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(clips, mask)


def large(config):
    return Large(config)
'''


TINY = ("--model", "vit_tiny", "--batch", "1", "--input", "synthetic", "--device", "cpu")
QUICK = (*TINY, "--masking", "dual")


@pytest.fixture
def bench(benches):
    return benches("dual_vs_encoder")


class LocalWorker:
    """A worker in this process; the same errors."""

    def __init__(self, make, job, name=None):
        self.job, self.name = job, name or job.name
        self.served = self._guarded(lambda: make(job))

    def _guarded(self, call):
        from harness.worker import WorkerError, is_out_of_memory

        try:
            return call()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise WorkerError(self.name, text, is_out_of_memory(error)) from error

    def wait_ready(self):
        pass

    def ask(self, method, *arguments):
        return self._guarded(lambda: getattr(self.served, method)(*arguments))

    def close(self):
        self.served = None


@pytest.fixture
def run(bench, tmp_path, monkeypatch, capsys):
    """`run(*words, expect=0)`: what the command prints, and its result file."""
    from harness import checking, stepping, turns

    monkeypatch.setattr(checking, "Worker", LocalWorker)
    monkeypatch.setattr(turns, "StepWorker", lambda job: LocalWorker(stepping.Stepper, job))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "others.py").write_text(WRONG_VARIANTS)

    def found(*words, expect=0):
        code = bench.main([*words, "--json", str(tmp_path / "r.json")])
        out, err = capsys.readouterr()
        assert code == expect, out + err
        return SimpleNamespace(stdout=out, stderr=err), json.loads((tmp_path / "r.json").read_text())

    yield found
    sys.modules.pop("others", None)


def run_alone(tmp_path, *words, expect=0):
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "r.json"), *words]
    paths = f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == expect, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text()) if (tmp_path / "r.json").exists() else None
    return done, result


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path):
    """Processes of its own, real clips where they are, a picture."""
    words = ["--model", "vit_tiny", "--batch", "1", "--steps", "1", "--warmup", "0", "--device", "cpu"]
    words += ["--masking", "dual", "--variants", "torch", "--plot", str(tmp_path / "p.png")]
    done, result = run_alone(tmp_path, *words)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert result["schema"] == "vmae-bench/1" and result["complete"]
    known = {"device", "cpu", "cores", "torch", "triton", "python", "commit", "clean", "date"}
    assert known <= result["environment"].keys() and result["environment"]["device"] == "cpu"
    (record,) = result["records"]
    assert record["peak_memory_bytes"] > 2**20 and record["check"]["compared"] > 50
    assert "torch, dual" in done.stdout


@pytest.mark.slow
def test_measures_checks_and_compares(run):
    done, result = run(*TINY, "--steps", "3", "--warmup", "0", "--variants", "reference+sdpa,torch")
    records = {(r["variant"], r["masking"]): r for r in result["records"]}
    assert set(records) == {(v, m) for v in ("reference+sdpa", "torch") for m in ("encoder_only", "dual")}
    assert result["failed"] == result["rejected"] == {}
    for record in records.values():
        assert record["model"] == "vit_tiny" and record["batch"] == 1 and record["dtype"] == "float32"
        times = record["step_ms"]
        assert len(times["runs"]) == 3 and 0 < times["min"] <= times["median"] <= times["max"]
        parts = sum(record[f"{part}_ms"]["runs"][0] for part in ("forward", "backward", "optimizer"))
        assert parts == pytest.approx(times["runs"][0])
        assert record["clips_per_s"] == pytest.approx(1000 / times["median"])
        check = record["check"]
        assert check["gradient_error"] <= check["gradient_bound"] <= check["widest_bound"] < 1e-5
    for masking in ("encoder_only", "dual"):
        ours, base = records["torch", masking], records["reference+sdpa", masking]
        assert ours["loss"] == pytest.approx(base["loss"], rel=1e-5)
        assert ours["saved_activation_bytes_per_clip"] < base["saved_activation_bytes_per_clip"]
        assert ours["forward_macs_per_clip"] < base["forward_macs_per_clip"]
    ratios = {(r["variant"], r["baseline"]): r for r in result["ratios"]}
    ratio = ratios["torch dual", "reference+sdpa encoder_only"]
    pairs = zip(
        records["torch", "dual"]["step_ms"]["runs"],
        records["reference+sdpa", "encoder_only"]["step_ms"]["runs"],
    )
    assert ratio["time"]["median"] == pytest.approx(sorted(a / b for a, b in pairs)[1])
    assert ratio["speedup"]["max"] == pytest.approx(1 / ratio["time"]["min"])
    assert {"memory", "saved_activations"} <= ratio.keys()
    assert "torch, dual" in done.stdout and "times faster" in done.stdout
    assert ratios["torch dual", "reference+sdpa dual"]["fastest_competitor"]


@pytest.mark.slow
def test_a_wrong_variant_gets_no_speed(run):
    names = "reference,off=others:off,right=others:right"
    done, result = run(*QUICK, "--steps", "1", "--warmup", "0", "--variants", names, expect=1)
    by_name = {r["variant"]: r for r in result["records"]}
    assert by_name["off=others:off"]["step_ms"] is None and by_name["off=others:off"]["clips_per_s"] is None
    assert by_name["right=others:right"]["step_ms"]["median"] > 0
    assert "loss differs from the reference's by 1.0e-03" in result["rejected"]["off=others:off dual"]
    assert not any(r["time"] for r in result["ratios"] if "off=" in r["variant"])
    assert "NO SPEED for off=others:off dual" in done.stderr and "- (wrong)" in done.stdout


@pytest.mark.slow
def test_what_does_not_fit_is_told_and_the_others_go_on(run):
    names = "large=others:large,reference,torch"
    done, result = run(*QUICK, "--steps", "2", "--warmup", "0", "--variants", names, expect=1)
    by_name = {r["variant"]: r for r in result["records"]}
    why = "does not fit at batch 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert result["failed"] == {"large=others:large dual": why}
    assert by_name["large=others:large"]["failed"] == why and by_name["large=others:large"]["step_ms"] is None
    assert len(by_name["torch"]["step_ms"]["runs"]) == 2
    assert any(r["fastest_competitor"] and r["speedup"] for r in result["ratios"])
    assert f"NO SPEED for large=others:large dual: {why}" in done.stderr
    assert "- (does not fit at batch 1)" in done.stdout


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_rounds(run, bench, tmp_path, monkeypatch):
    from harness import turns

    told = []

    def at(where):
        told.append(where)
        if where.startswith("round 3 of 4, torch"):
            raise KeyboardInterrupt

    monkeypatch.setattr(turns, "at", at)
    words = ("--steps", "3", "--warmup", "1", "--variants", "reference,torch")
    done, _ = run(*QUICK, *words, expect=130)
    assert done.stderr.endswith("interrupted\n")
    from harness.results import read_result

    result = read_result(tmp_path / "r.json", "dual_vs_encoder")
    assert not result.complete and "NOT COMPLETE" in result.tables()[0].note
    assert [len(r.step_ms.runs) for r in result.records] == [1, 1]
    (ratio,) = [r for r in result.ratios if r.fastest_competitor]
    assert ratio.speedup is not None


def test_counts_only(run):
    done, result = run("--model", "vit_tiny", "--count")
    own = [r for r in result["records"] if r["variant"] != "huggingface"]  # which is not counted
    assert all(r["step_ms"] is None and r["saved_activation_bytes_per_clip"] > 0 for r in own)
    assert "times faster" in done.stdout and "Parts of a step" not in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--variants", "torch,tritn"], "unknown variant 'tritn'; known: reference, reference+sdpa"),
        (["--variants", "x=no_such_module:f"], "no_such_module"),
        (["--masking", "triple"], "unknown masking 'triple'"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--model", "vit_tiny", "--input", "no_such_list.txt"], "no_such_list.txt"),
    ],
)
def test_bad_input_exits_with_2(bench, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(words) == 2
    assert message in capsys.readouterr().err


def test_ratios_are_paired_run_by_run(bench):
    from harness.json_records import Spread

    assert Spread.of_ratios([2, 6, 3], [1, 2, 3]) == Spread(median=2, min=1, max=3)


@pytest.mark.slow
def test_maskings(run):
    done, result = run("--model", "vit_tiny", "--count", "--variants", "torch", "--masking", "all")
    records = {r["masking"]: r for r in result["records"]}
    for key in ("forward_macs_per_clip", "saved_activation_bytes_per_clip"):
        values = [records[m][key] for m in ("encoder_only", "dual_25", "dual", "dual_75")]
        assert values == sorted(values, reverse=True) and len(set(values)) == 4


@pytest.mark.slow
def test_sweep_and_parts_of_the_memory(run):
    words = [*QUICK, "--steps", "2", "--warmup", "0", "--sweep", "4", "--variants", "torch"]
    done, result = run(*words)
    record, sweep = result["records"][0], result["sweeps"][0]
    memory = record["memory"]
    assert (
        memory["gradients"] == memory["parameters"] and 1.9 < memory["optimizer"] / memory["parameters"] < 2.1
    )
    assert memory["peak"] >= memory["activations"]
    assert record["mfu"] is None and record["model_flops_per_s"] > 0
    assert [b["batch"] for b in sweep["batches"]] == [1, 2, 4] and sweep["masking"] == "dual"
    assert all(b["clips_per_s"] > 0 and len(b["step_ms"]) == 1 for b in sweep["batches"])
    assert "Batch sweep" in done.stdout and "4: " in done.stdout


@pytest.mark.slow
def test_the_papers_table_stands_beside_ours(run):
    done, result = run(
        "--model", "vit_b", "--count", "--dtype", "bfloat16", "--variants", "reference,torch,triton"
    )
    lines = {line["variant"]: line for line in result["paper"]}
    assert lines["torch"]["paper_speedup"] == 1.79 and lines["torch"]["speedup"] is None
    assert lines["reference"]["macs"] == pytest.approx(lines["reference"]["paper_macs"], rel=2e-3)
    assert "paper, as recalled" in done.stdout
    saved = {(r["variant"], r["masking"]): r["saved_activation_bytes_per_clip"] for r in result["records"]}
    assert saved["triton", "dual"] <= 0.25 * saved["reference", "encoder_only"]
    assert saved["triton", "dual"] <= 0.45 * saved["reference", "dual"]


def record_of(variant, masking="dual", runs=(3.0, 2.0, 4.0), saved=2**20):
    from harness.json_records import Runs
    from harness.results.steps import StepRecord

    known = dict(model="m", device="cpu", dtype="float32", batch=2, variant=variant, masking=masking)
    counts = dict(saved_activation_bytes_per_clip=saved, forward_macs_per_clip=10**9)
    times = Runs.of(runs) if runs else None
    return StepRecord(**known, **counts, peak_memory_bytes=2**30, step_ms=times)


def test_the_fastest_competitor_is_named(bench):
    from harness import records

    steps = {"reference": [9], "reference+sdpa": [3], "torch": [2]}
    ratios = records.compare([record_of(name, runs=runs) for name, runs in steps.items()])
    fastest = [r for r in ratios if r.fastest_competitor]
    assert [(r.variant, r.baseline) for r in fastest] == [("torch dual", "reference+sdpa dual")]
    assert fastest[0].speedup.median == 1.5
    untimed = [record_of(name, runs=None) for name in steps]
    assert not any(r.fastest_competitor for r in records.compare(untimed))


def test_variants_that_cannot_run_say_why(bench, capsys):
    assert bench.main(["--variants", "triton", "--device", "cpu"]) == 2
    assert "'triton' does not run here: needs a GPU" in capsys.readouterr().err


def test_a_plot_says_what_was_not_counted(benches, tmp_path):
    plots = benches("plots")
    records = [record_of("torch"), record_of("huggingface", "encoder_only", saved=None)]
    path = tmp_path / "plot.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plots.plot_steps(str(path), records, "title")
    assert path.read_text().count("not counted") == 1


def test_transformers_own_model_does_the_same(run, tmp_path):
    """Encoder-only masking: it has no other. Its loss agrees with the reference's, else it would not be
    timed."""
    pytest.importorskip("transformers")
    words = ["--model", "vit_tiny", "--batch", "1", "--input", "synthetic", "--steps", "1", "--device", "cpu"]
    plot = tmp_path / "plot.png"
    done, result = run(*words, "--variants", "reference,huggingface,torch", "--plot", str(plot))
    assert plot.stat().st_size > 1000
    pairs = {(r["variant"], r["masking"]) for r in result["records"]}
    assert ("huggingface", "encoder_only") in pairs and ("huggingface", "dual") not in pairs
    assert result["rejected"] == {} and all(r["step_ms"]["median"] > 0 for r in result["records"])
    assert any(r["variant"] == "torch encoder_only" and r["fastest_competitor"] for r in result["ratios"])


def test_without_videos_or_decoders_clips_are_synthetic(bench, monkeypatch, capsys):
    from harness import clips

    import vmae.data.decode
    from vmae import InputError

    assert clips.choose_input("auto") == "real" and clips.choose_input("list.txt") == "list.txt"

    def none_here(kind, name):
        raise InputError("no decoder is installed")

    monkeypatch.setattr(vmae.data.decode, "find_backends", none_here)
    assert clips.choose_input("auto") == "synthetic"
    assert "nothing is decoded: no decoder is installed" in capsys.readouterr().out
