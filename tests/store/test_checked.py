"""The door to a store's files: what comes damaged is read once more, and what is damaged is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from splitfed.blobs.memory import MemoryBlobs
from splitfed.errors import CorruptedError, FormatError, StoreError
from splitfed.store.checked import Checked

KEY = "body/pin/a/1-0"


class Garbling(MemoryBlobs):
    """Storage whose replies are damaged on the way, as long as `ways` has one for them."""

    def __init__(self) -> None:
        super().__init__("garbling")
        self.ways: list[Callable[[bytes], bytes]] = []

    def get(self, key: str) -> memoryview | None:
        """What is stored, as it comes."""
        data = super().get(key)
        if data is None or not self.ways:
            return data
        return memoryview(self.ways.pop(0)(bytes(data)))


def flip(place: int) -> Callable[[bytes], bytes]:
    """A way on which one bit of a byte changes."""
    return lambda data: data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.fixture
def raw() -> Garbling:
    """Storage with one file."""
    found = Garbling()
    found.delete(KEY)
    Checked(found).create(KEY, [b'{"version": 7}'])
    return found


@pytest.mark.parametrize("place", [1, 5, -3], ids=["mark", "checksum", "content"])
def test_what_is_damaged_on_the_way_is_read_once_more(raw: Garbling, place: int) -> None:
    """The reader sees what was written, by either way of reading."""
    expected = bytes(MemoryBlobs.get(raw, KEY) or b"")
    for read in (Checked(raw).get, Checked(raw).peek):
        raw.ways = [flip(place)]
        assert bytes(read(KEY) or b"") == expected


def test_what_comes_otherwise_each_time_is_an_error_of_the_storage(raw: Garbling) -> None:
    """Nobody may take it for a file that is damaged for good: a batch would be given up."""
    raw.ways = [flip(-3), flip(-4)]
    with pytest.raises(StoreError, match=r"'body/pin/a/1-0' came with other bytes each time") as caught:
        Checked(raw).get(KEY)
    assert not isinstance(caught.value, CorruptedError)
    assert Checked(raw).get(KEY) is not None


@pytest.mark.parametrize(("place", "kind"), [(-3, CorruptedError), (5, FormatError)], ids=["content", "mark"])
def test_what_is_damaged_at_rest_is_refused_by_name(raw: Garbling, place: int, kind: type[Exception]) -> None:
    """With the key, and what mends it."""
    raw.put(KEY, [flip(place)(bytes(raw.get(KEY) or b""))])
    with pytest.raises(kind, match=r"'body/pin/a/1-0' .*Restore it from a copy, or run `splitfed repair`"):
        Checked(raw).get(KEY)


def test_what_is_deleted_between_two_looks_is_absent(raw: Garbling) -> None:
    """As it is for who reads later."""

    def and_gone(data: bytes) -> bytes:
        raw.delete(KEY)
        return flip(-3)(data)

    raw.ways = [and_gone]
    assert Checked(raw).get(KEY) is None
