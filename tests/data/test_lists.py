"""`vmae lists import`: outputs of NeMo Curator and cosmos-curate, as published, become a list in a stable
order, and what was left out is told."""

import json
import os
import sys
import tracemalloc
import uuid

import pytest

from vmae.cli import main
from vmae.data import curated
from vmae.data.curated import Names, read_clips
from vmae.data.manifest import read_list
from vmae.synthetic.samples import sample_videos

IDS = [str(uuid.UUID(int=number * 2**100)) for number in (5, 1, 3, 2)]


def meta(clip_id, root="/config/out", *, filtered=False, **more):
    """A record as both pipelines write it."""
    folder = "filtered_clips" if filtered else "clips"
    return {
        "span_uuid": clip_id,
        "source_video": "/config/in/a video.mp4",
        "duration_span": [10.0, 15.5],
        "width_source": 1920,
        "height_source": 1080,
        "framerate_source": 30.0,
        "clip_location": f"{root}/{folder}/{clip_id}.mp4",
        "width": 1280,
        "height": 720,
        "framerate": 30.0,
        "num_frames": 165,
        "video_codec": "h264",
        "num_bytes": 12345,
        "motion_score": {"global_mean": 0.5, "per_patch_min_256": 0.1},
        "aesthetic_score": 4.5,
        "windows": [],
        "valid": False,  # as without captions
    } | more


@pytest.fixture
def output(tmp_path):
    """The output folder of a pipeline with four clips, and one that it filtered out."""
    folder = tmp_path / "out put"
    for name in ("clips", "filtered_clips", "metas/v0", "processed_videos", "ce1_embd_parquet"):
        (folder / name).mkdir(parents=True)
    for clip_id in IDS:
        (folder / "clips" / f"{clip_id}.mp4").touch()
        (folder / "metas/v0" / f"{clip_id}.json").write_text(json.dumps(meta(clip_id)))
    gone = str(uuid.UUID(int=7))
    (folder / "filtered_clips" / f"{gone}.mp4").touch()
    (folder / "metas/v0" / f"{gone}.json").write_text(json.dumps(meta(gone, filtered=True)))
    return folder


def imported(source, *flags):
    """(exit code, paths in the list or None)"""
    target = source.parent / "list.txt"
    code = main(["lists", "import", str(source), str(target), *flags])
    return code, [entry.path for entry in read_list(target)] if target.exists() else None


def change(output, clip_id, **more):
    (output / "metas/v0" / f"{clip_id}.json").write_text(json.dumps(meta(clip_id) | more))


def test_the_output_of_a_pipeline_in_order_of_names(output, capsys):
    code, paths = imported(output)
    assert code == 0 and paths == [str(output / "clips" / f"{clip_id}.mp4") for clip_id in sorted(IDS)]
    assert (output.parent / "list.txt").read_text().splitlines()[
        0
    ] == f"out put/clips/{sorted(IDS)[0]}.mp4 0 -1"
    said = capsys.readouterr().out
    assert said.startswith(f"4 clips: {output.parent / 'list.txt'}\n")
    assert "left out: 1, taken out by the pipeline's own filters (filtered_clips); the first: " in said
    before = (output.parent / "list.txt").read_bytes()
    assert imported(output)[0] == 0 and (output.parent / "list.txt").read_bytes() == before


def test_what_is_missing_or_damaged_is_counted(output, capsys):
    (output / "clips" / f"{IDS[0]}.mp4").unlink()
    (output / "metas/v0" / f"{IDS[1]}.json").write_text('{"span_uuid": "cut o')
    (output / "metas/v0" / f"{IDS[2]}.json").write_text("[1, 2]")
    code, paths = imported(output)
    assert code == 0 and [os.path.basename(path) for path in paths] == [f"{IDS[3]}.mp4"]
    said = capsys.readouterr().out
    place = f"{output}/metas/v0/{IDS[0]}.json"
    assert f"left out: 1, its video is not there (--videos tells where); the first: {place}" in said
    assert "left out: 2, a record that is damaged or cannot be read" in said


@pytest.mark.parametrize(
    ("flags", "change_to", "reason"),
    [
        ("--min-seconds 5.4", {"duration_span": [0, 5.3]}, "below --min-seconds 5.4"),
        ("--max-seconds 5.6", {"duration_span": [1, 6.7]}, "above --max-seconds 5.6"),
        ("--min-side 720", {"width": 480, "height": 854}, "below --min-side 720"),
        ("--min-aesthetic 4.5", {"aesthetic_score": 4.4}, "below --min-aesthetic 4.5"),
        ("--min-motion 0.5", {"motion_score": {"global_mean": 0.4}}, "below --min-motion 0.5"),
        ("--min-aesthetic 0", {"aesthetic_score": None}, "a record without an aesthetic score"),
        ("--min-motion 0", {"motion_score": float("nan")}, "a record without a motion score"),
        ("--min-seconds 1", {"duration_span": None, "num_frames": None}, "a record without its duration"),
    ],
)
def test_each_filter(output, capsys, flags, change_to, reason):
    change(output, IDS[0], **change_to)
    code, paths = imported(output, *flags.split())
    assert code == 0 and len(paths) == 3 and not any(IDS[0] in path for path in paths)
    assert f"left out: 1, {reason}" in capsys.readouterr().out


def test_records_by_line_and_clips_elsewhere(output, tmp_path):
    """cosmos-curate with --upload-clip-info-in-chunks, on an object store that is mounted somewhere."""
    records = tmp_path / "records"
    (records / "metas_jsonl/v0").mkdir(parents=True)
    for number, clip_id in enumerate(IDS):
        line = json.dumps(meta(clip_id, root="s3://bucket/out")) + "\n"
        with open(records / f"metas_jsonl/v0/video_{number % 2}.jsonl", "a") as file:
            file.write(line)
    code, paths = imported(records, "--videos", str(output))
    assert code == 0 and [os.path.basename(path)[:-4] for path in paths] == [IDS[0], IDS[2], IDS[1], IDS[3]]
    target = tmp_path / "none.txt"
    assert main(["lists", "import", str(records), str(target)]) == 2 and not target.exists()


def test_clips_below_folders_and_at_their_own_place(output, tmp_path):
    inside = output / "clips" / IDS[0][:2] / f"{IDS[0]}.mp4"
    inside.parent.mkdir()
    (output / "clips" / f"{IDS[0]}.mp4").rename(inside)
    change(output, IDS[0], clip_location=f"/config/clips/out/clips/{IDS[0][:2]}/{IDS[0]}.mp4")
    away = tmp_path / "away.mp4"
    (output / "clips" / f"{IDS[1]}.mp4").rename(away)
    change(output, IDS[1], clip_location=str(away))
    _, paths = imported(output)
    assert {str(inside), str(away)} < set(paths) and len(paths) == 4


def test_the_newest_version_of_the_records(output):
    (output / "metas/v1").mkdir()
    (output / "metas/v1" / f"{IDS[3]}.json").write_text(json.dumps(meta(IDS[3])))
    assert len(imported(output)[1]) == 1


def test_duplicates_are_left_out(output, tmp_path, capsys):
    table = tmp_path / "ids.txt"
    table.write_text(f"{IDS[0]}\n\n{IDS[2]}\nanother\n")
    assert len(imported(output, "--without", str(table))[1]) == 2
    assert "left out: 2, a duplicate (--without)" in capsys.readouterr().out
    folder = tmp_path / "dedup" / "extraction" / "semdedup_pruning_tables"
    folder.mkdir(parents=True)
    scores = [(IDS[0], 0.995), (IDS[1], 0.9), (IDS[2], 0.99)]
    rows = [{"id": clip_id, "cosine_sim_score": score} for clip_id, score in scores]
    (folder / "cluster_0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(imported(output, "--without", str(tmp_path / "dedup"))[1]) == 2
    assert len(imported(output, "--without", str(tmp_path / "dedup"), "--similarity", "0.9")[1]) == 1


def test_names_are_a_set():
    names = Names(["b", "a", "b", "ü", ""])
    assert len(names) == 4 and all(name in names for name in ("a", "b", "ü", ""))
    assert "c" not in names and "a" not in Names([])


def test_parquet(output, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": clip_id, "file": f"clips/{clip_id}.mp4", "duration": 3.0} for clip_id in IDS]
    (output.parent / "tables").mkdir()
    for number in (1, 0):
        table = pyarrow.Table.from_pylist(rows[2 * number : 2 * number + 2])
        parquet.write_table(table, output.parent / "tables" / f"part.{number}.parquet")
    _, paths = imported(output.parent / "tables", "--videos", str(output), "--min-seconds", "3")
    assert [os.path.basename(path)[:-4] for path in paths] == IDS
    duplicates = output.parent / "dedup" / "duplicates"  # of NeMo Curator
    duplicates.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"id": IDS[:3]}), duplicates / "0f.parquet")
    assert len(imported(output, "--without", str(output.parent / "dedup"))[1]) == 1
    (output.parent / "tables" / "part.1.parquet").write_bytes(b"PAR1 cut off")
    target = output.parent / "other.txt"
    assert main(["lists", "import", str(output.parent / "tables"), str(target)]) == 2 and not target.exists()


def test_parquet_without_pyarrow(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "clips.parquet").write_bytes(b"PAR1")
    assert main(["lists", "import", str(tmp_path / "clips.parquet"), str(tmp_path / "list.txt")]) == 2
    assert "Parquet needs the package pyarrow: `pip install pyarrow`" in capsys.readouterr().err


def test_a_manifest_with_keys_of_its_own(tmp_path, capsys):
    (tmp_path / "a b.mp4").touch()
    (tmp_path / "ü.mp4").touch()
    lines = [{"media": {"where": "ü.mp4"}, "fps": 10, "num_frames": 20}, {"media": {"where": "a b.mp4"}}]
    lines += [{"media": {"where": "https://example.org/c.mp4"}}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    code, paths = imported(manifest, "--path-key", "media.where")
    assert code == 0 and [os.path.basename(path) for path in paths] == ["ü.mp4", "a b.mp4"]
    said = capsys.readouterr().out
    assert "an address: download it first" in said and f"the first: {manifest}, line 4" in said
    assert main(["lists", "import", str(manifest), str(tmp_path / "x")]) == 2
    assert "line 1: no path under clip_location or path" in capsys.readouterr().err
    assert imported(manifest, "--path-key", "media.where", "--min-seconds", "2")[1] == [
        str(tmp_path / "ü.mp4")
    ]


def test_a_folder_of_videos_with_records_beside(tmp_path):
    folder = tmp_path / "shard"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("000.mp4", "below/001.mp4", "#2.mp4")):
        (folder / name).touch()
        (folder / name).with_suffix(".json").write_text(json.dumps({"duration": number}))
    (folder / "no record.mp4").touch()
    assert len(imported(folder)[1]) == 4
    assert imported(folder, "--min-seconds", "1")[1] == [
        str(folder / "#2.mp4"),
        str(folder / "below/001.mp4"),
    ]
    target = folder / "list.txt"  # a name that begins with # is no comment
    assert main(["lists", "import", str(folder), str(target)]) == 0 and len(read_list(target)) == 4


def test_a_list_that_is_imported_can_be_read_and_checked(tmp_path):
    source = tmp_path / "m.jsonl"
    source.write_text("".join(json.dumps({"path": str(path)}) + "\n" for path in sample_videos()))
    assert imported(source)[1] == [str(path) for path in sample_videos()]


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("nowhere", "", "does not exist; `lists import` reads an output folder of NeMo Curator"),
        ("s3://bucket/out", "", "is an address; copy the records"),
        ("clips.lance", "", "is a Lance data set"),
        ("a.tar", "", "is not read here: `vmae index` makes an index of tar files"),
        ("a.csv", "", "is not read here; `lists import` reads"),
        ("empty", "", "no video"),
        ("bare", "", "holds no version (v0) of the records"),
        ("out put", "--min-seconds 9", "no clip was taken, so {list} is not written; left out: 4, below"),
        ("out put", "--min-seconds 3 --max-seconds 2", "--min-seconds 3 is above --max-seconds 2"),
        ("out put", "--without nowhere", "--without nowhere: does not exist"),
        ("out put", "--without {tmp}/empty", "no .parquet and no .jsonl file"),
        ("out put", "--min-side 0", "argument --min-side: must be a whole number from 1"),
    ],
)
def test_bad_input_is_one_line(output, tmp_path, capsys, source, flags, message):
    (tmp_path / "clips.lance").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "metas").mkdir(parents=True)
    for name in ("a.tar", "a.csv"):
        (tmp_path / name).touch()
    source = source if "://" in source else str(tmp_path / source)
    target = tmp_path / "list.txt"
    flags = flags.format(tmp=tmp_path).split()
    assert main(["lists", "import", source, str(target), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(list=target) in line and not target.exists()


def test_a_list_that_cannot_be_written(output, tmp_path, capsys):
    for target, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "list", "does not exist")):
        assert main(["lists", "import", str(output), str(target)]) == 2
        assert message in capsys.readouterr().err


def test_memory_does_not_grow_with_the_records(tmp_path, monkeypatch):
    """Names are kept, records are not: 20 times as many take little more memory."""
    monkeypatch.setattr(curated, "_AT_ONCE", 32)
    folder = tmp_path / "metas" / "v0"
    folder.mkdir(parents=True)
    text = json.dumps(meta("x", note="y" * 20_000))
    for number in range(600):
        (folder / f"{number:04}.json").write_text(text)
    tracemalloc.start()
    try:
        assert sum(clip.seconds == 5.5 for clip in read_clips(tmp_path)) == 600
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6 < 600 * len(text) / 5
