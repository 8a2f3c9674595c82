"""JSON that a kill, a disk or another hand has spoilt: skipped and counted, or named in a line; it blocks no
run."""

import json

import pytest

from vmae import InputError
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import read_manifest
from vmae.checkpoint.saver import Saver
from vmae.cli import main
from vmae.data.quarantine import Failure, Quarantine
from vmae.files.json_files import read_json, read_json_lines
from vmae.tools.curves import read_curve
from vmae.train.metrics import read_log, read_starts, write_run_file

SPOILT = {
    "bytes": b"\xff\xfe{",
    "number": b"17",
    "list": b"[1, 2]",
    "other keys": b'{"a": 1}',
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "half": b'{"step": 3, "lo',
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "kind": b'{"step": "3", "path": 3}',
    "truth": b'{"step": true, "path": null}',
    "zeros": b"\0" * 100,
    "deep record": b'{"step": 3, "path": "p", "x": '
    + b"[" * 300
    + b"]" * 300
    + b"}",  # reads, and could not be written
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_lines_are_skipped_and_counted(tmp_path, name):
    path = tmp_path / "log.jsonl"
    good = [
        json.dumps({"step": step, "path": f"\u2028 {step}"}, ensure_ascii=False).encode() for step in range(3)
    ]
    path.write_bytes(b"\n".join([good[0], SPOILT[name], b"  ", good[1], SPOILT[name], good[2]]))
    found = read_json_lines(path, step=int, path=str)
    assert [record["step"] for record in found.records] == [0, 1, 2] and found.numbers == [1, 4, 6]
    assert found.skipped == [(2, SPOILT[name]), (5, SPOILT[name])]
    assert found.note(path) == f"note: {path}: 2 lines skipped, cut short or not ours (line 2, 5)"
    assert len(read_log(path, step=int)) == 3


def test_no_file_and_no_lines_are_nothing_to_skip(tmp_path):
    (tmp_path / "empty").touch()
    for name in ("absent", "empty"):
        found = read_json_lines(tmp_path / name)
        assert found.records == [] and found.note("x") is None


@pytest.mark.parametrize(
    "name", ["bytes", "deep list", "deep object", "half", "zeros", "digits", "deep record"]
)
def test_a_spoilt_file_is_named_in_a_line(tmp_path, name):
    (tmp_path / "x.json").write_bytes(SPOILT[name])
    with pytest.raises(InputError, match="the thing .*x.json is no JSON: ") as caught:
        read_json(tmp_path / "x.json", "the thing")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="absent cannot be read: No such file"):
        read_json(tmp_path / "absent")


def write(path, *lines: bytes) -> None:
    path.write_bytes(path.read_bytes() + b"".join(line + b"\n" for line in lines))


def test_a_run_goes_on_over_spoilt_logs_and_loses_nothing(pretrain, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(run, "--steps", "2") == 0
    write(run / "log.jsonl", *SPOILT.values())
    (run / "quarantine.jsonl").write_bytes(b"")
    write(run / "quarantine.jsonl", *SPOILT.values(), b'{"path": "bad.mp4", "error": "e"}')
    (run / "run.json").write_bytes(b"{")
    kept = (run / "quarantine.jsonl").read_bytes()
    capsys.readouterr()
    assert pretrain(run, "--steps", "4") == 0
    shown = capsys.readouterr()
    note = f"note: {run}/log.jsonl: {len(SPOILT)} lines skipped, cut short or not ours (line 3, 4, 5, ...)"
    assert f"{note}; they are in {run}" in shown.err
    assert f"note: {run}/quarantine.jsonl: {len(SPOILT)} lines skipped" in shown.out
    assert (
        f"note: run file {run}/run.json is no JSON: " in shown.out
        and "kept as run.json.unreadable-1" in shown.out
    )
    assert [record["step"] for record in read_log(run / "log.jsonl")] == [1, 2, 3, 4]
    assert (run / "log.skipped").read_bytes() == b"".join(line + b"\n" for line in SPOILT.values())
    assert (run / "quarantine.jsonl").read_bytes() == kept
    write(run / "log.jsonl", b"again")
    assert pretrain(run, "--steps", "5") == 0
    assert (run / "log.skipped").read_bytes().endswith(SPOILT["deep record"] + b"\nagain\n")


@pytest.mark.parametrize("text", [b"{", b"\xff", b"17", b'{"starts": 3}', b'{"starts": [3]}', b"[" * 100_000])
def test_a_spoilt_run_file_is_kept_beside_a_new_one(tmp_path, text):
    for number in (1, 2):
        (tmp_path / "run.json").write_bytes(text)
        note = write_run_file(tmp_path, {"start_step": number})
        assert note.endswith(f"; kept as run.json.unreadable-{number}, a new one begins")
        assert (tmp_path / f"run.json.unreadable-{number}").read_bytes() == text
        assert read_starts(tmp_path) == [{"start_step": number}]


@pytest.mark.parametrize(
    "name", ["bytes", "number", "list", "deep list", "deep object", "half", "zeros", "deep record"]
)
def test_a_spoilt_manifest_is_damage_by_name(tmp_path, name):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        Saver(folder).save(step, {"model": {}, "optimizer": {}}, {"config": {}})
    (folder.latest() / "manifest.json").write_bytes(SPOILT[name])
    with pytest.raises(
        InputError, match=r"checkpoint-00000002 is damaged: manifest.json cannot be read \(.{5,80}\)$"
    ):
        read_manifest(folder.latest())
    good, problems = folder.last_good()
    assert good.name == "checkpoint-00000001" and "checkpoint-00000002" in problems[0]


def test_curves_draw_what_is_whole_and_say_what_is_not(tmp_path, capsys):
    line = {"epoch": 1, "loss_mean": 0.5, "lr": 1e-3, "grad_norm": 1, "clips_per_s": 3}
    good = [json.dumps({"step": step, **line}).encode() + b"\n" for step in (1, 2)]
    spoilt = b"".join(text + b"\n" for text in SPOILT.values())
    (tmp_path / "log.jsonl").write_bytes(good[0] + spoilt + good[1])
    (tmp_path / "run.json").write_bytes(b'{"starts":' * 100_000)
    assert main(["curves", str(tmp_path), "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["curves"][0]["steps"] == 2
    lines = f"{len(SPOILT)} lines skipped, cut short or not ours (line 2, 3, 4, ...)"
    assert shown.err == f"note: {tmp_path}/log.jsonl: {lines}\n"
    (tmp_path / "kept.jsonl").write_bytes(b'{"about": {"note": "x"}}\n' + good[0])
    assert read_curve(tmp_path / "kept.jsonl").note is None  # its first line is no stray one


def test_names_that_are_no_utf8_are_written_down_once(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    failure = Failure("/data/\udcff\u2028.mp4", "cut", "pyav")
    for _ in range(2):
        Quarantine(path, 1.0).add(0, [failure])
    assert [record["path"] for record in read_json_lines(path, path=str).records] == [failure.path]


def test_a_quarantine_file_comes_back_into_no_removed_folder(tmp_path):
    (tmp_path / "run").mkdir()
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl", 1.0)
    (tmp_path / "run").rmdir()
    with pytest.raises(InputError, match="cannot write the list of bad videos"):
        quarantine.add(0, [Failure("a", "b")])
    assert not (tmp_path / "run").exists()
