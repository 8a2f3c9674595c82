"""Latents stored once for fixed views train the same student, and others are refused by what differs."""

import json
from pathlib import Path

import pytest
import torch

from vmae import DualMask, InputError, ModelConfig, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import load_weights
from vmae.data.view_store import LatentStore
from vmae.model.target import Target

TEACHER = dict(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two pre-trained teachers with random weights: a.pth and b.pth."""
    folder = tmp_path_factory.mktemp("teachers")
    config = ModelConfig(**TEACHER, img_size=32, num_frames=8, patch_size=8)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        state = build_pretrainer(config).state_dict()
        export_weights(folder / f"{name}.pth", state, config={"model": config.to_dict(), "stride": 1})
    return folder


@pytest.fixture
def student(pretrain, tmp_path, monkeypatch):
    """`student(output, *flags)`: `pretrain` with a latent target, on six videos."""
    monkeypatch.chdir(tmp_path)
    six = tmp_path / "six.txt"
    six.write_text("".join((tmp_path / "frames.txt").read_text().splitlines(True)[:6]))

    def start(output, *flags, data=six):
        return pretrain(output, "--target", "teacher", "--teacher-dtype", "float32", *flags, data=data)

    return start


def losses(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_live_and_stored_latents_train_the_same_student(student, teachers, tmp_path, capsys):
    """Six steps are two epochs; the teacher is not needed once its latents are there."""
    teacher, flags = ["--teacher", teachers / "a.pth"], ["--num-sample", "2", "--warmup-steps", "0"]
    assert student("live", *teacher, *flags) == 0
    capsys.readouterr()
    assert student("none", *teacher, *flags, "--latents", "L", "--store", "2", "--dry-run") == 0
    told = "latents: 2 epochs x 6 videos x 2 clips x 24 counted tokens x 32 values x 2 = 36,864 bytes in L"
    assert told in capsys.readouterr().out and not (tmp_path / "L").exists()
    assert student("none", *teacher, *flags, "--latents", "L", "--store", "2") == 0
    out = capsys.readouterr().out
    assert told in out and " are free" in out and "L: bf16 latents of 2 epochs x 6 samples are stored" in out
    assert not (tmp_path / "none").exists()
    sizes = [(tmp_path / "L" / f"epoch-000{epoch}.bf16").stat().st_size for epoch in range(2)]
    assert sizes == [6 * 2 * 24 * 32 * 2] * 2
    assert student("stored", *flags, "--latents", "L") == 0
    assert losses("stored") == pytest.approx(losses("live"), rel=2e-3)  # but for bf16
    live, stored = (load_weights(tmp_path / name / "weights.pth") for name in ("live", "stored"))
    torch.testing.assert_close(
        live["decoder.head.weight"], stored["decoder.head.weight"], atol=0.02, rtol=0.1
    )


def test_stored_epochs_come_again_and_a_run_goes_on(student, teachers, capsys):
    flags = ["--teacher", teachers / "a.pth", "--latents", "L"]
    assert student("none", *flags, "--store", "1") == 0
    assert student("run", *flags, "--steps", "8", "--save-every", "4") == 0
    assert student("half", *flags, "--steps", "8", "--save-every", "4", "--workers", "1") == 0
    assert losses("run") == losses("half")
    assert student("run", "--latents", "L", "--steps", "10") == 0  # goes on without the teacher's file
    assert len(losses("run")) == 10 and "resuming from" in capsys.readouterr().out


@pytest.mark.slow
def test_latents_of_other_views_are_refused(student, teachers, tmp_path, labelled_world, capsys):
    teacher = ["--teacher", teachers / "a.pth"]
    assert student("none", *teacher, "--latents", "L", "--store", "1") == 0
    reversed_list = tmp_path / "reversed.txt"
    reversed_list.write_text("".join((tmp_path / "six.txt").read_text().splitlines(True)[::-1]))
    for flags, named in (
        ([*teacher, "--seed", "1"], "seed 0, 1"),
        ([*teacher, "--stride", "2"], "stride 1, 2"),
        ([*teacher, "--crop", "center"], 'crop "published", "center"'),
        ([*teacher, "--flip"], "flip false, true"),
        ([*teacher, "--encoder-ratio", "0.5"], "mask.encoder_ratio 0.75, 0.5"),
        ([*teacher, "--decoder-mask", "none"], 'mask.decoder "running_cell", "none"'),
        ([*teacher, "--num-sample", "2"], "num_sample 1, 2"),
        ([*teacher, "--repeat", "2"], "samples 6, 12"),
        ([*teacher, "--image-size", "48"], "clips.size [32, 32], [48, 48]"),
        ([*teacher, "--data", reversed_list], "list.entries differs"),
        ([*teacher, "--teacher-layers", "1"], 'latents.layers "last", "1"'),
        (["--teacher-dtype", "bfloat16"], 'latents.dtype "float32", "bfloat16"'),
        (["--no-normalize-latents"], "latents.normalize true, false"),
        (["--teacher", teachers / "b.pth"], "teacher.weights differs"),
    ):
        assert student("run", "--latents", "L", *flags) == 2
        err = capsys.readouterr().err
        assert "the latents in L are of other views or another teacher (there and now: " in err
        assert named in err and "choose another --latents folder" in err and err.count("\n") == 1
    # What decides no latent: the student, the loss, batches.
    same = ["--target-loss", "l2", "--batch-size", "3", "--depth", "1"]
    assert student("run", "--latents", "L", *same, "--dry-run") == 0
    capsys.readouterr()
    (tmp_path / "L" / "epoch-0000.done").write_bytes(b"\1" * 5 + b"\0")
    assert student("run", "--latents", "L") == 2
    assert "L lacks the latents of 1 samples; finish it with --store first" in capsys.readouterr().err
    assert student("none", *teacher, "--latents", "L", "--store", "1") == 0  # stores this one alone
    assert student("run", "--latents", "L", "--batch-size", "7") == 2
    assert "an epoch of 6 samples is less than a batch of 7" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--store", "1"], "--store needs the folder to store to: --latents DIR"),
        (["--latents", "L"], "L holds no stored latents; `pretrain --latents L --store EPOCHS` makes them"),
        (["--latents", "L", "--store", "1"], "--target teacher needs one"),
        (["--target", "pixels"], "--teacher-dtype is of --target teacher, and the target is pixels"),
    ],
)
def test_bad_input(student, tmp_path, capsys, flags, message):
    assert student("run", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


ABOUT = {"epochs": 3, "samples": 5, "num_sample": 2, "tokens": 4, "width": 3}


def test_a_disk_without_room(tmp_path, monkeypatch):
    from vmae.data import view_store

    store = LatentStore(tmp_path / "L", ABOUT)
    assert store.size_bytes == 3 * 5 * 2 * 4 * 3 * 2 == 720
    monkeypatch.setattr(view_store, "free_disk", lambda folder: 719)
    with pytest.raises(
        InputError, match="the latents would take 0.00 GB, and 0.00 GB are free in .*fewer epochs"
    ):
        store.create()
    assert not (tmp_path / "L").exists()
    monkeypatch.setattr(view_store, "free_disk", lambda folder: 720)
    store.create()


def test_a_disk_that_fills_up(small_disk):
    """What others write beside it: a line, not a signal; what is marked is complete."""
    place = small_disk(1 << 20)
    store = LatentStore(place / "L", {**ABOUT, "epochs": 1, "tokens": 256, "width": 64})
    store.create()
    (place / "other").write_bytes(bytes(950 << 10))
    values = torch.randn(2, 256, 64)
    with pytest.raises(InputError, match="cannot write the latents in .*: No space left on device; the same"):
        for index in range(5):
            store.write([(0, index)], values)
    done = [index for _, index in set((0, i) for i in range(5)) - set(store.missing())]
    for index in done:
        assert torch.equal(store.read([(0, index)]), values.bfloat16())


def test_rows_are_read_as_they_were_written(tmp_path):
    store = LatentStore(tmp_path, ABOUT)
    store.create()
    keys, values = [(2, 4), (0, 1), (2, 0)], torch.randn(6, 4, 3).bfloat16()
    store.write(keys, values)
    assert torch.equal(store.read(keys), values) and torch.equal(store.read([(0, 1)]), values[2:4])
    assert set(keys).isdisjoint(store.missing()) and len(store.missing()) == 12
    with pytest.raises(InputError, match="num_sample 2, 1; tokens 4, 8"):
        LatentStore(tmp_path, {**ABOUT, "num_sample": 1, "tokens": 8})


# --- values that are known, through the model ---


class Ones(Target):
    """Three ones a token."""

    name, width = "ones", 3

    def values(self, clips, mask):
        return torch.ones(*mask.target.shape, 3)


def test_known_values_of_packed_batches():
    config = ModelConfig(**TEACHER, img_size=32, num_frames=8, patch_size=8)
    model = build_pretrainer(config, target=Ones(config))
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (3, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    masks = [
        DualMask.sample(count, config.grid, encoder_ratio=ratio, generator=generator)
        for count, ratio in ((1, 0.75), (2, 0.5))
    ]
    values = [torch.randn(*mask.target.shape, 3) for mask in masks]
    ones = [torch.ones_like(one) for one in values]
    assert torch.equal(model(clips, masks, values=ones), model(clips, masks))
    each = [model(part, mask, values=own) for part, mask, own in zip(clips.split([1, 2]), masks, values)]
    weights = [mask.target_weight.sum() for mask in masks]
    expected = sum(loss * weight for loss, weight in zip(each, weights)) / sum(weights)
    torch.testing.assert_close(model(clips, masks, values=values), expected)
    with pytest.raises(InputError, match="2 masks need as many groups of values, in a list"):
        model(clips, masks, values=values[:1])
    with pytest.raises(InputError, match="2 masks need as many groups"):
        model(clips, masks, values=values[0])
    with pytest.raises(InputError, match="2 groups of values need a list of masks"):
        model(clips[:1], masks[0], values=values)
    with pytest.raises(
        InputError, match=r"values of shape \[2, 24, 3\] do not fit predictions of shape \[1, "
    ):
        model(clips[:1], masks[0], values=torch.ones(2, 24, 3))
