"""A run that kept no history has rows all the same: those of its commit records and round reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from harness_store import Point, again, batch, plant, record

from splitfed import Accumulator, GradientStore, History, InputError
from splitfed.tracking.history import Follower, Source
from splitfed.tracking.records import Records, name_of


def accumulator(store: GradientStore) -> Accumulator:
    """One at rate 1, on a store that it begins if need be."""
    return Accumulator(Point(), store, lambda params: torch.optim.SGD(params, lr=1.0))


def commit(store: GradientStore, *clients: str) -> None:
    """Commit a batch of each of these clients together; clients may be named twice."""
    seq = 10 * (store.latest_version() + 1)
    for place, client in enumerate(clients):
        plant(store, batch(seq + place, client), record())
    assert accumulator(store).step() is not None


@pytest.fixture
def store(tmp_path: Path) -> GradientStore:
    """A store at version 2: two batches of a and one of b, then one of b."""
    store = GradientStore(tmp_path / "digits" / "store", sync="process")
    accumulator(store)
    commit(store, "a", "a", "b")
    commit(store, "b")
    return store


def test_commits_are_read_off_their_records(store: GradientStore) -> None:
    """A row a version but the first, which folds nothing, with the batches of each client."""
    rows = History.load(again(store)).commits("body")
    told = [(row["version"], row["num_batches"], row["num_samples"], row["folded"]) for row in rows]
    assert told == [(1, 3, 3.0, {"a": 2, "b": 1}), (2, 1, 1.0, {"b": 1})]
    run = History.load(store.url).run
    assert run is not None
    assert (run["name"], run["first_versions"], run["settings"]) == ("digits", {}, {"store": store.shown})
    assert History.load(Path(store.url).parent).rows == History.load(store).rows


def test_rounds_are_read_off_their_reports(tmp_path: Path) -> None:
    """A simulation whose history was in memory, drawn later: its rounds, and commits timed from their start."""
    store = GradientStore(tmp_path / "run", sync="process")
    reports = list(toy.run(mode="sflv2", rounds=2, store=store))
    found = History.load(tmp_path / "run")
    assert [row["participants"] for row in found.rounds()] == [row["participants"] for row in reports]
    commits = found.commits("body")
    assert len(commits) == store.latest_version()
    assert all(0 <= row["time"] < 600 for row in commits)


def test_a_history_that_is_kept_is_the_history(tmp_path: Path) -> None:
    """What it has is taken from it alone; kinds that it lacks come from the records."""
    store = GradientStore(tmp_path / "run", sync="process")
    list(toy.run(mode="sflv2", rounds=1, store=store, callbacks=[kept := History(store)]))
    assert History.load(store).rows == kept.rows
    other = GradientStore(tmp_path / "other", sync="process")
    (report,) = toy.run(mode="sflv2", rounds=1, store=other)
    History(other).append({**report, "mine": True})
    found = History.load(other)
    assert [row.get("mine") for row in found.rounds()] == [True]
    assert len(found.commits("body")) == other.latest_version()


def test_a_long_run_tells_of_its_newest_versions(store: GradientStore) -> None:
    """Of 2 commits at most one is read: the run's row says from which version on; what came since is added."""
    records = Records(again(store), most=1)
    run, *commits = records.rows()
    assert (run["first_versions"], [row["version"] for row in commits]) == ({"body": 2}, [2])
    commit(store, "c")
    commit(store, "c")
    assert [row["version"] for row in records.rows()[1:]] == [4]


def test_a_lost_record_is_where_the_rows_begin(store: GradientStore) -> None:
    """What is told has no gaps."""
    commit(store, "c")
    store.blobs.delete(store.lineage().keys.commit(1))
    run, *commits = Records(again(store)).rows()
    assert (run["first_versions"], [row["version"] for row in commits]) == ({"body": 2}, [2, 3])


def test_a_run_that_goes_on_is_read_again(store: GradientStore) -> None:
    """By one source, with what other processes have committed meanwhile."""
    source = Source(store.url)
    assert len(source.read().commits()) == 2
    commit(again(store), "a")
    assert len(source.read().commits()) == 3


def test_names_of_runs() -> None:
    """The last part of the place, but not one that only says that it is a store."""
    names = [
        name_of(GradientStore(url)) for url in ("memory://bucket/digits", "memory://digits/store", "memory://store")
    ]
    assert names == ["digits", "digits", "store"]


def test_a_follower_leaves_no_commit_out(store: GradientStore, tmp_path: Path) -> None:
    """Those that were there, those that others made, and those made while it wasn't there; each once."""
    path = tmp_path / "history.jsonl"
    Follower(store, path, ["body"]).catch_up()
    commit(again(store), "a")
    follower = Follower(again(store), path, ["body"])
    follower.catch_up()
    follower.catch_up()
    found = History.load(path)
    assert [row["version"] for row in found.commits("body")] == [1, 2, 3]
    assert [row["kind"] for row in found.rows].count("run") == 1
    assert found.run is not None
    assert found.run["name"] == "digits"


def test_a_file_of_another_run_is_refused(store: GradientStore, tmp_path: Path) -> None:
    """It has versions that the store hasn't: its rows would be mixed with those of this run."""
    path = tmp_path / "history.jsonl"
    Follower(store, path, ["body"]).catch_up()
    new = GradientStore(tmp_path / "new", sync="process")
    accumulator(new)
    with pytest.raises(InputError, match=r"has version 2 of lineage 'body', and .* has 0: .*history of another run"):
        Follower(new, path, ["body"])
