"""The chain from videos to mAP at a scale of seconds."""

import json

import pytest


@pytest.mark.slow  # 3 s
def test_the_chain(benches, tmp_path, capsys):
    temporal = benches("temporal")
    words = ["--out", str(tmp_path / "t"), "--scale", "smoke", "--json", str(tmp_path / "r.json")]
    assert temporal.main(words) == 0
    assert "chance" in capsys.readouterr().out
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert [record["arm"] for record in records] == ["features", "untrained", "shuffled"]
    assert all(0 <= value <= 1 for record in records for value in record["map"].values())
    assert (tmp_path / "t" / "detector-features" / "segments.png").is_file()
    # Shuffled: every video has another's features; untrained: others than the trained.
    name = "training_0000.npy"
    one, moved, fresh = (
        (tmp_path / "t" / arm / name).read_bytes() for arm in ("features", "shuffled", "untrained")
    )
    assert (
        moved == (tmp_path / "t" / "features" / "training_0001.npy").read_bytes()
        and one != moved
        and one != fresh
    )
    assert temporal.main(words) == 0  # nothing is done again
    assert "== t:" not in capsys.readouterr().out
    assert temporal.main([*words, "--seed", "1"]) == 2
    assert "holds another run" in capsys.readouterr().err
