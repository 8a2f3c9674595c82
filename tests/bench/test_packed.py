"""Benchmarks of packed videos, at sizes of seconds: clips agree, rivals that are missing are said."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos

pytest.importorskip("av")


@pytest.fixture
def bench(benches):
    return benches("packed")


@pytest.fixture
def small(bench, tmp_path):
    return bench.make_videos(tmp_path, sample_videos()[2:3])


@pytest.mark.slow
def test_clips_of_every_way(bench, small, tmp_path):
    videos, sizes = small
    errors = bench.check(videos, range(2), [], tmp_path)
    assert all(errors[way] == (0, 0.0) for way in bench.EXACT) and errors[bench.KEPT][1] < 8
    full, short, kept, better = sizes
    assert full.bytes < short.bytes
    assert 30 < kept.psnr < better.psnr < 45 and kept.bytes < better.bytes
    assert kept.bytes < 0.4 * full.bytes and full.pictures == 120 and kept.pictures == 30
    assert 0 < full.table_bytes / full.pictures < 5
    runs = bench.time_ways(videos, range(1), [], 2)
    assert set(runs) == set(bench.OURS) and all(len(times) == 2 for times in runs.values())
    assert min(min(times) for times in runs.values()) > 0
    assert bench.time_parts("shards", [videos[0].stored], range(1)).resize > 0


def test_a_way_that_differs_is_not_timed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench, "make_clip", lambda way, *_: np.full((1, 1, 1, 3), 7 if way == "shards" else 8, np.uint8)
    )
    with pytest.raises(RuntimeError, match="clips of shards are not those of whole frames"):
        bench.check([None], range(1), [], tmp_path)


@pytest.mark.slow
def test_rivals(bench, small, tmp_path):
    """Those that are here make the same frames; others are left out with the reason."""
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps(bench.jobs_of(small[0], range(2))))
    rivals, absent = bench.start_rivals({"spdl": "/no/python", "decord2": sys.executable}, jobs)
    try:
        assert {rival.name for rival in rivals} | set(absent) == set(bench.RIVALS)
        assert absent["spdl"] == "/no/python: No such file or directory"
        if "decord2" in absent:
            assert absent["decord2"].startswith("PackageNotFoundError")
        for rival in rivals:
            assert rival.version and rival.ask("round")["seconds"] > 0
        errors = bench.check(small[0], range(2), rivals, tmp_path)
        assert all(errors[rival.name][0] <= 2 for rival in rivals if rival.name == "torchcodec")
    finally:
        for rival in rivals:
            rival.close()


def test_rival_arguments(bench):
    assert bench.read_rivals(["spdl=/a/b"]) == {"spdl": "/a/b"}
    for wrong in ("spdl", "spdl=", "other=/a"):
        with pytest.raises(InputError, match="NAME=PYTHON"):
            bench.read_rivals([wrong])


@pytest.mark.slow
def test_codecs(benches, tmp_path, monkeypatch):
    """The first way, one that has no encoder, and MJPEG."""
    bench = benches("packed_codecs")
    broken = bench.WAYS[0]._replace(label="missing", encoder="no_such_encoder")
    monkeypatch.setattr(bench, "WAYS", (bench.WAYS[0], broken, bench.mjpeg(6)))
    found = bench.encode_all(tmp_path, sample_videos()[2:3])
    first, missing, pictures = (record for record, _ in found)
    assert missing.wrong and missing.bytes is None and found[1][1] == []
    assert 30 < first.psnr < 45 and pictures.bytes > 3 * first.bytes > 0
    clips = [bench.make_clip(files[0], 1) for _, files in found if files]
    assert clips[0].shape == (16, 224, 224, 3)
    assert abs(clips[0].astype(int) - clips[1]).mean() < 5


@pytest.mark.slow
def test_commands_write_results(benches, tmp_path):
    from harness.results import read_result

    for name, arguments in (
        ("packed", ["--rounds", "1"]),
        ("packed_codecs", ["--rounds", "1", "--clips", "1"]),
    ):
        path = tmp_path / f"{name}.json"
        assert benches(name).main(["--quick", "--json", str(path), *arguments]) == 0
        assert read_result(Path(path), name).tables()[0].rows
