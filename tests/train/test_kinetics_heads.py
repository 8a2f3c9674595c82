"""Heads of Kinetics-710 become those of 400, 600 and 700 classes: by the published files, or by class names;
a map that does not fit is refused by name."""

import json
import random

import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import load_weights
from vmae.cli import main
from vmae.data.label_maps import check_mapped_names, map_by_names, same_names

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
# At a rate of 0 the weights stay as they were loaded.
FLAGS = (
    "--model vit_tiny --image-size 32 --num-frames 4 --stride 2 --batch-size 4 --num-sample 1 --workers 0 "
    "--init-frames 4 --init-size 32 --steps 1 --warmup-steps 1 --no-tensorboard --device cpu"
).split()
NAMES = [f"class {number}" for number in range(710)]


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(4)
    model = build_classifier(CONFIG, 710)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def k710(large, tmp_path):
    """A file as the published ones are, with a head of 710 classes, in a folder of its own."""
    path = tmp_path / "weights" / "vit_b_k710.pth"
    path.parent.mkdir()
    torch.save({"module": large.state_dict()}, path)
    return path


@pytest.fixture
def finetune(labelled_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where ./misc is looked for

    def start(*flags, out="run"):
        where = ["--data", str(labelled_world / "train.txt"), "--output", str(tmp_path / out)]
        return main(["finetune", *where, *FLAGS, *map(str, flags)])

    return start


def made_map(count, seed=1):
    return random.Random(seed).sample(range(710), count)


def head_of(folder):
    return load_weights(folder / "weights.pth")["head.weight"]


@pytest.mark.parametrize(
    "classes, place", [(400, "weights"), (700, "misc"), pytest.param(600, "misc", marks=pytest.mark.slow)]
)
def test_a_published_map_is_found_and_named(finetune, k710, large, tmp_path, capsys, classes, place):
    path = tmp_path / place / f"label_710to{classes}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(made_map(classes)))
    assert finetune("--finetune", k710, "--nb_classes", classes) == 0
    assert torch.equal(head_of(tmp_path / "run"), large.head.weight[made_map(classes)])
    shown = path if place == "weights" else path.relative_to(tmp_path)
    said = capsys.readouterr().out
    assert f"head of 710 classes converted to {classes}, label map {shown}" in said


def test_the_data_folder_is_looked_into_and_a_named_map_wins(finetune, k710, large, labelled_world, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text((labelled_world / "train.txt").read_text())
    (data / "label_710to400.json").write_text(json.dumps(made_map(400)))
    assert finetune("--finetune", k710, "--nb_classes", "400", "--data", data) == 0
    assert torch.equal(head_of(tmp_path / "run"), large.head.weight[made_map(400)])
    (tmp_path / "own.json").write_text(json.dumps(made_map(400, seed=2)))
    flags = ["--nb_classes", "400", "--data", data, "--label-map", tmp_path / "own.json"]
    assert finetune("--finetune", k710, *flags, out="own") == 0
    assert torch.equal(head_of(tmp_path / "own"), large.head.weight[made_map(400, seed=2)])


def test_without_a_map_one_line_says_where_it_comes_from(finetune, k710, tmp_path, capsys):
    assert finetune("--finetune", k710, "--nb_classes", "600") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    for part in (
        f"checkpoint {k710} has a head of 710 classes (Kinetics-710), the labels have 600",
        "label_710to600.json",
        "misc/ of the published repository OpenGVLab/VideoMAEv2",
        f"looked for it in {k710.parent}, ",
        ", misc; --label-map FILE.json",
        "--new-head",
    ):
        assert part in error, error
    assert finetune("--finetune", k710, "--nb_classes", "600", "--new-head") == 0
    assert finetune("--finetune", k710, "--nb_classes", "710", out="same") == 0  # its own classes
    assert finetune("--finetune", k710, "--nb_classes", "51", out="other") == 2  # no Kinetics
    assert "head of 710 classes, the labels have 51: --label-map" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2, 3], "misses classes: it maps 3 classes, the target has 400"),
        ([*made_map(399), 710], "names class 710, but the source has 710 classes"),
        ([*range(399), 5], "gives two target classes the same source class"),
        ({"a": 1}, "is no list of whole numbers"),
    ],
)
def test_a_map_that_is_none_is_refused(finetune, k710, tmp_path, capsys, content, message):
    path = k710.parent / "label_710to400.json"
    path.write_text(json.dumps(content))
    assert finetune("--finetune", k710, "--nb_classes", "400") == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and not (tmp_path / "run").exists()


def with_names(tmp_path, model, names, file="own.pth"):
    settings = {"model": CONFIG.to_dict(), "class_names": names}
    export_weights(tmp_path / file, model.state_dict(), config=settings)
    return tmp_path / file


def test_names_on_both_sides_need_no_map(finetune, large, tmp_path, capsys):
    numbers = made_map(400)
    (tmp_path / "k400.txt").write_text("".join(f"{NAMES[number].upper()}\n" for number in numbers))
    flags = ["--init", with_names(tmp_path, large, NAMES), "--classes", tmp_path / "k400.txt"]
    assert finetune(*flags) == 0
    assert torch.equal(head_of(tmp_path / "run"), large.head.weight[numbers])
    assert "head of 710 classes converted to 400, classes found by their names" in capsys.readouterr().out


def test_names_count_for_any_label_set(finetune, tmp_path, capsys):
    """Five merged classes and three of them; three in another order; three others."""
    five = build_classifier(CONFIG, 5)
    torch.nn.init.normal_(five.head.weight)
    merged = with_names(tmp_path, five, ["clap", "red things", "Blue Things", "jump", "green-things"])
    (tmp_path / "three.txt").write_text("red things\ngreen things\nblue things\n")
    assert finetune("--init", merged, "--classes", tmp_path / "three.txt") == 0
    assert torch.equal(head_of(tmp_path / "run"), five.head.weight[[1, 4, 2]])
    (tmp_path / "turned.txt").write_text("blue things\nred things\ngreen things\n")
    assert finetune("--init", tmp_path / "run", "--classes", tmp_path / "turned.txt", out="turned") == 0
    assert torch.equal(head_of(tmp_path / "turned"), five.head.weight[[2, 1, 4]])
    capsys.readouterr()
    (tmp_path / "others.txt").write_text("walk\nred things\nsit\n")
    assert finetune("--init", tmp_path / "run", "--classes", tmp_path / "others.txt", out="others") == 0
    assert "its head is of classes with other names: --new-head starts a fresh one" in capsys.readouterr().out
    assert finetune("--init", merged, "--classes", tmp_path / "others.txt", out="none") == 2
    assert "head of 5 classes, the labels have 3" in capsys.readouterr().err


def test_a_map_that_does_not_fit_the_names_is_refused_by_name(finetune, large, tmp_path, capsys):
    numbers = made_map(400)
    wanted = [NAMES[number] for number in numbers]
    numbers[7], numbers[9] = numbers[9], numbers[7]
    (tmp_path / "map.json").write_text(json.dumps(numbers))
    (tmp_path / "k400.txt").write_text("".join(f"{name}\n" for name in wanted))
    flags = ["--init", with_names(tmp_path, large, NAMES), "--classes", tmp_path / "k400.txt"]
    assert finetune(*flags, "--label-map", tmp_path / "map.json") == 2
    error = capsys.readouterr().err
    assert f"class 7 is {wanted[7]!r}, mapped to {wanted[9]!r} ({numbers[7]}); class 9 is" in error
    assert f"label map '{tmp_path / 'map.json'}'" in error and not (tmp_path / "run").exists()


def test_merged_names_are_one_class(tmp_path):
    """As merge-labels and the published file of same names say it."""
    known, wanted = ["clap", "jump", "ride a bike"], ["applaud", "Jump", "riding a bike"]
    with pytest.raises(
        InputError, match="class 0 is 'applaud', mapped to 'clap' .0.; class 2 is 'riding a bike'"
    ):
        check_mapped_names(tmp_path / "map.json", [0, 1, 2], known, wanted)
    merged = {"clap": ["k400: clap", "k600: Applaud"]}
    (tmp_path / "report.json").write_text(json.dumps({"merged_classes": merged, "conflicts": 0}))
    (tmp_path / "k710_identical_label_merge.json").write_text(json.dumps({"riding a bike": "ride a bike"}))
    check_mapped_names(tmp_path / "map.json", [0, 1, 2], known, wanted)
    with pytest.raises(InputError, match="class 0 is 'applaud', mapped to 'jump'"):
        check_mapped_names(tmp_path / "map.json", [1, 0, 2], known, wanted)
    (tmp_path / "report.json").write_text("[" * 300)
    assert same_names(tmp_path) == {"riding a bike": "ride a bike", "ride a bike": "ride a bike"}
    assert same_names(tmp_path / "gone") == {}


def test_names_that_decide_nothing():
    assert map_by_names(["a", "b", "A "], ["a"]) is None  # two classes of one name
    assert map_by_names(["a", "b"], ["a", "c"]) is None and map_by_names(["a", "b"], ["b", "B"]) is None
    assert map_by_names(["a", "b-c"], ["B  c", "a"]) == [1, 0]


def evaluate(data, checkpoint, output, *flags):
    views = ["--segments", "1", "--crops", "1", "--workers", "0", "--device", "cpu"]
    size = ["--model", "vit_tiny", "--init-frames", "4", "--init-size", "32", "--stride", "2"]
    place = ["evaluate", str(data), "--checkpoint", str(checkpoint), "--output", str(output)]
    return main([*place, *size, *views, *map(str, flags)])


@pytest.mark.slow
def test_a_list_of_kinetics_400_and_a_head_of_710(k710, labelled_world, tmp_path, capsys):
    """Its numbers are others: the scores would be wrong in silence."""
    *lines, last = (labelled_world / "val.txt").read_text().splitlines()
    (tmp_path / "k400.txt").write_text("\n".join([*lines, f"{last[:-1]}399"]) + "\n")
    assert evaluate(tmp_path / "k400.txt", k710, tmp_path / "test") == 2
    error = capsys.readouterr().err
    assert (
        "--label-map label_710to400.json" in error and "--label-map none" in error and error.count("\n") == 1
    )
    (tmp_path / "map.json").write_text(json.dumps(made_map(400)))
    assert evaluate(tmp_path / "k400.txt", k710, tmp_path / "test", "--label-map", tmp_path / "map.json") == 0
    assert evaluate(tmp_path / "k400.txt", k710, tmp_path / "plain", "--label-map", "none") == 0
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in NAMES[:400]))
    assert evaluate(tmp_path / "k400.txt", k710, tmp_path / "named", "--classes", tmp_path / "names.txt") == 2
    assert "400 class names for a head of 710 classes; --label-map label_710to400" in capsys.readouterr().err


def test_evaluate_refuses_a_map_of_other_names(large, labelled_world, tmp_path, capsys):
    numbers = made_map(400)
    (tmp_path / "map.json").write_text(json.dumps(numbers))
    flags = ["--label-map", tmp_path / "map.json", "--classes", tmp_path / "names.txt"]
    checkpoint = with_names(tmp_path, large, NAMES)
    (tmp_path / "names.txt").write_text("".join(f"{NAMES[number]}\n" for number in reversed(numbers)))
    assert evaluate(labelled_world / "val.txt", checkpoint, tmp_path / "test", *flags) == 2
    error = capsys.readouterr().err
    assert f"class 0 is '{NAMES[numbers[-1]]}', mapped to '{NAMES[numbers[0]]}'" in error
    (tmp_path / "names.txt").write_text("".join(f"{NAMES[number]}\n" for number in numbers))
    assert evaluate(labelled_world / "val.txt", checkpoint, tmp_path / "test", *flags) == 0
