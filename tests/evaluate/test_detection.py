"""`detect`: files in AVA's format, scores equal to the model's, pictures, restarts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import ModelConfig, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.cli import main
from vmae.data.ava import read_annotations, read_detections, read_excluded, read_person_boxes
from vmae.data.detection_dataset import KeyClipConfig, KeyFrameReader, find_videos, key_frames
from vmae.evaluate import detection
from vmae.evaluate.detection import load_detector
from vmae.evaluate.frame_map import frame_map
from vmae.files.folder_lock import LOCK_NAME, FolderLock
from vmae.model.detector import build_detector
from vmae.synthetic.moving_actors import ACTIONS, ActorsConfig, write_actors

MODEL = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
CLIP = KeyClipConfig(num_frames=4, image_size=32, stride=4)


@pytest.fixture(scope="module")
def actors(tmp_path_factory):
    return write_actors(
        tmp_path_factory.mktemp("actors"), ActorsConfig(train=1, validation=2, scenes=3), workers=1
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "weights.pth"
    model = build_detector(MODEL, len(ACTIONS), init_scale=20.0)
    about = {
        "model": MODEL.to_dict(),
        "clip": CLIP.to_dict(),
        "action_ids": list(ACTIONS),
        "action_names": list(ACTIONS.values()),
    }
    export_weights(path, model.state_dict(), config=about)
    return path


@pytest.fixture
def detect(actors, checkpoint, tmp_path):
    def start(*flags, out="test", weights=checkpoint, truth=True):
        known = ["--annotations", actors["val"]] if truth else []
        where = ["--checkpoint", weights, "--videos", actors["videos"], "--output", tmp_path / out, *known]
        return main(["detect", *map(str, [*where, "--workers", 0, "--device", "cpu", *flags])])

    return start


def test_detections_and_scores(detect, actors, checkpoint, tmp_path, capsys):
    flags = [
        "--persons",
        actors["val_persons"],
        "--excluded",
        actors["val_excluded"],
        "--batch-size",
        4,
        "--pictures",
        2,
    ]
    assert detect(*flags) == 0
    folder = tmp_path / "test"
    found = read_detections(folder / "detections.csv", ACTIONS)
    excluded = read_excluded(actors["val_excluded"])
    persons = [row for row in read_person_boxes(actors["val_persons"], 0.8) if row.key not in excluded]
    assert len(found) == len(persons) * len(ACTIONS) == 10 * 6
    # A score: the person's times the sigmoid of the model's logit for that box, alone.
    person, loaded = persons[3], load_detector(checkpoint)
    entries = find_videos(actors["videos"], [person.video])
    clip, boxes = KeyFrameReader(key_frames([person], "p", entries, CLIP), CLIP)[0]
    with torch.no_grad():
        expected = person.score * loaded.model(clip[None], boxes[None])[0, 0].sigmoid()
    got = {row.action: row.score for row in found if row.key == person.key and row.box == person.box}
    np.testing.assert_allclose([got[action] for action in ACTIONS], expected, rtol=1e-4)
    # The scores are those of the file.
    results = json.loads((folder / "results.json").read_text())
    truth = read_annotations(actors["val"], ACTIONS)
    assert results["frame_map"] == pytest.approx(
        100 * frame_map(truth, found, ACTIONS, excluded=excluded).mean
    )
    assert results["key_frames"] == 5 and 0 < results["frame_map"] < 100
    assert f"frame mAP at IoU 0.5: {results['frame_map']:.2f} %" in capsys.readouterr().out
    assert (folder / "actions.csv").read_text().startswith("action,name,boxes,average_precision\n")


def test_every_rule_is_named_with_its_number(detect, actors, tmp_path, capsys):
    """The headline is VideoMAE's rule; the flags choose another; all are in the file and printed."""
    assert detect("--persons", actors["val_persons"], "--pictures", 0) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    rules = results["rules"]
    assert list(rules) == ["videomae", "activitynet_2019", "activitynet_2020"]
    assert [rule["per_frame"] for rule in rules.values()] == [None, 50, 50]
    assert [rule["unannotated"] for rule in rules.values()] == ["count", "count", "ignore"]
    assert results["frame_map"] == rules["videomae"]["frame_map"] and "26cbda8" in results["rule"]["source"]
    for name, rule in rules.items():
        assert f"  {name}: {rule['frame_map']:.2f} %" in said and rule["source"]
    assert detect("--persons", actors["val_persons"], "--pictures", 0, "--per-frame", 3) == 0
    again = json.loads((tmp_path / "test" / "results.json").read_text())
    truth = read_annotations(actors["val"], ACTIONS)
    found = read_detections(tmp_path / "test" / "detections.csv", ACTIONS)
    assert again["rules"] == rules and again["frame_map"] != rules["videomae"]["frame_map"]
    assert again["frame_map"] == pytest.approx(100 * frame_map(truth, found, ACTIONS, per_frame=3).mean)
    assert again["rule"] == {"per_frame": 3, "unannotated": "count", "source": "as the flags say"}
    assert detect("--pictures", 0, "--per-frame", 0) == 2
    assert "--per-frame: must be a whole number from 1" in capsys.readouterr().err


@pytest.fixture
def score_file(tmp_path):
    """Scores detections of three persons on key frames at parts of a second; `extra` rows go behind them."""
    truth = "k,2.345000,0,0,0.5,0.5,1,0\nk,3.500000\nk,0004,0,0,0.5,0.5,2,0\n"
    found = "k,2.345,0,0,0.5,0.5,1,0.5\nk,3.5,0,0,0.5,0.5,1,0.8\nk,9.25,0,0,0.5,0.5,1,0.9\n"
    found += "k,4,0,0,0.5,0.5,2,0.7\n"
    (tmp_path / "truth.csv").write_text(truth)
    (tmp_path / "list.pbtxt").write_text('item {\n  name: "a"\n  id: 1\n}\nitem {\n  name: "b"\n  id: 2\n}\n')

    def score(*flags, extra=""):
        (tmp_path / "found.csv").write_text(found + extra)
        files = ["--detections", tmp_path / "found.csv", "--annotations", tmp_path / "truth.csv"]
        files += ["--actions", tmp_path / "list.pbtxt", "--output", tmp_path / "scored"]
        return main(["detect", *map(str, [*files, *flags])])

    return score


def test_detections_of_a_file_are_scored(score_file, tmp_path, capsys):
    assert score_file() == 0
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    # Of action 1 the third is right by VideoMAE's rule. Since 2020 the first is ignored, not the second: its
    # key frame is named.
    assert results["frame_map"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert results["rules"]["activitynet_2020"]["frame_map"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert results["dropped"] == 0 and "dropped" not in capsys.readouterr().out
    assert score_file("--unannotated", "ignore", "--per-frame", 50) == 0
    headline = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert headline["frame_map"] == results["rules"]["activitynet_2020"]["frame_map"]
    assert headline["rule"]["source"].startswith("ActivityNet")


def test_wrong_rows_of_detections_are_dropped_and_told(score_file, tmp_path, capsys):
    wrong = "k,4,0,0,1,1,2\nk,4,0,0,1,1,2,nan\nk,4,0.6,0,0.5,1,2,1\nk,4,0,0,2,1,2,1\nk,4,0,0,1,1,3,1\n"
    assert score_file(extra=wrong) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert results["dropped"] == 5 and results["frame_map"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert "note: 5 rows of" in said and "found.csv, line 5: 7 columns" in said
    assert len(results["first_dropped"]) == 3
    (tmp_path / "truth.csv").write_text("k,2.345,0,0,0.5,0.5,1,0\nk,2.5,0,0,0.5,1.5,1,0\n")
    assert score_file() == 2
    assert "truth.csv, line 2: box [0.0, 0.0, 0.5, 1.5] leaves the frame" in capsys.readouterr().err


def test_a_model_or_a_file(score_file, detect, tmp_path, capsys):
    assert score_file("--checkpoint", tmp_path) == 2
    assert "--detections runs no model: leave out --checkpoint and --persons" in capsys.readouterr().err
    assert main(["detect", "--detections", "d.csv", "--output", str(tmp_path / "o")]) == 2
    assert "--annotations and --actions: give both" in capsys.readouterr().err
    assert main(["detect", "--checkpoint", "c", "--annotations", "a", "--output", str(tmp_path / "o")]) == 2
    assert "the following arguments are required: --videos" in capsys.readouterr().err


def test_wrong_person_boxes_are_dropped_and_told(detect, actors, tmp_path, capsys):
    good = actors["val_persons"].read_text()
    (tmp_path / "persons.csv").write_text(good + "val_0000,1,0,0,1,1,,2\nval_0000,1,0,0,1,1\n")
    assert detect("--persons", tmp_path / "persons.csv", "--pictures", 0) == 0
    assert "note: 2 rows of" in capsys.readouterr().out
    assert json.loads((tmp_path / "test" / "results.json").read_text())["dropped"] == 2


def test_a_picture(detect, tmp_path):
    assert detect("--pictures", 1) == 0
    (path,) = (tmp_path / "test").glob("key_frame_*.png")
    picture = np.asarray(Image.open(path).convert("L"))
    assert picture.shape[1] == 384 and picture.shape[0] > 384  # the frame, and words below
    assert (picture[:384] == 255).sum() > 300 and (picture[384:] < 50).sum() > 200  # boxes; text


def test_annotated_boxes_are_the_default(detect, actors, tmp_path):
    assert detect("--pictures", 0) == 0
    truth = read_annotations(actors["val"], ACTIONS)
    found = read_detections(tmp_path / "test" / "detections.csv")
    assert {(row.key, row.box) for row in found} == {(row.key, row.box) for row in truth}


def test_without_ground_truth(detect, actors, tmp_path, capsys):
    assert detect("--persons", actors["val_persons"], truth=False) == 0
    assert (tmp_path / "test" / "detections.csv").exists() and not (
        tmp_path / "test" / "results.json"
    ).exists()
    assert detect(truth=False) == 2
    assert "which boxes?" in capsys.readouterr().err


def test_a_restarted_test_continues(detect, tmp_path, monkeypatch):
    assert detect("--pictures", 0) == 0
    parts, whole = (
        tmp_path / "test" / "scores.part.jsonl",
        (tmp_path / "test" / "detections.csv").read_bytes(),
    )
    lines = parts.read_text().splitlines(keepends=True)
    stray = '17\n{"a": 1}\n'
    parts.write_text("".join(lines[:4]) + stray + lines[4][:10])  # killed within the fourth key frame's line
    (tmp_path / "test" / "detections.csv").unlink()
    requested = []
    read = detection.KeyFrameReader.read
    monkeypatch.setattr(
        detection.KeyFrameReader, "read", lambda self, todo, n: requested.extend(todo) or read(self, todo, n)
    )
    assert detect("--pictures", 0) == 0
    assert requested == [3, 4, 5] and (tmp_path / "test" / "detections.csv").read_bytes() == whole


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--stride", 2], "clip.stride 4, 2"),
        (["--image-size", 48], "size [32, 32], [48, 48]"),
        (["--num-frames", 2], "frames 4, 2"),
        (["--dtype", "bfloat16"], 'dtype "float32", "bfloat16"'),
        (["--excluded", "val_excluded"], "key_frames 6, 5"),
        (["--persons", "val_persons"], "boxes differs"),
        (["--batch-size", 2, "--pictures", 0, "--backend", "torch", "--attention", "softmax"], None),
    ],
)
def test_another_test_in_the_folder_is_refused(detect, actors, tmp_path, capsys, flags, named):
    assert detect("--pictures", 0) == 0
    before = (tmp_path / "test" / "scores.part.jsonl").read_text()
    flags = [actors.get(flag, flag) for flag in flags]
    assert detect("--pictures", 0, *flags) == (0 if named is None else 2)
    err = capsys.readouterr().err
    assert named is None or (
        named in err and "holds another test" in err and "or remove" in err and err.count("\n") == 1
    )
    assert (tmp_path / "test" / "scores.part.jsonl").read_text().strip() == before.strip()


def test_scores_of_an_earlier_version_are_refused(detect, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    about = '{"weights": "0123456789abcdef", "clip": {}, "dtype": "float32", "boxes": "0"}'
    old = about + '\n{"frame": 0, "scores": []}\n'
    (tmp_path / "test" / "scores.part.jsonl").write_text(old)
    assert detect("--pictures", 0) == 2
    assert "weights differs" in capsys.readouterr().err
    assert (tmp_path / "test" / "scores.part.jsonl").read_text() == old


def test_a_broken_video_is_reported(detect, actors, tmp_path, monkeypatch, capsys):
    opened = detection.KeyFrameReader._try_twice

    def fail(self, video, epoch, index, attempt, failures):
        if video == 2:
            self.block(video, "is broken")
        return opened(self, video, epoch, index, attempt, failures)

    monkeypatch.setattr(detection.KeyFrameReader, "_try_twice", fail)
    assert detect("--pictures", 0) == 1
    assert "could not be decoded, and has no detections: is broken" in capsys.readouterr().out
    assert len({row.key for row in read_detections(tmp_path / "test" / "detections.csv")}) == 5


def test_an_official_file(detect, actors, tmp_path, capsys):
    # Weights without settings, with a head of 8 classes of which the action list names 6, as AVA's 60 of 80.
    torch.save({"model": build_detector(MODEL, 8).state_dict()}, tmp_path / "official.pth")
    flags = ["--num-frames", 4, "--image-size", 32, "--stride", 4, "--pictures", 0]
    assert detect(*flags, weights=tmp_path / "official.pth") == 2
    assert "name --model and --actions" in capsys.readouterr().err
    flags += ["--model", "vit_tiny", "--actions", actors["actions"], "--init-size", 32, "--init-frames", 4]
    assert detect(*flags, weights=tmp_path / "official.pth") == 0
    assert {row.action for row in read_detections(tmp_path / "test" / "detections.csv")} == set(range(1, 9))


def test_wrong_input(detect, actors, tmp_path, capsys):
    classifier = build_classifier(MODEL, 6)
    export_weights(tmp_path / "c.pth", classifier.state_dict(), config={"model": MODEL.to_dict()})
    assert detect(weights=tmp_path / "c.pth") == 2
    assert "is not a detector's; `python -m vmae finetune-detection --init" in capsys.readouterr().err
    assert detect("--persons", actors["val_persons"], "--min-score", "1.1") == 2
    assert "no person box with a score of at least 1.1" in capsys.readouterr().err
    assert detect("--dtype", "float8") == 2 and detect("--batch-size", 0) == 2
    assert not (tmp_path / "test").exists()


def test_a_folder_in_use_is_refused(detect, tmp_path, capsys):
    with FolderLock(tmp_path / "test", "another test"):
        assert detect() == 2
        assert "in use by another test" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "test").iterdir()] == [LOCK_NAME]
