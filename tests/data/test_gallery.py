"""Gallery and queries of a probe: who is in which, caps, and what two lists share."""

import numpy as np
import pytest

import vmae
from vmae.data.gallery import count_shared, join_lists, split_list
from vmae.data.labels import LabelledList
from vmae.data.manifest import VideoEntry


def listed(labels, name="v"):
    entries = [VideoEntry(path=f"/{name}/{number}.mp4") for number in range(len(labels))]
    return LabelledList(entries, [(label,) for label in labels], max(labels) + 1, False)


def test_half_of_each_class_in_the_order_of_the_list():
    labels = [0] * 10 + [1] * 5 + [2] * 2 + [3]
    found = split_list(listed(labels), 100, "list")
    own, asked = found.labels[: found.size], found.labels[found.size :]
    assert np.bincount(own).tolist() == [5, 3, 1] and np.bincount(asked).tolist() == [5, 2, 1]
    paths = [entry.path for entry in found.entries]
    assert len(set(paths)) == 17 and "/v/17.mp4" not in paths
    assert found.notes == (
        "note: 1 classes of list have one video each and are left out of the probe, which needs one to learn "
        "from and one to test on",
    )
    numbers = [int(path[3:-4]) for path in paths]
    assert numbers[: found.size] == sorted(numbers[: found.size])
    assert [labels[number] for number in numbers] == found.labels.tolist()
    assert [entry.path for entry in split_list(listed(labels), 100, "list").entries] == paths


@pytest.mark.parametrize("most", [2, 12, 31, 60])
def test_a_cap_takes_the_same_share_of_each_class(most):
    labels = [0] * 60 + [1] * 30 + [2] * 30
    found = split_list(listed(labels), most, "list")
    counts = np.bincount(found.labels, minlength=3)
    assert counts.sum() == most and found.size in (most // 2, -(-most // 2))
    if most >= 12:
        assert np.abs(counts - most * np.array([0.5, 0.25, 0.25])).max() <= 2


def test_of_many_classes_pairs_are_taken():
    """A cap below two a class leaves classes out, not each without a query."""
    found = split_list(listed([number // 4 for number in range(400)]), 20, "list")
    assert np.bincount(found.labels).tolist()[:10] == [2] * 10


def test_two_lists_share_the_cap():
    first, second = listed([0, 1] * 50), listed([0, 1, 2] * 4, "q")
    found = join_lists(first, second, 40, ("a", "b"))
    assert (found.size, len(found.queries)) == (28, 12) and found.num_classes == 3
    assert "4 of the 12 queries of b are of classes that no video taken of a shows" in found.notes[0]
    found = join_lists(first, second, 10, ("a", "b"))
    assert (found.size, len(found.queries)) == (5, 5)
    found = join_lists(second, first, 40, ("b", "a"))
    assert (found.size, len(found.queries)) == (12, 28)
    assert [entry.path[1] for entry in found.entries] == ["q"] * 12 + ["v"] * 28


def test_no_gallery():
    with pytest.raises(vmae.InputError, match="no class of two videos"):
        split_list(listed([0, 1, 2]), 10, "list")
    with pytest.raises(vmae.InputError, match="no class in common"):
        join_lists(listed([0, 0]), listed([1, 1]), 10, ("a", "b"))


def test_shared_videos_by_their_paths():
    one, two = listed([0] * 5), listed([0] * 3)
    assert (
        count_shared(one.entries, two.entries) == 3
        and count_shared(two.entries, listed([0], "w").entries) == 0
    )
    odd = [VideoEntry(path="/v/x/../1.mp4"), VideoEntry(path="/v//2.mp4")]
    assert count_shared(odd, one.entries) == 2 and count_shared(one.entries, odd) == 2
