"""Merging label sets: names, duplicates across sources and splits, and the maps back."""

import json
import re

import pytest

from vmae.cli import main
from vmae.data.labels import LabelledList, read_class_names, read_label_map, read_labelled_list
from vmae.data.manifest import VideoEntry
from vmae.data.merge_labels import LabelSource, merge_sources, normalise_name, video_id
from vmae.errors import InputError


def videos(*lines: str, classes: int) -> LabelledList:
    paths, labels = zip(*(line.rsplit(" ", 1) for line in lines), strict=True)
    return LabelledList(
        [VideoEntry(path) for path in paths], [(int(label),) for label in labels], classes, False
    )


def two_sources() -> list[LabelSource]:
    small = LabelSource(
        name="small",
        classes=["Eating cake", "running", "sleeping"],
        train=videos("s/one.mp4 0", "s/two.mp4 1", "s/three.mp4 2", classes=3),
        val=videos("s/val.mp4 1", classes=3),
    )
    large = LabelSource(
        name="large",
        classes=["jumping", "eating_cake", "dozing", "running (fast)"],
        train=videos("l/four.mp4 0", "l/one.webm 1", "l/val.mkv 3", "l/two.mp4 2", "l/held.mp4 0", classes=4),
        val=videos("l/held.mp4 0", "l/three.mp4 2", classes=4),
    )
    return [small, large]


def test_names_duplicates_and_splits():
    merged = merge_sources(two_sources(), {"Dozing": "sleeping"})
    assert merged.classes == ["Eating cake", "running", "sleeping", "jumping", "running (fast)"]
    assert merged.maps == {"small": [0, 1, 2], "large": [3, 0, 2, 4]}
    assert [(entry.path, labels) for entry, labels in merged.val] == [
        ("s/val.mp4", (1,)),
        ("l/held.mp4", (3,)),
        ("l/three.mp4", (2,)),
    ]
    # `three` is validated on by the other source, `one` and `two` come from the first, `val` and `held` are
    # validated on
    assert [(entry.path, labels) for entry, labels in merged.train] == [
        ("s/one.mp4", (0,)),
        ("s/two.mp4", (1,)),
        ("l/four.mp4", (3,)),
    ]
    assert merged.report["videos"]["train, large"] == {
        "listed": 5,
        "kept": 1,
        "duplicates": 2,
        "in_validation": 2,
    }
    assert merged.report["videos"]["train, small"] == {
        "listed": 3,
        "kept": 2,
        "duplicates": 0,
        "in_validation": 1,
    }
    assert merged.report["conflicts"] == 2  # two: running or dozing; val: running or running (fast)
    assert merged.report["first_conflicts"][1] == "two: running; large says sleeping"
    assert merged.report["merged_classes"] == {
        "Eating cake": ["small: Eating cake", "large: eating_cake"],
        "sleeping": ["small: sleeping", "large: dozing"],
    }


def test_names_may_be_merged_into_a_later_source():
    merged = merge_sources(two_sources(), {"sleeping": "dozing", "running": "running fast"})
    assert merged.classes == ["Eating cake", "running (fast)", "dozing", "jumping"]
    assert merged.maps == {"small": [0, 1, 2], "large": [3, 0, 2, 1]}


def test_normalised_names():
    for name in (" Playing_the  “Piano”, ＦＡＳＴ ", "playing-the piano (fast)"):
        assert normalise_name(name) == "playing the piano fast"


def test_video_ids():
    assert video_id("x/abc_def-123_000001_000011.mp4") == "abc_def-123_000001_000011"
    assert video_id("x/abc_def-123_000001_000011.mp4", "^.{11}") == "abc_def-123"
    assert video_id("frames/some.folder") == "some.folder"
    with pytest.raises(InputError, match="finds nothing in 'short'"):
        video_id("short.mp4", "^(.{11})")


@pytest.mark.parametrize(
    "same, message",
    [
        (
            {"Dozing": "sleeping", "dozing": "jumping"},
            "merges 'dozing' into two classes: 'sleeping', 'jumping'",
        ),
        ({"dozing": "sleeping", "sleeping": "dozing"}, "in a circle"),
        ({"running": "sleeping"}, "source 'small': 'running' and 'sleeping' would become one class"),
    ],
)
def test_bad_same_names(same, message):
    with pytest.raises(InputError, match=message):
        merge_sources(two_sources(), same)


def test_entries_that_merge_nothing_are_told():
    """As the published file of K710 has them: a name no source has, and two spellings of one name."""
    same = {"napping": "sleeping", "eating cake": "Eating_Cake", "Dozing": "sleeping", "walking": "strolling"}
    merged = merge_sources(two_sources(), same)
    assert merged.classes == ["Eating cake", "running", "sleeping", "jumping", "running (fast)"]
    assert merged.report["same"] == {
        "entries": 4,
        "spelling_only": ["eating cake: Eating_Cake"],
        "unknown_names": ["napping", "strolling", "walking"],
    }


@pytest.mark.parametrize(
    "same",
    [
        {"dozing": "sleeping", "running (fast)": "Eating cake"},
        [("sleeping", ["dozing"]), ("Eating cake", ["running fast", "eating_cake"])],
        [("sleeping", ["dozing"]), ("dozing", ["sleeping"]), ("running fast", ["Eating cake"])],
        # A name that no source has stands for the class, or between two names of one.
        [("to sleep", ["dozing", "sleeping"]), ("Eating cake", ["running fast"])],
        {"dozing": "to sleep", "to sleep": "sleeping", "running (fast)": "Eating cake"},
    ],
)
def test_forms_of_same_names(same):
    small, large = two_sources()
    large.classes[1] = "cooking"  # else two classes of it become one
    merged = merge_sources([small, large], same)
    assert merged.maps == {"small": [0, 1, 2], "large": [3, 4, 2, 0]}


def test_the_given_order_numbers_the_classes():
    order = ["Jumping", "running_fast", "dozing", "EATING CAKE", "running"]
    merged = merge_sources(two_sources(), {"Dozing": "sleeping"}, order=order)
    assert merged.classes == order  # spelt as there
    assert merged.maps == {"small": [3, 4, 2], "large": [0, 3, 2, 1]}
    assert [labels for _, labels in merged.train] == [(3,), (4,), (0,)]
    assert list(merged.report["merged_classes"]) == ["dozing", "EATING CAKE"]
    assert merged.report["order"] == "given"


@pytest.mark.parametrize(
    "order, message",
    [
        (
            ["Eating cake", "running", "sleeping", "jumping", "flying", "swimming"],
            "2 names that are no class of any source ('flying', 'swimming'); not 1 of the 5 merged classes "
            "('running (fast)')",
        ),
        (
            ["Eating cake", "running", "sleeping", "dozing", "jumping", "running fast"],
            "1 classes twice ('sleeping and dozing')",
        ),
        (
            ["running"],
            "not 4 of the 5 merged classes ('Eating cake', 'sleeping', 'jumping', 'running (fast)')",
        ),
        ([f"name {i}" for i in range(7)], "7 names .*'name 4' and 2 more"),
    ],
)
def test_an_order_of_other_classes_is_refused_by_name(order, message):
    with pytest.raises(InputError, match=message if ".*" in message else re.escape(message)):
        merge_sources(two_sources(), {"Dozing": "sleeping"}, order=order)


def kinetics_like():
    """Sources of 400, 600 and 700 classes with 724 names, of which 14 are second names of others; the file of
    these, with an entry that differs in case only and one that names no class; and an order of the 710."""
    plain = [f"action {i:03}" for i in range(710)]
    second = {f"also {name}": name for name in plain[:14]}
    classes = {
        "k400": plain[:400],
        "k600": [*second, *plain[14:600]],  # of the same actions, 14 under another name
        "k700": [*plain[10:14], *plain[14:710]],
    }
    assert len({name for names in classes.values() for name in names}) == 724
    sources = [
        LabelSource(name=name, classes=names, train=videos(f"{name}/x.mp4 0", classes=len(names)))
        for name, names in classes.items()
    ]
    extra = {"Action 020": "action 020", "no such action": "action 021"}
    order = [(f"also {name}" if i % 2 and i < 14 else name).upper() for i, name in enumerate(plain)][::-1]
    return sources, {**second, **extra}, order


def test_724_names_become_710_classes_with_the_official_numbers():
    sources, same, order = kinetics_like()
    merged = merge_sources(sources, same, order=order)
    assert len(merge_sources(sources).classes) == 724 and merged.classes == order
    assert [len(own) for own in merged.maps.values()] == [400, 600, 700]
    key = {normalise_name(name): normalise_name(target) for name, target in same.items() if "also" in name}
    for source in sources:
        for name, number in zip(source.classes, merged.maps[source.name]):
            ours, official = normalise_name(name), normalise_name(order[number])
            assert key.get(ours, ours) == key.get(official, official)
    assert merged.report["same"]["spelling_only"] == ["Action 020: action 020"]
    assert merged.report["same"]["unknown_names"] == ["no such action"]
    # The forms that such a file can have say the same.
    for form in ([(target, [name]) for name, target in same.items()], [(n, [t]) for n, t in same.items()]):
        assert merge_sources(sources, form, order=order).maps == merged.maps


def test_nothing_left_and_names_of_sources():
    small, large = two_sources()
    with pytest.raises(InputError, match="each its own"):
        merge_sources([small, small])
    held = LabelSource(
        name="held", classes=large.classes, train=videos("l/held.mp4 0", classes=4), val=large.val
    )
    with pytest.raises(InputError, match="no video is left"):
        merge_sources([held])


@pytest.fixture
def folder(tmp_path):
    for name in ("one.mp4", "two.mp4", "val.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "names.txt").write_text("walk\nrun\n")
    (tmp_path / "other.txt").write_text("strolling\nRun\n")
    (tmp_path / "train.txt").write_text("one.mp4 0\ntwo.mp4 1\n")
    (tmp_path / "val.txt").write_text("val.mp4 1\n")
    (tmp_path / "same.json").write_text('{"strolling": "walk"}')
    return tmp_path


def test_command_writes_what_the_readers_read(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    first, second = (
        ["--source", "k", "names.txt", "train.txt", "val.txt"],
        ["--source", "j", "other.txt", "val.txt", "-"],
    )
    assert main(["merge-labels", "out", *first, *second, "--same", "same.json"]) == 0
    assert "4 classes of 2 sources make 2" in capsys.readouterr().out
    assert read_class_names("out/classes.txt") == ["walk", "run"]
    assert read_label_map("out/label_2toj.json", source_classes=2, num_classes=2) == [0, 1]
    train = read_labelled_list("out/train.txt", num_classes=2)
    assert train.labels == [(0,), (1,)] and train.entries[0].path == str(folder / "one.mp4")
    assert read_labelled_list("out/val.txt").labels == [(1,)]
    assert (
        json.loads((folder / "out" / "report.json").read_text())["videos"]["train, j"]["in_validation"] == 1
    )


@pytest.mark.parametrize(
    "same",
    [
        {"strolling": "walk", "Run": "run", "flying": "walk"},
        {"walk": ["strolling", "flying"], "run": ["Run"]},
        {"walk": {"j": "strolling", "l": "flying"}, "run": "Run"},
        [["walk", "strolling"], ["run", "Run"], ["walk", "flying"]],
    ],
)
def test_command_takes_every_form_and_the_order(folder, monkeypatch, capsys, same):
    monkeypatch.chdir(folder)
    (folder / "same.json").write_text(json.dumps(same))
    (folder / "order.txt").write_text("run\nStrolling\n")
    sources = [
        "--source",
        "k",
        "names.txt",
        "train.txt",
        "val.txt",
        "--source",
        "j",
        "other.txt",
        "val.txt",
        "-",
    ]
    assert main(["merge-labels", "out", *sources, "--same", "same.json", "--order", "order.txt"]) == 0
    said = capsys.readouterr().out
    assert "4 classes of 2 sources make 2, numbered as in order.txt" in said
    assert "warning: same.json: 1 entries differ only in spelling" in said
    assert "warning: same.json: 1 names are no class of any source: 'flying'" in said
    assert read_class_names("out/classes.txt") == ["run", "Strolling"]
    assert read_label_map("out/label_2tok.json") == [1, 0] == read_label_map("out/label_2toj.json")
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["same"]["unknown_names"] == ["flying"] and report["order"] == "given"
    (folder / "order.txt").write_text("run\nwalk\nfly\n")
    assert main(["merge-labels", "other", *sources, "--same", "same.json", "--order", "order.txt"]) == 2
    said = capsys.readouterr().err
    assert "order.txt: the order of classes has 1 names that are no class of any source ('fly')" in said
    assert said.count("\n") == 1 and not (folder / "other").exists()


@pytest.mark.parametrize(
    "content", ['"x"', "[]", "[3]", '{"a": 3}', '{"a": []}', '[["a", 3]]', '{"a": {"b": 1}}']
)
def test_other_forms_of_same_names_are_refused(folder, monkeypatch, capsys, content):
    monkeypatch.chdir(folder)
    (folder / "same.json").write_text(content)
    sources = ["--source", "k", "names.txt", "train.txt", "val.txt"]
    assert main(["merge-labels", "out", *sources, "--same", "same.json"]) == 2
    said = capsys.readouterr().err
    assert "'same.json' must be {name: name it is merged into}" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (["--source", "j", "missing.txt", "train.txt", "-"], "'missing.txt' does not exist"),
        (["--source", "j", "one_class.txt", "train.txt", "-"], "label 1 is out of range"),
        (["--source", "j", "other.txt", "-", "-"], "no list to train on"),
        (["--data-root", "x", "."], "no such source"),
        (["--video-id", "("], "no regular expression"),
        (["--same", "names.txt"], "is no JSON"),
    ],
)
def test_command_explains(folder, monkeypatch, capsys, change, message):
    monkeypatch.chdir(folder)
    (folder / "one_class.txt").write_text("walk\n")
    assert main(["merge-labels", "out", "--source", "k", "names.txt", "train.txt", "val.txt", *change]) == 2
    assert message in capsys.readouterr().err and not (folder / "out").exists()
