"""The parts of a simulated federation: which ones a mode needs, and what their commits tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from torch.nn.functional import cross_entropy

from splitfed.accumulator import policies
from splitfed.accumulator.accumulator import Accumulator
from splitfed.federation.per_client import PerClient
from splitfed.simulation.assembly import Assembly
from splitfed.simulation.data import batches
from splitfed.simulation.run import Simulation
from splitfed.simulation.settings import LocalTraining
from splitfed.simulation.virtual_time import VirtualTime


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


def damped(staleness: int) -> float:
    """Half of what is stale."""
    return 0.5 if staleness else 1.0


def test_a_late_half_is_weighted_as_the_mode_says() -> None:
    """The slow client's one batch is of version 0 and averaged into version 2: half its step, of two alike, is missing.

    By hand: its step is 0.5 · gradient, so weighing it 0.5 and not 1 leaves out 0.5 · 0.5 · gradient / 2.
    """
    clients = toy.clients(2, each=4)
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 8})
    ends = []
    for weight in (policies.constant, damped):
        mode = policies.mode("round", staleness_weight=weight)
        simulation = toy.run(clients=clients, deadline=5, virtual=virtual, mode=mode)
        assert [row["late"] for row in simulation] == [[], ["client-1"]]
        ends.append(simulation.store.load_weights(lineage="client")["0.weight"])
    whole = toy.model()
    batch = next(batches(clients["client-1"], LocalTraining(batch_size=4), range(4)))
    cross_entropy(batch.outputs(whole), batch.target).backward()
    gradient = whole.get_parameter("0.weight").grad
    assert gradient is not None
    torch.testing.assert_close(ends[1] - ends[0], gradient / 8, rtol=0, atol=1e-6)


def test_who_is_in_already_isnt_asked() -> None:
    """But for gradients, of which each global step wants another."""
    for mode, asked in (("round", ("client-1", "client-2")), ("synchronous", tuple(toy.clients()))):
        parts, simulation = assembly(mode=mode, loss_fn=toy.dying(2))
        with pytest.raises(toy.Killed):
            next(simulation)
        plan = parts.federation.rounds.plan(1)
        assert parts.remaining_clients(plan) == asked
        assert parts.remaining_clients(replace(plan, barrier=False)) == plan.sampled
