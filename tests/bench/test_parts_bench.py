"""Jobs in parts against one job: that the benchmark sees a difference, and says what is the same."""

import json

import pytest


@pytest.mark.slow
def test_parts_are_compared_with_one_job(benches, tmp_path, capsys, monkeypatch):
    parts, file = benches("parts"), tmp_path / "parts.json"
    flags = ["--quick", "--items", "3000", "--json", str(file), "--commands", "evaluate"]
    assert parts.main(flags) == 0
    out = capsys.readouterr().out
    assert "evaluate      3      2" in out and "Joining the records" in out
    same, merge = json.loads(file.read_text())["records"]
    assert same["differing"] == [] and same["files"] == 5 and merge["items"] == 3000
    original = parts.contents
    monkeypatch.setattr(parts, "contents", lambda folder: {**original(folder), "name": folder.name.encode()})
    assert parts.main([*flags, "--items", "0"]) == 1
    assert "differ: name" in capsys.readouterr().out


def test_an_unknown_command(benches, capsys):
    assert benches("parts").main(["--commands", "pack", "--items", "-1"]) == 2
    assert "--items" in capsys.readouterr().err
