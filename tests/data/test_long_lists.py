"""Long lists are read as short ones are: the reader of short lists, line by line, is the reference."""

import itertools
import os
import random

import pytest

from vmae.data import list_cache, long_lists
from vmae.data.labels import _labelled_grammar, _read_labelled, read_any_list, read_labelled_list
from vmae.data.list_lines import read_pieces
from vmae.data.list_parsing import whole_lines
from vmae.data.manifest import read_list, read_list_with_problems
from vmae.errors import InputError

FILES = (
    "a.mp4",
    "b.avi",
    "my clips/b c.mp4",
    "my clips/part 3",
    "ünï/視頻.mp4",
    "x,y.mp4",
    "12/34.mp4",
    "SomethingV2/v.mp4",
    "#hash.mp4",
    "deep/er/clip_7.webm",
    "-7",
    "v1",
    "2024",
)
FOLDERS = ("frames", "SomethingV2/frames", "AVA2.2/frames", "my frames", "12/f 1")
PATTERNS = {"AVA2.2/frames": "image_{:06}.jpg"}
ODD = (
    "",
    "   ",
    "# a comment",
    "#",
    "#!stride=2",
    "#! stride=3 pattern=image_{:06}.jpg",
    "#! stride=default",
    "#! pattern=default",
    "\t# indented",
)
WRONG = (
    "a.mp4 5",
    "a.mp4 -1 3",
    "frames 1 0",
    "#! strde=3",
    "frames 1 -3",
    "frames 1 99999999999",
    "x.mp4 1 2 3 4 0",
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder of videos and frames; every list counts as long, and comes in small parts."""
    for name in FILES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"video")
    for name in FOLDERS:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, pattern in itertools.product(range(3), ("img_{:05}.jpg", "image_{:06}.jpg")):
            (folder / pattern.format(number)).write_bytes(b"image")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(long_lists, "is_long", lambda path: True)
    return tmp_path / "data"


def gap(rng):
    return rng.choice((" ", " ", " ", "\t", "  ", ", ", ",", " ,", "\u00a0"))


def video_line(rng, root, labels):
    name = rng.choice(FILES)
    path = os.path.join(root, name) if rng.random() < 0.2 else name
    if rng.random() < 0.1:
        path = f"./{path}"
    if rng.random() < 0.15:
        path = f'"{path}"'
    numbers = rng.choice(("", "0 -1", "0 -1", "3 -1", "+0 -1"))
    if labels and rng.random() < 0.8:
        numbers = ""
    elif not labels and numbers and rng.random() < 0.2:
        numbers += f" {rng.randrange(9)}"
    return finish(rng, path, numbers.split(), labels)


def plainest_line(rng, root, labels):
    path = rng.choice(
        ("a.mp4", "b.avi", "12/34.mp4", "deep/er/clip_7.webm", "v1", "-7", "2024", f"{root}/a.mp4")
    )
    return f"{path} 3" if labels else f"{path}{rng.choice((' 0 -1', ' 0 -1', ''))}"


def folder_line(rng, root, labels):
    path = rng.choice(FOLDERS)
    numbers = rng.choice((["0", "3"], ["1", "2"], ["001", "02"]))
    if labels and rng.random() < 0.5:
        numbers = numbers[1:]
    elif not labels and rng.random() < 0.3:
        numbers = [*numbers, str(rng.randrange(9))]
    return finish(rng, path, numbers, labels)


def finish(rng, path, numbers, labels):
    columns = list(numbers)
    if labels:
        columns.append(rng.choice(("3", "17", "0", "3;17", "5;5", "008", "+4")))
    return path + "".join(gap(rng) + column for column in columns)


def random_list(rng, root, labels):
    lines = []
    makers = rng.choice(
        (
            (video_line,),
            (folder_line,),
            (video_line, folder_line),
            (plainest_line,),
            (lambda *_: f"{root}/a.mp4 {3 if labels else '0 -1'}",),
        )
    )
    odd = rng.choice((0, 0, 0.2))
    for _ in range(rng.choice((1, 3, 12, 40))):
        line = rng.choice(ODD) if rng.random() < odd else rng.choice(makers)(rng, str(root), labels)
        if rng.random() < 0.05:
            line = f" {line}  "
        lines.append(line)
    if rng.random() < 0.25:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(WRONG))
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), "gone.mp4" + (" 3" if labels else ""))
    end = rng.choice(("\n", "\n", "\r\n", "\r"))
    text = end.join(lines) + rng.choice(("", end))
    data = text.encode("utf-8-sig" if rng.random() < 0.1 else "utf-8")
    return data.replace("ü".encode(), b"\xff") if rng.random() < 0.03 else data


def outcome(read, *arguments):
    try:
        return read(*arguments)
    except InputError as error:
        return str(error)


def line_by_line(path, root, labels, options):
    """(entries, labels), or what is wrong with some."""
    if labels:
        entries, problems, own = _read_labelled(path, root, _labelled_grammar(None, **options))
    else:
        (entries, problems), own = read_list_with_problems(path, root, **options), None
    return problems or (entries, own)


def any_list(path, root, labelled, long):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lists, "is_long", lambda path: long)
        found = read_any_list(path, root, labelled)
    return found.entries, found.labels, found.labelled, found.problems


def as_long(path, root, labels, options):
    if not labels:
        return read_list(path, root, **options), None
    found = read_labelled_list(path, root, **options)
    return found.entries, found.labels


@pytest.mark.parametrize("labels", [False, True], ids=["plain", "labelled"])
@pytest.mark.parametrize("seed", range(4))
def test_any_list_is_read_as_line_by_line(world, monkeypatch, seed, labels):
    rng, path = random.Random(f"{seed} {labels}"), world / "list.txt"

    def cut(path):
        data = b"".join(read_pieces(path))
        places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))
        yield from (data[a:b] for a, b in zip([0, *places], [*places, len(data)]))

    monkeypatch.setattr(list_cache, "read_pieces", cut)
    errors = 0
    for _ in range(20):
        path.write_bytes(random_list(rng, world, labels))
        root = rng.choice((None, world))
        options = {"frame_pattern": "img_{:05d}.jpg"} if rng.random() < 0.2 else {}
        expected = outcome(line_by_line, path, root, labels, options)
        found = outcome(as_long, path, root, labels, options)
        for labelled in (None, labels):  # as check-data and pack read it: each line is looked up
            arguments = (any_list, path, root, labelled)
            assert outcome(*arguments, True) == outcome(*arguments, False), path.read_bytes()
        if isinstance(expected, tuple):
            assert found == expected and [*found[0]] == expected[0], path.read_bytes()
            assert as_long(path, root, labels, options) == expected  # from the cache
            assert found[0].count_paths() == len({entry.path for entry in expected[0]})
            continue
        errors += 1
        if isinstance(expected, str):
            assert found == expected, path.read_bytes()
        else:  # of what is not there, the first one that was looked up is named
            assert any(f"line {line}: {problem}; " in found for line, problem in expected), path.read_bytes()
    assert 0 < errors < 20


def test_whole_lines_are_cut_at_ends_of_lines_only():
    data = "a\nb\r\nc\rd é\n\nlast".encode()
    for size in range(1, 8):
        parts = list(whole_lines(data[i : i + size] for i in range(0, len(data), size)))
        assert b"".join(parts) == data and all(part[-1:] in b"\n\r" for part in parts[:-1])
        assert not any(part.endswith(b"\r") and data[sum(map(len, parts[: i + 1])) :][:1] == b"\n"
                       for i, part in enumerate(parts))  # fmt: skip
