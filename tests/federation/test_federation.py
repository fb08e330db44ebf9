"""Rounds end once, with the right average and a true report, whoever vanishes, repeats himself or is killed."""

from __future__ import annotations

import math
import threading
import time
import types
import uuid

import pytest
from coalition import Coalition
from harness_store import commits

from splitfed import BatchId, Federation, InputError
from splitfed.accumulator import policies
from splitfed.federation import federation
from splitfed.store.records import commit_rows
from splitfed.store.rows import plain


def test_a_round_averages_halves_and_folds_the_body_once(store_url: str) -> None:
    """Ends 3 and 6 of 1 and 2 samples average to 5, the body's gradients 2 and 4 to 3; the report has it all."""
    run = Coalition.begun(store_url, "a", "b")
    run.batch("a", 2.0)
    run.batch("b", 4.0)
    run.train("a", to=3.0, num_samples=1)
    assert run.federation.poll() is None
    run.train("b", to=6.0, num_samples=2)
    run.clock.now += 10
    report = run.poll()
    assert run.weight() == 5.0
    assert run.weight("body") == 1.0 - 3.0
    assert report["status"] == "complete"
    assert (report["round"], report["version"], report["client_version"], report["commits"]) == (1, 1, 1, 1)
    assert report["participants"] == report["sampled"] == ["a", "b"]
    assert report["missing"] == report["late"] == report["kept"] == []
    assert report["dropped"] == {}
    assert report["time"] == 10.0
    assert report["clients"] == {
        "a": {"status": "folded", "num_samples": 1.0, "batches": 1, "staleness": 0},
        "b": {"status": "folded", "num_samples": 2.0, "batches": 1, "staleness": 0},
    }
    assert run.poll() == run.federation.close() == report


def test_a_client_that_vanishes_is_missing_at_the_deadline(store_url: str) -> None:
    """The round ends without it when its time is over; the batches that it had answered for count."""
    run = Coalition.begun(store_url, "a", "b")
    run.batch("b", 4.0)
    run.train("a", to=3.0)
    run.clock.now += 59.9
    assert run.federation.poll() is None
    run.clock.now += 0.1
    report = run.poll()
    assert report["status"] == "deadline"
    assert (report["participants"], report["missing"]) == (["a"], ["b"])
    assert report["clients"]["b"] == {"status": "missing", "batches": 1}
    assert (run.weight(), run.weight("body")) == (3.0, -3.0)


def test_a_client_that_vanishes_and_comes_back_takes_part_in_its_round(store_url: str) -> None:
    """Its new process learns that it is sampled and that nothing of it has come, pulls, and counts once."""
    run = Coalition.begun(store_url, "a", "b")
    run.train("a", to=3.0)
    back = run.restart("b")
    back.pull()
    assert back.round is not None
    assert (back.round.number, back.round.sampled, back.round.arrived) == (1, True, False)
    run.train("b", to=5.0)
    report = run.poll()
    assert (report["status"], report["participants"]) == ("complete", ["a", "b"])
    assert run.weight() == 4.0


def test_a_client_that_comes_back_after_its_update_arrived_is_told_so(store_url: str) -> None:
    """A new process sees that its predecessor's update is in; a second one of the round is refused and reported."""
    run = Coalition.begun(store_url, "a", "b")
    run.train("a", to=3.0)
    run.restart("a").pull()
    info = run.client("a").round
    assert info is not None
    assert info.arrived
    run.train("a", to=9.0)
    run.train("b", to=5.0)
    report = run.poll()
    assert run.weight() == 4.0
    assert report["participants"] == ["a", "b"]
    assert "second update" in report["dropped"]["a"]


def test_an_update_sent_twice_counts_once(store_url: str) -> None:
    """The same request again, before and after the commit, changes nothing and is in nobody's report."""
    run = Coalition.begun(store_url, "a", "b")
    sent = []
    push = run.server.push
    run.server.push = lambda request: (sent.append(request), push(request))[1]  # type: ignore[method-assign, misc]
    run.train("a", to=3.0)
    assert push(sent[0]).status == "stored"
    run.train("b", to=5.0)
    report = run.poll()
    assert push(sent[0]).status == "stored"
    assert (run.weight(), report["dropped"]) == (4.0, {})
    run.federation.open()
    run.pull("b")
    run.train("b", to=6.0)
    run.clock.now += 60
    again = run.poll()
    assert (again["participants"], again["dropped"], again["missing"]) == (["b"], {}, ["a"])


@pytest.mark.filterwarnings("ignore:.*isn't finite")
def test_nan_is_rejected_and_reported(store_url: str) -> None:
    """A client whose half and batches are NaN changes neither lineage; the report says so; nobody waits for it."""
    run = Coalition.begun(store_url, "a", "b")
    run.batch("a", 2.0)
    run.batch("b", math.nan)
    run.train("a", to=3.0)
    run.train("b", to=math.nan)
    report = run.poll()
    assert (run.weight(), run.weight("body")) == (3.0, -1.0)
    assert (report["status"], report["participants"], report["missing"]) == ("complete", ["a"], [])
    assert report["gradients_rejected"] == 1
    assert report["clients"]["b"]["status"] == "dropped"
    assert "finite" in report["dropped"]["b"]
    assert "1 of its batches" in report["dropped"]["b"]


def test_below_quorum_nothing_is_averaged_and_what_came_is_kept(store_url: str) -> None:
    """One of two required: versions stay, the report says so; in the next round the update counts as new."""
    run = Coalition.begun(store_url, "a", "b", min_clients=2)
    run.batch("a", 2.0)
    run.train("a", to=3.0)
    run.clock.now += 60
    report = run.poll()
    assert (report["status"], report["version"], report["client_version"]) == ("below_quorum", 0, 0)
    assert (report["participants"], report["missing"], report["kept"]) == ([], ["b"], ["a"])
    assert report["gradients_waiting"] == 1
    assert (run.weight(), run.weight("body")) == (1.0, 1.0)
    assert run.federation.open() is not None
    run.pull("a", "b")
    info = run.client("a").round
    assert info is not None
    assert (info.number, info.arrived) == (2, True)
    run.train("b", to=5.0)
    report = run.poll()
    assert (report["status"], report["participants"], report["late"]) == ("complete", ["a", "b"], [])
    assert (run.weight(), run.weight("body")) == (4.0, -1.0)


def test_below_quorum_what_came_can_be_dropped(store_url: str) -> None:
    """With below_quorum="drop" it is refused, told once, and closed by the next commit."""
    run = Coalition.begun(store_url, "a", "b", min_clients=2, below_quorum="drop")
    run.batch("a", 2.0)
    run.train("a", to=3.0)
    run.clock.now += 60
    report = run.poll()
    assert report["kept"] == []
    assert "fewer than 2" in report["dropped"]["a"]
    run.federation.open()
    for name in ("a", "b"):
        run.restart(name).pull()
        run.batch(name, 1.0)
        run.train(name, to=7.0)
    report = run.poll()
    assert (report["participants"], report["dropped"]) == (["a", "b"], {})
    assert (run.weight(), run.weight("body")) == (7.0, 0.0)
    assert run.store.waiting("client") == run.store.waiting("body") == []
    assert report["gradients_rejected"] == 1


@pytest.mark.filterwarnings("ignore:.*isn't finite")
@pytest.mark.parametrize(("policy", "value"), [("drop", 3.0), ("keep", math.nan)])
def test_a_client_that_was_refused_below_quorum_is_asked_anew(policy: str, value: float, store_url: str) -> None:
    """What round 1 refused still waits in round 2: its client trains again, and the round waits for it."""
    run = Coalition.begun(store_url, "a", "b", min_clients=2, below_quorum=policy)
    run.train("a", to=value)
    run.clock.now += 60
    assert run.poll()["status"] == "below_quorum"
    run.federation.open()
    run.pull("a", "b")
    for name, to in (("b", 5.0), ("a", 7.0)):
        info = run.client(name).round
        assert info is not None
        assert (info.number, info.arrived) == (2, False)
        assert run.federation.poll() is None, "the round waits for both"
        run.train(name, to=to)
    report = run.poll()
    assert (report["status"], report["participants"], report["dropped"]) == ("complete", ["a", "b"], {})
    assert run.weight() == 6.0
    assert run.store.waiting("client") == []


@pytest.mark.parametrize("late", ["count", "refuse"])
def test_a_late_update_is_counted_or_refused(late: str, store_url: str) -> None:
    """An update of round 1 that arrives in round 2 is folded at staleness 1, or closed as stale; both are told."""
    run = Coalition.begun(store_url, "a", "b", late=late)
    run.train("a", to=3.0)
    run.clock.now += 60
    run.poll()
    run.federation.open()
    run.pull("a")
    run.batch("b", 4.0)
    run.train("b", to=5.0)
    assert run.federation.poll() is None
    run.train("a", to=7.0)
    run.clock.now += 60
    report = run.poll()
    assert (report["participants"], report["late"], report["missing"]) == (["a"], ["b"], ["b"])
    if late == "count":
        assert run.weight() == 3.0 + (4.0 + 4.0) / 2
        assert run.weight("body") == -3.0
        assert report["dropped"] == {}
        assert report["clients"]["b"] == {"status": "late", "num_samples": 1.0, "batches": 1, "staleness": 1}
    else:
        assert run.weight() == 7.0
        assert "late" in report["dropped"]["b"]
        assert run.store.waiting("client") == []


def test_a_client_that_joins_late_gets_the_current_version_and_is_sampled_from_the_next_round(store_url: str) -> None:
    """It pulls what there is, isn't asked in the round under way, and what it sends there is refused and reported."""
    run = Coalition.begun(store_url, "a")
    run.train("a", to=3.0)
    run.poll()
    run.federation.open()
    run.pull("a", "late")
    info = run.client("late").round
    assert info is not None
    assert (run.client("late").version, info.number, info.sampled) == (1, 2, False)
    run.batch("late", 100.0)
    run.train("late", to=100.0)
    run.batch("a", 1.0)
    run.train("a", to=4.0)
    report = run.poll()
    assert (report["participants"], report["sampled"]) == (["a"], ["a"])
    assert "wasn't sampled" in report["dropped"]["late"]
    assert (run.weight(), run.weight("body")) == (4.0, 1.0 - 3.0)
    assert run.store.waiting("client") == run.store.waiting("body") == []
    plan = run.federation.open()
    assert plan is not None
    assert plan.sampled == ("a", "late")


def test_a_round_can_be_closed_by_hand(store_url: str) -> None:
    """close() ends it now; without one there is nothing to close."""
    run = Coalition(store_url, clients=["a", "b"], deadline=None)
    assert run.federation.poll() is None
    with pytest.raises(InputError, match=r"open\(\)"):
        run.federation.close()
    run.federation.open()
    run.pull("a")
    run.train("a", to=3.0)
    run.clock.now += 1e9
    assert run.federation.poll() is None
    assert run.federation.close()["status"] == "deadline"


def test_rounds_open_once_enough_clients_are_known(store_url: str) -> None:
    """Those that have pulled are known; open() answers the same plan until its round is over."""
    run = Coalition(store_url, min_clients=2)
    run.pull("a")
    assert run.federation.open() is None
    run.pull("b")
    plan = run.federation.open()
    assert plan is not None
    assert plan.sampled == ("a", "b")
    run.clock.now += 1
    assert run.federation.open() == plan


def test_settings_are_checked(store_url: str) -> None:
    """Each setting out of its range is refused, with what is expected."""
    run = Coalition(store_url)
    for settings, message in [
        ({"clients_per_round": 1, "min_clients": 2}, "at least min_clients=2"),
        ({"clients_per_round": 1.5}, "a share"),
        ({"clients_per_round": True}, "a share"),
        ({"min_clients": 0}, "min_clients"),
        ({"deadline": 0.0}, "deadline"),
        ({"late": "maybe"}, "'count'"),
        ({"below_quorum": "maybe"}, "'keep'"),
        ({"clients": ["../x"]}, "client id"),
        ({"clients": "alice"}, "expected several ids"),
        ({"mode": "sflv1"}, "PerClient"),
    ]:
        with pytest.raises(InputError, match=message):
            Federation(run.federation.body, run.federation.half, **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lineage"):
        Federation(run.federation.body, run.federation.body)
    with pytest.raises(InputError, match="deadline"):
        next(Federation(run.federation.body, run.federation.half).run(1))


def test_the_accumulator_follows_the_mode(store_url: str) -> None:
    """What differs is named, with how to mend it; a mode that says nothing of it leaves it free."""
    run = Coalition(store_url)
    buffered = policies.mode("buffered", min_batches=2)
    with pytest.raises(InputError, match=r"min_batches is 1, but mode 'buffered' says 8.*mode\(\.\.\.\)\.settings\(\)"):
        run.another_in("buffered")
    with pytest.raises(InputError, match="staleness_weight is <function constant"):
        run.another_in(buffered, min_batches=2, max_staleness=16)
    with pytest.raises(InputError, match="max_staleness is 4, but mode 'sflv2' says None"):
        run.another_in("sflv2", max_staleness=4)
    run.another_in(buffered, **buffered.settings())
    run.another_in("round", min_batches=3, max_staleness=4, staleness_weight=policies.inverse_sqrt)


def test_run_yields_each_round_and_resumes_where_the_store_is(store_url: str) -> None:
    """A coordinator that stops after round 1 is followed by one that ends rounds 2 and 3 and then the federation."""
    run = Coalition(store_url, clients=["a"], deadline=1e-3, clock=time.time)
    stop = threading.Event()
    first = run.federation.run(3, poll=0.001, stop=stop)
    assert next(first)["round"] == 1
    stop.set()
    assert list(first) == []
    reports = list(run.another().run(3, poll=0.001))
    assert [(report["round"], report["status"]) for report in reports] == [(2, "below_quorum"), (3, "below_quorum")]
    assert list(run.another().run(3, poll=0.001)) == []
    run.pull("a")
    info = run.client("a").round
    assert info is not None
    assert (info.number, info.finished) == (3, True)
    assert next(run.another().run(4, poll=0.001))["round"] == 4, "a longer run takes the end back"


def test_a_body_that_streams_commits_while_the_round_runs(store_url: str) -> None:
    """With K = 2 the body moves at the poll after two batches; what is left when the round ends is folded then."""
    mode = policies.mode("buffered", min_batches=2)
    run = Coalition.begun(store_url, "a", mode=mode, body=mode.settings())
    run.batch("a", 2.0)
    assert run.federation.poll() is None
    assert run.store.latest_version() == 0
    run.batch("a", 4.0)
    assert run.federation.poll() is None
    assert run.weight("body") == 1.0 - 3.0
    run.batch("a", 5.0)
    run.train("a", to=3.0)
    report = run.poll()
    assert (report["commits"], report["batches"], report["gradients_waiting"]) == (2, 3, 0)
    assert run.weight("body") == 1.0 - 3.0 - 5.0
    assert run.store.waiting("body") == []


def test_commits_made_by_others_in_a_round_are_in_its_report(store_url: str) -> None:
    """Global steps of synchronous mode, taken by whoever drives them: both were heard, and all of it is counted."""
    run = Coalition.begun(store_url, "a", "b", mode="synchronous")
    for _ in range(2):
        for name in ("a", "b"):
            run.client(name).zero_grad()
            run.batch(name, 2.0)
            run.client(name).push(gradient=True)
        for accumulator in (run.federation.body, run.federation.half):
            assert accumulator.step(1) is not None  # type: ignore[arg-type]
        run.pull("a", "b")
    report = run.poll()
    assert (report["status"], report["participants"]) == ("complete", ["a", "b"])
    assert (report["commits"], report["batches"]) == (2, 4)
    assert (report["version"], report["client_version"]) == (2, 2)
    assert report["clients"]["a"] == {"status": "folded", "batches": 2, "staleness": 0}


def test_without_a_barrier_a_round_is_a_stretch_of_updates(store_url: str) -> None:
    """Halves are committed two by two; the round of two clients ends after two updates, both of the faster one."""
    run = Coalition.begun(store_url, "a", "b", barrier=False, half={"min_batches": 2})
    info = run.client("a").round
    assert info is not None
    assert (info.sampled, info.barrier) == (True, False)
    run.train("a", to=3.0)
    assert run.federation.poll() is None
    run.pull("a")
    run.train("a", to=5.0)
    report = run.poll()
    assert run.weight() == 4.0
    assert (report["status"], report["participants"], report["missing"]) == ("complete", ["a"], ["b"])
    run.federation.open()
    run.train("b", to=9.0)
    run.clock.now += 60
    report = run.poll()
    assert (report["status"], report["late"], report["participants"]) == ("deadline", [], [])
    assert len(run.store.waiting("client")) == 1, "what waits goes on waiting for its commit"
    run.federation.open()
    run.pull("a")
    run.train("a", to=4.0)
    report = run.poll()
    assert run.weight() == 4.0 + (0.0 + 8.0) / 2
    assert (report["participants"], report["late"], report["missing"]) == (["a", "b"], [], [])
    assert {name: entry["staleness"] for name, entry in report["clients"].items()} == {"a": 0, "b": 1}


def test_a_body_per_client_is_averaged_when_the_round_ends(store_url: str) -> None:
    """SFLV1: bodies 1 - 3 and 1 - 9, of one batch and two, average to -6; the report counts all three batches."""
    run = Coalition.begun(store_url, "a", "b", mode="sflv1")
    run.batch("a", 3.0)
    run.batch("b", 4.0)
    assert run.federation.poll() is None
    run.batch("b", 5.0)
    run.train("a", to=3.0)
    run.train("b", to=5.0)
    report = run.poll()
    assert run.weight("body") == 1.0 - (3.0 * 1 + 9.0 * 2) / 3
    assert run.weight() == 4.0
    assert (report["version"], report["batches"]) == (1, 3)
    assert {name: entry["batches"] for name, entry in report["clients"].items()} == {"a": 1, "b": 2}
    assert run.another().close() == report


def test_updates_too_old_for_the_accumulator_are_reported(store_url: str) -> None:
    """With max_staleness=0 of the halves a late update that counts by policy is closed as stale at the commit."""
    run = Coalition.begun(store_url, "a", "b", half={"max_staleness": 0})
    run.train("a", to=3.0)
    run.clock.now += 60
    run.poll()
    run.federation.open()
    run.pull("a")
    run.train("a", to=4.0)
    run.train("b", to=5.0)
    run.clock.now += 60
    report = run.poll()
    assert run.weight() == 4.0
    assert "max_staleness" in report["dropped"]["b"]


@pytest.mark.filterwarnings("ignore:batch b/1/0 is rejected")
def test_an_unreadable_update_is_rejected_and_reported(store_url: str) -> None:
    """Foreign bytes in place of an update: it counts nowhere, its client wasn't heard, and the report says why."""
    run = Coalition.begun(store_url, "a", "b")
    run.train("a", to=3.0)
    run.store.blobs.create(run.store.pile("client").keys.gradient(BatchId("b", 1, 0)), [b"not a gradient"])
    run.clock.now += 60
    report = run.poll()
    assert (report["missing"], run.weight()) == (["b"], 3.0)
    assert "unreadable" in report["dropped"]["b"]


def test_the_rows_of_commits(store_url: str) -> None:
    """One per version of a stretch, with what was counted in it."""
    run = Coalition.begun(store_url, "a")
    run.batch("a", 2.0)
    run.train("a", to=3.0)
    run.poll()
    (row,) = commit_rows(run.store, "body", 0, 1, round_number=1)
    assert plain(row) == row
    assert row.pop("time") > 0
    assert row == {
        "kind": "commit",
        "lineage": "body",
        "version": 1,
        "num_batches": 1,
        "num_samples": 1.0,
        "staleness": {"0": 1},
        "num_stale": 0,
        "num_rejected": 0,
        "num_skipped": 0,
        "delay": None,
        "round": 1,
    }
    assert "round" not in commit_rows(run.store, "body", 0, 1)[0]


def test_the_clock_of_a_coordinator_never_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with the time of day; somebody sets that back by a year, and the seconds go on."""
    times = {"time": 1_000.0, "monotonic": 5.0}
    clock = types.SimpleNamespace(time=lambda: times["time"], monotonic=lambda: times["monotonic"])
    monkeypatch.setattr(federation, "time", clock)
    now = federation.steady_clock()
    assert now() == 1_000.0
    times.update(time=-30e6, monotonic=7.5)
    assert now() == 1_002.5


def test_a_poll_folds_a_backlog_in_commits_of_their_size() -> None:
    """Seven pending batches of two clients, by two or three: two commits while the round goes on, one at its end."""
    mode = policies.mode("buffered", min_batches=2, max_batches=3)
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a", "b", mode=mode, body=mode.settings())
    for name, count in (("a", 4), ("b", 3)):
        for _ in range(count):
            run.batch(name, 1.0)
    run.federation.poll()
    assert [commit.num_batches for commit in commits(run.store)[1:]] == [3, 3]
    run.train("a", to=2.0)
    run.train("b", to=2.0)
    report = run.poll()
    assert [commit.num_batches for commit in commits(run.store)[1:]] == [3, 3, 1]
    assert report["commits"] == 3
