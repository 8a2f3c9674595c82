"""Requests that run ahead: in order, within a bound of bytes, and none left behind."""

import threading
import time

import pytest

from vmae.data.shards.ahead import Ahead, answer_of
from vmae.data.shards.entries import Shard, ShardError

SHARD = Shard("s3://b/s.tar", 1000)


class Store:
    """Answers when it is let to; notes what was asked."""

    def __init__(self):
        self.asked, self.gate = [], threading.Event()

    def read(self, shard, offset, length):
        self.asked.append(offset)
        assert self.gate.wait(10)
        if offset == 66:
            raise ShardError("gone")
        return bytes([offset]) * length


def settled(store, count):
    """Whether so many were asked for, and no more."""
    end = time.monotonic() + 5
    while len(store.asked) < count and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.02)
    return len(store.asked) == count


def test_answers_are_those_of_the_requests_in_order():
    store = Store()
    ahead = Ahead(store.read, at_once=2)
    for offset in range(6):
        ahead.want((SHARD, offset, 3))
    assert settled(store, 2)  # at once
    store.gate.set()
    found = [answer_of(ahead.take((SHARD, offset, 3)), SHARD) for offset in range(6)]
    assert found == [bytes([offset]) * 3 for offset in range(6)] and sorted(store.asked) == list(range(6))
    assert ahead.take((SHARD, 0, 3)) is None


def test_bytes_are_bounded_but_a_single_request_may_be_larger():
    store = Store()
    store.gate.set()
    ahead = Ahead(store.read, most_bytes=10)
    for offset, length in enumerate((25, 4, 4, 4)):
        ahead.want((SHARD, offset, length))
    assert settled(store, 1)
    assert len(answer_of(ahead.take((SHARD, 0, 25)), SHARD)) == 25
    assert settled(store, 3)  # two of four bytes have room
    ahead.take((SHARD, 1, 4))
    assert settled(store, 4)


def test_what_was_not_taken_in_its_turn_makes_room():
    """A video that was blocked meanwhile is never taken."""
    store = Store()
    store.gate.set()
    ahead = Ahead(store.read, most_bytes=10)
    for offset in range(4):
        ahead.want((SHARD, offset, 5))
    assert settled(store, 2)
    assert ahead.take((SHARD, 99, 5)) is None  # one that stands in for another: nobody asked ahead
    assert answer_of(ahead.take((SHARD, 1, 5)), SHARD) == b"\1" * 5
    assert settled(store, 4)


def test_one_that_has_no_room_yet_is_asked_for_directly():
    store = Store()
    ahead = Ahead(store.read, most_bytes=5)
    ahead.want((SHARD, 0, 5))
    ahead.want((SHARD, 1, 5))
    assert ahead.take((SHARD, 1, 5)) is None
    store.gate.set()


def test_a_fault_is_raised_where_the_bytes_are_taken():
    store = Store()
    store.gate.set()
    ahead = Ahead(store.read)
    ahead.want((SHARD, 66, 5))
    with pytest.raises(ShardError, match="gone"):
        answer_of(ahead.take((SHARD, 66, 5)), SHARD)
