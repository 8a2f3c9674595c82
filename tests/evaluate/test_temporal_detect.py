"""The temporal detector: positions and seconds, targets and losses by hand, and that it finds what is plainly
there."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import vmae
from vmae import InputError
from vmae.cli import main
from vmae.evaluate.temporal import Segment, VideoInfo, mean_average_precision, write_actionformer
from vmae.evaluate.temporal_detect import detect, load_detector, soft_nms
from vmae.evaluate.temporal_features import Geometry, Item, read_about, read_items
from vmae.evaluate.temporal_loss import detector_loss, distance_iou_loss, focal_loss, targets_of
from vmae.evaluate.temporal_settings import DetectorConfig
from vmae.evaluate.temporal_task import FeatureBatch, TemporalTask
from vmae.model.temporal_head import TemporalHead

GEOMETRY = Geometry(frames=8, step=4)
FPS, POSITIONS = 10.0, 40
DURATION = (POSITIONS * 4 + 4) / FPS
QUICK = {"width": 24, "depth": 3, "epochs": 25, "lr": 5e-3}
RUN = {"batch_size": 4, "device": "cpu", "num_workers": 0, "tensorboard": False, "log_every": 1}


def easy_video(name: str, seed: int) -> tuple[Item, list[Segment]]:
    """Two actions; while one goes on, a channel of its own is 1; all else is noise."""
    rng = np.random.default_rng(seed)
    features, truth = rng.normal(0, 0.3, (POSITIONS, 6)).astype(np.float32), []
    for label, channel, low in (("jump", 1, 2), ("run", 4, 22)):
        first, length = low + int(rng.integers(5)), int(rng.integers(4, 11))
        features[first : first + length, channel] += 1
        times = [GEOMETRY.seconds(position - 0.5, FPS) for position in (first, first + length)]
        truth.append(Segment(name, *times, label))
    return Item(name, VideoInfo("test", DURATION, FPS), torch.from_numpy(features)), truth


def easy_world(count: int, first: int = 0) -> tuple[list[Item], list[Segment]]:
    pairs = [easy_video(f"v{number:02}", number) for number in range(first, first + count)]
    return [item for item, _ in pairs], [segment for _, own in pairs for segment in own]


def test_positions_are_the_middles_of_windows():
    thumos = Geometry(frames=16, step=4)
    assert thumos.seconds(0, 25) == pytest.approx(8 / 25) and thumos.seconds(10, 25) == pytest.approx(48 / 25)
    assert thumos.position(thumos.seconds(7.25, 30), 30) == pytest.approx(7.25)
    info = VideoInfo("test", 4.0, 25.0)  # 100 frames: windows from 0, 4, ..., 84
    assert (
        thumos.count(info) == 22 and Geometry(16, 16).count(info) == 6 and Geometry(101, 4).count(info) == 0
    )


def test_targets_by_hand():
    item = Item("a", VideoInfo("test", 8.4, 10.0), torch.zeros(20, 3))
    at = lambda position: GEOMETRY.seconds(position, 10.0)  # noqa: E731
    truth = [
        Segment("a", at(2), at(10), "run"),
        Segment("a", at(5.5), at(6.5), "jump"),
        Segment("a", at(15.1), at(15.3), "run"),
    ]
    labels, distances = targets_of(item, truth, ["jump", "run"], GEOMETRY, core=0.5)
    assert labels[:, 1].nonzero()[:, 0].tolist() == [
        4,
        5,
        6,
        7,
        8,
        15,
    ]  # the middle half of 2 to 10; one place of a short one
    assert labels[:, 0].nonzero()[:, 0].tolist() == [6]
    torch.testing.assert_close(distances[[4, 8]], torch.tensor([[2.0, 6.0], [6.0, 2.0]]))
    torch.testing.assert_close(distances[6], torch.tensor([0.5, 0.5]))  # of the shorter
    torch.testing.assert_close(
        distances[15], torch.tensor([1e-3, 0.3]), atol=1e-4, rtol=0
    )  # 15 is before its start


def test_losses_by_hand():
    score = 1 / (1 + math.exp(-1))
    found = focal_loss(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
    expected = [-0.25 * (1 - score) ** 2 * math.log(score), -0.75 * score**2 * math.log(1 - score)]
    torch.testing.assert_close(found, torch.tensor(expected))
    same, wanted = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    assert distance_iou_loss(same, wanted[:1]).item() == pytest.approx(0)
    # 4 long each, 2 in common, 6 together, middles 2 apart: 1 - 2/6 + (2/6)^2
    assert distance_iou_loss(same, wanted[1:]).item() == pytest.approx(1 - 1 / 3 + 1 / 9)


def test_padding_does_not_count_and_is_not_read():
    torch.manual_seed(0)
    head = TemporalHead(6, 2, width=16, depth=3).eval()
    x, valid = torch.randn(2, 30, 6), torch.ones(2, 30, dtype=torch.bool)
    valid[0, 20:] = False
    alone, padded = head(x[:1, :20], valid[:1, :20]), head(x, valid)
    for one, both in zip(alone, padded):
        torch.testing.assert_close(one[0], both[0, :20])
    labels, wanted = torch.zeros(1, 20, 2), torch.ones(1, 20, 2)
    labels[0, 3, 1] = 1
    padding = torch.ones(1, 10, 2)
    first = detector_loss(*alone, labels, wanted, valid[:1, :20])
    more = [
        torch.cat([part, padding], 1) for part in (padded[0][:1, :20], padded[1][:1, :20], labels, wanted)
    ]
    torch.testing.assert_close(detector_loss(*more, valid[:1]), first)


def test_soft_nms_by_hand():
    spans = np.array([[0, 10], [5, 15], [0, 9], [30, 40]], float)
    kept, scores = soft_nms(spans, np.array([0.8, 0.6, 0.9, 0.3]), sigma=0.5, min_score=0.25)
    # Best: 0 to 9. IoU 0.9 with the first (0.8 falls to 0.16: gone), 4/15 with the second, 0 with the last.
    assert kept.tolist() == [2, 1, 3]
    assert scores == pytest.approx([0.9, 0.6 * math.exp(-((4 / 15) ** 2) / 0.5), 0.3])
    none, empty = soft_nms(np.zeros((0, 2)), np.zeros(0), sigma=0.5, min_score=0.1)
    assert len(none) == len(empty) == 0


def write_world(folder, *, step: int = 4) -> DetectorConfig:
    """Features and dataset of 16 videos to train on and 4 to test."""
    (features := folder / "features").mkdir(parents=True)
    items, truth = easy_world(20)
    for item in items:
        np.save(features / f"{item.name}.npy", item.features.numpy())
    about = {"windows": {"frames": 8, "step": step}, "weights": "abc", "checkpoint": "x"}
    (features / "features.json").write_text(json.dumps(about))
    subsets = {item.name: "training" if number < 16 else "test" for number, item in enumerate(items)}
    write_actionformer(folder / "d.json", truth, {item.name: (DURATION, FPS) for item in items}, subsets)
    return DetectorConfig(features=str(features), dataset=str(folder / "d.json"), **QUICK)


def train(config: DetectorConfig, folder, **run):
    """A detector, through the common loop, and its settings."""
    vmae.train(TemporalTask(config), output=folder, **RUN, **run)
    return load_detector(folder, read_about(Path(config.features)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train(write_world(folder), folder / "run")


def test_it_finds_what_is_plainly_there(trained):
    head, config = trained
    items, truth = easy_world(8, first=100)
    found = [segment for item in items for segment in detect(head, item, GEOMETRY, config)]
    scores = mean_average_precision(truth, found)
    assert config.classes == ("jump", "run") and scores["map"][0.5] > 0.95 and scores["map"][0.7] > 0.7
    assert all(0 <= segment.start < segment.end <= DURATION for segment in found)
    # Of another video's features it knows the habits only.
    others = [Item(item.name, item.info, other.features) for item, other in zip(items, items[1:] + items[:1])]
    wrong = [segment for item in others for segment in detect(head, item, GEOMETRY, config)]
    assert mean_average_precision(truth, wrong)["map"][0.7] < scores["map"][0.7] / 2


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_same_seed_same_detector_also_after_a_stop(tmp_path, monkeypatch):
    config = write_world(tmp_path).replace(epochs=3, max_positions=16)
    whole, _ = train(config, tmp_path / "whole")
    plain = TemporalTask.after_step

    def stop(self, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, step)

    monkeypatch.setattr(TemporalTask, "after_step", stop)
    result = vmae.train(TemporalTask(config), output=tmp_path / "parts", save_every=5, **RUN)
    assert result.stopped_by == signal.SIGTERM and result.steps == 7 and result.weights is None
    monkeypatch.setattr(TemporalTask, "after_step", plain)
    parts, _ = train(config, tmp_path / "parts")
    assert len(losses(tmp_path / "parts")) == 12 and losses(tmp_path / "whole") == losses(tmp_path / "parts")
    same = zip(whole.state_dict().values(), parts.state_dict().values())
    assert all(torch.equal(one, other) for one, other in same)
    other, _ = train(config.replace(seed=1), tmp_path / "other")
    assert not torch.equal(other.embed.weight, whole.embed.weight)


def test_long_videos_are_trained_in_pieces_that_differ_by_epoch(tmp_path):
    task = TemporalTask(write_world(tmp_path).replace(max_positions=16))
    dataset, _ = task.read_data()
    pieces = [dataset[epoch, 3] for epoch in range(4)]
    whole = dataset.videos[3].values
    assert all(piece.clips.shape == (1, 16, 6) and bool(piece.valid.all()) for piece in pieces)
    assert torch.equal(dataset[2, 3].clips, pieces[2].clips)
    assert any(not torch.equal(pieces[0].clips, piece.clips) for piece in pieces)
    windows = whole.unfold(0, 16, 1).transpose(1, 2)
    first = torch.cat([pieces[0].clips, pieces[0].labels, pieces[0].distances], 2)
    assert (first == windows).all(2).all(1).sum() == 1  # features and targets are of one place


def test_videos_of_a_batch_are_filled_up_to_the_longest():
    def sample(length):
        parts = (torch.ones(1, length, width) for width in (6, 2, 2))
        return FeatureBatch(*parts, torch.ones(1, length, dtype=torch.bool), [(0, length, "x")])

    batch = FeatureBatch.cat([sample(3), sample(5)])
    assert batch.clips.shape == (2, 5, 6) and batch.valid.tolist()[0] == [True] * 3 + [False] * 2
    assert batch.labels[0, 3:].sum() == 0 and batch.ids == [(0, 3, "x"), (0, 5, "x")]
    assert batch.to("cpu").distances.shape == (2, 5, 2) and batch.replaced == []


# --- the command --------------------------------------------------------------------------------------------


def write_words(folder, **options) -> list[str]:
    """`write_world`, and the command's words."""
    config = write_world(folder, **options)
    return ["detect-temporal", config.features, config.dataset, "--device", "cpu"]


def test_the_command(tmp_path, capsys):
    words = write_words(tmp_path)
    settings = ["--width", "24", "--depth", "3", "--epochs", "25", "--lr", "0.005", "--picture", "2"]
    assert main([*words, "--output", str(tmp_path / "out"), *settings]) == 0
    shown = capsys.readouterr().out
    assert "mAP" in shown and "jump" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["map"]["0.5"] > 0.9
    found = json.loads((tmp_path / "out" / "detections.json").read_text())["results"]
    assert set(found) == {f"v{number}" for number in range(16, 20)}
    assert (tmp_path / "out" / "segments.png").read_bytes()[:4] == b"\x89PNG"
    again = [*words, "--output", str(tmp_path / "again"), "--detector", str(tmp_path / "out")]
    assert main(again) == 0
    assert json.loads((tmp_path / "again" / "detections.json").read_text())["results"] == found
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "holds a detector" in capsys.readouterr().err
    assert main([*again, "--epochs", "3"]) == 2
    assert "leave out --epochs" in capsys.readouterr().err
    rewrite(tmp_path / "features" / "features.json", "abc", "def")
    assert main(again) == 2
    assert "features of other weights or windows" in capsys.readouterr().err


def test_repeated_segments_are_told_in_training_and_test(tmp_path, capsys):
    words = write_words(tmp_path)
    content = json.loads((tmp_path / "d.json").read_text())
    for video, copies in (("v00", 2), ("v17", 1)):
        own = content["database"][video]["annotations"]
        own += [{**own[0], "segment": [x + 5e-4 for x in own[0]["segment"]]}] * copies
    (tmp_path / "d.json").write_text(json.dumps(content))
    assert main([*words, "--output", str(tmp_path / "out"), "--epochs", "1", "--width", "24"]) == 0
    said = capsys.readouterr().out
    assert "note: 2 segments of" in said and "'v00', 'jump' from" in said  # training
    assert "note: 1 segments of" in said and "'v17', 'jump' from" in said  # test
    assert json.loads((tmp_path / "out" / "results.json").read_text())["dropped"] == 1


def rewrite(path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: (root / "features" / "v03.npy").unlink(), "no features of v03"),
        (lambda root: (root / "features" / "features.json").unlink(), "python -m vmae features"),
        (
            lambda root: (root / "features" / "features.json").write_text("{}"),
            "does not tell the features' windows",
        ),
        (
            lambda root: np.save(root / "features" / "v04.npy", np.zeros((POSITIONS, 5), np.float32)),
            "5 values a window",
        ),
        (
            lambda root: np.save(root / "features" / "v04.npy", np.zeros((20, 6), np.float32)),
            "another video, other windows",
        ),
        (lambda root: rewrite(root / "d.json", "training", "train"), "it has: test, train"),
        (lambda root: rewrite(root / "d.json", '"fps": 10.0', '"fps": 0'), "above 0"),
        (lambda root: rewrite(root / "d.json", '"fps": 10.0', '"fps": NaN'), "above 0"),
        (
            lambda root: rewrite(root / "d.json", '"segment": [', '"segment": [NaN, '),
            "needs 0 <= start < end",
        ),
        (lambda root: (root / "d.json").write_text("[" * 100_000), "nested too deeply"),
    ],
)
def test_bad_input_is_named_before_any_work(tmp_path, capsys, change, message):
    words = write_words(tmp_path)
    change(tmp_path)
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_features_of_another_step(tmp_path, capsys):
    words = write_words(tmp_path, step=8)
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "has 40 windows, but" in capsys.readouterr().err


def test_bad_settings_and_files(tmp_path, capsys):
    with pytest.raises(InputError, match="epochs must be a whole number from 1"):
        DetectorConfig(features="", dataset="", epochs=0)
    words = write_words(tmp_path)
    (tmp_path / "x.pth").write_text("x")
    for name, message in (("x.pth", "is no detector"), ("none.pth", "cannot be read")):
        assert main([*words, "--output", str(tmp_path / "out"), "--detector", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    info = easy_world(1)[0][0].info
    with pytest.raises(InputError, match="no features of a, b, c, d and 1 more"):
        read_items(tmp_path / "empty", {name: info for name in "abcde"}, GEOMETRY)
    database = json.loads((tmp_path / "d.json").read_text())
    for video in database["database"].values():
        video["annotations"] = [] if video["subset"] == "training" else video["annotations"]
    (tmp_path / "d.json").write_text(json.dumps(database))
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "have no segments" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_stopped_command_goes_on_with_the_same_features_only(tmp_path, capsys, monkeypatch):
    words = [*write_words(tmp_path), "--output", str(tmp_path / "out"), "--epochs", "3"]
    plain = TemporalTask.after_step
    monkeypatch.setattr(TemporalTask, "after_step", lambda self, step: os.kill(os.getpid(), signal.SIGINT))
    assert main(words) == 130
    assert "stopped by SIGINT after step 1" in capsys.readouterr().out
    assert not (tmp_path / "out" / "detector.pth").exists()
    monkeypatch.setattr(TemporalTask, "after_step", plain)
    rewrite(tmp_path / "features" / "features.json", "abc", "def")
    assert main(words) == 2
    assert "is not the list that" in (error := capsys.readouterr().err) and "labels differ" in error
    rewrite(tmp_path / "features" / "features.json", "def", "abc")
    assert main(words) == 0
    assert "resuming from" in capsys.readouterr().out and (tmp_path / "out" / "detections.json").exists()


def test_a_detector_from_before_the_common_loop(trained, tmp_path):
    head, config = trained
    names = "width depth drop_rate epochs max_positions lr weight_decay core sigma min_score keep seed"
    old = {name: getattr(config, name) for name in names.split()} | {"batch_size": 4}
    content = {"head": head.state_dict(), "classes": ["jump", "run"], "features": config.about, "config": old}
    torch.save(content, tmp_path / "detector.pth")
    again, read = load_detector(tmp_path, config.about)
    assert read.classes == config.classes and read.sigma == config.sigma
    assert torch.equal(again.embed.weight, head.embed.weight)


def test_no_segments_to_compare_with(tmp_path, capsys):
    words = write_words(tmp_path)
    database = json.loads((tmp_path / "d.json").read_text())
    for video in database["database"].values():
        video["annotations"] = [] if video["subset"] == "test" else video["annotations"]
    (tmp_path / "d.json").write_text(json.dumps(database))
    assert main([*words, "--output", str(tmp_path / "out"), "--epochs", "1"]) == 0
    assert "nothing to compare" in capsys.readouterr().out
    assert (tmp_path / "out" / "detections.json").exists() and not (
        tmp_path / "out" / "results.json"
    ).exists()
