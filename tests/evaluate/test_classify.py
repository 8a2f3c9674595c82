"""Multi-view test: its scores do not depend on batch size, ranks or stops; its files and its errors."""

import argparse
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.classifier import load_classifier
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import load_weights
from vmae.cli import main
from vmae.data.classify_dataset import ClipConfig, ViewConfig, ViewDataset
from vmae.data.labels import read_labelled_list
from vmae.evaluate import classify
from vmae.evaluate.classify import EvaluationConfig, evaluate, published_views
from vmae.evaluate.scores import average_precision, class_table, confusion, mean_average_precision, score
from vmae.evaluate.views import view_probabilities

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
CLIP = ClipConfig(num_frames=4, image_size=32, stride=2)
NAMES = ["red things", "green things", "blue things"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A fine-tuned checkpoint with random weights."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    model = build_classifier(CONFIG, 3)
    torch.nn.init.normal_(model.head.weight)
    settings = {"model": CONFIG.to_dict(), "clip": CLIP.to_dict(), "class_names": NAMES, "pooling": "mean"}
    export_weights(path, model.state_dict(), config=settings, step=1)
    return path


def config(world, **changes):
    return EvaluationConfig(data=str(world / "val.txt"), views=ViewConfig(segments=2, crops=3), **changes)


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_scores_are_those_of_averaged_softmaxes(weights, labelled_world, tmp_path):
    loaded = load_classifier(weights)
    results = evaluate(loaded, config(labelled_world, keep_scores=True), tmp_path, batch_size=4)
    labelled = read_labelled_list(labelled_world / "val.txt")
    data, right = ViewDataset(labelled.entries, CLIP, ViewConfig(segments=2, crops=3)), []
    for video, record in enumerate(predictions(tmp_path)):
        with torch.no_grad():
            expected = loaded.model(data[video]).softmax(1).mean(0)
        assert record["scores"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert record["top"][0][0] == int(expected.argmax()) and len(record["top"]) == 3
        right.append(int(expected.argmax()) == labelled.labels[video][0])
    assert (
        results["videos"] == 7
        and results["top1"] == pytest.approx(100 * np.mean(right))
        and results["top5"] == 100
    )
    assert json.loads((tmp_path / "results.json").read_text())["top1"] == results["top1"]
    assert Image.open(tmp_path / "confusion.png").size[0] > 100
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["name"] for row in rows] == ["0", "1", "2"] and sum(int(row["videos"]) for row in rows) == 7


def test_any_number_of_ranks_and_uneven_batches(weights, labelled_world, tmp_path):
    """Ranks one after the other (each has its own share), with batches that do not divide the views."""
    loaded = load_classifier(weights)
    whole = evaluate(loaded, config(labelled_world), tmp_path / "whole", batch_size=4)
    settings = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    labelled = read_labelled_list(labelled_world / "val.txt")
    data = ViewDataset(labelled.entries, CLIP, ViewConfig(segments=2, crops=3))

    def predict(views):
        options = dict(device=torch.device("cpu"), dtype="float32", multi_label=False, batch_size=4)
        return classify.describe_prediction(view_probabilities(loaded.model, views, **options), False)

    for ranks in (2, 3, 8):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        for rank in range(ranks):
            classify.write_share(folder, labelled, data, range(7), predict, rank=rank, world_size=ranks)
        assert classify.finish(folder, labelled, settings, None) == whole
        assert predictions(folder) == predictions(tmp_path / "whole")


def test_frames_of_other_names(weights, labelled_world, tmp_path, capsys):
    folder = tmp_path / "clip"
    folder.mkdir()
    for number, image in enumerate(sorted((labelled_world / "v00").iterdir())):
        (folder / f"f_{number:03}.jpg").symlink_to(image)
    (tmp_path / "val.csv").write_text(f"{folder},8,1\n")
    words = ["evaluate", str(tmp_path / "val.csv"), "--checkpoint", str(weights), "--device", "cpu"]
    words += ["--output", str(tmp_path / "out"), "--segments", "1", "--crops", "1", "--workers", "0"]
    assert main(words) == 2 and "does not exist" in capsys.readouterr().err
    assert main([*words, "--fname_tmpl", "f_{:03}.jpg", "--start_idx", "0"]) == 0
    assert "1 videos" in capsys.readouterr().out


def test_a_stopped_test_continues(weights, labelled_world, tmp_path, monkeypatch):
    loaded = load_classifier(weights)
    evaluate(loaded, config(labelled_world), tmp_path / "whole")
    count, original = [0], classify.view_probabilities

    def stop_at_the_fourth(*args, **kwargs):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(classify, "view_probabilities", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, config(labelled_world), tmp_path / "parts")
    part = tmp_path / "parts" / "predictions-0.part.jsonl"
    part.write_text(
        part.read_text() + '17\n{"a": 1}\n{"video": 5, "pa'
    )  # and lines of others, and a torn one
    monkeypatch.setattr(
        classify, "view_probabilities", lambda *a, **k: (count.append(1), original(*a, **k))[1]
    )
    evaluate(loaded, config(labelled_world), tmp_path / "parts")
    assert count[1:] == [1] * 4  # of seven, three were done
    assert predictions(tmp_path / "parts") == predictions(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("*.part.jsonl"))


def test_another_test_in_the_folder_is_an_error(weights, labelled_world, tmp_path):
    loaded = load_classifier(weights)
    evaluate(loaded, config(labelled_world), tmp_path)
    with torch.no_grad():
        loaded.model.head.bias += 1
    with pytest.raises(InputError, match="holds another test \\(there and now: weights differs\\)"):
        evaluate(loaded, config(labelled_world), tmp_path)


def test_broken_videos_do_not_count_and_are_named(weights, labelled_world, tmp_path, capsys):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text((labelled_world / "val.txt").read_text() + f"{bad} 1\n")
    flags = [
        "--output",
        str(tmp_path / "out"),
        "--segments",
        "1",
        "--crops",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert main(["evaluate", str(tmp_path / "list.txt"), "--checkpoint", str(weights), *flags]) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["videos"] == 7 and results["undecodable"] == 1
    out = capsys.readouterr().out
    assert "could not be decoded, and does not count" in out and "red things" in out and "top-1" in out


@pytest.mark.parametrize(
    "lists, chosen",
    [
        (("train.csv", "val.csv", "test.csv"), "test.csv"),
        (("train.csv", "val.csv"), "val.csv"),
        (("test.csv",), "test.csv"),
        (("train.csv",), None),
        ((), None),
    ],
)
def test_a_folder_is_tested_on_its_test_list(weights, labelled_world, tmp_path, capsys, lists, chosen):
    """test.csv, else val.csv, never train.csv; the list is named, for a folder and for a list."""
    folder, lines = tmp_path / "data", (labelled_world / "val.txt").read_text().splitlines(keepends=True)
    folder.mkdir()
    for count, name in enumerate(("train.csv", "val.csv", "test.csv"), 1):
        if name in lists:
            (folder / name).write_text("".join(lines[:count]))
    flags = [
        "--checkpoint",
        str(weights),
        "--device",
        "cpu",
        "--segments",
        "1",
        "--crops",
        "1",
        "--workers",
        "0",
    ]
    code = main(["evaluate", str(folder), *flags, "--output", str(tmp_path / "out")])
    output = capsys.readouterr()
    if chosen is None:
        assert code == 2 and f"folder {folder} holds no test.csv and no val.csv; give a list" in output.err
        assert not (tmp_path / "out").exists()
        return
    count = {"val.csv": 2, "test.csv": 3}[chosen]
    assert (
        code == 0
        and f"list: {folder / chosen}, {count} videos\n" in output.out
        and len(predictions(tmp_path / "out")) == count
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["data"] == str(
        folder / chosen
    )
    assert main(["evaluate", str(folder / chosen), *flags, "--output", str(tmp_path / "out")]) == 0
    assert f"list: {folder / chosen}, {count} videos\n" in capsys.readouterr().out


def test_pixels_are_those_of_the_training_unless_told_otherwise(weights, labelled_world, tmp_path, capsys):
    """Stored with the weights; a file from before the setting has the usual ones."""

    def seen(path, *flags):
        words = ["evaluate", str(tmp_path / "list.txt"), "--checkpoint", str(path), *flags]
        words += ["--segments", "1", "--crops", "1", "--workers", "0", "--device", "cpu"]
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert main([*words, "--output", str(out)]) == 0
        clip = json.loads((out / "evaluation.json").read_text())["clip"]
        return clip["resize"], clip["short_side"], capsys.readouterr().out

    (tmp_path / "list.txt").write_text((labelled_world / "val.txt").read_text().splitlines()[0] + "\n")
    state = load_weights(weights)
    own = {"model": CONFIG.to_dict(), "pooling": "mean", "clip": CLIP.to_dict()}
    before = {key: value for key, value in own["clip"].items() if key not in ("resize", "short_side")}
    export_weights(tmp_path / "before.pth", state, config={**own, "clip": before}, step=1)
    assert seen(tmp_path / "before.pth")[:2] == ("torch", None)
    own["clip"] |= {"resize": "published", "short_side": 40}
    export_weights(tmp_path / "now.pth", state, config=own, step=1)
    *found, out = seen(tmp_path / "now.pth")
    assert found == ["published", 40] and "short side 40, resized as published\n" in out
    *found, out = seen(tmp_path / "now.pth", "--resize", "torch", "--short_side_size", "32")
    assert found == ["torch", 32] and "short side 32, antialiased (published: not; --resize published)" in out
    assert seen(tmp_path / "now.pth", "--image-size", "48")[:2] == ("published", None)
    assert main(["predict", "none.mp4", "--checkpoint", str(weights), "--short-side", "31"]) == 2
    assert "short side of 31 pixels is less than the 32 of the clips" in capsys.readouterr().err


def test_views():
    assert published_views("dense") == ViewConfig(segments=5, crops=3)
    assert published_views("sparse") == ViewConfig(segments=2, crops=3)
    assert published_views("sparse", 7, 1) == ViewConfig(segments=7, crops=1)


def test_probabilities_do_not_depend_on_the_batch(weights):
    model = load_classifier(weights).model
    views = torch.randint(0, 256, (7, 4, 32, 32, 3), dtype=torch.uint8)
    options = dict(device=torch.device("cpu"), dtype="float32")
    whole = view_probabilities(model, views, batch_size=7, multi_label=False, **options)
    split = view_probabilities(model, views, batch_size=3, multi_label=False, **options)
    torch.testing.assert_close(whole, split, atol=1e-6, rtol=0)
    assert float(whole.sum()) == pytest.approx(1)
    several = view_probabilities(model, views, batch_size=3, multi_label=True, **options)
    torch.testing.assert_close(several, model(views).sigmoid().mean(0).double(), atol=1e-6, rtol=0)


# --- Scores ---


def records(*best):
    others = {k: [[other, 0.0] for other in range(6) if other != k][:4] for k in best}
    return [{"video": video, "top": [[k, 0.9], *others[k]]} for video, k in enumerate(best)]


def test_score():
    labels = [(0,), (0,), (0,), (1,), (5,)]
    found = score([*records(0, 0, 3, 1, 0), {"video": 9, "error": "gone"}], labels, 7)
    assert found["videos"] == 5 and found["undecodable"] == 1 and found["top1"] == 60
    assert found["top5"] == 80  # class 5 is not among 0, 1, 2, 3, 4
    assert found["mean_class_accuracy"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert score([{"video": 0, "error": "gone"}], labels, 7) == {"videos": 0, "undecodable": 1}


def test_confusion_and_table():
    matrix = confusion(records(0, 2, 2, 1), [(0,), (0,), (0,), (1,)], 3)
    assert matrix.tolist() == [[1, 0, 2], [0, 1, 0], [0, 0, 0]]
    assert class_table(matrix, ["a", "b", "c"]) == [
        {"class": 0, "name": "a", "videos": 3, "accuracy": pytest.approx(100 / 3), "taken_for": "c (2)"},
        {"class": 1, "name": "b", "videos": 1, "accuracy": 100.0, "taken_for": ""},
    ]


def test_several_labels_have_average_precision():
    scores = np.array([[0.9, 0.1], [0.8, 0.7], [0.3, 0.6], [0.1, 0.2]])
    truth = np.array([[True, False], [False, True], [True, False], [False, False]])
    assert mean_average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_average_precision_with_equal_scores_equals_scikit_learn():
    """Fixed numbers, computed with scikit-learn 1.9.1's `average_precision_score`."""
    scores = np.array([0.9, 0.8, 0.8, 0.8, 0.5, 0.5, 0.3, 0.1, 0.1, 0.0])
    for truth, expected in (
        ([1, 0, 1, 1, 0, 0, 1, 0, 1, 0], 0.7253968253968255),
        ([0, 1, 0, 0, 1, 0, 0, 0, 0, 1], 0.29444444444444445),
    ):
        assert average_precision(scores, np.array(truth, bool)) == pytest.approx(expected, rel=1e-12)
    one_in_ten = np.arange(20) % 10 == 3
    for constant in (0.0, 0.3, np.inf):
        assert average_precision(np.full(20, constant), one_in_ten) == pytest.approx(0.1, rel=1e-12)
    rng = np.random.RandomState(0)
    scores, truth = rng.randint(0, 5, (40, 6)) / 4.0, rng.rand(40, 6) < 0.3
    assert mean_average_precision(scores, truth) == pytest.approx(0.37748722330863616, rel=1e-12)
    orders = [np.arange(40)[::-1], *(np.random.RandomState(seed).permutation(40) for seed in range(5))]
    assert {mean_average_precision(scores[order], truth[order]) for order in orders} == {
        mean_average_precision(scores, truth)
    }


def test_nan_scores_are_refused(weights, labelled_world, tmp_path, capsys):
    scores, truth = np.array([[0.5, 0.1], [np.nan, 0.2]]), np.eye(2, dtype=bool)
    with pytest.raises(InputError, match="score of video 1 is not a number"):
        mean_average_precision(scores, truth)
    with pytest.raises(InputError, match="no class has a positive"):
        mean_average_precision(np.ones((2, 2)), ~np.ones((2, 2), bool))
    for record in ({"top": [[0, np.nan]]}, {"top": [[0, 1.0]], "scores": [1.0, np.nan]}):
        with pytest.raises(InputError, match="prediction of a.mp4 is not a number"):
            score([{"video": 0, "path": "a.mp4", **record}], [(0,)], 2)
    (tmp_path / "list.txt").write_text((labelled_world / "val.txt").read_text().splitlines()[0] + "\n")
    state = load_weights(weights)
    state["head.bias"][1] = np.nan
    settings = {"model": CONFIG.to_dict(), "clip": CLIP.to_dict(), "pooling": "mean"}
    export_weights(tmp_path / "damaged.pth", state, config=settings)
    where = [
        "--checkpoint",
        str(tmp_path / "damaged.pth"),
        "--device",
        "cpu",
        "--segments",
        "1",
        "--crops",
        "1",
    ]
    assert (
        main(
            [
                "evaluate",
                str(labelled_world / "val.txt"),
                *where,
                "--output",
                str(tmp_path / "out"),
                "--workers",
                "0",
            ]
        )
        == 2
    )
    assert "v00: the model's output is no number (NaN); the weights are damaged" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


# --- The commands ---


def test_official_files(tmp_path, labelled_world, capsys):
    """Published files hold weights only: their shapes tell the preset, or --model; a head of other classes
    needs a label map."""
    torch.manual_seed(2)
    model = build_classifier(CONFIG, 5)
    path = tmp_path / "official.pth"
    torch.save({"module": model.state_dict(), "args": argparse.Namespace(lr=1.0)}, path)
    (tmp_path / "map.json").write_text("[4, 0, 2]")
    flags = [
        "--checkpoint",
        str(path),
        "--output",
        str(tmp_path / "out"),
        "--segments",
        "1",
        "--crops",
        "1",
        "--workers",
        "0",
    ]
    clip = [
        "--num-frames",
        "4",
        "--image-size",
        "32",
        "--init-frames",
        "4",
        "--init-size",
        "32",
        "--device",
        "cpu",
    ]
    command = ["evaluate", str(labelled_world / "val.txt"), *flags, *clip]
    assert main([*command, "--label-map", str(tmp_path / "map.json")]) == 0
    assert "taken as vit_tiny by its shapes" in capsys.readouterr().out
    (tmp_path / "out" / "predictions.jsonl").unlink()
    assert main([*command, "--model", "vit_b"]) == 2
    assert "another architecture than vit_b" in capsys.readouterr().err
    assert main([*command, "--model", "vit_tiny", "--label-map", str(tmp_path / "map.json")]) == 0
    loaded = load_classifier(
        path, preset="vit_tiny", source=(4, 32), clip=CLIP.to_dict(), label_map=str(tmp_path / "map.json")
    )
    assert torch.equal(loaded.model.head.weight, model.head.weight[[4, 0, 2]])


def test_predict_names_classes(weights, labelled_world, tmp_path, capsys):
    from vmae.data.write_video import write_video
    from vmae.synthetic.moving_shapes import render

    write_video(tmp_path / "shape.mp4", render("right", 32, 12, 0))
    flags = ["--checkpoint", str(weights), "--device", "cpu"]
    assert main(["predict", str(tmp_path / "shape.mp4"), *flags, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(any(name in line for name in NAMES) for line in lines)
    assert main(["predict", str(tmp_path / "shape.mp4"), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["classes"]
    assert sum(entry["probability"] for entry in found) == pytest.approx(1, abs=1e-4)
    assert main(["predict", str(tmp_path / "gone.mp4"), *flags]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--label-map", "gone.json"], "'gone.json' does not exist"),
        (["--averaged"], "has no averaged weights"),
        (["--classes", "two.txt"], "2 class names for a head of 3 classes"),
        (["--crops", "-1"], "--crops/--test_num_crop: must be a whole number from 1"),
        (["--dtype", "float8"], "unknown dtype"),
    ],
)
def test_bad_input(weights, labelled_world, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a\nb\n")
    command = [
        "evaluate",
        str(labelled_world / "val.txt"),
        "--checkpoint",
        str(weights),
        "--output",
        "out",
        "--device",
        "cpu",
    ]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_labels_beyond_the_head_and_pretrained_files(weights, labelled_world, tmp_path, capsys):
    (tmp_path / "list.txt").write_text((labelled_world / "val.txt").read_text().replace(" 2\n", " 3\n"))
    where = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", str(tmp_path / "list.txt"), "--checkpoint", str(weights), *where]) == 2
    assert "label 3 is out of range; labels are 0 to 2" in capsys.readouterr().err
    from vmae import build_pretrainer

    torch.save({"model": build_pretrainer(CONFIG).state_dict()}, tmp_path / "pre.pth")
    official = ["--checkpoint", str(tmp_path / "pre.pth"), "--model", "vit_tiny"]
    assert main(["evaluate", str(labelled_world / "val.txt"), *official, *where]) == 2
    assert "has no head: it is pre-trained" in capsys.readouterr().err
