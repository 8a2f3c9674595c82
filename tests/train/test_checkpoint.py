"""Checkpoints are complete or absent, and nothing else is ever read."""

import errno
import pickle

import pytest
import torch

from vmae import InputError, ModelConfig, build_pretrainer
from vmae.interop.upstream import load_weights
from vmae.train.checkpoint import (
    CheckpointFolder,
    export_weights,
    read_training_checkpoint,
    set_aside,
    write_atomically,
)


def content(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((3,), value)}, "optimizer": {"state": {}}, "config": {"model": {"depth": 1}}}


def test_saved_checkpoint_reads_back_without_unpickling(tmp_path):
    path = CheckpointFolder(tmp_path).save(7, content(2.5))
    assert path.name == "checkpoint-00000007.pth"
    read = read_training_checkpoint(path)
    assert read["step"] == 7 and read["config"] == {"model": {"depth": 1}}
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.full((3,), 2.5))


def test_latest_is_the_highest_step_and_old_ones_go(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (9, 10, 100_000_000, 11):
        folder.save(step, content())
    assert [path.name for path in folder.paths()] == ["checkpoint-00000011.pth", "checkpoint-100000000.pth"]
    assert folder.latest().name == "checkpoint-100000000.pth"


def test_no_folder_has_no_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "absent")
    assert folder.latest() is None and folder.paths() == [] and folder.unfinished() == []


def test_unfinished_files_are_ignored_then_removed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    left_over = tmp_path / ".checkpoint-00000009.pth.123.unfinished"
    left_over.write_bytes(b"half")
    assert folder.latest() is None and folder.unfinished() == [left_over]
    folder.save(1, content())
    assert not left_over.exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_failed_write_keeps_what_was_there(tmp_path, monkeypatch, failure):
    folder = CheckpointFolder(tmp_path, keep=1)
    old = folder.save(1, content())

    def broken_save(value, file):
        file.write(b"some bytes")
        raise failure

    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(InputError, match="cannot write .*checkpoint-00000002.pth"):
        folder.save(2, content())
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert read_training_checkpoint(old)["step"] == 1


def test_write_atomically_names_a_folder_it_cannot_write_to(tmp_path):
    with pytest.raises(InputError, match="absent"):
        write_atomically(tmp_path / "absent" / "x", lambda file: file.write(b""))


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        CheckpointFolder(tmp_path, keep=0)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, of the hand-made file
def test_damaged_and_malicious_files_are_refused_by_name(tmp_path):
    path = CheckpointFolder(tmp_path).save(3, content())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="checkpoint-00000003.pth"):
        read_training_checkpoint(path)
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    path.write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(InputError, match="checkpoint-00000003.pth"):
        read_training_checkpoint(path)
    assert not ran.exists()


def test_weights_alone_are_no_training_checkpoint(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="w.pth is not a training checkpoint .*optimizer, step, config.*--init"):
        read_training_checkpoint(tmp_path / "w.pth")


def test_exported_weights_have_the_published_form(tmp_path):
    model = build_pretrainer(ModelConfig.preset("vit_tiny", img_size=32, num_frames=4, depth=1))
    export_weights(tmp_path / "weights.pth", model, step=4)
    assert torch.load(tmp_path / "weights.pth", weights_only=True)["step"] == 4
    state = load_weights(tmp_path / "weights.pth")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_set_aside_moves_a_whole_run_and_never_overwrites(tmp_path):
    for expected in ("previous-1", "previous-2"):
        CheckpointFolder(tmp_path).save(5, content())
        (tmp_path / "log.jsonl").write_text("{}")
        (tmp_path / "mine.txt").write_text("stays")
        assert set_aside(tmp_path).name == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "previous-1", "previous-2"]
    assert sorted(path.name for path in (tmp_path / "previous-2").iterdir()) == ["checkpoint-00000005.pth", "log.jsonl"]
    assert set_aside(tmp_path) is None


def test_set_aside_after_a_step_moves_later_checkpoints_only(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=9)
    for step in (1, 2, 3):
        folder.save(step, content())
    (tmp_path / "log.jsonl").write_text("{}")
    moved = set_aside(tmp_path, after_step=2)
    assert [path.name for path in moved.iterdir()] == ["checkpoint-00000003.pth"]
    assert folder.latest().name == "checkpoint-00000002.pth" and (tmp_path / "log.jsonl").exists()
