"""Mixes: what the YAML says, shares kept to a sample, sources walked through evenly, and each way to get one
wrong."""

from collections import Counter

import pytest

from vmae.config import MaskConfig
from vmae.data.dataset import PretrainDataset, check_decodable
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry
from vmae.data.mix import Mix, Source, describe_data, read_data
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos, write_sample_list

SETTINGS = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))


@pytest.fixture
def folder(tmp_path):
    """Two lists: three videos, and two folders of frames."""
    (tmp_path / "films").mkdir()
    for number in range(3):
        (tmp_path / "films" / f"f{number}.mp4").touch()
    for number in range(2):
        (tmp_path / "frames" / f"x{number}").mkdir(parents=True)
        (tmp_path / "frames" / f"x{number}" / "pic_1.png").touch()
    (tmp_path / "films.txt").write_text("f0.mp4\n#! stride=3\nf1.mp4\n#! stride=default\nf2.mp4\n")
    (tmp_path / "frames.txt").write_text("x0 1 30\nx1 1 40\n")
    return tmp_path


FILMS = "  - {name: films, list: films.txt, root: films, kind: video, weight: 3}\n"
FRAMES = (
    "  - {name: pictures, list: frames.txt, root: frames, kind: frames, pattern: 'pic_{}.png', "
    "stride: 2, weight: 1}\n"
)


def write(folder, text):
    (folder / "mix.yaml").write_text(text)
    return folder / "mix.yaml"


def test_sources(folder):
    mix = read_data(write(folder, f"sources:\n{FILMS}{FRAMES}"))
    assert mix.mixing == "weighted" and len(mix) == 5
    assert [(s.name, s.first, s.count, s.weight) for s in mix.sources] == [
        ("films", 0, 3, 3.0),
        ("pictures", 3, 2, 1.0),
    ]
    assert [entry.stride for entry in mix] == [None, 3, None, 2, 2]  # the list's own stride comes first
    assert mix[3].pattern == "pic_{}.png" and mix[3].kind == "frames"
    assert mix[0].path == str(folder / "films" / "f0.mp4")
    assert mix.shares() == [0.75, 0.25]


def test_natural_mixing(folder):
    for text in (
        f"mixing: natural\nsources:\n{FILMS}{FRAMES}",
        "sources:\n- list: films.txt\n  root: films\n",
    ):
        mix = read_data(write(folder, text))
        assert mix.mixing == "natural" and mix.shares()[0] == [source.count for source in mix.sources][
            0
        ] / len(mix)
    assert [mix.pick(0, 5, index, 3)[0] for index in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_list_is_a_mix_of_one(folder):
    mix = read_data(folder / "films.txt", folder / "films")
    assert len(mix) == 3 and mix.shares() == [1.0] and mix.mixing == "natural"


def test_root_of_a_mix(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere, f"sources:\n{FILMS}")
    assert len(read_data(path, folder)) == 3
    with pytest.raises(InputError, match="data root .*films"):
        read_data(path)


def entries(count):
    return [VideoEntry(f"v{i}") for i in range(count)]


# Shares that do and do not divide the epoch; a source of one video; sources larger and smaller than their
# share.
@pytest.mark.parametrize(
    ("counts", "weights"), [((50, 10), (1, 1)), ((7, 20, 1), (0.3, 0.5, 0.2)), ((100, 3), (1, 0.001))]
)
def test_weighted_shares_and_even_visits(counts, weights):
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    sources = [Source(str(i), *found) for i, found in enumerate(zip(firsts, counts, weights, strict=True))]
    mix = Mix(entries(sum(counts)), sources, "weighted")
    size = sum(counts)
    samples = mix.samples(size)
    assert sum(samples) == size
    for got, weight in zip(samples, weights, strict=True):
        assert abs(got - size * weight / sum(weights)) < 1
    visits = Counter()
    for epoch in range(40):
        picked = [mix.pick(3, epoch, index, size)[0] for index in range(size)]
        assert [sum(s.first <= p < s.first + s.count for p in picked) for s in sources] == samples
        visits.update(picked)
        for source in sources:  # nobody is more than one visit ahead
            own = [visits[v] for v in range(source.first, source.first + source.count)]
            assert max(own) - min(own) <= 1
    again = [
        Mix(entries(size), sources, "weighted").pick(3, 17, index, size)[0] for index in reversed(range(size))
    ]
    assert again[::-1] == [mix.pick(3, 17, index, size)[0] for index in range(size)]
    assert again[::-1] != [mix.pick(4, 17, index, size)[0] for index in range(size)]


@pytest.mark.parametrize("mixing", ["natural", "weighted"])
def test_samples_of_each_source_are_counted(mixing):
    sources = [Source("a", 0, 5, 1), Source("b", 5, 1, 2), Source("c", 6, 3, 1)]
    mix = Mix(entries(9), sources, mixing)
    for indices in (range(9), range(20), [3], [5, 6, 7, 30], []):
        picked = [mix.pick(0, 2, index, 9)[0] for index in indices]
        expected = [sum(s.first <= p < s.first + s.count for p in picked) for s in sources]
        assert mix.count_sources(indices, 9) == expected


def test_a_bad_video_is_replaced_from_its_own_source(tmp_path):
    videos = [VideoEntry(str(path)) for path in sample_videos()[2:]]
    (tmp_path / "bad.mp4").touch()
    sources = [Source("a", 0, 2, 1), Source("b", 2, 1, 1)]
    mix = Mix([VideoEntry(str(tmp_path / "bad.mp4")), *videos], sources, "weighted")
    data = PretrainDataset(mix, **SETTINGS)
    assert len(data) == 3
    samples = [data[epoch, index] for epoch in range(2) for index in range(3)]
    replaced = [sample for sample in samples if sample.replaced]
    assert replaced and {sample.ids[0][2] for sample in replaced} == {videos[0].path}
    assert check_decodable(mix, limit=3)[0][0].endswith("bad.mp4")
    plain = list(build_loader(data, batch_size=3, epochs=2))
    parallel = list(build_loader(data, batch_size=3, epochs=2, num_workers=2))
    assert [batch.ids for batch in plain] == [batch.ids for batch in parallel]


def test_what_a_run_says_of_its_data(tmp_path, folder):
    write_sample_list(tmp_path / "samples.txt")
    text = "sources:\n  - {name: real, list: samples.txt, weight: 1}\n" + FRAMES
    lines = describe_data(read_data(write(folder, text)))
    assert lines == [
        "real: 4 videos, 0.00647 hours, 50.0% of samples",
        "pictures: 2 videos, 70 images, 50.0% of samples, stride 2",
        "weighted mixing of 2 sources, 6 videos",
    ]
    videos = read_data(tmp_path / "samples.txt").entries
    (line,) = describe_data(list(videos) * 10, probes=8)
    assert line == "list: 40 videos, about 0.0647 hours, 100.0% of samples"


# Each line names the one before ten times: written out, the last has a billion words.
_NAMES = zip("abcdefgh", "bcdefghi")
LAUGHS = "mixing:\n- &a ha\n" + "".join(f"- &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in _NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a list\n", "expected `sources:`"),
        ("{", "is no YAML"),
        ("sources: []\n", "no list of sources"),
        ("sources:\n- {list: films.txt}\nspeed: 2\n", "unknown speed"),
        ("sources:\n- films.txt\n", "source 1: expected keys"),
        ("sources:\n- {list: films.txt, rate: 2}\n", "source 1: unknown rate; known: frames, kind, list"),
        ("sources:\n- {list: none.txt}\n", "source 1: list file .*none.txt"),
        (
            "sources:\n- {list: films.txt, root: films, kind: clips}\n",
            "kind must be one of video, frames, images, not .clips.",
        ),
        (
            "sources:\n- {list: films.txt, root: films, kind: frames}\n",
            "line 1 .*is of kind video, not frames.*3 of 3",
        ),
        ("sources:\n- {list: films.txt, root: films, weight: 0}\n", "weight must be"),
        ("sources:\n- {list: films.txt, root: films, weight: true}\n", "weight must be"),
        ("sources:\n- {list: films.txt, root: films, stride: 1.5}\n", "stride must be"),
        (
            "sources:\n- {list: films.txt, root: films, weight: .nan}\n",
            "source 1: weight must be a number above 0 and at most",
        ),
        ("sources:\n- {list: films.txt, root: films, weight: .inf}\n", "source 1: weight must be"),
        (
            "sources:\n- {list: films.txt, root: films, stride: 99999999999}\n",
            "source 1: stride must be a whole number from 1",
        ),
        (f"sources:\n- {{list: films.txt, root: films, stride: {'9' * 5000}}}\n", "no YAML|stride must be"),
        ("sources:\n- {list: [films.txt], root: films}\n", "source 1: list must be one word"),
        (f"sources: {'[' * 500}{']' * 500}\n", "nested too deeply"),
        (f"sources: {'[' * 150}{']' * 150}\n", "nested too deeply"),
        ("sources: &a [*a]\n", "nested too deeply"),
        (LAUGHS + "sources:\n" + FILMS, "unknown mixing"),
        (LAUGHS + "sources:\n- {list: films.txt, root: *i}\n", "root must be one word"),
        (f"sources:\n{FILMS}{FILMS}", "'films' is taken"),
        (f"mixing: random\nsources:\n{FILMS}", "unknown mixing 'random'"),
    ],
)
def test_bad_mix(folder, text, message):
    with pytest.raises(InputError, match=message):
        read_data(write(folder, text))


def test_missing_mix(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_data(tmp_path / "none.yaml")
