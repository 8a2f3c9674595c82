"""Checkpoints are complete or absent, damage is named, nothing in them is executed, and a background save
saves the same."""

import contextlib
import json
import os
import pickle
import resource
import signal

import pytest
import torch

import vmae.checkpoint.saver as saver_module
from vmae import InputError
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import (
    MANIFEST,
    find_damage,
    load_tensors,
    read_group,
    read_manifest,
    tensor_layouts,
)
from vmae.checkpoint.saver import Saver, share_of
from vmae.files.atomic import why_not_written, write_atomically


def content(value: float = 1.0, size: int = 3) -> dict:
    return {"model": {"a.w": torch.full((size,), value)}, "optimizer": {"a.w.step": torch.tensor(value)}}


def save(folder, step=7, value=1.0, background=False, **more):
    saver = Saver(CheckpointFolder(folder, keep=9), background=background)
    saver.save(step, content(value, **more), {"config": {"betas": (0.9, 0.95)}})
    saver.finish()
    return saver.folder.path_of(step)


@pytest.mark.parametrize("background", [False, True])
def test_a_saved_checkpoint_reads_back(tmp_path, background):
    path = save(tmp_path, value=2.5, background=background)
    assert path.name == "checkpoint-00000007" and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    manifest = read_manifest(path)
    assert manifest["step"] == 7 and manifest["config"] == {"betas": [0.9, 0.95]} and manifest["ranks"] == 1
    assert set(manifest["files"]) == {"__0_0.distcp", ".metadata"} and find_damage(path) == []
    assert torch.equal(read_group(path)["a.w"], torch.full((3,), 2.5))
    assert tensor_layouts(path)["optimizer.a.w.step"] == (torch.Size([]), torch.float32)


def test_a_background_save_holds_what_was_there_when_it_began(tmp_path):
    saver = Saver(CheckpointFolder(tmp_path), background=True)
    tensors = content(size=4_000_000)
    saver.save(1, tensors, {"config": {}})
    tensors["model"]["a.w"].fill_(5.0)
    saver.save(2, tensors, {"config": {}})  # waits for the first
    saver.finish()
    assert [read_group(path)["a.w"].unique().item() for path in saver.folder.paths()] == [1.0, 5.0]


def test_copies_share_the_tensors_by_bytes():
    tensors = {"model": {f"m{n}": torch.zeros(n) for n in range(40)}, "ema": {"only": torch.zeros(100)}}
    shares = [share_of(tensors, copy, 3) for copy in range(3)]
    sizes = [sum(x.numel() for group in share.values() for x in group.values()) for share in shares]
    assert sum(sizes) == 880 and max(sizes) - min(sizes) <= 100
    names = [name for share in shares for group in share.values() for name in group]
    assert sorted(names) == sorted([*tensors["model"], "only"])
    assert share_of(tensors, 0, 1) == tensors and share_of({"model": {}}, 0, 1) == {}


def test_copies_of_a_gpus_tensors_are_staged_in_memory_that_is_kept(tmp_path, monkeypatch):
    """The GPU and its page-locked memory are stood in for."""
    made, closed, given = [], [], []

    class Stager:
        def __init__(self, options):
            made.append(options)

        def close(self):
            closed.append(True)

    def async_save(tensors, *, async_stager=None, **where):
        given.append(async_stager)
        return real(tensors, **where)

    real = saver_module.dcp.async_save
    monkeypatch.setattr(saver_module, "DefaultStager", Stager)
    monkeypatch.setattr(saver_module.dcp, "async_save", async_save)
    saver = Saver(CheckpointFolder(tmp_path), background=True)
    saver.save(1, content(), {"config": {}})
    assert given == [None]
    monkeypatch.setattr(saver_module, "on_gpu", lambda tensor: True)
    for step in (2, 3):
        saver.save(step, content(), {"config": {}})
    assert len(made) == 1 and isinstance(given[1], Stager) and given[1] is given[2] and not closed
    assert made[0].use_pinned_memory and not made[0].use_async_staging
    saver.close()
    assert closed == [True] and len(saver.folder.paths()) == 3


@pytest.fixture
def small_files():
    """A disk that is full after 100 kB, as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, small_files, background):
    old = save(tmp_path, step=1)
    with pytest.raises(
        InputError, match="cannot write .*checkpoint-00000002: .*the earlier checkpoints are untouched"
    ):
        save(tmp_path, step=2, size=1_000_000, background=background)
    assert [entry.name for entry in tmp_path.iterdir()] == [old.name]
    assert find_damage(old) == [] and read_manifest(old)["step"] == 1


def test_an_error_of_the_run_is_not_hidden_by_one_of_its_save(tmp_path, small_files):
    with pytest.raises(KeyError), contextlib.ExitStack() as stack:
        saver = Saver(CheckpointFolder(tmp_path), background=True)
        stack.push(saver.close)
        saver.save(1, content(size=1_000_000), {"config": {}})
        raise KeyError("first")


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_damage_is_found_and_named(tmp_path, name):
    for number, (change, words) in enumerate(
        [
            (lambda data: data.__delitem__(slice(10, None)), f"{name} has 10 bytes instead of"),
            (lambda data: data.__setitem__(20, data[20] ^ 4), f"{name} is not what was written"),
            (None, f"{name} is missing"),
        ]
    ):
        path = save(tmp_path, step=number)
        (path / name).unlink() if change is None else rewrite(path / name, change)
        assert len(found := find_damage(path)) == 1 and words in found[0]


def test_each_rank_looks_at_its_share_of_the_files(tmp_path):
    path = save(tmp_path)
    for name in ("__0_0.distcp", ".metadata"):
        (path / name).unlink()
    assert [find_damage(path, part, 2) for part in (0, 1)] == [
        [".metadata is missing"],
        ["__0_0.distcp is missing"],
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-30], "manifest.json cannot be read"),
        (lambda text: text.replace('"step": 7', '"step": 8'), "manifest.json is not what was written"),
        (lambda text: "[]", "manifest.json cannot be read"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, change, words):
    path = save(tmp_path)
    (path / MANIFEST).write_text(change((path / MANIFEST).read_text()))
    with pytest.raises(InputError, match=words):
        read_manifest(path)
    older = save(tmp_path, step=3)
    good, problems = CheckpointFolder(tmp_path).last_good()
    assert good == older and "checkpoint-00000007" in problems[0]


def test_weights_alone_are_no_training_checkpoint(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="w.pth is not a training checkpoint.*--init"):
        read_manifest(tmp_path / "w.pth")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, of the hand-made file
def test_a_malicious_pickle_is_refused_unexecuted(tmp_path):
    """In the description, and in place of a tensor, with a manifest that agrees with both."""
    path = save(tmp_path)
    metadata = path / ".metadata"
    whole = pickle.loads(metadata.read_bytes())
    whole.planner_data = Malicious(tmp_path / "ran")
    metadata.write_bytes(pickle.dumps(whole))
    with pytest.raises(
        InputError, match="io.open does not belong into a checkpoint's metadata; it was not executed"
    ):
        read_group(path)
    whole.planner_data, whole.state_dict_metadata["model.a.w"] = None, 3
    metadata.write_bytes(pickle.dumps(whole))
    with pytest.raises(InputError, match="model.a.w is no tensor"):
        read_group(path)
    path = save(tmp_path, step=8)
    (path / "__0_0.distcp").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")) * 100)
    with pytest.raises(InputError, match="checkpoint-00000008 cannot be read"):
        read_group(path)
    assert not (tmp_path / "ran").exists()


def test_anything_but_tensors_is_refused(tmp_path):
    saver = Saver(CheckpointFolder(tmp_path))
    saver.save(1, {"model": {"w": "text"}}, {"config": {}})
    with pytest.raises(
        InputError, match="holds more than tensors: .metadata: .*BytesStorageMetadata does not belong"
    ):
        tensor_layouts(saver.folder.path_of(1))


def test_missing_tensors_and_groups_are_errors(tmp_path):
    path = save(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_tensors(path, {"model": {"other": torch.ones(3)}})
    with pytest.raises(InputError, match="holds no average"):
        read_group(path, "average")


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, value=1.0)
    path = save(tmp_path, value=2.0)
    assert read_group(path)["a.w"][0] == 2.0 and os.listdir(tmp_path) == [path.name]


def test_a_later_form_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vmae.checkpoint.format.FORMAT", 2)
    path = save(tmp_path)
    monkeypatch.undo()
    assert json.loads((path / MANIFEST).read_text())["format"] == 2
    with pytest.raises(InputError, match="has form 2; this code reads form 1"):
        read_manifest(path)


@pytest.fixture
def disk_calls(monkeypatch):
    """What reaches the disk, in order: ("sync", path) and ("rename", from, to)."""
    calls, sync, rename, link_of = [], os.fsync, os.replace, "/proc/self/fd/{}"

    def note_sync(file):
        handle = file if isinstance(file, int) else file.fileno()
        calls.append(("sync", os.path.realpath(link_of.format(handle))))
        return sync(handle)

    def note_rename(source, target, **options):
        calls.append(("rename", os.path.realpath(source), os.path.realpath(target)))
        return rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    return calls


@pytest.mark.parametrize("background", [False, True])
def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, disk_calls, background):
    """A crash of the machine after the rename must not leave a folder that looks complete and is not."""
    path = save(tmp_path, background=background)
    beside = f"{tmp_path}/.{path.name}.unfinished"
    named = disk_calls.index(("rename", beside, str(path)))
    before = [call[1] for call in disk_calls[:named] if call[0] == "sync"]
    # torch syncs its description under the name that it has while it is written.
    wanted = {f"{beside}/{file.name}" for file in path.iterdir() if file.name != ".metadata"} | {beside}
    assert wanted <= set(before) and any(name.startswith(f"{beside}/.metadata") for name in before)
    assert before.index(f"{beside}/{MANIFEST}") < before.index(
        beside
    )  # the folder last: it holds the others' names
    assert ("sync", str(tmp_path)) in disk_calls[named:]


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, disk_calls):
    write_atomically(tmp_path / "x.json", lambda file: file.write(b"{}"))
    (kind, written), (_, source, target), last = disk_calls
    assert (
        kind == "sync"
        and written == source
        and target == str(tmp_path / "x.json")
        and last == ("sync", str(tmp_path))
    )


def test_torchs_word_for_a_full_disk_is_translated_where_its_cause_is_lost(tmp_path):
    """Errors of other ranks come without their cause."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert why_not_written(error, tmp_path / "x", 1 << 60).startswith(
        "No space left on device (1152921504606.8 MB wanted, "
    )
    assert why_not_written(error, tmp_path / "x", 1) == "only a part could be written (0.0 MB wanted)"
    assert why_not_written(RuntimeError("other\nlines"), tmp_path / "x") == "other"
    error.__context__ = OSError(122, "Disk quota exceeded")
    assert why_not_written(error, tmp_path / "gone" / "x", 5_000_000) == "Disk quota exceeded (5.0 MB wanted)"


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    saver = Saver(CheckpointFolder(tmp_path / "gone"))
    with pytest.raises(InputError, match="output folder .*gone is gone"):
        saver.save(1, content(), {"config": {}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_that_goes_away_during_a_save_gets_no_checkpoint(tmp_path, background):
    """Its owner's check fails before the rename; an empty folder, as torch's writer makes one, goes too."""
    (tmp_path / "run").mkdir()
    calls = []

    def check():
        calls.append(len(os.listdir(tmp_path / "run")))
        if len(calls) == 2:
            raise InputError("the folder is gone")

    saver = Saver(CheckpointFolder(tmp_path / "run", check=check), background=background)
    with pytest.raises(InputError, match="^the folder is gone$"):
        saver.save(1, content(), {"config": {}})
        saver.finish()
    assert calls == [0, 1] and list(tmp_path.iterdir()) == []
