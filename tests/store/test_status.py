"""The status of a run is what is in its store, on a live store too, and looking changes nothing."""

from __future__ import annotations

import json
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from harness_store import Nth, Point, batch, drain, hooked, meanwhile, plant, record, refuse, sgd, spoil

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import FormatError, MissingError
from splitfed.store.checked import Checked
from splitfed.store.status import LineageStatus, read_status
from splitfed.store.store import GradientStore


@pytest.fixture
def url() -> str:
    """A store with versions 0 and 1 of `Point`: two batches of a and b folded at staleness 0; then a's 2 and 3 wait."""
    url = f"memory://{uuid.uuid4()}"
    store = GradientStore(url)
    accumulator = Accumulator(Point(), store, sgd())
    accumulator.step()
    store.open_client("a")
    store.open_client("a")
    store.open_client("b")
    plant(store, batch(0), record())
    plant(store, batch(0, "b"), record(num_samples=3.0))
    drain(accumulator)
    plant(store, batch(2), record(base_version=1))
    plant(store, batch(3), record(base_version=0))
    return url


def body(url: str, **settings: Any) -> LineageStatus:
    """The status of its one lineage."""
    (found,) = read_status(GradientStore(url), **settings).lineages
    return found


def test_what_is_on_file_of_a_batch_is_said() -> None:
    """By lineage."""
    url = f"memory://{uuid.uuid4()}"
    Accumulator(Point(), GradientStore(url), sgd(), durability="log")
    assert body(url).durability == "log"


def test_what_is_there(url: str) -> None:
    """Versions, clients, waiting and closed batches, staleness and bytes are those of the store."""
    store = GradientStore(url)
    found = read_status(store)
    assert (found.url, found.format, found.problems, found.num_requests) == (url, 2, (), 0)
    assert found.clients == {"a": 2, "b": 1}
    assert found.num_objects == len(store.blobs.list(""))
    assert sum(found.bytes.values()) == sum(len(store.blobs.get(key) or b"") for key in store.blobs.list(""))
    assert {"weights", "optimizer", "applied", "commit", "grad", "clients", "other"} == set(found.bytes)
    (line,) = found.lineages
    assert (line.name, line.version, line.oldest) == ("body", 1, 0)
    assert (line.waiting, line.num_waiting, line.closed) == ({"a": 2}, 2, {"a": 1, "b": 1})
    assert (line.staleness, line.num_unread) == ({0: 1, 1: 1}, 0)
    newest, first = line.commits
    assert (newest.version, newest.kind, newest.num_batches, newest.num_samples) == (1, "fold", 2, 4.0)
    assert (newest.staleness, first.kind) == ({0: 2}, "initial")


def test_as_json(url: str) -> None:
    """The JSON holds all of it, in plain kinds."""
    found = read_status(GradientStore(url)).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["lineages"][0]["staleness"] == {"0": 1, "1": 1}
    assert found["lineages"][0]["commits"][0]["num_samples"] == 4.0


def test_looking_writes_nothing(url: str) -> None:
    """A store whose every write fails can be looked at."""

    def read_only(operation: str, key: str, perform: Any) -> Any:
        return perform() if operation in ("get", "list") else refuse(operation, key, perform)

    assert read_status(hooked(url, read_only)).problems == ()


@pytest.mark.parametrize("at", ["get format.json", "get body/commit/0000000001", "get body/applied", "get body/grad"])
def test_commits_in_between_are_no_problem(url: str, at: str) -> None:
    """A version that is added while the status is read, and one that leaves the window, is nothing to complain of."""

    def commit() -> None:
        other = GradientStore(url)
        plant(other, batch(9), record(base_version=1))
        drain(Accumulator(Point(), other, sgd(), keep_versions=2))

    hook = Nth(0, meanwhile(commit), at=at)
    with hook.armed():
        found = read_status(hooked(url, hook))
    assert hook.count > 0
    assert found.problems == ()


def test_gradients_beyond_the_budget_are_not_read(url: str) -> None:
    """How old they are isn't asked when that would read more bytes than allowed; they are counted."""
    store = GradientStore(url)
    (size, other) = store.blobs.sizes("body/grad").values()
    line = body(url, budget=size + other - 1)
    assert (line.staleness, line.num_unread, line.num_waiting) == ({0: 1}, 1, 2)
    plant(store, batch(7), b"junk")
    assert body(url).num_unread == 1, "one that isn't a gradient can't be read either"


def test_what_isnt_a_run(url: str) -> None:
    """An empty place, and one whose format record is something else, say so."""
    with pytest.raises(MissingError, match=r"no run was begun in memory://.*is the URL right"):
        read_status(GradientStore(f"memory://{uuid.uuid4()}"))
    store = GradientStore(url)
    store.blobs.put("format.json", [b'{"format": "1"}'])
    with pytest.raises(FormatError, match="has format '1', expected one of"):
        read_status(store)


def test_foreign_keys_and_requests(url: str) -> None:
    """What isn't ours is only counted in bytes; a posted request waits until its answer is there."""
    store = GradientStore(url)
    for key in ("bodyguard/fingerprint.json", "clients/a/x", "body/weights/junk", "probe/1/2"):
        store.blobs.create(key, [b"1"])
    posts = [f"post/a/{'0' * 32}-000000000{number}" for number in range(2)]
    for key in (f"{posts[0]}.request", f"{posts[1]}.request", f"{posts[1]}.answer"):
        store.blobs.create(key, [b"1"])
    found = read_status(store)
    assert ([line.name for line in found.lineages], found.clients) == (["body"], {"a": 2, "b": 1})
    assert (found.num_requests, found.bytes["post"], found.problems) == (1, 3, ())


def damaged(url: str, act: Any) -> str:
    """The one problem that a store has after some damage."""
    act(GradientStore(url))
    (problem,) = read_status(GradientStore(url)).problems
    return problem


def test_missing_files_of_the_newest_version_are_a_problem(url: str) -> None:
    """The version is named, and what to do."""
    assert "the weights of version 1 of lineage 'body' are gone" in damaged(
        url, lambda store: [store.blobs.delete(key) for key in store.blobs.list("body/weights") if "/0000000001" in key]
    )


def test_damaged_records_are_a_problem(url: str) -> None:
    """A commit record or applied table that was changed is named, and the rest is still shown."""

    def cut(key: str) -> Any:
        return lambda store: store.blobs.put(key, [b"{"])

    (applied,) = GradientStore(url).blobs.list("body/applied")
    original = bytes(GradientStore(url).blobs.get(applied) or b"")
    assert "applied table of lineage 'body'" in damaged(url, lambda store: spoil(store, applied))
    assert body(url).num_waiting == 2
    GradientStore(url).blobs.put(applied, [original])
    assert "commit record of lineage 'body'" in damaged(url, cut("body/commit/0000000001.json"))
    assert (body(url).version, body(url).waiting) == (-1, {"a": 2})


def test_a_lineage_without_a_version_is_a_problem(url: str) -> None:
    """An architecture whose first version never came is named."""
    store = GradientStore(url)
    store.blobs.create("client/fingerprint.json", [store.blobs.get("body/fingerprint.json") or b""])
    found = read_status(store)
    assert [(line.name, line.version) for line in found.lineages] == [("body", 1), ("client", -1)]
    assert "lineage 'client'" in found.problems[0]


def test_credentials_are_not_shown() -> None:
    """The URL is told without the password in it."""
    store = GradientStore("memory://x")
    raw: Any = SimpleNamespace(url="s3://***bucket/run", sizes=lambda prefix: {}, get=lambda key: None)
    store.blobs = Checked(raw)
    with pytest.raises(MissingError, match=r"s3://\*\*\*bucket"):
        read_status(store)
