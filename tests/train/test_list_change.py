"""A run goes on with the list that it began with, or says what it means to go on with another one."""

import json
import time
from pathlib import Path

import pytest

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.folder import CheckpointFolder, export_weights
from vmae.checkpoint.format import _digest, read_manifest
from vmae.cli import main
from vmae.config import MaskConfig
from vmae.data import Mix, PretrainDataset, VideoEntry, read_data
from vmae.data.list_identity import identify_list, list_changes
from vmae.data.mix import Source
from vmae.synthetic.moving_actors import ActorsConfig, write_actors
from vmae.train.metrics import read_log

CLIP = dict(num_frames=4, stride=1, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))
SIZE = "--model vit_tiny --image-size 32 --num-frames 4 --stride 2 --batch-size 4 --workers 0".split()
SIZE += ["--device", "cpu", "--no-tensorboard"]


def dataset_of(data) -> PretrainDataset:
    return PretrainDataset(data, **CLIP)


@pytest.fixture
def listed(tmp_path):
    """`listed(text, root=None, name="list.txt")`: (data set, root) of a list in a folder with empty files a
    to e and a mix's folders of frames."""
    for name in "abcde":
        (tmp_path / f"{name}.mp4").touch()
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"img_{number:05}.jpg").touch()
            (tmp_path / name / f"f_{number:05}.jpg").touch()

    def make(text: str, root=None, name: str = "list.txt"):
        path = tmp_path / name
        path.write_text(text)
        return dataset_of(read_data(path, root)), str(root or tmp_path)

    return make


def changes(one, other) -> list[str]:
    """From the list of one data set to that of another; the first has been through a manifest."""
    before = json.loads(json.dumps(identify_list(*one)))
    return list_changes(before, *other, identify_list(*other))


PLAIN = "a.mp4\nb.mp4\nc.mp4\nx 0 2\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "# a comment\n\na.mp4 0 -1\nb.mp4,0,-1\n  c.mp4 0 -1 17\n#! pattern=f_{:05}.jpg\n#! "
            "pattern=default\nx 0 2 5\n",
            None,
        ),
        ("a.mp4\nb.mp4\n", ["4 videos then, 2 now", "first 2 are the same"]),
        ("a.mp4\nb.mp4\nc.mp4\nx 0 2\nd.mp4\n", ["4 videos then, 5 now", "number 5, now", "d.mp4 (line 5)"]),
        ("a.mp4\nc.mp4\nb.mp4\nx 0 2\n", ["the entries differ, first at number 2, now", "c.mp4 (line 2)"]),
        ("a.mp4\nb.mp4\nd.mp4\nx 0 2\n", ["first at number 3, now", "d.mp4 (line 3)"]),
        ("a.mp4\nb.mp4\nc.mp4\nx 1 2\n", ["number 4"]),
        ("a.mp4\nb.mp4\nc.mp4\nx 0 3\n", ["number 4"]),
        ("a.mp4\nb.mp4\nc.mp4\n#! pattern=f_{:05}.jpg\nx 0 2\n", ["number 4"]),
        ("#! stride=2\na.mp4\n#! stride=default\nb.mp4\nc.mp4\nx 0 2\n", ["number 1, now", "a.mp4 (line 2)"]),
        (
            "#! pattern=f_{:05}.jpg\na.mp4\nb.mp4\nc.mp4\n#! pattern=default\nx 0 2\n",
            None,
        ),  # of videos it says nothing
    ],
)
def test_what_decides_the_samples_counts_and_nothing_else(listed, text, words):
    found = changes(listed(PLAIN), listed(text, name="other.txt"))
    assert bool(found) == (words is not None), found
    for word in words or ():
        assert word in "; ".join(found)


def test_a_moved_folder_is_the_same_list(tmp_path, listed, monkeypatch):
    own = listed(PLAIN)
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    text = (moved / "list.txt").read_text()
    (moved / "sub").mkdir()
    (moved / "sub" / "list.txt").write_text(text)
    for root in (moved, f"{moved}/", moved / "sub" / ".."):
        data = dataset_of(read_data(moved / "sub" / "list.txt", root))
        assert changes(own, (data, str(root))) == []
    (moved / "absolute.txt").write_text("".join(f"{moved}/{line}\n" for line in text.splitlines()))
    assert changes(own, (dataset_of(read_data(moved / "absolute.txt", moved)), str(moved))) == []
    monkeypatch.chdir(moved)
    assert changes(own, (dataset_of(read_data("list.txt")), "")) == []
    assert changes(own, (dataset_of(read_data("./list.txt", ".")), ".")) == []


MIX = "sources:\n- {{name: {name}, list: one.txt, weight: {weight}}}\n- {{list: two.txt, weight: 1}}\n"


def test_a_mix_is_its_lists_and_weights(tmp_path, listed):
    (tmp_path / "one.txt").write_text("a.mp4\nb.mp4\n")
    (tmp_path / "two.txt").write_text("c.mp4\n")
    own = listed(MIX.format(name="k", weight=3), name="mix.yaml")
    assert changes(own, listed(MIX.format(name="renamed", weight=3.0), name="mix.yaml")) == []
    other = changes(own, listed(MIX.format(name="k", weight=4), name="mix.yaml"))
    assert other == [
        "mixed by weights 3 (2 videos), 1 (1 videos) then, by weights 4 (2 videos), 1 (1 videos) now"
    ]
    natural = listed("mixing: natural\nsources: [{list: one.txt}, {list: two.txt}]\n", name="natural.yaml")
    assert "by nothing but their numbers of videos now" in changes(own, natural)[0]
    assert (
        changes(natural, listed("a.mp4\nb.mp4\nc.mp4\n")) == []
    )  # one list in three lines, or two: the same samples
    (tmp_path / "one.txt").write_text("a.mp4\n")
    (tmp_path / "two.txt").write_text("b.mp4\nc.mp4\n")  # the same videos in the same order, of other sources
    assert "weights 3 (1 videos)" in changes(own, listed(MIX.format(name="k", weight=3), name="mix.yaml"))[0]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.mp4").touch()
    rooted = listed(
        "sources: [{list: one.txt, root: deep, weight: 3}, {list: two.txt, weight: 1}]\n", name="rooted.yaml"
    )
    assert (
        changes(listed(MIX.format(name="k", weight=3), name="mix.yaml"), rooted) == []
    )  # its root alone differs


def test_a_long_list_is_hashed_in_a_moment_and_a_difference_narrowed_down():
    """1.35 million lines, as UnlabeledHybrid has them, take 0.55 s of one core; here a tenth."""
    entries = [
        VideoEntry(f"/data/kinetics/train/some_class_name/clip_{n:07}.mp4", line=n) for n in range(135_000)
    ]
    own = dataset_of(Mix(entries, [Source("k", 0, len(entries), 1.0, "/data/kinetics")])), ""
    began = time.process_time()
    identity = identify_list(*own)
    assert time.process_time() - began < 1
    assert len(json.dumps(identity)) < 3000
    swapped = list(entries)
    swapped[70_000], swapped[70_001] = swapped[70_001], swapped[70_000]
    assert changes(own, (dataset_of(swapped), "/data/kinetics")) == [
        "the entries differ, first among numbers 69631 to 70685"
    ]
    assert changes(own, (dataset_of(entries[:-1]), "/data/kinetics")) == [
        "135000 videos then, 134999 now",
        "the entries differ, first among numbers 133986 to 134999",
    ]
    assert changes(
        own, (dataset_of(entries[:-2000]), "/data/kinetics")
    ) == [  # cut into other parts than the list of before
        "135000 videos then, 133000 now",
        "the entries differ, first among numbers 132931 to 133000",
    ]


# --- The commands ---


def edit(path: Path, change) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def test_pretrain_refuses_another_list_and_goes_on_if_asked(pretrain, tmp_path, capsys):
    data, run = tmp_path / "frames.txt", tmp_path / "run"
    assert pretrain(run, "--steps", "2") == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    edit(data, lambda lines: ["# my best videos\n", "\n", *lines])
    assert pretrain(run, "--steps", "3", "--dry-run") == 0  # the same videos
    edit(data, lambda lines: lines[6:1:-1])
    capsys.readouterr()
    assert pretrain(run, "--steps", "4") == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"{data} is not the list that {run}/checkpoint-00000002 was trained on" in error
    )
    assert "12 videos then, 5 now; the entries differ, first at number 1, now" in error
    assert "--allow-list-change" in error and "come twice and others not at all" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert pretrain(run, "--steps", "4", "--allow-list-change") == 0
    assert "allowed: from step 2 on, samples are drawn from the new list" in capsys.readouterr().out
    assert pretrain(run, "--steps", "5") == 0  # it is the run's list now
    text = capsys.readouterr().out
    assert "trained on" not in text and [record["step"] for record in read_log(run / "log.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_checkpoint_of_before_goes_on_with_a_note(pretrain, tmp_path, capsys):
    assert pretrain(tmp_path / "run", "--steps", "2") == 0
    manifest = CheckpointFolder(tmp_path / "run").latest() / "manifest.json"
    content = {key: value for key, value in read_manifest(manifest.parent).items() if key != "list"}
    manifest.write_text(json.dumps({**content, "sha256": _digest(content)}))
    capsys.readouterr()
    assert pretrain(tmp_path / "run", "--steps", "3") == 0
    assert "was written before lists were kept: whether" in capsys.readouterr().out
    assert read_manifest(CheckpointFolder(tmp_path / "run").latest())["list"]["videos"] == 12


def test_finetune_and_distil_refuse_other_labels(labelled_world, tmp_path, capsys):
    data, teacher = tmp_path / "train.txt", tmp_path / "teacher.pth"
    config = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
    export_weights(teacher, build_classifier(config, 3).state_dict(), config={"model": config.to_dict()})
    for command, more in (("finetune", []), ("distil", ["--teacher", str(teacher)])):
        data.write_text((labelled_world / "train.txt").read_text())
        words = [
            command,
            "--data",
            str(data),
            "--output",
            str(tmp_path / command),
            *SIZE,
            *more,
            "--num-sample",
            "1",
        ]
        assert main([*words, "--steps", "1"]) == 0
        edit(data, lambda lines: [lines[0], lines[1].replace(" 1\n", " 2\n"), *lines[2:]])
        capsys.readouterr()
        assert main([*words, "--steps", "2"]) == 2
        error = capsys.readouterr().err
        assert "the labels differ, first at number 2, now" in error and "entries differ" not in error
        assert main([*words, "--steps", "2", "--allow-list-change", "--dry-run"]) == 0


def test_finetune_detection_refuses_other_boxes(tmp_path, capsys):
    actors = write_actors(tmp_path / "actors", ActorsConfig(train=1, validation=1, scenes=2), workers=1)
    files = [f"--annotations {actors['train']} --videos {actors['videos']} --actions {actors['actions']}"]
    words = ["finetune-detection", *" ".join(files).split(), "--output", str(tmp_path / "run"), *SIZE]
    assert main([*words, "--steps", "1"]) == 0
    actors["videos"].rename(tmp_path / "moved")
    words[words.index("--videos") + 1] = str(tmp_path / "moved")
    assert main([*words, "--steps", "2", "--dry-run"]) == 0
    edit(actors["train"], lambda lines: lines[:-1])
    capsys.readouterr()
    assert main([*words, "--steps", "2"]) == 2
    assert (
        f"{actors['train']} is not the list" in (error := capsys.readouterr().err)
        and "labels differ" in error
    )


# --- The batch, stored once ---


def test_the_effective_batch_is_what_the_run_makes_it(pretrain, tmp_path, labelled_world):
    from vmae.train.optim import OptimConfig
    from vmae.train.parallel import Parallel
    from vmae.train.prepare import prepare
    from vmae.train.pretrain_settings import PretrainConfig, RunConfig
    from vmae.train.tasks.pretrain import PretrainTask

    list_file = tmp_path / "list.txt"
    list_file.write_text("".join(f"{labelled_world}/v{video:02} 1 10\n" for video in range(12)))
    model = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4, patch_size=8)
    own = dict(
        model=model,
        mask=CLIP["mask"],
        optim=OptimConfig(lr=1.0),
        data=str(list_file),
        steps=8,
        warmup_steps=0,
    )
    run = RunConfig(output=str(tmp_path / "run"), batch_size=2, accumulate=3, device="cpu")
    for given in ({}, {"effective_batch": 6}):
        prepared = prepare(PretrainTask(PretrainConfig(**own, **given)), run, Parallel())
        assert prepared.config.effective_batch == 6 and prepared.steps_per_epoch == 2
        assert prepared.optim.lr == pytest.approx(6 / 256)
    with pytest.raises(
        InputError, match="effective_batch is 32, but batch_size 2 x accumulate 3 x 1 ranks make 6"
    ):
        prepare(PretrainTask(PretrainConfig(**own, effective_batch=32)), run, Parallel())
