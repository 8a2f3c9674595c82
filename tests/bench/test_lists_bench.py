"""The start of a run on a long list, at a length of a second."""

import json

import pytest


@pytest.mark.slow
def test_starts_are_timed_and_counted(benches, tmp_path, capsys):
    file = tmp_path / "lists.json"
    flags = ["--lines", "21000", "--repeats", "1", "--reads", "3000", "--json", str(file)]
    assert benches("lists").main([*flags, "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "MiB made private" in out and "SHA-256 of 21,000 lines" in out
    content = json.loads(file.read_text())
    starts = [record for record in content["records"] if record["kind"] == "start"]
    assert [(record["lines"], record["start"]) for record in starts] == [(21000, "cold"), (21000, "warm")]
    assert all(set(record["laps_s"]) == {"read", "loader", "identity", "order"} for record in starts)
    assert all(0 < record["memory_mib"]["median"] <= record["peak_mib"]["median"] for record in starts)
    calls = [record["calls"] for record in content["records"] if record["kind"] == "lookup"]
    assert calls == [500, 500, 0]  # rank 0 looks up a sample, whatever is kept; the others nothing
    kinds = [record for record in content["records"] if record["kind"] == "lines"]
    assert len(kinds) == 9 and all(record["line_us"]["median"] > 0 for record in kinds)
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_measured_is_said(benches, tmp_path, capsys):
    lists = benches("lists")
    assert (
        lists.main(["--lines", "20000000"]) == 2 and "--lines: at most 10,648,000" in capsys.readouterr().err
    )
    assert lists.main(["--before", str(tmp_path)]) == 2
    assert "no tree with a folder `vmae`" in capsys.readouterr().err


@pytest.mark.slow
def test_an_index_in_place_of_the_list(benches, tmp_path, capsys):
    file = tmp_path / "index.json"
    flags = ["--index", "--lines", "4000", "--repeats", "1", "--reads", "1000", "--json", str(file)]
    assert benches("lists").main([*flags, "--folder", str(tmp_path)]) == 0
    start, worker = json.loads(file.read_text())["records"]
    assert (start["lines"], start["start"], worker["reads"]) == (4000, "index", 1000)
    assert worker["private_mib"] < 8 and [path.name for path in tmp_path.iterdir()] == ["index.json"]
