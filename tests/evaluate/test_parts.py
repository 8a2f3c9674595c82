"""`--part i/n` and `--merge` of evaluate, features and detect: the files of one job, bit by bit, for any
number of parts and ranks, after any stop."""

import json

import pytest
import torch

from vmae import ModelConfig, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.cli import main
from vmae.evaluate import classify, detection, features
from vmae.files.folder_lock import LOCK_NAME, FolderLock
from vmae.model.detector import build_detector
from vmae.synthetic.moving_actors import ACTIONS, ActorsConfig, write_actors
from vmae.train.guard import LateNumbers

MODEL = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
CLIP = {"num_frames": 4, "image_size": 32, "stride": 2}
BLOCK = 3  # of detect: six blocks, of one and a half batches each


@pytest.fixture(scope="module")
def commands(tmp_path_factory, labelled_world):
    """The words of each command, but for --output; evaluate and features meet a file that is no video."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    model = build_classifier(MODEL, 3)
    torch.nn.init.normal_(model.head.weight)
    export_weights(root / "c.pth", model.state_dict(), config={"model": MODEL.to_dict(), "clip": CLIP})
    detector = build_detector(MODEL, len(ACTIONS), init_scale=20.0)
    about = {"model": MODEL.to_dict(), "clip": CLIP}
    about |= {"action_ids": list(ACTIONS), "action_names": list(ACTIONS.values())}
    export_weights(root / "d.pth", detector.state_dict(), config=about)
    actors = write_actors(root / "actors", ActorsConfig(train=1, validation=4, scenes=4), workers=1)
    (root / "bad.mp4").write_text("no video")
    videos = [labelled_world / f"v{number:02}" for number in range(8)]
    (root / "labelled.txt").write_text(
        "".join(f"{video} 10 {number % 3}\n" for number, video in enumerate(videos)) + f"{root}/bad.mp4 0\n"
    )
    (root / "list.txt").write_text(f"{root}/bad.mp4 0 -1\n" + "".join(f"{video} 1 10\n" for video in videos))
    words = {
        "evaluate": [root / "labelled.txt", "--checkpoint", root / "c.pth", "--segments", 1, "--crops", 1]
        + ["--workers", 0, "--batch-size", 3],
        "features": [root / "list.txt", "--checkpoint", root / "c.pth", "--step", 2, "--batch-size", 3],
        "detect": ["--checkpoint", root / "d.pth", "--videos", actors["videos"], "--workers", 0]
        + ["--annotations", actors["val"], "--pictures", 1, "--batch-size", 2],
    }
    return {name: [name, *map(str, own), "--device", "cpu"] for name, own in words.items()}


@pytest.fixture(autouse=True)
def batches_matter(monkeypatch):
    """In large models and on a GPU, the last bits depend on what else is in a batch; here, the first ones."""
    features_of_batch, score_batch = features._features, detection._score_batch

    def mixed_features(model, clips, config, embedded):
        return LateNumbers(features_of_batch(model, clips, config, embedded).wait() + clips.float().mean())

    def mixed_scores(model, frames, batch, *more):
        shift = sum(2**-sample.frame for sample in batch) / 100
        for record in score_batch(model, frames, batch, *more):
            yield {**record, "scores": [[score * (1 - shift) for score in box] for box in record["scores"]]}

    monkeypatch.setattr(detection, "BLOCK", BLOCK)
    monkeypatch.setattr(features, "_features", mixed_features)
    monkeypatch.setattr(detection, "_score_batch", mixed_scores)


@pytest.fixture(params=["evaluate", "features", "detect"])
def job(request, commands, tmp_path):
    """`job(folder, *flags)` runs a command; `job.code` is what it ends with when all is done."""

    def start(folder, *flags):
        torch.set_num_threads(1)
        return main([*commands[request.param], "--output", str(tmp_path / folder), *map(str, flags)])

    start.name, start.code, start.items = request.param, 1, 9
    if request.param == "detect":
        start.code, start.items = 0, 16
    return start


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_give_the_files_of_one_job(job, tmp_path, capsys):
    assert job("whole") == job.code
    said = capsys.readouterr().out.replace("whole", "parts").splitlines()
    codes = [job("parts", "--part", f"{number}/3") for number in (3, 1, 2)]
    assert sorted(codes) == [0, 0, job.code]
    capsys.readouterr()
    assert job("parts", "--merge") == job.code
    told = capsys.readouterr().out.splitlines()
    assert told == said
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.slow
def test_what_comes_after_a_merge_changes_nothing(job, tmp_path):
    for number in (1, 2):
        job("parts", "--part", f"{number}/2")
    assert job("parts", "--merge") == job.code
    before = files(tmp_path / "parts")
    assert job("parts", "--merge") == job.code and files(tmp_path / "parts") == before
    assert job("parts", "--part", "2/3") in (0, job.code)  # of another n even: all is there
    assert job("parts", "--merge") == job.code and files(tmp_path / "parts") == before
    assert job("parts") == job.code and files(tmp_path / "parts") == before


def test_missing_parts_are_named(job, tmp_path, capsys):
    assert job("out", "--merge") == 2
    error = capsys.readouterr().err
    assert f"has no parts to join: {job.items} of {job.items}" in error and error.count("\n") == 1
    assert job("out", "--part", "2/3") in (0, 1)
    capsys.readouterr()
    with FolderLock(tmp_path / "out" / "parts" / "3-of-3", "a part"):
        assert job("out", "--merge") == 2
    error = capsys.readouterr().err
    assert "not started), 3/3 (" in error and "at work); run them to their end" in error
    assert "parts 1/3 (" in error and "2/3" not in error and error.count("\n") == 1
    assert not (tmp_path / "out" / LOCK_NAME).exists()


def test_what_does_not_belong_together(job, tmp_path, capsys):
    assert job("out", "--part", "1/3") in (0, 1)
    capsys.readouterr()
    for flags, text in (
        (["--part", "1/7"], "holds parts of 3 (1/3), and this is 1/7: go on with --part i/3"),
        ([], "holds parts of 3 (1/3), and this is 1/1"),
        (["--part", "2/3", "--dtype", "bfloat16"], 'dtype "float32", "bfloat16"); choose another --output'),
        (["--merge", "--dtype", "bfloat16"], 'dtype "float32", "bfloat16"); choose another --output'),
        (["--merge", "--part", "1/3"], "not allowed with"),
        (["--part", "4/3"], "must be i/n with i from 1 to n"),
    ):
        assert job("out", *flags) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error


def test_the_same_part_twice_at_once(job, tmp_path, capsys):
    with FolderLock(tmp_path / "out" / "parts" / "1-of-2", "part 1/2 of a test"):
        assert job("out", "--part", "1/2") == 2
        assert "is in use by part 1/2 of a test" in capsys.readouterr().err
        assert job("out", "--part", "2/2") in (0, 1)
    capsys.readouterr()
    with FolderLock(tmp_path / "out", "a merge"):
        assert job("out", "--part", "1/2") == 2 and job("out", "--merge") == 2
        assert capsys.readouterr().err.count("is in use by a merge") == 2


def on_rank(words):
    torch.set_num_threads(1)
    return main(words)


@pytest.mark.slow
@pytest.mark.parametrize("count, ranks", [(1, [2]), (1, [4]), (7, [1]), (3, [2, 1, 4])])
def test_any_number_of_parts_and_ranks(job, commands, run_ranks, tmp_path, count, ranks):
    assert job("whole") == job.code
    words = [*commands[job.name], "--output", str(tmp_path / "out"), "--part"]
    for number in range(count):
        started = ranks[number % len(ranks)]
        run_ranks(started, on_rank, [*words, f"{number + 1}/{count}"])
    assert job("out", "--merge") == job.code
    assert files(tmp_path / "out") == files(tmp_path / "whole")


STOPS = {
    "evaluate": (classify, "view_probabilities"),
    "features": (features, "write_atomically"),
    "detect": (detection, "_score_batch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2])
def test_a_part_goes_on_where_it_was_stopped_with_other_ranks(
    job, commands, run_ranks, tmp_path, monkeypatch, before
):
    assert job("whole") == job.code
    module, name = STOPS[job.name]
    original, calls = getattr(module, name), []

    def stop_at_the_third(*args, **options):
        if name == "_score_batch" or ".npy" in str(args[0]) or name == "view_probabilities":
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, name, stop_at_the_third)
    assert job("out", "--part", "1/2") == 130
    monkeypatch.setattr(module, name, original)
    words = [*commands[job.name], "--output", str(tmp_path / "out"), "--part"]
    run_ranks(before, on_rank, [*words, "1/2"])
    assert job("out", "--part", "2/2") in (0, 1)
    assert job("out", "--merge") == job.code
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_every_video_of_a_part_is_bad(commands, tmp_path, capsys):
    """Of a part that is no error; of the whole it is one, as of one job."""
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "b.mp4").write_text("no video")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.mp4 0\n{tmp_path}/b.mp4 1\n")
    _, _, *rest = commands["evaluate"]
    words = ["evaluate", str(tmp_path / "list.txt"), *rest, "--output", str(tmp_path / "out")]
    assert [main([*words, "--part", f"{number}/2"]) for number in (1, 2)] == [1, 1]
    assert "part 1/2: 0 videos tested, 1 could not be decoded" in capsys.readouterr().out
    assert main([*words, "--merge"]) == 2
    assert "no video of" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["undecodable"] == 2
