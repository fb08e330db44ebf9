"""Who makes which request when: virtual schedules worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import toy

from splitfed.accumulator import policies
from splitfed.simulation.engines.turns import Turns, interleave
from splitfed.simulation.run import Simulation
from splitfed.simulation.virtual_time import VirtualTime

GROUPED = policies.mode("grouped", group=2)


def watched(monkeypatch: pytest.MonkeyPatch, simulation: Simulation) -> list[tuple[float, str, str]]:
    """The (time, client, request) of each request that a simulation makes from now on."""
    log: list[tuple[float, str, str]] = []
    meter, timeline = simulation._assembly.meter, simulation._timeline
    ask = meter.send

    def asking(method: str, request: Any) -> Any:
        answer = ask(method, request)
        if getattr(request, "base_version", 0) != -1:
            log.append((round(timeline.now if timeline is not None else 0.0, 6), request.client_id, method))
        return answer

    monkeypatch.setattr(meter, "send", asking)
    return log


def test_a_client_makes_each_request_at_its_own_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds of work a batch and half a second a way: 1 before each request, and 2 ways; a batch takes 5.

    Pull at 0.5; forward 0.5 + 1 + 0.5 later; backward as much later; the next forward has the last third of one batch
    and the first of the next before it.
    """
    simulation = toy.run(clients=toy.clients(1), rounds=1, virtual=VirtualTime(compute=3, latency=0.5))
    log = watched(monkeypatch, simulation)
    row = next(simulation)
    expected = [(0.5, "pull"), (2.5, "forward"), (4.5, "backward"), (7.5, "forward"), (9.5, "backward"), (11.5, "push")]
    assert [(time, kind) for time, _, kind in log] == expected
    assert row["time"] == 11.5
    assert [(commit["time"], commit["delay"]) for commit in simulation.history.commits("body")] == [(11.5, 4.5)]


def test_a_round_waits_for_its_slowest_client() -> None:
    """Two batches of 1 second and two of 10: without latency the round takes 2 · 10."""
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 10})
    times = [row["time"] for row in toy.run(clients=toy.clients(2), virtual=virtual)]
    assert times == pytest.approx([20, 40])


def test_without_virtual_time_clients_come_one_after_the_other_where_order_doesnt_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In round mode; batch by batch where one sees what another has done."""
    orders = {}
    for mode in ("round", "sflv1", "sflv2", "buffered", "synchronous", GROUPED):
        simulation = toy.run(clients=toy.clients(2), rounds=1, mode=mode)
        log = watched(monkeypatch, simulation)
        next(simulation)
        orders[policies.mode(mode).name] = "".join(client[-1] for _, client, kind in log if kind == "backward")
    in_turns = dict.fromkeys(("sflv2", "buffered", "synchronous", "grouped"), "0101")
    assert orders == {"round": "0011", "sflv1": "0011", **in_turns}


def test_turns_are_spread_evenly_over_a_round() -> None:
    """Of 4, 2 and 1 turns: at 1/8, 3/8, 5/8, 7/8, at 1/4 and 3/4, and at 1/2. Of equal numbers: one after the other."""
    assert "".join(interleave({"a": 4, "b": 2, "c": 1})) == "abacaba"
    assert "".join(interleave({"b": 2, "a": 2})) == "abab"
    assert "".join(interleave({"a": 3, "b": 1})) == "aaba"
    many = {"a": 4000, "b": 999}
    order = interleave(many)
    counts = itertools.accumulate(client == "b" for client in order)
    assert all(abs(found - (place + 1) * 999 / 4999) <= 1 for place, found in enumerate(counts))


@pytest.mark.parametrize("barrier", [True, False])
def test_in_turns_by_data_all_end_their_passes_together(monkeypatch: pytest.MonkeyPatch, barrier: bool) -> None:
    """Four batches and two and one, in both rounds; without a barrier the next cycle of turns follows at once."""
    clients = {f"client-{number}": toy.examples(4 * count) for number, count in enumerate((4, 2, 1))}
    settings: dict[str, Any] = {"mode": "sflv2", "clients": clients, "pacing": "data", "barrier": barrier}
    simulation = toy.run(**settings, min_updates=1)
    log = watched(monkeypatch, simulation)
    rows = [next(simulation), next(simulation)]
    order = "".join(client[-1] for _, client, kind in log if kind == "backward")
    assert order[:14] == "01020100102010"
    if barrier:
        assert len(order) == 14
        assert [row["commits"] for row in rows] == [7, 7]
        again = toy.run(**settings)
        list(again)
        assert toy.same(again.whole(), simulation.whole())


def test_a_straggler_is_late_and_begins_the_next_round_when_it_is_done() -> None:
    """A deadline after 5 seconds; the slow one pushes at 8, in the second round, and then trains for that one.

    It pulls version 0 at 0 and version 1 at 8, and is folded at 10 and at 20: into versions 2 and 4, by 1 and 2 late.
    """
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 8})
    rows = list(toy.run(clients=toy.clients(2, each=4), rounds=4, deadline=5, virtual=virtual))
    assert [row["time"] for row in rows] == [5, 10, 15, 20]
    assert [row["participants"] for row in rows] == [["client-0"]] * 4
    assert [row["late"] for row in rows] == [[], ["client-1"], [], ["client-1"]]
    assert [row["clients"]["client-1"].get("staleness") for row in rows] == [None, 1, None, 2]


def test_late_updates_can_be_refused() -> None:
    """They are reported as dropped, and count nowhere."""
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 8})
    settings: dict[str, Any] = {"clients": toy.clients(2, each=4), "deadline": 5, "late": "refuse", "virtual": virtual}
    first, second = toy.run(**settings)
    assert first["missing"] == ["client-1"]
    assert list(second["dropped"]) == ["client-1"]
    assert second["participants"] == ["client-0"]


def test_without_a_barrier_each_client_goes_on_at_once() -> None:
    """One client needs 2 seconds for a pass of two batches, the other 20.2: ten of the fast one lie in between.

    A stretch has as many updates as there are clients, so the first ends with the fast one's second pass, at 4.
    """
    mode = policies.mode("buffered", min_batches=2, max_staleness=64)
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 10.1})
    simulation = toy.run(clients=toy.clients(2), rounds=6, mode=mode, virtual=virtual, min_updates=1)
    rows = list(simulation)
    assert [row["time"] for row in rows] == pytest.approx([4, 8, 12, 16, 20, 22])
    trained = [sum(row["clients"].get(name, {}).get("batches", 0) for row in rows) for name in toy.clients(2)]
    assert trained[0] > 5 * trained[1] > 0
    halves = simulation.history.commits("client")
    assert max(int(age) for commit in halves for age in commit["staleness"]) == 10


@pytest.mark.parametrize("virtual", [None, VirtualTime(compute=3, latency=0.5)])
def test_local_steps_push_halves_within_a_pass(virtual: VirtualTime | None) -> None:
    """Of four batches two make an update, and two updates a stretch of two clients: as many as without, but twice."""
    settings: dict[str, Any] = {"mode": "sflv2", "barrier": False, "virtual": virtual, "min_updates": 1}
    found = {}
    for steps in (None, 2):
        simulation = toy.run(clients=toy.clients(2, each=16), rounds=4, local_steps=steps, **settings)
        rows = list(simulation)
        halves = simulation.history.commits("client")
        found[steps] = [row["time"] for row in rows] if virtual else [sum(row["batches"] for row in rows)]
        assert sum(commit["num_samples"] for commit in halves[:8]) == (8 * 16 if steps is None else 8 * 8)
    if virtual is None:
        assert found[None][0] > 1.5 * found[2][0]
    else:
        # The pull 0.5 after a run begins, each backward 4 after it and 5 after the one before, the push 2 after the
        # last: 0.5 + 4 + 3 * 5 + 2. With two steps 0.5 + 4 + 5 + 2; within a run the next pull is 1 after the push.
        assert found == {None: [21.5, 43.0, 64.5, 86.0], 2: [11.5, 23.5, 35.0, 47.0]}


def test_staleness_is_that_of_the_virtual_schedule() -> None:
    """K = 1: the slow client's forward is at 3.4 and its backward at 6.8 seconds; what is committed in between counts.

    The fast one's backwards are at 2/3, 5/3, 8/3, ..., so four of them lie in between: 11/3, 14/3, 17/3 and 20/3.
    """
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 10.2})
    clients = {**toy.clients(1, each=40), "client-1": toy.examples(4)}
    simulation = toy.run(clients=clients, mode="sflv2", rounds=1, virtual=virtual)
    list(simulation)
    stale = [commit for commit in simulation.history.commits("body") if commit["staleness"] != {"0": 1}]
    assert [(round(commit["time"], 6), commit["staleness"]) for commit in stale] == [(6.8, {"4": 1})]


def test_a_client_that_vanishes_is_missing_and_comes_back() -> None:
    """Whoever vanishes in a round is in no report of it but as missing; over the rounds everybody takes part again."""
    rows = list(toy.run(rounds=12, virtual=VirtualTime(dropout=0.5), deadline=4))
    missing = [set(row["missing"]) for row in rows]
    assert all(set(row["missing"]) | set(row["participants"]) == set(toy.clients()) for row in rows)
    assert any(missing)
    assert {name for row in rows for name in row["participants"]} == set(toy.clients())
    assert rows[0]["time"] == 4 if missing[0] else rows[0]["time"] == pytest.approx(2)


def test_a_round_without_a_deadline_ends_when_nobody_is_left() -> None:
    """The vanished don't hang it."""
    rows = list(toy.run(rounds=6, virtual=VirtualTime(dropout=0.7)))
    assert len(rows) == 6
    assert any(row["missing"] for row in rows)
    assert {row["status"] for row in rows} <= {"complete", "deadline", "below_quorum"}


def test_without_a_barrier_the_vanished_begin_anew() -> None:
    """After the time that a pass takes them."""
    mode = policies.mode("buffered", min_batches=2)
    rows = list(toy.run(rounds=6, mode=mode, virtual=VirtualTime(dropout=0.5), min_updates=1))
    assert {name for row in rows for name in row["clients"]} == set(toy.clients())


def test_global_steps_wait_for_the_slowest_in_virtual_time() -> None:
    """Synchronous mode: each of two steps takes as long as its slowest client's batch."""
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 10})
    simulation = toy.run(clients=toy.clients(2), rounds=1, mode="synchronous", virtual=virtual)
    rows = list(simulation)
    steps = [commit["time"] for commit in simulation.history.commits("body")]
    assert steps == pytest.approx([10, 20])
    assert rows[0]["time"] == pytest.approx(20)


def test_global_steps_go_on_without_the_vanished() -> None:
    """Nobody waits for them: no step takes longer than the slowest batch, and a round no longer than two."""
    rows = list(toy.run(rounds=8, mode="synchronous", virtual=VirtualTime(dropout=0.5)))
    assert any(row["missing"] for row in rows)
    lengths = [now["time"] - before["time"] for before, now in itertools.pairwise([{"time": 0.0}, *rows])]
    assert max(lengths) == pytest.approx(2)


def test_what_a_client_keeps_can_be_looked_at() -> None:
    """Its personal parts after its last run; nothing of one that was never active."""
    simulation = toy.run(personal=("3.*",), rounds=1)
    list(simulation)
    driver = simulation._driver
    assert isinstance(driver, Turns)
    assert sorted(driver.state("client-0").personal) == ["3.bias", "3.weight"]
    assert driver.state("nobody").personal == {}


def test_a_round_of_global_steps_is_over_when_its_last_client_is() -> None:
    """Two batches of a second: the rounds end at 2 and 4 seconds, however far off the deadline is."""
    rows = list(toy.run(mode="synchronous", virtual=VirtualTime(), deadline=100))
    assert [(row["status"], row["time"]) for row in rows] == [
        ("complete", pytest.approx(2)),
        ("complete", pytest.approx(4)),
    ]


def test_a_deadline_takes_the_global_step_that_a_straggler_holds_up() -> None:
    """The others take part in every round: one step in the first, in later ones each step of theirs but that one."""
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 1, "client-2": 1000})
    rows = list(toy.run(mode="synchronous", virtual=virtual, deadline=100, rounds=4))
    assert [row["time"] for row in rows] == [100, 200, 300, 400]
    assert [row["participants"] for row in rows] == [["client-0", "client-1"]] * 4
    assert all(row["commits"] for row in rows)


def test_who_was_kept_below_quorum_isnt_asked_again() -> None:
    """The first client's update is in at 1 second and kept at 10; the second's comes at 11, in the second round.

    Both are of version 0 and count in the second round, with one batch each; the third is never heard from.
    """
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 11, "client-2": 1000})
    rows = list(toy.run(clients=toy.clients(3, each=4), virtual=virtual, deadline=10, min_clients=2))
    assert [row["status"] for row in rows] == ["below_quorum", "deadline"]
    assert (rows[1]["participants"], rows[1]["batches"]) == (["client-0", "client-1"], 2)
    assert rows[1]["dropped"] == {}


@pytest.mark.parametrize("mode", ["round", "sflv1", "sflv2"])
def test_clients_that_never_wait_take_turns(mode: str) -> None:
    """Without a barrier and without virtual time, in any mode: none goes on for ever."""
    simulation = toy.run(mode=mode, barrier=False, rounds=3)
    rows = list(simulation)
    assert [row["status"] for row in rows] == ["complete"] * 3
    assert {name for row in rows for name in row["clients"]} == set(toy.clients())


def test_a_group_pulls_in_turn_and_goes_around_while_a_client_has_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of 1, 3 and 2 batches: each pulls when it is its turn, so no batch of a group is stale."""
    clients = dict(zip("abc", (toy.examples(4), toy.examples(12), toy.examples(8)), strict=True))
    simulation = toy.run(clients=clients, rounds=2, mode=GROUPED)
    log = watched(monkeypatch, simulation)
    rows = list(simulation)
    turns = [(client, kind) for _, client, kind in log if kind in ("pull", "push")]
    each = [(client, kind) for client in "abcbcb" for kind in ("pull", "push")]
    begun = turns.count(("a", "pull")) - 2  # the first pull of all publishes the half, and asks again
    assert turns[begun:] == 2 * each
    assert [(row["commits"], row["batches"], row["version"], row["client_version"]) for row in rows] == [
        (3, 6, 3, 3),
        (3, 6, 6, 6),
    ]
    for lineage in ("body", "client"):
        assert all(commit["staleness"] == {"0": 2} for commit in simulation.history.commits(lineage))


def test_a_group_that_isnt_full_is_committed_when_the_round_ends() -> None:
    """Five batches in groups of two: the last one alone."""
    clients = {"a": toy.examples(8), "b": toy.examples(12)}
    simulation = toy.run(clients=clients, rounds=1, mode=GROUPED)
    (row,) = simulation
    assert (row["status"], row["gradients_waiting"], row["version"]) == ("complete", 0, 3)
    assert [commit["num_batches"] for commit in simulation.history.commits("client")] == [2, 2, 1]


def test_groups_go_on_without_a_slow_client_and_a_deadline_ends_the_round_without_it() -> None:
    """Four batches of a second of two clients are two groups; the slow one's first comes in the next round, stale."""
    virtual = VirtualTime(compute={"client-0": 1, "client-1": 1, "client-2": 30})
    simulation = toy.run(mode=GROUPED, virtual=virtual, deadline=20, rounds=2)
    first, second = simulation
    assert (first["status"], first["missing"], first["commits"], first["batches"]) == ("deadline", ["client-2"], 2, 4)
    assert second["batches"] == 5
    (late,) = [commit for commit in simulation.history.commits("client") if "4" in commit["staleness"]]
    assert late["time"] == pytest.approx(40)


def test_groups_go_on_without_clients_that_die_in_them() -> None:
    """Of whoever vanishes nothing counts by half: body and halves have folded the same batches in the same versions."""
    simulation = toy.run(rounds=8, mode=GROUPED, virtual=VirtualTime(dropout=0.5), deadline=10)
    rows = list(simulation)
    assert any(row["missing"] for row in rows)
    folded = [[commit["num_samples"] for commit in simulation.history.commits(name)] for name in ("body", "client")]
    assert folded[0] == folded[1]
    assert simulation.store.waiting("body") == simulation.store.waiting("client") == []


@pytest.mark.parametrize("virtual", [None, VirtualTime(compute={"client-0": 1, "client-1": 1, "client-2": 5.5})])
def test_groups_without_a_barrier_never_wait(virtual: VirtualTime | None) -> None:
    """A round of three clients ends with the second group of two; the slow one's batches come in between, stale."""
    simulation = toy.run(mode=GROUPED, virtual=virtual, barrier=False, rounds=6)
    rows = list(simulation)
    assert [row["status"] for row in rows] == ["complete"] * 6
    assert [row["batches"] for row in rows] == [4] * 6
    commits = [simulation.history.commits(lineage) for lineage in ("body", "client")]
    assert [commit["staleness"] for commit in commits[0]] == [commit["staleness"] for commit in commits[1]]
    oldest = max(int(age) for commit in commits[0] for age in commit["staleness"])
    assert oldest == 0 if virtual is None else oldest >= 2
    if virtual is not None:
        assert rows[-1]["time"] < 13
