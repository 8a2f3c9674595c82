"""Positions for other frame counts and sizes."""

import pytest
import torch
import torch.nn.functional as F

from vmae import InputError, build_classifier
from vmae.config import ModelConfig
from vmae.model.embed import interpolate_positions, sine_cosine_positions


def test_the_same_grid_changes_nothing():
    table = sine_cosine_positions(24, 8)
    assert interpolate_positions(table, (2, 3, 4), (2, 3, 4)) is table


def test_space_is_bicubic_and_each_frame_its_own():
    table = torch.randn(1, 2 * 4 * 4, 6)
    found = interpolate_positions(table, (2, 4, 4), (2, 6, 5)).reshape(2, 6, 5, 6)
    for frame in range(2):
        image = table.reshape(2, 4, 4, 6)[frame].permute(2, 0, 1)[None]
        expected = F.interpolate(image, size=(6, 5), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
        torch.testing.assert_close(found[frame], expected)


def test_time_is_linear():
    table = torch.randn(1, 4 * 2 * 3, 5)
    found = interpolate_positions(table, (4, 2, 3), (8, 2, 3)).reshape(8, 2, 3, 5)
    frames = table.reshape(4, 2, 3, 5)
    torch.testing.assert_close(found[0], frames[0])
    torch.testing.assert_close(found[1], 0.75 * frames[0] + 0.25 * frames[1])
    torch.testing.assert_close(found[2], 0.25 * frames[0] + 0.75 * frames[1])


def test_both_at_once_are_one_after_the_other():
    table = torch.randn(1, 4 * 2 * 2, 3)
    step = interpolate_positions(table, (4, 2, 2), (4, 3, 5))
    both = interpolate_positions(table, (4, 2, 2), (6, 3, 5))
    torch.testing.assert_close(both, interpolate_positions(step, (4, 3, 5), (6, 3, 5)))


def test_a_model_remembers_the_grid_of_its_positions(tiny):
    wider = tiny.replace(img_size=(96, 64), num_frames=12, pos_grid=tiny.grid)
    model = build_classifier(wider, 3)
    own = sine_cosine_positions(tiny.num_tokens, 48)
    torch.testing.assert_close(model.pos_embed, interpolate_positions(own, tiny.grid, (6, 6, 4)))
    assert "pos_embed" not in model.state_dict()
    assert ModelConfig.from_dict(wider.to_dict()) == wider
    again = build_classifier(ModelConfig.from_dict({**wider.to_dict(), "pos_grid": list(tiny.grid)}), 3)
    assert torch.equal(again.pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    "change", [dict(pos_grid=(2, 2)), dict(pos_grid=(0, 2, 2)), dict(pos_grid=(4, 4, 4), learned_pos=True)]
)
def test_bad_grids(tiny, change):
    with pytest.raises(InputError, match="pos_grid"):
        tiny.replace(**change)
