"""What workers, packing and an epoch's order take, measured at sizes of seconds."""

import json

import pytest


@pytest.mark.slow
def test_needs_are_measured(benches, tmp_path, capsys):
    file = tmp_path / "needs.json"
    assert benches("needs").main(["--quick", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "What a run needs of its machine" in out and "The order of an epoch" in out
    load, clips, order = json.loads(file.read_text())["records"]
    assert (load["kind"], clips["kind"], order["kind"]) == ("load", "clips", "order")
    assert load["main_files_before"] < load["main_files"] <= load["planned_files"]
    assert load["worker_private"]["min"] > 10 << 20 and len(load["worker_private"]["runs"]) == load["workers"]
    assert clips["seconds"] > 5 and clips["packed_bytes"] > 0 < clips["pack_cpu_s"]["min"]
    assert order["samples"] == 10**6 and order["kept_bytes"] >= 4e6


def test_needs_bench_names_wrong_counts(benches, capsys):
    assert benches("needs").main(["--quick", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
