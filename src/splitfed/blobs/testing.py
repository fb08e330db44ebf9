"""The conformance suite of storage backends: subclass it, say how to open yours, and run pytest.

    class TestMyStore(splitfed.testing.BlobsSuite):
        def open(self, place):
            return splitfed.blobs.open_blobs(f"mine://bucket/{place}")

Exactly-once and atomic versions rest on what is tested here, so a backend that passes can carry a
run. The trap is the race: most storage creates twice under load what it creates once in a calm
test. So writers meet here in threads, and one pass is no proof: run it a few times more. Pytest
itself isn't needed: a broken promise is an `AssertionError`.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from splitfed.blobs.contract import Blobs, Buffer
from splitfed.errors import IdError, InputError, SplitFedError, UnsupportedError

MALFORMED: tuple[Any, ...] = (
    # They leave the root, or have an empty name.
    *("..", ".", "/", "/etc/passwd", "../a", "a/../b", "a/..", "a//b", "a/", "/a", ""),
    # They hide, or look like an option or a home directory.
    *(".a", "a/.b", "~", "~/a", "-a", "_a", "=a"),
    # They mean something to a shell or in a URL.
    *("a*b", "a?versionId=1", "a::b", "a%00b", "a%2fb", "a b", "a\n"),
    # They mean something else, or nothing, to another system.
    *("a\\b", "a:b", "a\0b", "ключ"),
    # They are too long, or no strings.
    *("a/" * 256 + "a", "a" * 251, 7, None, b"a"),
)


class BlobsSuite:
    """What every backend must do; each test is one promise of `splitfed.blobs.Blobs`."""

    num_keys = 12
    """How many keys writers race for."""

    def open(self, place: str) -> Blobs:
        """Open the blobs at a place of this name: empty the first time, the same ones afterwards.

        Raises:
            UnsupportedError: the subclass doesn't say how.
        """
        raise UnsupportedError(
            f"{type(self).__name__} doesn't say how to open its backend: define open(self, place)"
        )

    def setup_method(self) -> None:
        """Give the test a place of its own."""
        self.place = f"suite-{uuid.uuid4().hex[:12]}"

    def test_what_is_absent_reads_as_none(self) -> None:
        """Absent keys and directories are no errors."""
        blobs = self.open(self.place)
        _same("get of an absent key", blobs.get("a/b"), None)
        lists = [blobs.list(prefix) for prefix in ("", "a", "a/b")]
        _same("lists of absent directories", lists, [[], [], []])
        _same("sizes of an absent directory", blobs.sizes("a"), {})
        blobs.delete("a/b")
        _same("delete_tree of an absent directory", blobs.delete_tree("a"), 0)

    def test_create_stores_once(self) -> None:
        """The first create of a key returns True; later ones return False and change nothing."""
        bodies: list[list[Buffer]] = [[b"first ", b"body"], [b"second"], [b"third"]]
        one, other = self.open(self.place), self.open(self.place)
        answers = [
            blobs.create("grad/a/1", parts)
            for blobs, parts in zip((one, other, one), bodies, strict=True)
        ]
        answers.append(other.create("grad/a/1", [b"fourth"], durable=False))
        _same("creates of one key", answers, [True, False, False, False])
        _same("the object after them", _content(other, "grad/a/1"), b"first body")

    def test_put_creates_and_replaces(self) -> None:
        """Put overwrites, and a created object too."""
        blobs = self.open(self.place)
        blobs.create("dir/head", [b"0"])
        blobs.put("dir/head", [b"1"])
        blobs.put("dir/head", [b"two", b"2"], durable=True)
        blobs.put("dir/new", [b"3"])
        objects = [_content(blobs, key) for key in ("dir/head", "dir/new")]
        _same("the objects", objects, [b"two2", b"3"])
        _same("create of a key that was put", blobs.create("dir/new", [b"4"]), False)

    def test_empty_objects_are_refused(self) -> None:
        """An object without a byte raises, whichever way it is empty, and leaves nothing."""
        blobs = self.open(self.place)
        nothing: list[list[Buffer]] = [[], [b""], [b"", bytearray(), memoryview(b"")]]
        for parts in nothing:
            for write in (blobs.create, blobs.put):
                what = f"{write.__name__} of an empty object"
                _raises(InputError, what, partial(write, "a/b", parts))
        _same("what lies there then", blobs.list(""), [])

    def test_parts_are_joined_in_order(self) -> None:
        """Bytes, bytearrays, views of other items and empty parts make one object; 5,000 do too."""
        blobs = self.open(self.place)
        words = memoryview(bytes(range(24))).cast("i", [2, 3])
        blobs.create("mixed", [b"ab", b"", bytearray(b"cd"), words, memoryview(b"xyz")[1:]])
        joined = b"abcd" + bytes(range(24)) + b"yz"
        _same("an object of mixed parts", _content(blobs, "mixed"), joined)
        many = [bytes([number % 251]) * (number % 7) for number in range(5000)]
        blobs.put("many", many)
        _same("an object of 5,000 parts", _content(blobs, "many"), b"".join(many))

    def test_what_get_returns_is_private_and_writable(self) -> None:
        """What get returns can be changed in place; neither store nor other readers see it."""
        blobs = self.open(self.place)
        for size in (1, 65_535, 65_536, 200_001):
            body = random.Random(size).randbytes(size)
            blobs.create(f"x/{size}", [body])
            data = blobs.get(f"x/{size}") or memoryview(b"")
            found = (data.nbytes, data.readonly)
            _same(f"length and read-only flag of {size} bytes", found, (size, False))
            data[:1] = bytes([body[0] ^ 1])
            unchanged = _content(blobs, f"x/{size}") == body
            _same(f"the {size} bytes after a reader wrote to its own", unchanged, True)
            blobs.delete(f"x/{size}")
            _same(f"the reader's {size} bytes after the delete", bytes(data[1:]) == body[1:], True)

    def test_list_is_recursive_sorted_and_by_whole_names(self) -> None:
        """A directory holds what is beneath it, not siblings with a longer name nor its own key."""
        blobs = self.open(self.place)
        keys = [
            "body/commit/2.json",
            "body/commit/10.json",
            "body/head",
            "body@a/head",
            "body2/x",
            "format.json",
        ]
        for key in keys:
            blobs.create(key, [key.encode()])
        inner = ["body/commit/10.json", "body/commit/2.json"]
        prefixes = ("", "body", "body/", "body/commit", "bod", "body/head")
        expected = [sorted(keys), [*inner, "body/head"], [*inner, "body/head"], inner, [], []]
        _same(f"lists of {prefixes}", [blobs.list(prefix) for prefix in prefixes], expected)
        _same("sizes", [*blobs.sizes("").items()], [(key, len(key)) for key in sorted(keys)])

    def test_delete_tree_counts_and_spares_the_rest(self) -> None:
        """All keys beneath the directory go, no others, and the directory may be used again."""
        blobs = self.open(self.place)
        for key in ["a/1", "a/b/2", "a/b/c/3", "ab/4", "b/a/5"]:
            blobs.create(key, [b"1"])
        _same("delete_tree of three keys", blobs.delete_tree("a"), 3)
        _same("what is left", blobs.list(""), ["ab/4", "b/a/5"])
        _same("create beneath it", blobs.create("a/b/2", [b"again"]), True)
        _raises(IdError, "delete_tree of the whole store", lambda: blobs.delete_tree(""))

    def test_malformed_keys_are_refused(self) -> None:
        """No method takes a key that could leave the root, glob, hide, or do something in a URL."""
        blobs = self.open(self.place)
        calls: Mapping[str, Callable[[Any], object]] = {
            "get": blobs.get,
            "create": lambda key: blobs.create(key, [b"1"]),
            "put": lambda key: blobs.put(key, [b"1"]),
            "delete": blobs.delete,
            "delete_tree": blobs.delete_tree,
            "list": blobs.list,
            "sizes": blobs.sizes,
            "lock": lambda key: blobs.lock(key, 0).__enter__(),
        }
        for key in MALFORMED:
            for name, call in calls.items():
                if name not in ("list", "sizes", "delete_tree") or key not in ("", "a/"):
                    _raises(IdError, f"{name}({key!r})", partial(call, key))

    def test_operations_leave_what_a_dictionary_would_hold(self) -> None:
        """Any sequence of operations by one caller has the effect that it has on a dict."""
        chance = random.Random(0)
        blobs = self.open(self.place)
        model: dict[str, bytes] = {}
        for number in range(120):
            verb = chance.choice(["create", "create", "put", "delete"])
            key = chance.choice(["a", "b/1", "b/2", "b/c/3", "d.json"])
            body = b"%d" % number
            if verb == "create":
                _same(f"create {number}", blobs.create(key, [body]), key not in model)
                model.setdefault(key, body)
            elif verb == "put":
                blobs.put(key, [body])
                model[key] = body
            else:
                blobs.delete(key)
                model.pop(key, None)
            _same(f"{key} after {verb} {number}", _content(blobs, key), model.get(key))
        stored = {key: _content(blobs, key) for key in blobs.list("")}
        _same("all objects in the end", stored, model)

    def test_racing_writers_have_one_winner_a_key(self) -> None:
        """Of writers that create a key at once one wins, and its object is there, whole."""
        stores = [self.open(self.place), self.open(self.place)]
        bodies = [bytes([writer]) * 9000 for writer in range(4)]
        for number in range(self.num_keys):
            key = f"race/{number}"

            def write(writer: int, key: str = key) -> bool:
                body = bodies[writer]
                return stores[writer % 2].create(key, [body[:5000], body[5000:]])

            won = _at_once(write, 4)
            _same(f"winners of {key}", sum(won), 1)
            whole = _content(stores[0], key) == bodies[won.index(True)]
            _same(f"whether the winner's object lies at {key}", whole, True)

    def test_readers_see_nothing_or_all(self) -> None:
        """While objects are created and replaced, a reader gets None or one whole object."""
        blobs = self.open(self.place)
        done = threading.Event()
        bodies = [bytes([number]) * 300_000 for number in range(self.num_keys)]
        keys = ["d/same", *(f"d/{number}" for number in range(self.num_keys))]

        def write(_: int) -> None:
            try:
                for number, body in enumerate(bodies):
                    blobs.create(f"d/{number}", [body[:100_000], body[100_000:]])
                    blobs.put("d/same", [body[:100_000], body[100_000:]])
            finally:
                done.set()

        def read(_: int) -> None:
            while not done.is_set():
                for key in keys:
                    data = _content(blobs, key)
                    _same(f"a read of {key} is whole", data is None or data in bodies, True)

        _at_once(lambda worker: (write if worker == 0 else read)(worker), 3)
        _same("the last object", _content(blobs, "d/same") == bodies[-1], True)

    def test_probe_passes_and_cleans_up(self) -> None:
        """The start-up probe passes, and no key of it remains."""
        blobs = self.open(self.place)
        blobs.probe()
        _same("what the probe leaves", blobs.list(""), [])

    def test_lock_excludes_or_says_that_it_does_not(self) -> None:
        """Of two that want a lock one holds it; a backend without locks yields False."""
        one, other = self.open(self.place), self.open(self.place)
        with one.lock("body/commit", 5) as held, other.lock("body/commit", 0.02) as second:
            _same("a lock that another holds", second, False)
        with other.lock("body/commit", 5) as again:
            _same("the lock when it is free", again, held)
        _same("what a lock leaves", one.list(""), [])


def _same(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise AssertionError(f"{what}: expected {str(expected)[:400]}, got {str(got)[:400]}")


def _raises(error: type[SplitFedError], what: str, call: Callable[[], object]) -> None:
    try:
        got: object = call()
    except error:
        return
    raise AssertionError(f"{what}: expected {error.__name__}, got {got!r}")


def _content(blobs: Blobs, key: str) -> bytes | None:
    data = blobs.get(key)
    return None if data is None else bytes(data)


def _at_once(work: Callable[[int], Any], count: int) -> Sequence[Any]:
    """Run `work(0)` to `work(count - 1)` in threads that begin together; their results in order."""
    gate = threading.Barrier(count)

    def run(number: int) -> Any:
        gate.wait(60)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(run, range(count))]
