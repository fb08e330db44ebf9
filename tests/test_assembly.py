"""The parts of a simulated federation: which ones a mode needs, and what their commits tell."""

from __future__ import annotations

from typing import Any

import toy

from splitfed.accumulator import Accumulator
from splitfed.assembly import Assembly
from splitfed.perclient import PerClient
from splitfed.simulated import Simulation


def assembly(**settings: Any) -> tuple[Assembly, Simulation]:
    """The parts of such a run, and the run, which holds them."""
    simulation = toy.run(**settings)
    return simulation._assembly, simulation


def test_a_mode_decides_which_accumulators_there_are() -> None:
    """SFLV1 has a body per client, the others one; halves wait for the round's end, or for `min_updates`."""
    assert isinstance(assembly(mode="sflv1")[0].body, PerClient)
    body = assembly(mode="buffered")[0].body
    assert isinstance(body, Accumulator)
    assert (body.min_batches, body.max_staleness) == (8, 16)
    waiting, free = assembly(mode="buffered")[0].half, assembly(mode="buffered", barrier=False, min_updates=3)[0].half
    assert (waiting.min_batches, waiting.max_staleness) == (1, None)
    assert (free.min_batches, free.max_staleness) == (3, 16)


def test_halves_wait_for_a_tenth_of_the_active_clients_if_nothing_is_said() -> None:
    """Of forty, four; of three, one."""
    assert assembly(clients=toy.clients(40, each=1), barrier=False)[0].half.min_batches == 4
    assert assembly(barrier=False)[0].half.min_batches == 1


def test_real_commits_are_told_by_the_time_of_their_records() -> None:
    """Whoever made them: seconds since the run began, in order, and how long their batches waited."""
    parts, simulation = assembly(mode="sflv2", rounds=1)
    next(simulation)
    rows = simulation.history.commits()
    assert [row["version"] for row in rows if row["lineage"] == "body"] == [1, 2, 3, 4, 5, 6]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= 60
    records = [parts.store.lineage("body").commit(version).time for version in (1, 6)]
    assert abs((records[1] - records[0]) - (times[-2] - times[0])) < 1e-6
    assert all(0 <= row["delay"] < 60 for row in rows)
    assert parts.commit_rows(1, 0.0) == []


def test_what_a_store_has_already_is_no_news() -> None:
    """A run that goes on tells of its own commits alone."""
    first = toy.run(rounds=1)
    next(first)
    again = toy.run(rounds=2, store=first.store)
    list(again)
    assert [row["version"] for row in again.history.commits("body")] == [2]
