"""RoIAlign against the bilinear formula, its gradient, and the detector around it."""

import math

import pytest
import torch

from vmae import InputError
from vmae.model.detector import axis_weights, build_detector, roi_align


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
