"""The benchmark as a user runs it, at sizes of seconds; its check and its arithmetic by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vmae.data.decode import BACKENDS, DecodeError
from vmae.synthetic.samples import sample_videos

pytest.importorskip("av")
pytest.importorskip("decord")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "data.py"
CARPHONE = str(sample_videos()[2])
KINDS = ("original", "packed", "h264, GOP 12", "h264, GOP 250")


@pytest.fixture
def bench(benches):
    return benches("data")


@pytest.mark.slow
def test_measures_checks_and_writes(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "2", "--clips", "1", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    here = ["published", *(n for n, b in BACKENDS.items() if "video" in b.kinds and b.missing() is None)]
    assert set(result["absent"]) == {n for n, b in BACKENDS.items() if "video" in b.kinds} - set(here)
    clips = {(r["videos"], r["variant"]): r for r in result["records"] if r["kind"] == "clip"}
    assert set(clips) == {(kind, variant) for kind in KINDS for variant in here}
    for r in clips.values():
        assert r["wrong"] is None and r["error_levels"] <= 2 and len(r["clip_cpu_ms"]["runs"]) == 2
        assert r["clips_per_s_per_core"] == pytest.approx(1e3 / r["clip_cpu_ms"]["median"])
        assert r["variant"] != "published" or r["error_levels"] == 0
    assert {r["videos"]: r["target"] for r in result["ratios"] if r["target"]} == {
        "h264, GOP 12": 1.8,
        "h264, GOP 250": 1.3,
        "packed / original": 2.5,
    }
    for r in result["ratios"]:
        assert r["met"] == (None if r["target"] is None else r["speedup"]["median"] >= r["target"])
    assert {r["videos"] for r in result["records"] if r["kind"] == "parts"} == set(KINDS)
    assert all(r["clips_per_s"] > 0 for r in result["records"] if r["kind"] == "workers")
    assert "Loading, compared" in done.stdout and "An ASSUMPTION: 396 TFLOP/s" in done.stdout


@pytest.mark.parametrize(
    "backend", ["published", *(name for name, b in BACKENDS.items() if "video" in b.kinds)]
)
def test_a_clip_of_every_variant_is_the_true_one(bench, backend):
    if backend != "published" and (lack := BACKENDS[backend].missing()):
        pytest.skip(lack)
    errors, wrong = bench.find_wrong([backend], [CARPHONE], range(2))
    assert wrong == {} and errors[backend] <= (0 if backend == "published" else 2)


def test_a_wrong_or_refusing_variant_gets_no_speed(bench, monkeypatch):
    plain = bench.make_clip

    def make(variant, path, seed):
        if variant == "refuses":
            raise DecodeError(f"{path}: refused")
        clip = plain("pyav", path, seed)
        return np.roll(clip, 1, axis=0) if variant == "late" else clip

    monkeypatch.setattr(bench, "make_clip", make)
    records = bench.measure_kind("original", [CARPHONE], ["pyav", "late", "refuses"], range(1), 2)
    by_variant = {r.variant: r for r in records}
    assert by_variant["pyav"].wrong is None and len(by_variant["pyav"].clip_cpu_ms.runs) == 2
    assert "levels, 2 allowed" in by_variant["late"].wrong and by_variant["late"].error_levels > 2
    assert by_variant["refuses"].wrong == "refused"
    assert all(by_variant[name].clips_per_s_per_core is None for name in ("late", "refuses"))


def test_variants_take_turns(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "make_clip", lambda *arguments: asked.append(arguments))
    runs = bench.time_clips(["a", "b"], ["v", "w"], range(2), 2)
    assert {name: len(times) for name, times in runs.items()} == {"a": 2, "b": 2}
    first = [(variant, path, seed) for path in "vw" for seed in (0, 1) for variant in "ab"]
    assert asked == first + [(variant, path, seed) for path in "vw" for seed in (0, 1) for variant in "ba"]


def test_resizing_is_within_the_tolerance_on_all_crops(bench):
    assert 0 < bench.error_on_all_crops([CARPHONE]) <= bench.TOLERANCE


def test_ratios_by_hand(bench):
    def record(videos, variant, runs, default=False):
        times = bench.Runs.of(runs) if runs else None
        return bench.ClipRecord(
            videos=videos, variant=variant, default=default, error_levels=0, clip_cpu_ms=times
        )

    ratios = bench.compare(
        [
            record("original", "published", [60.0, 90.0]),
            record("packed", "published", [30.0, 30.0]),
            record("packed", "pyav", [20.0, 20.0], True),
            record("packed", "torchcodec", None),
        ]
    )
    medians = {(r.videos, r.variant): (r.speedup.median, r.target, r.met) for r in ratios}
    assert medians == {
        ("packed / original", "published"): (2.5, None, None),
        ("packed", "pyav"): (1.5, None, None),
        ("packed / original", "pyav"): (3.75, 2.5, True),
    }


def test_what_a_gpu_needs(bench):
    found = bench.needs(rate=50.0, resize_share=0.2, gpu_flops=400e12, assumption="a guess")
    feeds = {r.preset: r for r in found}
    assert {"vit_b", "vit_g"} <= set(feeds) and "vit_tiny" not in feeds
    g = feeds["vit_g"]
    assert g.clips_per_s_needed == pytest.approx(400e12 / (3 * 2 * g.forward_macs))
    assert g.cores_1 == pytest.approx(g.clips_per_s_needed / 50)
    # a decode of 0.8 and four crops of 0.2, for four clips
    assert g.cores_4 == pytest.approx(g.cores_1 * 1.6 / 4) and g.assumption == "a guess"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--workers", "1", "0"], "--workers must be at least 1"),
        (["--gpu-flops", "0"], "--gpu-flops must be above 0"),
    ],
)
def test_bad_input_exits_with_2(bench, capsys, words, message):
    assert bench.main(words) == 2
    assert message in capsys.readouterr().err


def test_without_decord_there_is_no_baseline(bench, capsys, monkeypatch):
    import dataclasses

    monkeypatch.setitem(
        BACKENDS, "decord", dataclasses.replace(BACKENDS["decord"], missing=lambda: "`pip install decord`")
    )
    assert bench.main(["--quick"]) == 2
    assert "the published path needs decord: `pip install decord`" in capsys.readouterr().err
