"""Labelled panels as PNG, GIF and MP4: their layout, and that they can be read without colour."""

import argparse

import numpy as np
import pytest
from PIL import Image

from vmae import InputError, ModelConfig
from vmae.data.decode import open_video
from vmae.evaluate.pictures import (
    Panel,
    add_output_arguments,
    draw_grid,
    draw_moment,
    grey_frames,
    outputs_of,
    write_pictures,
)

CONFIG = ModelConfig(
    img_size=(32, 48), patch_size=16, num_frames=4, embed_dim=12, num_heads=2
)  # 2 x 2 x 3 tokens


def panel(shade: int = 90, times: int = 4, **more) -> Panel:
    """A frame of one shade, which grows by 20 with each frame."""
    frames = (
        np.full((times, 32, 48, 3), shade, np.uint8)
        + 20 * np.arange(times, dtype=np.uint8)[:, None, None, None]
    )
    return Panel(caption="what it is", frames=frames, **more)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_output_arguments(parser, "x.png")
    return parser.parse_args(flags)


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_outlines_are_readable_in_grey(shade):
    """They stand out from black, white and grey alike."""
    outlined = np.zeros((2, 2, 3), bool)
    outlined[1, 0, 1] = True
    frames = np.full((4, 32, 48, 3), shade, np.uint8)
    picture = draw_grid([Panel(caption="x", frames=frames, outlined=outlined)], [(1, "a"), (2, "b")])
    grey = np.asarray(picture.convert("L"))
    scale, top = 4, 4 + 18 + 4 + 4 + 18 - 4  # smallest side 32 -> 128; label line, caption line
    without, marked = (grey[top : top + 128, left : left + 192] for left in (4, 4 + 196))
    assert (without == shade).all()
    token = marked[: 16 * scale, 16 * scale : 32 * scale]
    assert token[0, 0] == 255 and token[1, 1] == 0 and token[32, 32] == shade
    assert (marked[:, : 16 * scale] == shade).all() and (marked[16 * scale :] == shade).all()


def test_token_values_stand_in_their_places():
    values = np.arange(12) / 11
    frames = grey_frames(values, CONFIG)
    assert frames.shape == (4, 32, 48, 3) and frames.dtype == np.uint8
    for token, (time, row, column) in enumerate(np.ndindex(2, 2, 3)):
        shown = frames[2 * time : 2 * time + 2, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert (shown == round(255 * token / 11)).all()
    colours = grey_frames(np.stack([values, 1 - values, 0 * values - 5], 1), CONFIG)
    assert tuple(colours[0, 0, 0]) == (0, 255, 0) and tuple(colours[-1, -1, -1]) == (255, 0, 0)


def test_grid_has_a_column_for_each_moment_and_wraps_words():
    narrow, wide = (
        draw_grid([Panel(caption=text, frames=panel().frames)], [(0, "frame 7"), (3, "frame 9")])
        for text in ("x", "word " * 99)
    )
    assert wide.width == narrow.width and wide.height > narrow.height + 100
    pixels = np.asarray(narrow)
    assert tuple(pixels[-20, 40]) == (90,) * 3 and tuple(pixels[-20, 40 + 196]) == (150,) * 3


def test_moment_stands_side_by_side_and_goes_on_below():
    picture = np.asarray(draw_moment([panel(shade) for shade in (10, 20, 30, 40, 50)], 2, "frame 3"))
    shades = [tuple(picture[y, x]) for y in (100, picture.shape[0] - 20) for x in (30, 330, 630, 930)]
    assert [shade[0] for shade in shades] == [50, 60, 70, 80, 90, 255, 255, 255]


def test_panels_abreast_make_a_png_of_the_middle_moment(tmp_path):
    panels = [panel(shade) for shade in (10, 20, 30, 40)]
    write_pictures(panels, [tmp_path / "x.png"], labels=list("abcd"), step=2, abreast=2)
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    shades = [int(picture[y, x, 0]) for y in (100, picture.shape[0] - 20) for x in (30, 330)]
    assert shades == [50, 60, 70, 80] and picture.shape[1] == 2 * (288 + 4) + 4


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".MP4"])
def test_animation_has_a_picture_for_each_frame(tmp_path, suffix):
    path = tmp_path / "new" / f"x{suffix}"
    still = Panel(
        caption="still", frames=np.full((5, 33, 33, 3), 100, np.uint8)
    )  # an odd size; nothing but the label moves
    write_pictures([still], [path], labels=[f"frame {n}" for n in "00112"], fps=5)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if suffix == ".gif":
        with Image.open(path) as gif:
            assert gif.n_frames == 5 and gif.info["loop"] == 0
            durations = [(gif.seek(number), gif.info["duration"])[1] for number in range(5)]
        assert durations == [200] * 5
    else:
        with open_video(path) as reader:
            pictures = reader.frames(range(len(reader)))
            assert len(pictures) == 5 and reader.fps == 5
        assert np.abs(pictures[:, -20, 40].astype(int) - 100).max() < 6


def test_png_shows_the_first_frame_of_tubelets(tmp_path):
    write_pictures([panel(times=8)], [tmp_path / "x.png"], labels=list("abcdefgh"), columns=3, step=2)
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    assert [int(pixels[-20, 40 + 196 * column, 0]) for column in range(3)] == [90, 90 + 20 * 4, 90 + 20 * 6]


def test_outputs_are_checked_before_any_work(tmp_path, monkeypatch):
    default = tmp_path / "x.png"
    assert outputs_of(parse(), default) == [default]
    flags = ["--output", str(tmp_path / "a.gif"), "--output", str(tmp_path / "b.mp4")]
    assert outputs_of(parse(*flags), default) == [tmp_path / "a.gif", tmp_path / "b.mp4"]
    (tmp_path / "f.png").mkdir()
    (tmp_path / "file").write_text("")
    for output, message in (
        ("x.webm", "x.webm: give a name that ends with"),
        ("x", "ends with"),
        ("f.png", "is a folder"),
        ("file/x.gif", "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            outputs_of(parse("--output", str(default), "--output", str(tmp_path / output)), default)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match="pip install av"):
        outputs_of(parse(*flags), default)
    assert outputs_of(parse("--output", "a.gif"), default)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".mp4"])
def test_what_cannot_be_written_is_named_and_what_came_before_stays(tmp_path, suffix):
    (tmp_path / f"x{suffix}").mkdir()
    with pytest.raises(InputError, match=f"cannot write .*x{suffix}"):
        write_pictures([panel()], [tmp_path / "first.png", tmp_path / f"x{suffix}"], labels=list("abcd"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", f"x{suffix}"]
