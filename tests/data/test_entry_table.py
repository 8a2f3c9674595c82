"""Entries in flat arrays: they answer as a list of objects does, and keep no object for an entry."""

import hashlib
import json
import pickle
import random

import numpy as np
import pytest

from vmae import MaskConfig
from vmae.checkpoint.identity import content_hash, frames_identity, list_hash
from vmae.data import Mix, PretrainDataset, VideoEntry
from vmae.data.dataset import EpochSampler
from vmae.data.entry_table import CHUNK, EntryChain, EntryList, EntryTable, LabelTable, as_entries
from vmae.data.list_identity import identify_list
from vmae.data.mix import Source
from vmae.data.sampling import permutation

NAMES = ("a.mp4", "/data/a.mp4", "./b.mp4", "ü/視頻.mp4", "data/x", "frames", "new\nline.mp4", "\udcff.mp4")


def random_entries(rng, count, names=NAMES):
    entries = []
    for number in range(count):
        path = rng.choice(names)
        if rng.random() < 0.5:
            path = f"{path}{rng.randrange(5)}"
        stride = rng.choice((None, None, 2, 7))
        if rng.random() < 0.3:
            pattern = rng.choice(("img_{:05}.jpg", "f {:03}.png"))
            entries.append(VideoEntry(path, "frames", rng.randrange(3), rng.randrange(1, 9), stride, pattern))
        else:
            entries.append(VideoEntry(path, stride=stride, line=number + 1))
    return entries


def answers(entries):
    """What `Entries` can be asked."""
    count = len(entries)
    ranges = [(0, count), (count // 3, count // 2), (count, count)]
    return {
        "strides": entries.strides(),
        "images": entries.images(),
        "kinds": [[int(number) for number in entries.numbers_of(kind)] for kind in ("video", "frames")],
        "paths": [entries.path_bytes(*span) for span in ranges],
        "distinct": entries.count_paths(),
        "lines": [entries.identity_lines(*span, start) for span in ranges for start in ("/data/", "./")],
        "stride 3": list(entries.with_stride(3)),
        "no stride": list(entries.with_stride(None)),
    }


@pytest.mark.parametrize("seed", range(6))
def test_a_table_is_its_entries(seed):
    rng = random.Random(seed)
    entries = random_entries(rng, 40, NAMES[: 3 + seed])
    table, plain = EntryTable.of(entries), EntryList(entries)
    assert table == entries and entries == table and list(table) == entries and len(table) == 40
    assert table != entries[:-1] and table != [*entries[:-1], VideoEntry("other")] and table != "text"
    assert answers(table) == answers(plain)
    for part in (slice(0, 40), slice(7, 21), slice(30, 10), slice(-5, None), slice(None, None, -3)):
        assert table[part] == entries[part] and answers(as_entries(table[part])) == answers(
            EntryList(entries[part])
        )
        assert pickle.loads(pickle.dumps(table[part])) == entries[part]
    again = table[5:30][10:20]
    assert (
        again == entries[15:25] and np.shares_memory(again._ends, table._ends) and again._text is table._text
    )
    assert [table[number] for number in (-1, np.int64(3), -40)] == [entries[-1], entries[3], entries[0]]
    for number in (40, -41):
        with pytest.raises(IndexError, match="of 40"):
            table[number]


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_is_its_parts_one_after_the_other(seed):
    rng = random.Random(seed)
    parts = [random_entries(rng, count) for count in (13, 0, 1, 26)]
    whole = sum(parts, [])
    chain = EntryChain([EntryChain([EntryTable.of(parts[0]), parts[1]]), parts[2], EntryTable.of(parts[3])])
    assert chain == whole and answers(chain) == answers(EntryList(whole))
    for part in (slice(0, 13), slice(14, 30), slice(5, 20), slice(20, 5), slice(None, None, 4)):
        assert chain[part] == whole[part]
    assert isinstance(chain[2:9], EntryTable)  # a source of a mix is its list's table
    assert chain[-1] == whole[-1] and pickle.loads(pickle.dumps(chain)) == whole
    with pytest.raises(IndexError):
        chain[40]


def test_paths_start_from_their_roots():
    text = b"a.mp4\n/data/a.mp4\na.mp4\nb/c.mp4\n"
    ends = np.array([6, 18, 24, 32])
    columns = {name: np.zeros(4, np.int32) for name in ("kind", "start", "stride", "pattern", "line")}
    columns |= {"total": np.full(4, -1), "root": np.array([0, 0, 1, 0])}
    table = EntryTable(np.frombuffer(text, np.uint8), ends, columns, roots=("/data", "lists"))
    paths = ["/data/a.mp4", "/data/a.mp4", "lists/a.mp4", "/data/b/c.mp4"]
    assert [entry.path for entry in table] == paths and table.count_paths() == 3
    assert answers(table) == answers(EntryList(list(table)))
    assert answers(table[:1]) == answers(EntryList(list(table[:1])))
    assert table[3:].path_bytes(0, 1) == [b"/data/b/c.mp4"]
    assert [table.written_path(number) for number in range(3)] == ["a.mp4", "/data/a.mp4", "a.mp4"]


def test_a_column_of_one_value_takes_no_room():
    table = EntryTable.of([VideoEntry(f"{number}.mp4") for number in range(1000)])
    assert all(column.strides == (0,) for column in table._columns.values())
    assert len(pickle.dumps(table)) < 20_000  # 8 bytes of place and 7 of name each


def test_labels():
    own = [(3,), (1, 2), (0,)]
    several, single = LabelTable.of(own), LabelTable.of([(4,), (0,), (4,)])
    assert several == own and own == several and several[1] == (1, 2) and several[-1] == (0,)
    assert several[1:] == own[1:] and list(several) == own and several != own[:2]
    assert several.distinct() == [0, 1, 2, 3] and several.several
    assert single == [(4,), (0,), (4,)] and single.distinct() == [0, 4] and not single.several
    assert pickle.loads(pickle.dumps(several)) == own
    with pytest.raises(IndexError):
        several[3]


# --- What is made of them stays as it was ---


def test_orders_are_those_of_numpy():
    for count in (1, 2, 1003, 70_001):
        one, other = np.random.default_rng(count), np.random.default_rng(count)
        found, expected = permutation(count, one), other.permutation(count)
        assert found.dtype == np.int32 and (found == expected).all()
        assert one.integers(1 << 40) == other.integers(1 << 40)  # and what is drawn next


def test_samples_of_steps_are_as_before():
    """Recorded before orders were kept as int32."""
    sampler = EpochSampler(1000, 4, seed=3, world_size=2, rank=1)
    assert [index for _, index in sampler[0] + sampler[130]] == [976, 719, 64, 93, 342, 484, 35, 98]
    small = EpochSampler(3, 4, seed=3, world_size=2, rank=1)
    assert [index for _, index in small[5]] == [4, 3, 6, 8]
    mix = Mix(
        [VideoEntry(str(i)) for i in range(9)], [Source("a", 0, 4, 2.0), Source("b", 4, 5, 1)], "weighted"
    )
    picked = [mix.pick(5, epoch, index, 9)[0] for epoch in (0, 3) for index in range(9)]
    assert picked == [2, 0, 1, 3, 0, 1, 6, 8, 4, 1, 0, 3, 2, 0, 1, 7, 6, 7]


def dataset_of(entries):
    settings = {"num_frames": 2, "stride": 1, "image_size": 32, "grid": (1, 2, 2)}
    return PretrainDataset(entries, mask=MaskConfig(), **settings)


def test_the_identity_of_a_list_is_as_before():
    """The lines that are hashed, written out as they were made one by one."""
    rng = random.Random(0)
    entries = random_entries(rng, 300)
    parts = EntryChain([EntryTable.of(entries[:120]), EntryTable.of(entries[120:])])
    sources = [Source("a", 0, 120, 1.0, "/data"), Source("b", 120, 180, 1.0)]

    def line(entry, start):
        path = entry.path[len(start) :] if entry.path.startswith(start) else entry.path
        text = f"{path}\0{entry.stride}"
        if entry.kind == "frames":
            text += f"\0{entry.start}\0{entry.total}\0{entry.pattern}"
        return f"{text}\n".encode("utf-8", "surrogatepass")

    lines = [line(entry, "/data/" if number < 120 else "./") for number, entry in enumerate(entries)]
    expected = {
        "sha256": hashlib.sha256(b"".join(lines)).hexdigest(),
        "parts": [hashlib.sha256(b"".join(lines[a : a + 7])).hexdigest()[:8] for a in range(0, 300, 7)],
    }
    for data in (Mix(parts, sources), Mix(entries, sources)):
        assert identify_list(dataset_of(data), "", block=7) == {
            "videos": 300,
            "block": 7,
            "entries": expected,
        }


def test_the_hash_of_a_list_is_that_of_its_whole_text():
    entries = random_entries(random.Random(1), 50, NAMES[:5])
    labels = [(number, 3) if number % 3 else (1,) for number in range(50)]
    for own in (None, labels):
        whole = [[[entry.stride, *frames_identity(entry)] for entry in entries], own]
        assert list_hash(EntryTable.of(entries), own and LabelTable.of(own)) == content_hash(whole)
    long = EntryTable.of([VideoEntry("/a")] * (CHUNK + 3))
    text = json.dumps([[[None, "/a"]] * (CHUNK + 3), None])
    assert list_hash(long) == hashlib.sha256(text.encode()).hexdigest()
    assert list_hash([]) == content_hash([[], None])
