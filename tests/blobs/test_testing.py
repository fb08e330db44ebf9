"""The conformance suite finds what it is there to find: each promise, broken alone, fails its test."""

from __future__ import annotations

import builtins
import inspect
import threading
import uuid
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest

from splitfed.blobs.contract import Blobs, Buffer, check_key
from splitfed.blobs.memory import MemoryBlobs
from splitfed.blobs.testing import BlobsSuite
from splitfed.errors import InputError, StoreError, UnsupportedError

TESTS = [name for name, _ in inspect.getmembers(BlobsSuite, inspect.isfunction) if name.startswith("test_")]


class Forgetful(MemoryBlobs):
    """Reads an absent object as an empty one."""

    def get(self, key: str) -> memoryview | None:
        """Never None."""
        found = super().get(key)
        return memoryview(bytearray()) if found is None else found


class Overwriting(MemoryBlobs):
    """Takes every create for the first."""

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Replaces."""
        self.put(key, parts)
        return True


class Asking(MemoryBlobs):
    """Asks whether the key is there, and then writes."""

    together = threading.Barrier(4)

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Two may win; those that come at once meet between the question and the write."""
        absent = self.get(key) is None
        if threading.current_thread() is not threading.main_thread():
            with suppress(threading.BrokenBarrierError):
                self.together.wait(60)
        if absent:
            self.put(key, parts)
        return absent


class Keeping(MemoryBlobs):
    """Doesn't replace what is there."""

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Creates."""
        self.create(key, parts)


class Lax(MemoryBlobs):
    """Stores empty objects."""

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Whatever it is given."""
        with suppress(InputError):
            super().put(key, parts, durable=durable)


class Shortening(MemoryBlobs):
    """Loses the last of several parts."""

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Some of it."""
        super().put(key, parts[:-1] or parts, durable=durable)


class ReadOnly(MemoryBlobs):
    """Hands out its own bytes."""

    def get(self, key: str) -> memoryview | None:
        """Not writable."""
        found = super().get(key)
        return None if found is None else found.toreadonly()


class Prefixing(MemoryBlobs):
    """Takes a directory for the beginning of a name."""

    def list(self, prefix: str) -> builtins.list[str]:
        """Siblings with a longer name too."""
        return [key for key in super().list("") if key.startswith(prefix)]


class Miscounting(MemoryBlobs):
    """Doesn't say how much a delete deleted."""

    def delete_tree(self, prefix: str) -> int:
        """One more than there were."""
        return super().delete_tree(prefix) + 1


class Trusting(MemoryBlobs):
    """Deletes under any name."""

    def delete(self, key: str) -> None:
        """Ignores those that aren't keys."""
        with suppress(StoreError, InputError):
            super().delete(key)


class Undeleting(MemoryBlobs):
    """Deletes nothing."""

    def delete(self, key: str) -> None:
        """Says that it did."""
        check_key(key)


class Torn(MemoryBlobs):
    """Writes an object in two steps."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.half: Buffer = b""
        self.half_read = threading.Event()

    def get(self, key: str) -> memoryview | None:
        """Says when somebody came between the steps."""
        found = super().get(key)
        if found is not None and found == self.half:
            self.half_read.set()
        return found

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """A reader comes in between."""
        if len(parts) == 2 and threading.current_thread() is not threading.main_thread():
            self.half = parts[0]
            super().put(key, parts[:1])
            assert self.half_read.wait(60)
        super().put(key, parts)


class Littering(MemoryBlobs):
    """Leaves its probe behind."""

    def probe(self) -> None:
        """Without a clean-up."""
        self.create("probe/x", [b"1"])


class Generous(MemoryBlobs):
    """Gives a lock to everyone."""

    @contextmanager
    def lock(self, key: str, timeout: float) -> Any:
        """Says that it holds."""
        with nullcontext():
            yield bool(check_key(key))


MUTANTS: dict[type[Blobs], str] = {
    Forgetful: "test_what_is_absent_reads_as_none",
    Overwriting: "test_create_stores_once",
    Asking: "test_racing_writers_have_one_winner_a_key",
    Keeping: "test_put_creates_and_replaces",
    Lax: "test_empty_objects_are_refused",
    Shortening: "test_parts_are_joined_in_order",
    ReadOnly: "test_what_get_returns_is_private_and_writable",
    Prefixing: "test_list_is_recursive_sorted_and_by_whole_names",
    Miscounting: "test_delete_tree_counts_and_spares_the_rest",
    Trusting: "test_malformed_keys_are_refused",
    Undeleting: "test_operations_leave_what_a_dictionary_would_hold",
    Torn: "test_readers_see_nothing_or_all",
    Littering: "test_probe_passes_and_cleans_up",
    Generous: "test_lock_excludes_or_says_that_it_does_not",
}


def suite(backend: type[Any]) -> BlobsSuite:
    """The suite over one backend, at a place of its own."""

    class Mine(BlobsSuite):
        num_keys = 4

        def open(self, place: str) -> Blobs:
            made: Blobs = backend(f"{backend.__name__}-{place}")
            return made

    made = Mine()
    made.setup_method()
    return made


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_promise_fails_its_test(mutant: type[Blobs]) -> None:
    """A backend that breaks one promise fails the test of that promise, with what was expected."""
    with pytest.raises(AssertionError, match="expected"):
        getattr(suite(mutant), MUTANTS[mutant])()


def test_every_test_has_its_mutant() -> None:
    """No test of the suite is there that nothing was seen to fail."""
    assert sorted(MUTANTS.values()) == sorted(TESTS)


def test_what_keeps_its_promises_passes_without_pytest() -> None:
    """The methods are plain: memory passes all of them."""
    for name in TESTS:
        getattr(suite(MemoryBlobs), name)()


def test_a_backend_must_say_how_it_is_opened() -> None:
    """A suite without `open` says what is missing."""
    with pytest.raises(UnsupportedError, match=r"define open\(self, place\)"):
        BlobsSuite().open(uuid.uuid4().hex)
