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
    # All of the block, though three are done: a batch holds what it would have held.
    assert requested == [0, 1, 2, 3, 4, 5] and (tmp_path / "test" / "detections.csv").read_bytes() == whole


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


# --- As VideoMAE-Action-Detection --------------------------------------------------------------------------

PUBLISHED = {**CLIP.to_dict(), "preprocess": "published"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Four videos of two shapes as folders of images, with annotations: a key frame with two boxes each."""
    root, rng, rows = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0), []
    for name, size in (("a", (48, 64)), ("b", (64, 48)), ("c", (48, 64)), ("d", (64, 48))):
        (root / "videos" / name).mkdir(parents=True)
        for number in range(1, 13):
            pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "videos" / name / f"img_{number:05}.png")
        rows += [f"{name},1.500000,0.1,0.1,0.6,0.8,1,0", f"{name},1.500000,0.5,0.2,0.95,0.9,2,1"]
    (root / "truth.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def detect_shapes(shapes, tmp_path):
    def start(weights, *flags, out="test"):
        flags = ["--pictures", 0, "--fps", 4, "--frame-pattern", "img_{:05}.png", "--batch-size", 2, *flags]
        where = [
            "--videos",
            shapes / "videos",
            "--annotations",
            shapes / "truth.csv",
            "--checkpoint",
            weights,
        ]
        words = ["detect", *where, "--output", tmp_path / out, "--workers", 0, "--device", "cpu", *flags]
        return main([str(word) for word in words])

    return start


def export_detector(path, checkpoint, **changes):
    """The weights of `checkpoint` with other settings; None removes one."""
    content = torch.load(checkpoint, weights_only=True)
    settings = {**content["config"], **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    export_weights(path, content["model"], config=settings)
    return path


def test_published_clips_of_several_shapes(detect_shapes, shapes, checkpoint, tmp_path, capsys):
    """Each video in its own shape, whatever the batch; what the weights learned decides."""
    weights = export_detector(tmp_path / "p.pth", checkpoint, clip=PUBLISHED, roi="published")
    assert detect_shapes(weights, out="two") == 0
    assert "--preprocess published, --roi published" in capsys.readouterr().out
    assert detect_shapes(weights, "--batch-size", 1, out="one") == 0
    two, one = (read_detections(tmp_path / name / "detections.csv") for name in ("two", "one"))
    assert [row.key for row in two] == [row.key for row in one]  # in the order of the annotations
    np.testing.assert_allclose([row.score for row in two], [row.score for row in one], rtol=1e-4)
    assert {row.timestamp for row in two} == {1.5}
    loaded = load_detector(weights)
    entries = find_videos(shapes / "videos", ["b"], pattern="img_{:05}.png")
    rows = [row for row in read_annotations(shapes / "truth.csv") if row.video == "b"]
    clip, boxes = KeyFrameReader(key_frames(rows, "t", entries, loaded.clip, fps=4), loaded.clip)[0]
    assert clip.shape == (4, 49, 37, 3)
    with torch.no_grad():
        expected = loaded.model(clip[None], boxes[None])[0].sigmoid()
    got = torch.tensor([row.score for row in two if row.video == "b"]).reshape(2, -1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # Another way to look at them gives other scores, and is another test.
    assert detect_shapes(weights, "--roi", "aligned", out="two") == 2
    assert 'holds another test (there and now: roi "published", "aligned")' in capsys.readouterr().err
    scores = [one]
    for flags in (["--roi", "aligned"], ["--preprocess", "resize"]):
        assert detect_shapes(weights, *flags, out="other" + flags[1]) == 0
        scores.append(read_detections(tmp_path / f"other{flags[1]}" / "detections.csv"))
    values = np.array([[row.score for row in rows] for rows in scores])
    assert all(np.abs(values[i] - values[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_checkpoints_from_before_these_settings_mean_what_they_meant(detect_shapes, checkpoint, tmp_path):
    """Without `preprocess` and `roi`: whole frames, resized, and the aligned RoI; a test that such a version
    began goes on."""
    clip = {name: value for name, value in CLIP.to_dict().items() if name != "preprocess"}
    old = export_detector(tmp_path / "old.pth", checkpoint, clip=clip, roi=None)
    loaded = load_detector(old)
    assert loaded.clip == CLIP and (loaded.model.roi, loaded.model.preprocess) == ("aligned", "resize")
    assert detect_shapes(old, out="old") == 0
    said = ["--preprocess", "resize", "--roi", "aligned"]
    assert detect_shapes(checkpoint, *said, out="now") == 0
    detections = [(tmp_path / name / "detections.csv").read_text() for name in ("old", "now")]
    assert detections[0] == detections[1]
    part = tmp_path / "old" / "scores.part.jsonl"
    header, *records = part.read_text().splitlines(keepends=True)
    about = json.loads(header)
    assert about.pop("roi") == "aligned" and about["clip"].pop("preprocess") == "resize"
    part.write_text("".join([json.dumps(about) + "\n", *records[:2]]))
    assert detect_shapes(old, out="old") == 0
    assert (tmp_path / "old" / "detections.csv").read_text() == detections[0]
    assert detect_shapes(old, "--preprocess", "published", out="old") == 2


def test_official_files_are_seen_as_published(tmp_path, actors):
    """They do not say how their clips were made: as VideoMAE-Action-Detection makes them."""
    torch.save({"model": build_detector(MODEL, 8).state_dict()}, tmp_path / "official.pth")
    known = {"preset": "vit_tiny", "source": (4, 32), "actions": ACTIONS}
    loaded = load_detector(tmp_path / "official.pth", **known)
    assert (loaded.clip.preprocess, loaded.model.preprocess, loaded.model.roi) == ("published",) * 3
    assert "--preprocess published, --roi published" in loaded.note
    other = load_detector(tmp_path / "official.pth", **known, clip={"preprocess": "resize"}, roi="aligned")
    assert (other.clip.preprocess, other.model.preprocess, other.model.roi) == ("resize", "resize", "aligned")
