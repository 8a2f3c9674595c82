"""A run's folder: names, what is kept, files that replace others at once, and one file of weights."""

import os

import pytest
import torch

from vmae import InputError, ModelConfig, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder, export_weights, find_weights, set_aside
from vmae.checkpoint.published import load_weights, read_settings_and_weights
from vmae.checkpoint.saver import Saver
from vmae.files.atomic import write_atomically


def save(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        Saver(folder).save(
            step, {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}, {"config": {}}
        )


def names(folder: CheckpointFolder) -> list[str]:
    return [path.name for path in folder.paths()]


def test_latest_is_the_highest_step_and_old_ones_go(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 9, 10, 100_000_000, 11)
    assert names(folder) == ["checkpoint-00000011", "checkpoint-100000000"]
    assert folder.latest().name == "checkpoint-100000000"
    assert len(list(tmp_path.iterdir())) == 2


def test_every_so_many_steps_stay(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1, keep_every=4)
    save(folder, *range(2, 12, 2))
    assert names(folder) == ["checkpoint-00000004", "checkpoint-00000008", "checkpoint-00000010"]


def test_no_folder_has_no_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "absent")
    assert folder.latest() is None and folder.paths() == [] and folder.unfinished() == []


def test_unfinished_folders_are_ignored_then_removed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    left_over = tmp_path / ".checkpoint-00000009.unfinished"
    left_over.mkdir()
    (left_over / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "checkpoint-00000008").mkdir()  # no manifest: none of ours
    assert folder.latest() is None and folder.unfinished() == [left_over]
    save(folder, 1)
    assert not left_over.exists()


def test_a_save_leaves_a_file_alone_that_another_thread_is_writing(tmp_path):
    """The ids of log services are written by a thread, which the first save may meet."""
    # Of a killed process: in a container, the next one often has the same number.
    left_over = tmp_path / f".weights.pth.{os.getpid()}-0123abcd.unfinished"
    left_over.write_bytes(b"half")

    def write(file):
        save(CheckpointFolder(tmp_path), 1)
        file.write(b"whole")

    write_atomically(tmp_path / "sinks.json", write)
    assert (tmp_path / "sinks.json").read_bytes() == b"whole" and not left_over.exists()


def test_a_deletion_cut_short_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    monkeypatch.setattr("shutil.rmtree", lambda *path, **options: None)
    save(folder, 2)
    assert names(folder) == ["checkpoint-00000002"] and len(folder.unfinished()) == 1


def test_numbers_out_of_range_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least 1 checkpoint"):
        CheckpointFolder(tmp_path, keep=0)
    with pytest.raises(InputError, match="keep_every must be at least 1"):
        CheckpointFolder(tmp_path, keep_every=0)


def test_write_atomically_names_a_folder_it_cannot_write_to_and_keeps_the_old_file(tmp_path):
    with pytest.raises(InputError, match="absent"):
        write_atomically(tmp_path / "absent" / "x", lambda file: file.write(b""))
    (tmp_path / "x").write_text("old")

    def half(file):
        file.write("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        write_atomically(tmp_path / "x", half, binary=False)
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_exported_weights_have_published_names_and_say_what_they_are_of(tmp_path, name):
    state = build_pretrainer(ModelConfig.preset("vit_tiny", img_size=32, num_frames=4, depth=1)).state_dict()
    export_weights(tmp_path / name, state, config={"model": {"depth": 1}}, step=4)
    read = load_weights(tmp_path / name)
    assert read.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in read.items())
    assert read_settings_and_weights(tmp_path / name)[0] == {"model": {"depth": 1}}
    assert find_weights(tmp_path / name) == tmp_path / name


def test_exported_file_opens_as_the_published_code_opens_it(tmp_path):
    export_weights(tmp_path / "weights.pth", {"w": torch.ones(2)}, step=4)
    assert torch.load(tmp_path / "weights.pth", weights_only=True)["step"] == 4


def test_set_aside_moves_a_whole_run_and_never_overwrites(tmp_path):
    for expected in ("previous-1", "previous-2"):
        save(CheckpointFolder(tmp_path), 5)
        (tmp_path / "log.jsonl").write_text("{}")
        (tmp_path / "mine.txt").write_text("stays")
        assert set_aside(tmp_path).name == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "previous-1", "previous-2"]
    assert sorted(path.name for path in (tmp_path / "previous-2").iterdir()) == [
        "checkpoint-00000005",
        "log.jsonl",
    ]
    assert set_aside(tmp_path) is None


def test_set_aside_after_a_step_moves_later_checkpoints_only(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=9)
    save(folder, 1, 2, 3)
    (tmp_path / "log.jsonl").write_text("{}")
    moved = set_aside(tmp_path, after_step=2)
    assert [path.name for path in moved.iterdir()] == ["checkpoint-00000003"]
    assert folder.latest().name == "checkpoint-00000002" and (tmp_path / "log.jsonl").exists()
