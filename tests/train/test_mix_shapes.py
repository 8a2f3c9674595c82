"""Runs on mixes whose sources have clips of several shapes, images among them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import DualMask, ModelConfig, build_pretrainer
from vmae.cli import main
from vmae.config import MaskConfig, OptimConfig
from vmae.data import read_data
from vmae.planning.plan import shape_lines
from vmae.train import compiled
from vmae.train.mix_shapes import MixShapes
from vmae.train.pretrain_settings import PretrainConfig


@pytest.fixture
def mixed(pretrain, tmp_path, labelled_world):
    """`mixed(output, *flags)`: a run on clips of 8 x 32 x 32, of 16 x 16 x 16, and images."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "sources:\n- {name: films, list: frames.txt, weight: 2}\n"
        "- {name: long, list: frames.txt, frames: 16, size: 16, weight: 1}\n"
        "- {name: photos, list: photos, kind: images, weight: 1}\n"
    )
    return lambda output, *flags: pretrain(tmp_path / output, *flags, data=mix)


def weights(folder):
    return torch.load(folder / "weights.pth", weights_only=True)["model"]


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_bit_by_bit(mixed, tmp_path, capsys):
    assert mixed("whole") == 0
    told = capsys.readouterr().out
    assert "photos: 6 images, 25.0% of samples" in told
    assert (
        "clips of 8 x 32 x 32 in 50.0% of the steps, 16 x 16 x 16 in 26.7% of the steps, 2 x 32 x 32" in told
    )
    (last,) = [line for line in logged(tmp_path / "whole") if line["step"] == 6]
    assert sum(last["samples"].values()) == 12 and all(count % 2 == 0 for count in last["samples"].values())
    assert mixed("other", "--save-every", 3) == 0
    shutil.rmtree(tmp_path / "other" / "checkpoint-00000006")
    (tmp_path / "other" / "weights.pth").unlink()
    assert mixed("other") == 0  # from step 3
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "other")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_micro_batches_change_nothing(mixed, tmp_path):
    assert mixed("one", "--steps", 4) == 0
    assert mixed("two", "--steps", 4, "--batch-size", 1, "--accumulate", 2) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
    samples = [logged(tmp_path / name)[-1]["samples"] for name in ("one", "two")]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_blocks_are_compiled_for_every_shape(mixed, labelled_world, tmp_path, monkeypatch, capsys):
    """Probes too: more graphs than torch's own limit of a function, 8."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    labelled = tmp_path / "labelled.txt"
    labelled.write_text((labelled_world / "train.txt").read_text())
    probe = ["--probe-data", labelled, "--probe-every", 4]
    try:
        assert mixed("compiled", "--steps", 8, "--compile", "--drop-path", 0.2, *probe) == 0
    finally:
        torch.compiler.reset()
        compiled.set_compiler()
    told = capsys.readouterr().err
    assert int(re.findall(r"(\d+) graphs", told)[-1]) > 8 and "warning: torch.compile" not in told, told
    assert " 0 graph breaks\n" in told and "not compiled" not in told


def train_on_ranks(mix, output, kind, batch):
    torch.set_num_threads(1)
    size = "--model vit_tiny --image-size 32 --patch-size 8 --num-frames 8 --stride 1".split()
    run = "--encoder-ratio 0.75 --steps 6 --workers 0 --lr 0.01 --log-every 1 --device cpu".split()
    where = ["--data", str(mix), "--output", str(output), "--parallel", kind, "--batch-size", batch]
    return main(["pretrain", *where, *size, *run])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_train_on_the_shapes_as_one(mixed, run_ranks, tmp_path, kind):
    """All ranks have clips of the same shape in a step, and the same samples as one process."""
    assert mixed("for_its_files", "--steps", 1, "--warmup-steps", 0) == 0
    mix = tmp_path / "mix.yaml"
    assert run_ranks(1, train_on_ranks, mix, tmp_path / "one", "none", "4") == [0]
    assert run_ranks(2, train_on_ranks, mix, tmp_path / "two", kind, "2") == [0, 0]
    one, two = (
        [line for line in logged(tmp_path / name) if "loss" in line and "step" in line]
        for name in ("one", "two")
    )
    assert len(one) == 6 and [line["samples"] for line in two] == [line["samples"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learned-pos"], "learned positions are for the model's 8 x 32 x 32 alone.*needs `frames: 8`"),
        (["--pos-grid", 4, 2, 2], "positions of another grid"),
    ],
)
def test_what_is_for_one_shape_is_refused(mixed, tmp_path, capsys, flags, message):
    assert mixed("run", *flags) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_images_are_for_three_channels(mixed, tmp_path, capsys):
    stack = np.zeros((20, 40, 36, 1), dtype=np.uint8)
    np.save(tmp_path / "grey.npy", stack)
    (tmp_path / "frames.txt").write_text("grey.npy\n" * 8)
    flags = ["--in-channels", 1, "--channel-mean", 0.5, "--channel-std", 0.2]
    assert mixed("run", *flags) == 2
    message = "a source of images is for clips of 3 channels, and the model takes 1"
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_another_shape_is_another_list(mixed, tmp_path, capsys):
    assert mixed("run", "--steps", 1, "--warmup-steps", 0) == 0
    mix = tmp_path / "mix.yaml"
    mix.write_text(mix.read_text().replace("frames: 16, ", ""))
    assert mixed("run", "--steps", 2, "--warmup-steps", 0) == 2
    assert "its sources' clips were 8 x 32 x 32, 16 x 16 x 16, 2 x 32 x 32 then" in capsys.readouterr().err


def test_a_group_alone_is_dense_and_equals_packed(tiny, clips_of):
    """A list of one mask takes the dense path; beside a second group, the same clips take the packed one."""
    model = build_pretrainer(tiny, backend="torch")
    short = tiny.replace(num_frames=2)
    mask = DualMask.sample(2, short.grid, generator=torch.Generator().manual_seed(0))
    clips = clips_of(short)
    alone = model([clips], [mask])
    together = model([clips[:1], clips[1:]], [mask[:1], mask[1:]])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)
    first = build_pretrainer(short, backend="torch")  # a model of that shape has the same weights
    first.load_state_dict(model.state_dict())
    assert torch.equal(alone, first(clips, mask))


def test_costs(tiny):
    """By hand: the mean over the steps, the largest clip, the most tokens of each side."""
    short, mask = tiny.replace(num_frames=2), MaskConfig(encoder_ratio=0.75)
    found = MixShapes([tiny, short], [0.75, 0.25])
    alone = [MixShapes([model], [1.0]) for model in (tiny, short)]
    assert found.macs(mask) == 0.75 * alone[0].macs(mask) + 0.25 * alone[1].macs(mask)
    assert found.clip_bytes == 8 * 64 * 64 * 3
    assert found.most_tokens(mask) == (16, 32) and alone[0].describe() == []


def test_plan_tells_of_the_shapes(mixed, tmp_path):
    mix = tmp_path / "mix.yaml"
    config = PretrainConfig(
        model=ModelConfig.preset("vit_b"),
        mask=MaskConfig(),
        optim=OptimConfig(warmup_epochs=0),
        data=str(mix),
    )
    assert shape_lines(config, read_data(tmp_path / "frames.txt")) == []
    mix.write_text(mix.read_text().replace("size: 16", "size: 160"))
    _, films, long, photos, last = shape_lines(config, read_data(mix))
    assert "films: 50.0% of the clips, of 16 x 224 x 224, 1568 tokens" in films
    assert "long: 25.0% of the clips, of 16 x 160 x 160, 800 tokens" in long
    assert "photos: 25.0% of the clips, of 2 x 224 x 224, 196 tokens" in photos
    assert last.startswith("all figures above are for clips of 16 x 224 x 224; those of this mix cost 0.")


def test_pack_leaves_images_alone(mixed, tmp_path, capsys):
    assert main(["pack", str(tmp_path / "mix.yaml"), str(tmp_path / "packed")]) == 2
    assert "source 'photos': single images are read as they are, and not packed" in capsys.readouterr().err


def test_a_mix_in_place_of_a_labelled_list(mixed, tmp_path, capsys):
    flags = ["--model", "vit_tiny", "--output", str(tmp_path / "tuned"), "--device", "cpu"]
    assert main(["finetune", "--data", str(tmp_path / "mix.yaml"), "--no-val", "--no-test", *flags]) == 2
    assert "line 1: this is a mix (YAML), which `pretrain`" in capsys.readouterr().err


def test_check_data_opens_images(mixed, tmp_path, capsys):
    photos = tmp_path / "photos"
    Image.new("CMYK", (40, 36)).save(photos / "print.jpg")
    (photos / "bad.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("".join(f"photos/{path.name}\n" for path in sorted(photos.iterdir())))
    assert (
        main(["check-data", "--images", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out")]) == 1
    )
    told = capsys.readouterr().out
    assert "8 images: 7 good, 1 bad" in told and "containers: PNG 6, JPEG 1" in told
    assert "1 videos have other pixels than RGB of 8 bits (mode CMYK: 1)" in told.replace("images", "videos")
    assert len((tmp_path / "out" / "clean.txt").read_text().splitlines()) == 7
