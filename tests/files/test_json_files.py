"""Files that others wrote: whatever is wrong with their JSON is one line."""

import json

import pytest

from vmae import InputError
from vmae.checkpoint.format import read_manifest
from vmae.checkpoint.huggingface import read_pretrained
from vmae.cli import main
from vmae.data.labels import read_class_names, read_label_map
from vmae.data.merge_labels import _read_same
from vmae.evaluate.temporal import read_actionformer
from vmae.evaluate.temporal_detect import read_about
from vmae.files.json_files import MAX_DEPTH, parse_json, read_json_lines
from vmae.tools.curves import read_curve

DEEP = [
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    "[" * 200 + "]" * 200,
    "[" * 100_000,
]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_what_is_read():
    for text in ('{"a": [1, 2.5, null, "x"]}', "3", nested(MAX_DEPTH - 1)):
        assert parse_json(text) == json.loads(text)
    for text in (*DEEP, "{", "9" * 5000 + "}", nested(MAX_DEPTH + 1)):
        with pytest.raises(ValueError):
            parse_json(text)


@pytest.mark.parametrize("text", DEEP)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("classes.json", lambda path: read_class_names(path)),
        ("map.json", lambda path: read_label_map(path)),
        ("same.json", lambda path: _read_same(str(path))),
        ("dataset.json", lambda path: read_actionformer(path)),
        ("features.json", lambda path: read_about(path.parent)),
        ("config.json", lambda path: read_pretrained(path.parent)),
        ("manifest.json", lambda path: read_manifest(path.parent)),
    ],
)
def test_deep_files_are_named_in_a_line(tmp_path, name, read, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["world.json", "actors.json"])
def test_a_damaged_description_of_made_videos_is_named(tmp_path, capsys, name):
    (tmp_path / name).write_text(nested(10_000))
    assert main(["moving-shapes" if name == "world.json" else "moving-actors", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{name} is damaged" in error and error.count("\n") == 1


def test_a_curve_is_drawn_without_a_damaged_description_of_its_run(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss_mean": 0.5}\n')
    (tmp_path / "run.json").write_text(nested(10_000))
    assert read_curve(tmp_path).about == {}


def test_lines_of_a_long_file_are_those_read_one_by_one(tmp_path):
    """Whole lines are parsed together: a bad one among them spoils no other, and moves no number."""
    lines = [json.dumps({"item": number, "text": "},{"}) for number in range(1, 701)]
    lines[300], lines[400], lines[401] = '{"item": 301, "te', "", '{"item": {"a": 1}'
    lines[500], lines[501] = '{"item": 1}, {"item": 2}', DEEP[0]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    found = read_json_lines(tmp_path / "log.jsonl", item=int)
    bad = {301, 401, 402, 501, 502}
    assert found.numbers == [number for number in range(1, 701) if number not in bad]
    assert [record["item"] for record in found.records] == found.numbers
    assert [number for number, _ in found.skipped] == [301, 402, 501, 502]
