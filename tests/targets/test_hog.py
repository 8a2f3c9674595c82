"""Histograms of oriented gradients: against plain loops, on edges of a known direction, and as a run's
target."""

import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vmae import DualMask, InputError, MaskConfig, ModelConfig, build_pretrainer
from vmae.config import IMAGENET_MEAN, IMAGENET_STD, PRESETS
from vmae.masking import DECODER_MASKS, ENCODER_MASKS
from vmae.targets.hog import BINS, HogTarget, cells_of
from vmae.train.loop import Trainer
from vmae.train.metrics import read_log

WIDTHS = dict(embed_dim=48, depth=1, num_heads=3, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
# A patch of each number of cells, patch 14 (cells of 7), a rectangle, tubelets of 4 frames.
SHAPES = {
    "patch 16": dict(img_size=64, num_frames=8),
    "patch 14": dict(img_size=28, patch_size=14, num_frames=8),
    "patch 8, rectangle": dict(img_size=(16, 48), patch_size=8, num_frames=8),
    "tubelets of 4 frames": dict(img_size=32, num_frames=16, tubelet_size=4),
}


def config_of(name: str) -> ModelConfig:
    return ModelConfig(**WIDTHS, **SHAPES[name])


def floats_of(clips: torch.Tensor) -> torch.Tensor:
    """Normalised float [B, 3, T, H, W] of uint8 clips."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()


def draw(config: ModelConfig, batch: int = 2, **options) -> DualMask:
    mask = MaskConfig(**{"encoder_ratio": 0.75, **options})
    return DualMask.sample(batch, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(2))


def tokens_counted(total: int, seen: list[int], decoded: list[int], batch: int = 1) -> DualMask:
    """The mask of clips of which the encoder sees some tokens, and the decoder predicts some."""
    masked = torch.ones(2, batch, total, dtype=torch.bool)
    masked[0, :, seen] = masked[1, :, decoded] = False
    return DualMask.from_bool(*masked)


def plain_histograms(frame: np.ndarray, patch: int, cells: int) -> np.ndarray:
    """[rows, columns, C]: values of all patches of a frame uint8 [H, W, 3], pixel by pixel."""
    height, width, _ = frame.shape
    padded = np.pad(frame.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    side = patch // cells
    sums = np.zeros((height // patch, width // patch, cells, cells, 3, 9))
    for y in range(height):
        for x in range(width):
            for colour in range(3):
                around = padded[y : y + 3, x : x + 3, colour]
                along_x, along_y = (around * sobel).sum(), (around * sobel.T).sum()
                angle = math.degrees(math.atan2(along_y, along_x)) % 180
                bin_ = int(angle // 20) % 9
                cell = (y % patch) // side, (x % patch) // side
                sums[y // patch, x // patch, cell[0], cell[1], colour, bin_] += math.hypot(along_x, along_y)
    norm = np.linalg.norm(sums, axis=-1, keepdims=True)
    return (sums / np.where(norm > 0, norm, 1)).reshape(height // patch, width // patch, -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_plain_loops(shape, clips_of):
    config = config_of(shape)
    target, clips, mask = HogTarget(config), clips_of(config, 1), draw(config, 1)
    values = target.values(clips, mask)
    assert values.shape == (1, mask.keep.shape[1], target.width) and values.dtype == torch.float32
    rows, columns = config.grid[1:]
    frames = {}
    for token, value in zip(mask.target[0].tolist(), values[0]):
        frame, place = divmod(token, rows * columns)
        if frame not in frames:
            first = clips[0, frame * config.tubelet_size].numpy()
            frames[frame] = plain_histograms(first, config.patch_size, target.cells)
        expected = torch.from_numpy(frames[frame][divmod(place, columns)])
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_float_clips_give_the_same_values_to_the_bit(shape, clips_of):
    config = config_of(shape)
    target, clips, mask = HogTarget(config), clips_of(config), draw(config)
    flat = clips // 64 * 64  # many gradients along an axis, at the edge of a bin
    for one in (clips, flat):
        assert torch.equal(target.values(floats_of(one), mask), target.values(one, mask))


@pytest.mark.parametrize("degrees", [10, 30, 50, 70, 90, 110, 130, 150, 170])
def test_an_edge_falls_into_the_bin_of_its_direction(degrees):
    """A ramp along `degrees`: every pixel of the frame's inner tokens has that gradient."""
    config = ModelConfig(**WIDTHS, img_size=64, num_frames=8)
    y, x = np.mgrid[:64, :64] - 31.5
    ramp = 127.5 + 2.5 * (x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees)))
    for sign in (1, -1):  # unsigned: dark to light is light to dark
        frame = torch.from_numpy(127.5 + sign * (ramp - 127.5))
        clip = frame.view(1, 1, 1, 64, 64).expand(1, 3, 8, 64, 64)  # floats: uint8 would round the angle
        mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        mask = tokens_counted(64, seen=[0], decoded=[5, 6, 9, 10])
        values = HogTarget(config).values(((clip / 255 - mean) / std).float(), mask)
        expected = F.one_hot(torch.tensor(degrees // 20), BINS).float()
        torch.testing.assert_close(values.view(-1, BINS), expected.expand(4 * 4 * 3, -1))


def test_a_vertical_edge_is_bin_0_in_its_colour_and_cell_only():
    config = ModelConfig(**WIDTHS, img_size=64, num_frames=8)
    clip = torch.zeros(1, 8, 64, 64, 3, dtype=torch.uint8)
    clip[:, ::2, :, 20:, 1] = 200  # green, in the left cells of the second column of tokens; first frames
    clip[:, 1::2] = torch.randint(0, 256, (1, 4, 64, 64, 3), dtype=torch.uint8)  # others are not read
    mask = draw(config, 1, decoder="none")
    values = HogTarget(config).values(clip, mask).view(-1, 2, 2, 3, BINS)
    expected = torch.zeros_like(values)
    expected[mask.target[0] % 4 == 1, :, 0, 1, 0] = 1
    assert torch.equal(values, expected) and values.sum() > 0


def test_pixels_outside_a_token_count_one_wide_and_no_further(clips_of):
    config = config_of("patch 8, rectangle")
    target, clips = HogTarget(config), clips_of(config, 1)
    mask = tokens_counted(48, seen=[0], decoded=[1])
    before = target.values(clips, mask)  # of the token at lines 0 to 7, columns 8 to 15
    for columns, same in (
        (slice(0, 7), True),
        (slice(7, 8), False),
        (slice(16, 17), False),
        (slice(17, 48), True),
    ):
        changed = clips.clone()
        changed[:, :, :, columns] = 255 - changed[:, :, :, columns]
        assert torch.equal(target.values(changed, mask), before) == same, columns


def test_one_colour_gives_zeros_and_no_nan():
    config = config_of("patch 16")
    target, mask = HogTarget(config), draw(config)
    clips = torch.full((2, 8, 64, 64, 3), 77, dtype=torch.uint8)
    assert torch.equal(target.values(clips, mask), torch.zeros(2, mask.keep.shape[1], 108))
    assert target.trivial(clips, mask) == {"zero": 0.0, "mean of the batch": 0.0}


@pytest.mark.parametrize("encoder", ENCODER_MASKS)
@pytest.mark.parametrize("decoder", DECODER_MASKS)
def test_every_pair_of_masks_gives_the_values_of_its_tokens(encoder, decoder, clips_of):
    """Whatever is drawn: values of its counted tokens, and the weighted mean of their errors."""
    config = config_of("patch 8, rectangle")
    model = build_pretrainer(config, target=HogTarget(config))
    clips = clips_of(config)
    mask = draw(config, encoder=encoder, encoder_ratio=0.5, decoder=decoder, decoder_ratio=0.5)
    every = torch.empty(2, 48, 27)  # of two masks, for the encoder sees a token of each
    for half in (range(24), range(24, 48)):
        one = tokens_counted(48, seen=[47 - half[0]], decoded=list(half), batch=2)
        every[:, list(half)] = model.target.values(clips, one)
    values, tokens = model.target.values(clips, mask), mask.target.long()[..., None].expand(-1, -1, 27)
    assert torch.equal(values, every.gather(1, tokens))
    predicted = model.predict(clips, mask).gather(1, mask.keep.long()[..., None].expand(-1, -1, 27))
    errors = (predicted - values).square().mean(-1)
    expected = (errors * mask.target_weight).sum() / mask.target_weight.sum()
    torch.testing.assert_close(model(clips, mask), expected)
    torch.testing.assert_close(model(clips, mask, values=values), expected)


def test_the_loss_has_the_gradient_of_its_formula(clips_of):
    """The head's gradient against a central difference in float64."""
    config = config_of("patch 8, rectangle")
    target, clips, mask = HogTarget(config), clips_of(config), draw(config)
    rows, head = torch.randn(2, mask.keep.shape[1], 32), torch.nn.Linear(32, target.width)
    target.loss(rows, head, clips, mask).backward()
    values = target.values(clips, mask).double()
    weight, bias = (p.detach().double() for p in (head.weight, head.bias))

    def loss_at(step: float) -> float:
        return F.mse_loss(F.linear(rows.double(), weight + step * direction, bias), values).item()

    direction = torch.randn_like(weight)
    slope = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    assert (head.weight.grad.double() * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_thirty_steps_lower_the_loss(clips_of):
    config = config_of("patch 8, rectangle")
    model = build_pretrainer(config, target=HogTarget(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clips, losses = clips_of(config) // 128 * 128, []
    for _ in range(30):
        loss = model(clips, draw(config))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    zero = model.target.trivial(clips, draw(config))["zero"]
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0] and losses[-1] < 0.5 * zero


def test_packed_clips_of_two_sizes(clips_of):
    config = config_of("patch 16")
    other = ModelConfig(**WIDTHS, img_size=(32, 64), num_frames=8)
    model = build_pretrainer(config, target=HogTarget(config))
    clips, masks = [clips_of(config), clips_of(other, 3)], [draw(config), draw(other, 3)]
    predicted = model.predict(clips, masks)
    total, weight = torch.tensor(0.0), torch.tensor(0.0)
    for one, group, mask in zip(predicted, clips, masks):
        counted = one.gather(1, mask.keep.long()[..., None].expand(-1, -1, 108))
        total = total + (counted - HogTarget(config).values(group, mask)).square().mean(-1).sum()
        weight = weight + mask.target_weight.sum()
    torch.testing.assert_close(model(clips, masks), total / weight)


def test_words_and_costs():
    target = HogTarget(config_of("patch 14"))
    assert (target.width, target.macs(), target.state_bytes()) == (2 * 2 * 3 * 9, 0, 0)
    assert target.describe() == "histograms of oriented gradients, 9 bins, cells of 7 x 7 pixels"
    assert [cells_of(patch) for patch in (8, 14, 16, 32)] == [1, 2, 2, 4]


@pytest.mark.parametrize("patch", [4, 11, 13, 15])
def test_a_patch_without_such_cells_is_refused(patch):
    with pytest.raises(InputError, match=f"equal cells of 6 to 10 pixels, and --patch-size {patch} has none"):
        HogTarget(ModelConfig(**WIDTHS, img_size=2 * patch, patch_size=patch, num_frames=8))


def test_clips_of_other_channels_are_refused():
    other = dict(in_channels=1, channel_mean=(0.5,), channel_std=(0.2,))
    with pytest.raises(InputError, match="--target hog reads RGB clips"):
        HogTarget(ModelConfig(**WIDTHS, img_size=16, patch_size=8, num_frames=8, **other))


# --- a run -------------------------------------------------------------------------------------------------

MICRO = dict(embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
RUN = (
    "--model micro --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75 "
    "--batch-size 2 --workers 0 --log-every 1 --device cpu --no-tensorboard --target hog"
).split()


@pytest.fixture
def run(labelled_world, tmp_path, monkeypatch):
    """`run(output, *flags)`: the command; returns its exit code and the losses of its log."""
    from vmae.cli import main

    monkeypatch.setitem(PRESETS, "micro", MICRO)
    videos = tmp_path / "frames.txt"
    videos.write_text("".join(f"{labelled_world}/v{video:02} 1 10\n" for video in range(12)))

    def start(output, *flags):
        code = main(["pretrain", "--data", str(videos), "--output", str(output), *RUN, *map(str, flags)])
        return code, [record["loss"] for record in read_log(output / "log.jsonl")]

    return start


def test_a_run_goes_on_as_if_it_had_not_stopped(run, tmp_path, monkeypatch, capsys):
    _, whole = run(tmp_path / "whole", "--steps", 4)
    shown = capsys.readouterr().out
    assert "predicted: histograms of oriented gradients, 9 bins, cells of 8 x 8 pixels" in shown
    settings = json.loads((tmp_path / "whole" / "run.json").read_text())["starts"][0]["config"]
    assert settings["results"]["target"]["name"] == "hog"
    plain = Trainer.clip

    def clip(self, record):
        if record.step + 1 == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "clip", clip)
        assert len(run(tmp_path / "halves", "--steps", 4)[1]) == 2
    assert run(tmp_path / "halves", "--steps", 4) == (0, whole)
    weights = [torch.load(tmp_path / name / "weights.pth", weights_only=True) for name in ("whole", "halves")]
    assert all(torch.equal(value, weights[1]["model"][name]) for name, value in weights[0]["model"].items())


def test_a_target_that_is_not_possible_ends_a_run_before_anything_is_written(run, tmp_path, capsys):
    code, _ = run(tmp_path / "a", "--steps", 2, "--patch-size", 4)
    assert code == 2 and "--patch-size 4 has none" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
