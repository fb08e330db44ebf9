"""The pool of workers: who trains where, and that a death costs time and changes no count."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import crews
import pytest
import toy

from splitfed.errors import InputError, WorkerError
from splitfed.store.store import GradientStore

MODES = ("round", "sflv1", "synchronous", "buffered", "sflv2", "grouped")
EXACT = ("round", "sflv1", "synchronous")
"""The modes whose schedule is fixed."""


def counted(store: GradientStore) -> dict[str, tuple[int, int]]:
    """The samples of each client's batches that commits of the body have folded, and their number."""
    found: dict[str, tuple[int, int]] = {}
    for name in ("body", *(f"body@{client}" for client in store.clients())):
        line = store.lineage(name)
        for version in range(1, line.head() + 1):
            for batch in line.commit(version).folded:
                if batch.incarnation:  # else it is a change that was averaged, and no batch
                    samples, batches = found.get(batch.client_id, (0, 0))
                    found[batch.client_id] = (samples + 4, batches + 1)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_what_a_dead_worker_has_sent_counts_once(tmp_path: Path, mode: str) -> None:
    """Three deaths, before a backward and after one: 2 batches of each client, whoever dies."""
    store = GradientStore(tmp_path / "store", sync="process")
    run = crews.simulation(store, deaths=[0, 3, 6], mode=mode, clients=toy.clients(4), rounds=1)
    with pytest.warns(UserWarning, match=r"died with client 'client-\d' \(it had to be\): another one takes its place"):
        (row,) = run
    assert counted(store) == {f"client-{number}": (8, 2) for number in range(4)}
    assert (row["status"], row["batches"], row["dropped"], row["gradients_rejected"]) == ("complete", 8, {}, 0)
    assert [entry["num_samples"] for entry in row["clients"].values()] == [8] * 4


@pytest.mark.parametrize("mode", EXACT)
def test_a_killed_run_ends_in_the_bits_of_a_calm_one(tmp_path: Path, mode: str) -> None:
    """Where the schedule is fixed: with dropout in the body, three deaths, and rows that tell the same losses."""
    settings: dict[str, Any] = {"model": toy.model(0.5), "mode": mode, "rounds": 2}
    calm = toy.run(**settings)
    losses = [row["train_loss"] for row in calm]
    run = crews.simulation(GradientStore(tmp_path / "store", sync="process"), deaths=[1, 4, 2], **settings)
    with pytest.warns(UserWarning, match="another one takes its place"):
        rows = list(run)
    assert toy.same(calm.whole(), run.whole())
    assert mode == "synchronous" or [row["train_loss"] for row in rows] == losses


def test_personal_parts_and_optimizers_of_a_killed_run_are_those_of_a_calm_one(tmp_path: Path) -> None:
    """The client's own state is with the pool, and moves on only with a run that has ended."""
    settings: dict[str, Any] = {"personal": ("3.*",), "keep_optimizers": True, "rounds": 3}
    calm = toy.run(**settings)
    losses = [row["train_loss"] for row in calm]
    run = crews.simulation(GradientStore(tmp_path / "store", sync="process"), deaths=[3, 9], **settings)
    with pytest.warns(UserWarning, match="another one takes its place"):
        assert [row["train_loss"] for row in run] == losses
    assert toy.same(calm.whole(), run.whole())


def test_a_run_that_a_dead_worker_held_takes_its_steps_again(tmp_path: Path) -> None:
    """Two workers hold the runs of three clients after the first global step, when one dies in the second."""
    calm = toy.run(mode="synchronous", rounds=1)
    list(calm)
    store = GradientStore(tmp_path / "store", sync="process")
    run = crews.simulation(store, deaths=[6], mode="synchronous", rounds=1)
    with pytest.warns(UserWarning, match="another one takes its place"):
        (row,) = run
    assert (row["commits"], row["batches"]) == (2, 6)
    assert toy.same(calm.whole(), run.whole())


def test_the_fourth_death_of_one_worker_ends_the_run(tmp_path: Path) -> None:
    """Three are replaced, each with a warning; what is in the store stays, and a run on it goes on to the same bits."""
    calm = toy.run(rounds=1)
    list(calm)
    store = GradientStore(tmp_path / "store", sync="process")
    run = crews.simulation(store, deaths=[1, 1, 1, 1], workers=1, rounds=1)
    with pytest.warns(UserWarning, match="another one") as told, pytest.raises(WorkerError) as caught:
        next(run)
    assert len(told) == 3
    assert str(caught.value) == (
        "worker 0 died with client 'client-0' (it had to be), 4 times in this run. "
        "What is in the store stays: simulate on it again to go on"
    )
    again = crews.simulation(store, rounds=1)
    assert [row["batches"] for row in again] == [6]
    assert toy.same(calm.whole(), again.whole())


def test_no_more_workers_than_clients_are_started(tmp_path: Path) -> None:
    """Two of three clients train in a round: a third worker would wait forever."""
    store = GradientStore(tmp_path / "store", sync="process")
    run = crews.simulation(store, workers=5, clients_per_round=2, rounds=1)
    crew = run._driver._crew  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(run)
    assert crew.started == [0, 1]


def test_memory_cant_be_shared() -> None:
    """A store in this process's memory is refused before anything is started."""
    with pytest.raises(InputError, match="memory://mine is in this process's memory"):
        toy.run(store=GradientStore("memory://mine"), workers=1)
