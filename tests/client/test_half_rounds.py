"""client.rounds(): the user's own loop, once for each round in which the client is asked to train."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from coalition import Coalition, set_weight

from splitfed import InputError
from splitfed.protocol import backoff


@pytest.fixture
def run() -> Coalition:
    """A coalition on a store in memory."""
    return Coalition(f"memory://{uuid.uuid4()}")


def waits(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], Any]) -> list[float]:
    """Let something happen at each wait, in place of waiting; answer how long each would have been."""
    left, waited = list(actions), list[float]()

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        left.pop(0)()

    monkeypatch.setattr(backoff.time, "sleep", sleep)
    return waited


def test_a_client_pulls_trains_and_pushes_each_round_until_the_last(
    run: Coalition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the first round, trains once in each, starts each from the average, and ends with the federation."""

    def next_round() -> None:
        run.poll()
        run.federation.open()

    def end() -> None:
        run.poll()
        run.federation.finish()

    waited = waits(monkeypatch, run.federation.open, next_round, end)
    seen = []
    client = run.client("a")
    for info in client.rounds(poll=0.5):
        (parameter,) = client.parameters()
        seen.append((info.number, parameter.item()))
        run.batch("a", 1.0)
        set_weight(client, parameter.item() + 2.0)
    assert seen == [(1, 1.0), (2, 3.0)]
    assert run.weight() == 5.0
    assert waited == [0.5, 0.5, 0.5]
    assert client.round is not None
    assert client.round.finished


def test_a_client_that_is_not_sampled_waits(run: Coalition, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks, without moving weights, and its half stays as it is."""
    other = Coalition(run.url, clients=["a", "b"], clients_per_round=1)
    pulled = []
    pull = other.server.pull
    other.server.pull = lambda request: (pulled.append(request.weights), pull(request))[1]  # type: ignore[method-assign]
    plan = other.federation.open()
    assert plan is not None
    (unlucky,) = {"a", "b"} - set(plan.sampled)
    waits(monkeypatch, lambda: None, lambda: (other.federation.close(), other.federation.finish()))
    assert list(other.client(unlucky).rounds(poll=1)) == []
    assert pulled == [False, False, False]


def test_a_round_that_ends_between_look_and_pull_is_left(run: Coalition, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pull answers holds: a client doesn't train for a round that is over."""
    other = Coalition(run.url, clients=["a"])
    other.federation.open()
    client = other.client("a")
    pull = other.server.pull

    def overtaken(request: Any) -> Any:
        if request.weights:
            other.federation.close()
        return pull(request)

    other.server.pull = overtaken  # type: ignore[method-assign]
    waits(monkeypatch, other.federation.finish)
    assert list(client.rounds()) == []


def test_a_loop_that_is_left_pushes_nothing(run: Coalition) -> None:
    """Break, or an error in the user's loop: the half's change stays at home."""
    other = Coalition(run.url, clients=["a"])
    other.federation.open()
    for _ in other.client("a").rounds():
        other.batch("a", 1.0)
        break
    assert other.store.waiting("client") == []


def test_gradients_are_pushed_where_asked_for(run: Coalition, monkeypatch: pytest.MonkeyPatch) -> None:
    """In synchronous mode the loop takes no step: the half's own gradient is published, and its lineage steps."""
    other = Coalition(run.url, clients=["a"], mode="synchronous")
    other.federation.open()
    waits(monkeypatch, lambda: (other.poll(), other.federation.finish()))
    for _ in other.client("a").rounds(gradient=True, num_samples=4):
        other.batch("a", 3.0)
    assert other.weight() == 1.0 - 3.0
    assert other.weight("body") == 1.0 - 3.0


def test_without_a_barrier_a_client_goes_on_at_once(run: Coalition, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains again and again, whatever round it is, until the federation is finished."""
    other = Coalition(run.url, clients=["a", "b"], barrier=False)
    other.federation.open()
    waits(monkeypatch)
    seen = []
    for info in other.client("a").rounds():
        other.batch("a", 1.0)
        seen.append(info.number)
        if len(seen) == 3:
            other.federation.close()
            other.federation.finish()
    assert seen == [1, 1, 1]


def test_the_wait_is_checked(run: Coalition) -> None:
    """A wait of no seconds would be a busy loop."""
    with pytest.raises(InputError, match="poll"):
        next(run.client("a").rounds(poll=0))


def follow(run: Coalition, name: str, gain: float, failures: list[BaseException]) -> Iterator[threading.Thread]:
    """A thread in which a client takes part; each round it adds `gain` to its half."""

    def loop() -> None:
        try:
            for _ in client.rounds(poll=0.005):
                (parameter,) = client.parameters()
                client(parameter.detach().clone()).sum().backward()
                set_weight(client, parameter.item() + gain)
        except BaseException as error:
            failures.append(error)
            raise

    client = run.client(name)
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()


def test_three_clients_and_a_coordinator_that_know_nothing_of_each_other(tmp_path: Any) -> None:
    """They meet in the store; the third joins after the first round and takes part in all that follow."""
    run = Coalition((tmp_path / "store").as_uri(), min_clients=2)
    run.clock.now = 0.0  # and stays: no round ends by its deadline
    failures: list[BaseException] = []
    early = [follow(run, name, gain, failures) for name, gain in (("a", 1.0), ("b", 3.0))]
    threads = [*map(next, early)]
    reports = run.federation.run(4, poll=0.005)
    first = next(reports)
    late = follow(run, "c", 5.0, failures)
    next(late)
    run.server.pull(participating_request("c"))
    rest = list(reports)
    for loop in (*early, late):
        assert next(loop, None) is None
    assert failures == []
    assert len(threads) == 2
    assert first["participants"] == ["a", "b"]
    assert [report["round"] for report in rest] == [2, 3, 4]
    assert all(report["status"] == "complete" for report in (first, *rest))
    assert rest[-1]["participants"] == ["a", "b", "c"]
    joined = sum("c" in report["participants"] for report in rest)
    assert run.weight() == pytest.approx(1 + (4 - joined) * 2.0 + joined * 3.0)


def participating_request(name: str) -> Any:
    """A look at the round, as a client has it: from then on it is known."""
    from splitfed.protocol.messages import PullRequest

    return PullRequest(name, weights=False)


# ------------------------------------------------------------------------------------ restarts


def test_a_restarted_client_goes_on_in_the_middle_of_its_round(run: Coalition, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the half that it has loaded, and without a pull: batches and update count once; the next round follows."""
    other = Coalition(run.url, clients=["a"])
    other.federation.open()
    client = other.client("a")
    for _ in client.rounds():
        other.batch("a", 1.0)
        set_weight(client, 2.0)
        position = client.position()
        other.batch("a", 1.0)
        set_weight(client, 5.0)
        client.push()  # and is killed before it can note that
        break
    assert (position["half"], position["round"]["number"], position["done"]) == (0, 1, 0)
    again = other.restart("a")
    set_weight(again, 2.0)
    again.resume(position)
    waits(
        monkeypatch, lambda: (other.poll(), other.federation.open()), lambda: (other.poll(), other.federation.finish())
    )
    seen = []
    for info in again.rounds():
        (parameter,) = again.parameters()
        seen.append((info.number, parameter.item()))
        other.batch("a", 1.0)
        set_weight(again, 5.0 if info.number == 1 else 6.0)
    assert seen == [(1, 2.0), (2, 5.0)]
    assert other.weight() == 6.0
    folded = [str(batch) for commit in map(other.store.lineage().commit, (1, 2)) for batch in commit.folded]
    assert folded == ["a/1/0", "a/1/1", "a/1/2"]
    assert other.store.lineage("client").commit(1).num_samples == 2


def test_a_restarted_client_whose_round_is_over_still_ends_it(run: Coalition, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was only slow: its update comes late, and is treated so."""
    other = Coalition(run.url, clients=["a", "b"])
    other.federation.open()
    client = other.client("a")
    for _ in client.rounds():
        other.batch("a", 1.0)
        position = client.position()
        break
    other.pull("b")
    other.train("b", 3.0)
    other.federation.close()
    again = other.restart("a")
    again.resume(position)
    waits(monkeypatch, other.federation.finish)
    assert [info.number for info in again.rounds()] == [1]
    assert [str(batch) for batch in other.store.waiting("client")] == ["a/1/0"]


def test_a_round_whose_half_has_expired_isnt_gone_on_with(run: Coalition, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the update would be the change from is gone: the next round begins with a pull."""
    other = Coalition(run.url, clients=["a"])
    other.federation.open()
    client = other.client("a")
    for _ in client.rounds():
        position = client.position()
        break
    lineage = other.store.lineage("client")
    other.federation.close()
    for _ in range(40):
        other.federation.open()
        other.pull("a")
        other.train("a", 1.0)
        other.federation.close()
    assert position["half"] < lineage.head() - 30
    again = other.restart("a")
    again.resume(position)
    assert (again.version, again.round) == (None, None)
    waits(monkeypatch, other.federation.finish)
    assert [*again.rounds()] == []


def test_a_client_that_was_restarted_between_rounds_waits_for_the_next(
    run: Coalition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has trained in this one already, whatever has become of that."""
    other = Coalition(run.url, clients=["a"])
    other.federation.open()
    client = other.client("a")
    rounds = client.rounds()
    next(rounds)
    other.batch("a", 1.0)
    waits(monkeypatch, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    position = client.position()
    assert (position["round"], position["done"], position["push"]) == (None, 1, 1)
    again = other.restart("a")
    again.resume(position)
    waits(monkeypatch, lambda: (other.poll(), other.federation.finish()))
    assert [*again.rounds()] == []
