"""RoIAlign against the bilinear formula, its gradient, and the detector around it."""

import math

import pytest
import torch
import torch.nn.functional as F

from vmae import InputError
from vmae.model.detector import DEVIATION, MEAN, axis_weights, build_detector, roi_align


def bilinear(feature, y, x):
    """The value at (y, x) of a [h, w] map whose pixels sit at whole numbers; outside, the nearest edge."""
    height, width = feature.shape
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), height - 2) if height > 1 else 0, min(int(x), width - 2) if width > 1 else 0
    value = 0.0
    for i in (top, top + 1):
        for j in (left, left + 1):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            if weight > 0:
                value += weight * feature[i, j].item()
    return value


def aligned_by_hand(feature, box, bins, samples):
    """RoIAlign of Mask R-CNN, loop by loop, with the half-pixel shift."""
    height, width = feature.shape
    x1, y1, x2, y2 = box[0] * width - 0.5, box[1] * height - 0.5, box[2] * width - 0.5, box[3] * height - 0.5
    out = torch.zeros(bins, bins, dtype=torch.float64)
    for p in range(bins):
        for q in range(bins):
            for a in range(samples):
                for b in range(samples):
                    y = y1 + (p + (a + 0.5) / samples) * (y2 - y1) / bins
                    x = x1 + (q + (b + 0.5) / samples) * (x2 - x1) / bins
                    out[p, q] += bilinear(feature, y, x) / samples**2
    return out


@pytest.mark.parametrize("grid", [(5, 7), (14, 14), (2, 3)])  # rectangular; published; smaller than the bins
def test_against_the_formula(grid):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, *grid, 3, dtype=torch.float64, generator=g)
    boxes = [(0.1, 0.2, 0.8, 0.9), (0.0, 0.0, 1.0, 1.0), (0.5, 0.0, 0.55, 0.03), (0.93, 0.9, 1.0, 1.0)]
    for bins, samples in ((7, 2), (3, 1)):
        got = roi_align(features, torch.tensor([boxes] * 2, dtype=torch.float64), bins, samples)
        assert got.shape == (2, 4, bins, bins, 3)
        for b, m, d in ((0, 0, 0), (0, 1, 2), (1, 2, 1), (1, 3, 0)):
            expected = aligned_by_hand(features[b, :, :, d], boxes[m], bins, samples)
            torch.testing.assert_close(got[b, m, :, :, d], expected, rtol=1e-12, atol=1e-12)


def test_a_value_by_hand():
    # One row of cells 0, 1, 2, 3. A bin from 0.25 to 0.75 of it, two samples: at 0.375 and 0.625, cells 1.0
    # and 2.0.
    features = torch.arange(4.0).reshape(1, 1, 4, 1)
    assert roi_align(features, torch.tensor([[[0.25, 0, 0.75, 1.0]]]), 1, 2).item() == pytest.approx(1.5)
    # The left edge: samples at 0.0625 and 0.1875, cells -0.25 (stays at the first) and 0.25.
    assert roi_align(features, torch.tensor([[[0.0, 0, 0.25, 1.0]]]), 1, 2).item() == pytest.approx(0.125)


def test_weights_sum_to_one():
    low, high = torch.rand(3, 5) * 0.5, 0.5 + torch.rand(3, 5) * 0.5
    torch.testing.assert_close(axis_weights(low, high, 9, 7, 2).sum(-1), torch.ones(3, 5, 7))


def test_gradients():
    g = torch.Generator().manual_seed(1)
    features = torch.randn(2, 4, 5, 2, dtype=torch.float64, generator=g, requires_grad=True)
    boxes = torch.tensor(
        [[[0.11, 0.23, 0.72, 0.91]], [[0.05, 0.13, 0.33, 0.42]]], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda f, b: roi_align(f, b, 3, 2), (features, boxes))


def test_the_detector(tiny, clips_of):
    model = build_detector(tiny, 5).eval()
    clips = clips_of(tiny)
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.5, 0.5, 1.0, 1.0]], [[0, 0, 1.0, 1.0], [0, 0, 0, 0]]])
    logits = model(clips, boxes)
    assert logits.shape == (2, 2, 5) and logits.isfinite().all()
    torch.testing.assert_close(model(clips[:1], boxes[:1])[0], logits[0])  # a clip's boxes are its own
    torch.testing.assert_close(model(clips, boxes.flip(1)).flip(1), logits)  # and do not see each other
    torch.testing.assert_close(model(clips[1:], boxes[1:, :1])[0, 0], logits[1, 0])  # nor what pads
    # By its published parts, for one box.
    tokens = model.tokens(clips)[0].reshape(*tiny.grid, -1).mean(0)
    pooled = [
        aligned_by_hand(tokens[..., d].detach(), boxes[0, 0].tolist(), 7, 2).max()
        for d in range(tiny.embed_dim)
    ]
    torch.testing.assert_close(
        model.box_features(clips, boxes)[0, 0], torch.stack(pooled).float(), rtol=1e-4, atol=1e-5
    )
    names = set(model.state_dict())
    assert {
        "norm.weight",
        "head.weight",
        "head.bias",
        "blocks.0.attn.q_bias",
    } <= names and "fc_norm.weight" not in names


def test_every_parameter_learns(tiny, clips_of):
    model = build_detector(tiny, 3)
    logits = model(clips_of(tiny), torch.tensor([[[0.1, 0.2, 0.6, 0.9]]] * 2))
    (logits * torch.randn(logits.shape)).sum().backward()
    assert all(math.isfinite(p.grad.norm()) and p.grad.norm() > 0 for p in model.parameters())


def test_no_actions(tiny):
    with pytest.raises(InputError, match="at least 1 action"):
        build_detector(tiny, 0)


# --- As VideoMAE-Action-Detection --------------------------------------------------------------------------


def published_by_hand(feature, box, bins=7):
    """AlphAction's ROIAlign3d of one box in tokens on a [h, w] map, sample by sample."""
    height, width = feature.shape
    x1, y1 = box[0], box[1]
    box_width, box_height = max(box[2] - box[0], 1.0), max(box[3] - box[1], 1.0)
    down, across = math.ceil(box_height / bins), math.ceil(box_width / bins)
    out = torch.zeros(bins, bins, dtype=torch.float64)
    for p in range(bins):
        for q in range(bins):
            for a in range(down):
                for b in range(across):
                    y = y1 + p * box_height / bins + (a + 0.5) * box_height / bins / down
                    x = x1 + q * box_width / bins + (b + 0.5) * box_width / bins / across
                    if -1 <= y <= height and -1 <= x <= width:
                        out[p, q] += bilinear(feature, y, x) / (down * across)
    return out


# Published: a training crop, and a whole frame of 16:9; smaller than the bins; one token high.
@pytest.mark.parametrize("grid", [(14, 14), (16, 29), (5, 7), (1, 3)])
def test_published_roi_against_the_formula(grid):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, *grid, 3, dtype=torch.float64, generator=g)
    # Inside; the whole frame; narrower than a token; less than a token from the edge, so that some samples
    # lie outside; flat, as a box outside of a crop is; a pixel left of the frame, as a mirrored one can be.
    boxes = [
        (0.1, 0.2, 0.8, 0.9),
        (0.0, 0.0, 1.0, 1.0),
        (0.5, 0.0, 0.51, 0.03),
        (0.97, 0.98, 1.0, 1.0),
        (1.0, 0.3, 1.0, 0.6),
        (-1 / 224, 0.1, 0.4, 0.5),
    ]
    got = roi_align(features, torch.tensor([boxes] * 2, dtype=torch.float64), roi="published")
    assert got.shape == (2, 6, 7, 7, 3)
    for m, box in enumerate(boxes):
        tokens = [share * cells for share, cells in zip(box, [grid[1], grid[0]] * 2)]
        for b, d in ((0, 0), (1, 2)):
            expected = published_by_hand(features[b, :, :, d], tokens)
            torch.testing.assert_close(got[b, m, :, :, d], expected, rtol=1e-9, atol=1e-9)


def test_the_two_kinds_of_roi_differ():
    features = torch.randn(1, 14, 14, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[0.1, 0.2, 0.4, 0.9], [0.3, 0.1, 0.9, 0.8]]])
    aligned, published = (
        roi_align(features, boxes, roi=roi).amax((2, 3)) for roi in ("aligned", "published")
    )
    assert (aligned - published).norm() / aligned.norm() > 0.05


def test_gradients_of_the_published_roi():
    g = torch.Generator().manual_seed(1)
    features = torch.randn(2, 4, 5, 2, dtype=torch.float64, generator=g, requires_grad=True)
    boxes = torch.tensor([[[0.11, 0.23, 0.72, 0.91]], [[0.05, 0.13, 0.83, 0.42]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, 3, roi="published"), (features,))


def published_by_parts(model, clips, boxes):
    """Logits of one box in pixels of each clip [3, T, H, W] of 0 to 255: by torch's own operations, with
    zeros at the right and bottom, and positions resized for each clip."""
    config, logits = model.config, []
    patch = config.patch_size
    mean, deviation = (torch.tensor(values)[:, None, None, None] for values in (MEAN, DEVIATION))
    for clip, box in zip(clips, boxes):
        pixels = (clip - mean) / deviation
        filled = torch.zeros(3, clip.shape[1], *(-(-side // patch) * patch for side in clip.shape[2:]))
        filled[:, :, : clip.shape[2], : clip.shape[3]] = pixels
        x = model.patch_embed.proj(filled[None])
        grid = x.shape[2:]
        table = model.pos_embed.reshape(*config.grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid[1:], mode="bicubic", align_corners=False)
        x = x.flatten(2).transpose(1, 2) + table.permute(0, 2, 3, 1).reshape(1, -1, config.embed_dim)
        for block in model.blocks:
            x = block(x)
        x = model.norm(x).reshape(*grid, -1).mean(0)
        tokens = [side / patch for side in box]
        pooled = torch.stack([published_by_hand(x[..., d], tokens).max() for d in range(config.embed_dim)])
        logits.append(model.head(pooled.float()))
    return torch.stack(logits)


# The size of training (4 x 4 tokens); a rectangle of whole patches; one that is filled up on both sides; one
# of less than the training size.
@pytest.mark.parametrize("size", [(64, 64), (64, 112), (70, 121), (40, 56)])
@torch.no_grad()
def test_published_clips_of_any_shape(tiny, size):
    torch.manual_seed(0)
    model = build_detector(tiny, 5, roi="published", preprocess="published").eval()
    model.patch_embed.proj.weight.mul_(10)
    clips = torch.randint(0, 256, (2, tiny.num_frames, *size, 3), dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 7.0, 30.0, 35.0], [20.0, 3.0, 50.0, 39.0]])
    shares = boxes[:, None] / torch.tensor([size[1], size[0]] * 2)
    logits = model(clips, shares)
    expected = published_by_parts(model, clips.permute(0, 4, 1, 2, 3).float(), boxes.tolist())
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-4, atol=1e-5)
    # Float clips are taken as normalised.
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    normalised = ((clips - mean) / deviation).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(model(normalised, shares), logits, rtol=1e-5, atol=1e-6)
    if size == (64, 64):  # the same tokens as any classifier's of such clips
        features = model.tokens(normalised).unflatten(1, tiny.grid).mean(1)
        pooled = roi_align(features, shares, roi="published").amax((2, 3))
        torch.testing.assert_close(model.head(pooled), logits)


def test_published_clips_train(tiny):
    model = build_detector(tiny, 3, roi="published", preprocess="published")
    clips = torch.randint(0, 256, (2, tiny.num_frames, 64, 64, 3), dtype=torch.uint8)
    logits = model(clips, torch.tensor([[[0.1, 0.2, 0.6, 0.9]]] * 2))
    (logits * torch.randn(logits.shape)).sum().backward()
    assert all(math.isfinite(p.grad.norm()) and p.grad.norm() > 0 for p in model.parameters())


def test_what_published_refuses(tiny):
    with pytest.raises(InputError, match="unknown roi 'caffe'; known: aligned, published"):
        build_detector(tiny, 3, roi="caffe")
    model = build_detector(tiny, 3, preprocess="published")
    with pytest.raises(
        InputError, match=r"clips of shape \[1, 3, 6, 64, 64\] do not fit a model of 8 frames"
    ):
        model(torch.zeros(1, 6, 64, 64, 3, dtype=torch.uint8), torch.zeros(1, 1, 4))
