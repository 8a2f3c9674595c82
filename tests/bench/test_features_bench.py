"""The features' benchmark: both ways give the same features, and a difference gets no speed."""

import json

import pytest


@pytest.fixture
def bench(benches, monkeypatch):
    features = benches("features")
    monkeypatch.setattr(features, "QUICK", (features.Setting("vit_tiny", 32, 4, (96, 64)),))
    monkeypatch.setattr(features, "QUICK_SECONDS", 2)
    return features


def test_a_small_run(bench, benches, tmp_path, capsys):
    pytest.importorskip("decord")
    words = [
        "--quick",
        "--windows",
        "3",
        "--rounds",
        "2",
        "--batch-size",
        "2",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert bench.main(words) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    (record,) = content["records"]
    assert record["same"] and record["error"] < 1e-4 and content["error_of_whole_video"] < 1e-4
    assert record["windows"] == (2 * 25 - 16) // 4 + 1
    assert set(record["ms_per_window"]) == {
        "published decode",
        "published model",
        "ours decode",
        "ours model",
    }
    assert record["met"] == (record["speedup"]["median"] >= 2)
    assert "times faster" in capsys.readouterr().out
    (row,) = result_of(benches, content).tables()[0].rows
    seconds = [f"{record['video_cpu_s'][who]:.0f}" for who in ("published", "ours")]
    assert row[:3] == [record["setting"], *seconds]
    assert row[3].startswith(f"{record['speedup']['median']:.2f} (")
    content["records"] = [record | {"same": False, "error": 1e-3}]
    wrong = [*["-"] * 5, "NO SPEED: differs by 1e-03"]
    assert result_of(benches, content).tables()[0].rows[0][1:] == wrong


def result_of(benches, content):
    from harness.results.features import FeaturesResult

    return benches("json_records").from_json(FeaturesResult, content)


def test_features_that_differ_get_no_speed(bench):
    ms = {f"{who} {part}": [1.0, 1.0] for who in bench.WHOS for part in bench.PARTS}
    record = bench.make_record(bench.QUICK[0], bench.Measured(ms, 9, 1e-3, 1.0), 2)
    assert not record.same and record.speedup is None and record.met is None
    good = bench.Measured(ms | {"published model": [5.0, 4.0]}, 9, 0.0, 1.0)
    record = bench.make_record(bench.QUICK[0], good, 2)
    assert record.speedup.median == pytest.approx(2.75) and record.met


def test_runs_are_spread(bench):
    assert bench.runs_of(range(0, 400, 4), 3, 3) == [[0, 4, 8], [192, 196, 200], [388, 392, 396]]
    assert bench.runs_of(range(0, 8, 4), 5, 1) == [[0, 4]]


def test_bad_arguments(bench, capsys):
    assert bench.main(["--quick", "--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert bench.main(["--quick", "--only", "vit_x"]) == 2
    assert "leaves no setting" in capsys.readouterr().err
