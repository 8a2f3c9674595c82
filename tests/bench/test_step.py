"""Where a step's time goes, and how it grows: the arithmetic by hand, and tiny runs."""

import json

import pytest

QUICK = ["--model", "vit_tiny", "--batch", "1", "--steps", "1", "--device", "cpu", "--input", "synthetic"]


def test_kinds(benches):
    kind_of = benches("profiling").kind_of
    for name, kind in {
        "aten::addmm": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matrix products",
        "void flash::flash_fwd_kernel<...>": "attention",
        "aten::_softmax": "attention",
        "aten::native_layer_norm": "normalisation",
        "aten::gelu": "GELU",
        "aten::copy_": "gather and copy",
        "Memcpy HtoD (Pinned -> Device)": "gather and copy",
        "void at::native::vectorized_elementwise_kernel": "element by element",
        "embed_visible_fwd_kernel": "ours (Triton)",
        "triton_poi_fused_add_0": "fused by torch.compile",
        "aten::_fused_adamw_": "optimizer",
        "aten::sum": "sums",
        "something": "other",
    }.items():
        assert kind_of(name) == kind, name


def test_busy_time_is_the_union_of_kernels(benches):
    assert benches("profiling").union_us([(0, 4), (2, 6), (10, 11), (3, 5)]) == 7
    assert benches("profiling").union_us([]) == 0


@pytest.mark.slow
def test_profiles_a_step(benches, tmp_path, capsys):
    words = [
        "--json",
        str(tmp_path / "r.json"),
        "--plot",
        str(tmp_path / "p.png"),
        "--trace",
        str(tmp_path / "t.json"),
    ]
    assert benches("step").main([*QUICK, *words]) == 0
    record = json.loads((tmp_path / "r.json").read_text())["records"][0]
    names = [found["name"] for found in record["classes"]]
    assert {
        "matrix products",
        "attention",
        "normalisation",
        "optimizer",
        "waiting for data",
        "host gaps",
    } <= set(names)
    assert sum(found["ms"] for found in record["classes"]) == pytest.approx(
        record["profiled_step_ms"], rel=0.05
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "traceEvents" in json.loads((tmp_path / "t.json").read_text())
    assert "Where a step's time goes: vit_tiny, torch" in capsys.readouterr().out


WRONG = """
from vmae.model.pretrainer import Pretrainer


class Off(Pretrainer):
    def forward(self, clips, mask):
        return super().forward(clips, mask) * 1.001
"""


def test_a_wrong_variant_is_not_profiled(benches, tmp_path, monkeypatch, capsys):
    (tmp_path / "others.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        benches("step").main([*QUICK, "--variant", "off=others:Off", "--json", str(tmp_path / "r.json")]) == 1
    )
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["records"][0]["classes"] == [] and content["records"][0]["step_ms"] is None
    assert "differs" in content["rejected"]["off=others:Off"] and "NO SPEED" in capsys.readouterr().err
    from harness.results import read_result

    (table,) = read_result(tmp_path / "r.json", "step").tables()
    assert table.head[1] == "NO SPEED" and table.rows[0][0] == "off=others:Off"


def test_bad_input(benches, capsys):
    assert benches("step").main(["--variant", "triton", "--device", "cpu"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert benches("scaling").main(["--batch", "0"]) == 2
    assert "--batch" in capsys.readouterr().err


def test_predictions_grow_with_the_first_measured_point(benches):
    scaling = benches("scaling")
    from harness.results.steps import Memory

    def point(macs, ms=None):
        parts = dict(parameters=1, gradients=1, optimizer=2, activations=3)
        measured = None
        if ms:
            memory = Memory(peak=150 * macs, **parts)
            measured = scaling.Measured(step_ms=scaling.Runs.of([ms]), clips_per_s=1.0, memory=memory)
        about = dict(variant="torch", masking="dual", dtype="float32", batch=1, device="cpu")
        predicted = scaling.Predicted(forward_macs=macs, memory=parts, memory_bytes=100 * macs)
        return scaling.Point(axis="batch", value=macs, **about, predicted=predicted, measured=measured)

    points = [point(10, 20.0), point(20, 30.0), point(40)]
    first, second, third = scaling.with_predicted_times(points)
    assert [r.predicted.step_ms for r in (first, second, third)] == [20, 40, 80]
    assert first.measured_over_predicted == scaling.Ratios(memory=1.5)
    assert second.measured_over_predicted == scaling.Ratios(time=0.75, memory=1.5)
    assert third.measured is None and third.measured_over_predicted is None


@pytest.mark.slow
def test_scaling_counts_what_dual_masking_saves_as_clips_grow(benches, tmp_path, capsys, monkeypatch):
    scaling = benches("scaling")
    monkeypatch.setitem(scaling.POINTS["clips"], "beyond", ["8x64", "16x96"])
    words = ["--axes", "clips", "--model", "vit_tiny", "--json", str(tmp_path / "r.json")]
    assert scaling.main(words) == 0
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert [(r["value"], r["masking"]) for r in records] == [
        (value, masking) for value in ("8x64", "16x96") for masking in ("encoder_only", "dual")
    ]
    assert all(r["measured"] is None and r["predicted"]["step_ms"] is None for r in records)
    saved = [
        a["predicted"]["forward_macs"] / b["predicted"]["forward_macs"] for a, b in zip(*[iter(records)] * 2)
    ]
    assert 1 < saved[0] < saved[1]
    tokens = records[3]["predicted"]["tokens"]
    assert tokens["total"] == 8 * 6 * 6 and tokens["decoded"] == tokens["total"] // 2
    shown = capsys.readouterr().out
    assert f"{saved[1]:.2f}" in shown and "16 x 96" in shown and "counted, not run" in shown


@pytest.mark.slow
def test_scaling_measures_and_predicts(benches, tmp_path, capsys):
    words = [
        "--quick",
        "--axes",
        "frames",
        "ranks",
        "--steps",
        "1",
        "--warmup",
        "1",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert benches("scaling").main(words) == 0
    records = {(r["axis"], r["value"]): r for r in json.loads((tmp_path / "r.json").read_text())["records"]}
    assert set(records) == {("frames", 16), ("frames", 32), ("frames", 64), ("ranks", 1), ("ranks", 2)}
    assert records["frames", 64]["measured"] is None and records["frames", 64]["predicted"]["step_ms"] > 0
    assert (
        records["frames", 32]["predicted"]["forward_macs"]
        > 2 * records["frames", 16]["predicted"]["forward_macs"]
    )
    assert records["ranks", 2]["measured"]["clips_per_s"] > 0
    assert "predicted, ms" in capsys.readouterr().out
