"""The little AVA: boxes fit the pixels, nothing leaks at the key frame, and the files are those that AVA
has."""

import json
from collections import Counter

import numpy as np
import pytest

from vmae import InputError
from vmae.data.ava import read_actions, read_annotations, read_excluded, read_person_boxes
from vmae.data.decode import open_video
from vmae.evaluate.frame_map import box_iou
from vmae.synthetic.moving_actors import (
    ACTIONS,
    SLIDES,
    TURNS,
    ActorsConfig,
    cast,
    draw_actor,
    render_scene,
    write_actors,
)
from vmae.synthetic.moving_shapes import _looks

SIZE = 64


def test_a_box_is_that_of_the_drawn_pixels():
    actor, sprite = cast(5, SIZE)[0], _looks(16, 5)[1]
    ground = np.zeros((SIZE, SIZE, 3), np.uint8)
    for frame in (0, 12, 23):
        picture, box = draw_actor(ground, sprite, actor, frame)
        rows, columns = (np.flatnonzero(picture.any((axis, 2))) for axis in (1, 0))
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        # Pixels that the shape covers by less than half a level are within the box, and black.
        assert (np.array(box) * SIZE <= tight + [0, 0, 1, 1]).all() and np.abs(
            np.array(box) * SIZE - tight
        ).max() <= 1


def test_actors_stay_apart_and_inside():
    for seed in range(0, 40 * 16, 16):
        _, boxes, _ = render_scene(SIZE, seed)  # raises where one reaches the edge
        assert all(box_iou(first, second) == 0 for first, second in boxes)


def test_boxes_move_as_the_actions_say():
    seen = Counter()
    for seed in range(0, 40 * 16, 16):
        _, boxes, actors = render_scene(SIZE, seed)
        for number, actor in enumerate(actors):
            middles = np.array(
                [[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in (frame[number] for frame in boxes)]
            )
            way = middles[-1] - middles[0]
            slide = next((name for name in actor.actions if name in SLIDES), None)
            if slide and not set(actor.actions) & set(TURNS):
                axis = int(SLIDES[slide][1] != 0)
                assert way[axis] * SLIDES[slide][axis] > 0.08 and abs(way[1 - axis]) < 0.02
            turn = next((TURNS[name] for name in actor.actions if name in TURNS), 0)
            assert np.sign(actor.angles[-1] - actor.angles[0]) == turn
            seen.update(actor.actions)
    assert set(seen) == set(ACTIONS.values())


def test_the_key_frame_alone_does_not_show_the_action():
    places = {name: [] for name in SLIDES}
    for seed in range(0, 3000 * 16, 16):
        for actor in cast(seed, SIZE):
            for name in actor.actions:
                if name in places:
                    places[name].append([*actor.places[12], actor.radius])
    for own in places.values():
        # 3000 scenes, some 1200 actors a slide: a mean is off by 0.006 of the side at one standard deviation.
        assert np.abs(np.mean(own, 0) - [0.5, 0.5, 0.115]).max() < 0.025


@pytest.fixture(scope="module")
def actors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("actors")
    return folder, write_actors(folder, ActorsConfig(train=2, validation=2, scenes=2), workers=1)


def test_the_files(actors):
    folder, paths = actors
    assert read_actions(paths["actions"]) == ACTIONS
    rows = read_annotations(paths["train"], ACTIONS)
    assert {row.key for row in rows} == {(f"train_000{v}", t) for v in (0, 1) for t in (1, 3)}
    assert {len({row.box for row in rows if row.key == key}) for key in {row.key for row in rows}} == {2}
    persons = read_person_boxes(paths["train_persons"], 0.8)
    assert len(persons) == 8
    for person in persons:
        assert max(box_iou(person.box, row.box) for row in rows if row.key == person.key) > 0.7
    assert read_excluded(paths["val_excluded"]) == {("val_0001", 3)}
    with open_video(str(paths["videos"] / "train_0000.mp4")) as reader:
        assert len(reader) == 48 and reader.fps == 12
        picture = reader.frames([12])[0].astype(int)  # second 1, the first key frame
    box = np.round(np.array(rows[0].box) * SIZE).astype(int)
    inside = picture[box[1] : box[3], box[0] : box[2]]
    assert inside.max() > 130 > picture.mean()  # a bright shape on a dark ground


def test_again_and_other_settings(actors, tmp_path):
    folder, paths = actors
    before = paths["train"].read_text(), (paths["videos"] / "val_0001.mp4").stat().st_mtime_ns
    (paths["videos"] / "val_0000.mp4").unlink()
    write_actors(folder, ActorsConfig(train=2, validation=2, scenes=2), workers=1)
    assert before == (paths["train"].read_text(), (paths["videos"] / "val_0001.mp4").stat().st_mtime_ns)
    assert (paths["videos"] / "val_0000.mp4").exists()
    with pytest.raises(InputError, match="holds videos of other settings"):
        write_actors(folder, ActorsConfig(train=3, validation=2, scenes=2), workers=1)
    assert json.loads((folder / "actors.json").read_text())["train"] == 2
    with pytest.raises(InputError, match="size must be even"):
        ActorsConfig(size=65)
