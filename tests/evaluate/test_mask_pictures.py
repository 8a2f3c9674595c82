"""`python -m vmae masks`: what is drawn is what is sampled, and the captions count it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import DualMask, InputError
from vmae.cli import main
from vmae.config import PRESETS, MaskConfig
from vmae.evaluate.mask_pictures import CELL, draw_masks, parse_grid
from vmae.masking import DECODER_MASKS, ENCODER_MASKS, mask_help

GRID = (4, 6, 8)


def cells(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(white, dotted), each bool [N], read back from the picture: a cell's shade beside its middle, and in
    it."""
    beside = frames[:, 2:-1:CELL, 2:-1:CELL, 0].ravel() > 128
    middle = frames[:, CELL // 2 : -1 : CELL, CELL // 2 : -1 : CELL, 0].ravel() > 128
    return beside, beside != middle


@pytest.mark.parametrize("encoder", ENCODER_MASKS)
def test_every_type_is_drawn_as_it_is_sampled(encoder):
    config = MaskConfig(encoder=encoder, encoder_ratio=0.75, decoder_ratio=0.25)
    panels = draw_masks(GRID, config, 3)
    names = [f"encoder {kind}" for kind in ENCODER_MASKS] + [f"decoder {kind}" for kind in DECODER_MASKS]
    assert [panel.caption.split(":")[0] for panel in panels] == names
    for panel in panels:
        side, kind = panel.caption.split(":")[0].split()
        kinds = (
            {"encoder": kind, "decoder": "none"}
            if side == "encoder"
            else {"encoder": encoder, "decoder": kind}
        )
        generator = torch.Generator().manual_seed(3)
        mask = DualMask.sample(1, GRID, **{**config.to_dict(), **kinds}, generator=generator)
        hidden, left_out = (masked[0].numpy() for masked in mask.to_bool())
        white, dotted = cells(panel.frames)
        numbers = [int(word) for word in re.findall(r"(?<=\s)\d+(?=\s)", panel.caption)]
        if side == "encoder":
            assert np.array_equal(white, ~hidden) and not dotted.any()
            assert numbers == [(~hidden).sum(), 192, hidden.sum()] and "ratio 0.75" in panel.caption
        else:
            assert np.array_equal(white, ~left_out) and np.array_equal(dotted, ~hidden)
            assert numbers == [(~left_out).sum(), 192, (hidden & ~left_out).sum()]
            assert ("ratio 0.25" in panel.caption) == (kind != "none") and f"{encoder} mask" in panel.caption


def test_what_a_grid_does_not_allow_is_said_in_its_place():
    panels = {panel.caption.split(":")[0]: panel for panel in draw_masks((4, 5, 6), MaskConfig(), 0)}
    refused = panels.pop("decoder running_cell")
    assert "not possible here" in refused.caption and "cannot tile a frame of 5 x 6" in refused.caption
    assert len({panel.frames.shape for panel in (refused, *panels.values())}) == 1
    assert len(np.unique(refused.frames)) == 1 and not any(
        "not possible" in panel.caption for panel in panels.values()
    )


def test_command(tmp_path, capsys):
    outs = {name: tmp_path / f"{name}.png" for name in ("a", "b", "c")}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["masks", "--output", str(outs[name]), "--grid", "4,6,8", "--seed", str(seed)]) == 0
    assert "grid of 4 x 6 x 8 tokens, seed 2" in capsys.readouterr().out
    assert outs["a"].read_bytes() == outs["b"].read_bytes() != outs["c"].read_bytes()
    gif = tmp_path / "x.gif"
    assert main(["masks", "--output", str(gif), "--model", "vit_g"]) == 0
    assert "encoder tube: ratio 0.9; 208 of 2048 tokens seen" in capsys.readouterr().out
    with Image.open(gif) as picture:
        assert picture.n_frames == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--grid 4,6", "--grid 4,6: give three whole numbers"),
        ("--grid 4,0,6", "must be at least 1"),
        ("--grid 1024,1024,2", "their product at most 1,048,576"),
        ("--encoder-ratio 1", "--encoder-ratio"),
        ("--decoder-ratio -0.5", "--decoder-ratio"),
        ("--encoder-mask cube", "unknown encoder mask 'cube'"),
        ("--model vit_q", "unknown model preset 'vit_q'"),
        ("--seed -1", "--seed"),
        ("--output x.bmp", "x.bmp"),
    ],
)
def test_wrong_input_is_named(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["masks", *flags.split()]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_reads_the_registries(capsys):
    for command in ("reconstruct", "convert"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert ", ".join(PRESETS) in shown
        if command == "reconstruct":
            assert mask_help("encoder") in shown and mask_help("decoder") in shown


def test_grid_is_parsed():
    assert parse_grid("8, 14,7") == (8, 14, 7)
    with pytest.raises(InputError):
        parse_grid("a,b,c")
