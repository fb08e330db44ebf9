"""The same round ends once: whichever coordinator dies wherever, and however many there are."""

from __future__ import annotations

import contextlib
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest
from coalition import Coalition, coordinate
from harness_store import Crash, Nth, commits, crash, hooked, lose_reply, meanwhile, refuse
from processes import CONTEXT

from splitfed import GradientStore, StoreError
from splitfed.store.rounds import Rounds


def ready(url: str, **settings: Any) -> Coalition:
    """Round 1 of three clients, of which two have answered: ends 3 and 5, body gradients 2 and 6."""
    run = Coalition.begun(url, "a", "b", "c", **settings)
    run.batch("a", 2.0)
    run.batch("b", 6.0)
    run.train("a", to=3.0)
    run.train("b", to=5.0)
    run.clock.now += 60
    return run


def check(run: Coalition, report: dict[str, Any]) -> None:
    """The round ended with exactly the updates that its report names."""
    ends = {"a": 3.0, "b": 5.0, "c": 10.0}
    took_part = report["participants"]
    assert took_part in (["a", "b"], ["a", "b", "c"])
    assert run.weight() == sum(ends[name] for name in took_part) / len(took_part)
    assert run.weight("body") == 1.0 - 4.0
    assert [len(commits(run.store, lineage)) for lineage in ("body", "client")] == [2, 2]
    assert report["missing"] == ([] if "c" in took_part else ["c"])
    assert run.store.rounds().report(1) == report


def points(at: str = "") -> int:
    """How many operations of a kind ending a round takes."""
    run, log = ready(f"memory://{uuid.uuid4()}"), Nth(at=at)
    other = run.another(hooked(run.url, log))
    with log.armed():
        other.close()
    return log.count


@pytest.mark.parametrize("fault", [crash, refuse, lose_reply])
def test_a_coordinator_that_stops_anywhere_leaves_a_round_that_ends_once(fault: Any) -> None:
    """At every record of a round's end: the next one finishes it; what arrives in between counts now or later."""
    for n in range(points("create")):
        run, hook = ready(f"memory://{uuid.uuid4()}"), Nth(n, fault, at="create")
        first = run.another(hooked(run.url, hook))
        with hook.armed(), contextlib.suppress(Crash, StoreError):
            first.close()
        run.train("c", to=10.0)
        check(run, run.another().close())


def test_two_coordinators_that_race_end_a_round_once() -> None:
    """Whatever the one has done when the other does it all, both answer the same report."""
    for n in range(0, points(), 2):
        run = ready(f"memory://{uuid.uuid4()}")
        other: list[dict[str, Any]] = []
        hook = Nth(n, meanwhile(lambda run=run, other=other: other.append(run.another().close())))  # type: ignore[misc]
        first = run.another(hooked(run.url, hook))
        with hook.armed():
            report = first.close()
        assert other == [report]
        check(run, report)


def test_a_racing_open_makes_one_plan() -> None:
    """Of two that open a round at different times with different clients known, one decides for both."""
    run = Coalition(f"memory://{uuid.uuid4()}", clients=["a", "b"])
    late = Coalition(run.url, clients=["a", "b", "c"])
    hook = Nth(0, meanwhile(lambda: late.federation.open()), at="create rounds/0000000001/plan")
    first = run.another(hooked(run.url, hook))
    with hook.armed():
        plan = first.open()
    assert plan is not None
    assert plan == late.federation.open() == run.federation.open()
    assert plan.sampled == ("a", "b", "c")


def test_a_quorum_decided_once_is_not_decided_again() -> None:
    """A round that one coordinator put on record as below quorum stays so, though another has seen enough by then."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a", "b", min_clients=2)
    run.train("a", to=3.0)
    run.clock.now += 60
    hook = Nth(0, meanwhile(lambda: run.train("b", to=5.0)), at="create rounds/0000000001/ending")
    first = run.another(hooked(run.url, hook))
    with hook.armed():
        report = first.close()
    assert report["status"] == "below_quorum"
    assert run.another().close() == report
    assert run.weight() == 1.0
    run.federation.open()
    assert run.poll()["participants"] == ["a", "b"], "what came too late for that decision is there for the next"
    assert run.weight() == 4.0


@pytest.mark.parametrize(
    "key", ["rounds/0000000001/ending", "body/commit", "client/commit", "rounds/0000000001/report"]
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_coordinator_that_is_killed(key: str, after: bool, tmp_path: Path) -> None:
    """SIGKILL around each record of a round's end: another process carries on, and the round ends once."""
    run = ready((tmp_path / "store").as_uri())
    process = CONTEXT.Process(target=coordinate, args=(run.url, key, after, {"clients": ["a", "b", "c"]}))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    run.train("c", to=10.0)
    report = run.another().poll()
    assert report is not None
    assert (report["status"] == "complete") == (not after and key.endswith("ending")), "who decided, decided for all"
    check(run, report)


def test_no_round_is_opened_that_nobody_ends() -> None:
    """Another ends the last round just before run(1) would open one: run() opens no second, and clients are let go."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a")
    run.train("a", to=3.0)
    store = GradientStore(run.url, sync="process")
    first, newest = run.another(store), Rounds.newest
    looked: list[int] = []

    def meanwhile_closed(rounds: Rounds) -> int:
        if rounds is first.rounds and len(looked) < 2:
            looked.append(1)
            if len(looked) == 2:
                run.another().close()
        return newest(rounds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "newest", meanwhile_closed)
        assert [report["round"] for report in first.run(1, poll=0.001)] == [1]
    assert run.store.rounds().newest() == 1
    run.pull("a")
    info = run.client("a").round
    assert info is not None
    assert info.finished


@pytest.mark.parametrize("has_seen", [True, False], ids=["seen", "unseen"])
def test_a_coordinator_that_is_slow_leaves_the_next_round_alone(has_seen: bool) -> None:
    """SFLV1: one carries out round 1 while another ends round 2, having published one change of two: one average."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a", "b", mode="sflv1")
    first, slow = run.federation, run.another()

    def answer() -> None:
        for name, x in (("a", 2.0), ("b", 4.0)):
            run.pull(name)
            run.batch(name, x)
            run.train(name, to=1.0)

    answer()
    plan, before = first.rounds.plan(1), run.store.latest_version()
    run.poll()
    ending = first.rounds.ending(1)
    assert ending is not None
    first.open()
    answer()
    publish, told = first.body._publish, []  # type: ignore[union-attr]

    def interrupted(client_id: str, ended: Any) -> Any:
        found = publish(client_id, ended)
        if not told:
            told.append(client_id)
            if has_seen:
                slow._carry_out(plan, ending)
            else:  # it looked whether round 1 was carried out before it was
                slow.body.average(ending.samples, upto=before)  # type: ignore[union-attr]
        return found

    first.body._publish = interrupted  # type: ignore[union-attr, method-assign]
    report = run.poll()
    assert told == ["a"]
    assert [commit.num_batches for commit in commits(run.store)] == [0, 2, 2]
    assert (report["version"], run.weight("body")) == (2, 1.0 - 3.0 - 3.0)
