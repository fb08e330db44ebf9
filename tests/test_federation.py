"""Rounds end once, with the right average and a true report, whoever vanishes, repeats himself or is killed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from coalition import Coalition

from splitfed import Federation, InputError


def begun(url: str, *names: str, **settings: Any) -> Coalition:
    """A coalition whose clients have pulled within round 1."""
    found = Coalition(url, clients=names, **settings)
    assert found.federation.open() is not None
    found.pull(*names)
    return found


def test_a_round_averages_halves_and_folds_the_body_once(store_url: str) -> None:
    """Ends 3 and 6 of 1 and 2 samples average to 5, the body's gradients 2 and 4 to 3; the report has it all."""
    run = begun(store_url, "a", "b")
    run.batch("a", 2.0)
    run.batch("b", 4.0)
    run.train("a", to=3.0, num_samples=1)
    assert run.poll() is None
    run.train("b", to=6.0, num_samples=2)
    run.clock.now += 10
    report = run.poll()
    assert report is not None
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
    run = begun(store_url, "a", "b")
    run.batch("b", 4.0)
    run.train("a", to=3.0)
    run.clock.now += 59.9
    assert run.poll() is None
    run.clock.now += 0.1
    report = run.poll()
    assert report is not None
    assert report["status"] == "deadline"
    assert (report["participants"], report["missing"]) == (["a"], ["b"])
    assert report["clients"]["b"] == {"status": "missing", "batches": 1}
    assert (run.weight(), run.weight("body")) == (3.0, -3.0)


def test_a_client_that_vanishes_and_comes_back_takes_part_in_its_round(store_url: str) -> None:
    """Its new process learns that it is sampled and that nothing of it has come, pulls, and counts once."""
    run = begun(store_url, "a", "b")
    run.train("a", to=3.0)
    back = run.restart("b")
    back.pull()
    assert back.round is not None
    assert (back.round.number, back.round.sampled, back.round.arrived) == (1, True, False)
    run.train("b", to=5.0)
    report = run.poll()
    assert report is not None
    assert (report["status"], report["participants"]) == ("complete", ["a", "b"])
    assert run.weight() == 4.0


def test_a_client_that_comes_back_after_its_update_arrived_is_told_so(store_url: str) -> None:
    """A new process sees that its predecessor's update is in; a second one of the round is refused and reported."""
    run = begun(store_url, "a", "b")
    run.train("a", to=3.0)
    run.restart("a").pull()
    info = run.client("a").round
    assert info is not None
    assert info.arrived
    run.train("a", to=9.0)
    run.train("b", to=5.0)
    report = run.poll()
    assert report is not None
    assert run.weight() == 4.0
    assert report["participants"] == ["a", "b"]
    assert "second update" in report["dropped"]["a"]


def test_an_update_sent_twice_counts_once(store_url: str) -> None:
    """The same request again, before and after the commit, changes nothing and is in nobody's report."""
    run = begun(store_url, "a", "b")
    sent = []
    push = run.server.push
    run.server.push = lambda request: (sent.append(request), push(request))[1]  # type: ignore[method-assign, misc]
    run.train("a", to=3.0)
    assert push(sent[0]).status == "stored"
    run.train("b", to=5.0)
    report = run.poll()
    assert push(sent[0]).status == "stored"
    assert report is not None
    assert (run.weight(), report["dropped"]) == (4.0, {})
    run.federation.open()
    run.pull("b")
    run.train("b", to=6.0)
    run.clock.now += 60
    again = run.poll()
    assert again is not None
    assert (again["participants"], again["dropped"], again["missing"]) == (["b"], {}, ["a"])


@pytest.mark.filterwarnings("ignore:.*isn't finite")
def test_nan_is_rejected_and_reported(store_url: str) -> None:
    """A client whose half and batches are NaN changes neither lineage; the report says so; nobody waits for it."""
    run = begun(store_url, "a", "b")
    run.batch("a", 2.0)
    run.batch("b", math.nan)
    run.train("a", to=3.0)
    run.train("b", to=math.nan)
    report = run.poll()
    assert report is not None
    assert (run.weight(), run.weight("body")) == (3.0, -1.0)
    assert (report["status"], report["participants"], report["missing"]) == ("complete", ["a"], [])
    assert report["gradients_rejected"] == 1
    assert report["clients"]["b"]["status"] == "dropped"
    assert "finite" in report["dropped"]["b"]
    assert "1 of its batches" in report["dropped"]["b"]


def test_below_quorum_nothing_is_averaged_and_what_came_is_kept(store_url: str) -> None:
    """One of two required: versions stay, the report says so; in the next round the update counts as new."""
    run = begun(store_url, "a", "b", min_clients=2)
    run.batch("a", 2.0)
    run.train("a", to=3.0)
    run.clock.now += 60
    report = run.poll()
    assert report is not None
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
    assert report is not None
    assert (report["status"], report["participants"], report["late"]) == ("complete", ["a", "b"], [])
    assert (run.weight(), run.weight("body")) == (4.0, -1.0)


def test_below_quorum_what_came_can_be_dropped(store_url: str) -> None:
    """With below_quorum="drop" it is refused, told once, and closed by the next commit."""
    run = begun(store_url, "a", "b", min_clients=2, below_quorum="drop")
    run.batch("a", 2.0)
    run.train("a", to=3.0)
    run.clock.now += 60
    report = run.poll()
    assert report is not None
    assert report["kept"] == []
    assert "fewer than 2" in report["dropped"]["a"]
    run.federation.open()
    for name in ("a", "b"):
        run.restart(name).pull()
        run.batch(name, 1.0)
        run.train(name, to=7.0)
    report = run.poll()
    assert report is not None
    assert (report["participants"], report["dropped"]) == (["a", "b"], {})
    assert (run.weight(), run.weight("body")) == (7.0, 0.0)
    assert run.store.waiting("client") == run.store.waiting("body") == []
    assert report["gradients_rejected"] == 1


@pytest.mark.parametrize("late", ["count", "refuse"])
def test_a_late_update_is_counted_or_refused(late: str, store_url: str) -> None:
    """An update of round 1 that arrives in round 2 is folded at staleness 1, or closed as stale; both are told."""
    run = begun(store_url, "a", "b", late=late)
    run.train("a", to=3.0)
    run.clock.now += 60
    assert run.poll() is not None
    run.federation.open()
    run.pull("a")
    run.batch("b", 4.0)
    run.train("b", to=5.0)
    assert run.poll() is None
    run.train("a", to=7.0)
    run.clock.now += 60
    report = run.poll()
    assert report is not None
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
    run = begun(store_url, "a")
    run.train("a", to=3.0)
    assert run.poll() is not None
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
    assert report is not None
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
    assert run.poll() is None
    with pytest.raises(InputError, match=r"open\(\)"):
        run.federation.close()
    run.federation.open()
    run.pull("a")
    run.train("a", to=3.0)
    run.clock.now += 1e9
    assert run.poll() is None
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
        ({"mode": "sflv1"}, "PerClient"),
    ]:
        with pytest.raises(InputError, match=message):
            Federation(*run.accumulators, **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lineage"):
        Federation(run.accumulators[0], run.accumulators[0])
    with pytest.raises(InputError, match="deadline"):
        next(Federation(*run.accumulators).run(1))
