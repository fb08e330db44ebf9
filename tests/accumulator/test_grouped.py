"""Body and halves committed together: one decision, carried out once, whoever is killed where.

The model is two numbers as in `coalition`: y = h · b · x with h = b = 1, and the loss is y. So a batch of x gives the
body the gradient h · x, and the half b · x; both step by SGD of rate 1.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

import pytest
import torch
from coalition import halves
from harness_store import Crash, Nth, commits, crash, hooked, lose_reply, meanwhile, refuse, sgd

from splitfed import Accumulator, ExpiredError, GradientStore, InputError, SplitClient, SplitServer, StoreError
from splitfed.accumulator import policies
from splitfed.accumulator.grouped import Grouped
from splitfed.store.together import Pair

GROUP = policies.mode("grouped", group=2)
XS = (2.0, 6.0)
"""The inputs of a group of two batches: the means of both gradients are 4."""


def accumulator(store: GradientStore, **settings: Any) -> Accumulator:
    """Of body and halves, as a new process would have it."""
    half, body = halves()
    settings = {**GROUP.settings(), "lock_seconds": 0.0, **settings}
    updates = Accumulator(half, store, sgd(), lineage="client", **settings)
    return Accumulator(body, store, sgd(), halves=updates, **settings)


class Run:
    """A store, its server, and clients that are made when they are asked for."""

    def __init__(self, url: str = "", **settings: Any) -> None:
        self.url = url or f"memory://{uuid.uuid4()}"
        self.store = GradientStore(self.url, sync="process")
        self.server = SplitServer(halves()[1], self.store)
        self.both = accumulator(self.store, **settings)
        self.clients: dict[str, SplitClient] = {}

    def client(self, name: str) -> SplitClient:
        """The client of that name."""
        if name not in self.clients:
            self.clients[name] = SplitClient(halves()[0], self.server, name)
        return self.clients[name]

    def pull(self, name: str) -> Pair:
        """What a client is handed."""
        self.client(name).pull()
        sync = self.client(name)._sync
        assert sync.version is not None
        assert sync.body_version is not None
        return Pair(sync.body_version, sync.version)

    def backward(self, name: str, x: float) -> None:
        """A batch whose half's gradient isn't pushed yet."""
        self.client(name).zero_grad()
        self.client(name)(torch.tensor([[x]])).sum().backward()

    def batch(self, name: str, x: float) -> None:
        """A batch, and the gradient of its half."""
        self.backward(name, x)
        self.client(name).push(gradient=True)

    def weights(self) -> tuple[float, float]:
        """The numbers of body and half."""
        pair = self.store.pair()
        found = self.store.load_weights(pair.body), self.store.load_weights(pair.client, "client")
        body, half = (float(next(iter(state.values()))) for state in found)
        return body, half


def ready(**settings: Any) -> Run:
    """Two clients have pulled and pushed: a group waits."""
    run = Run(**settings)
    for name, x in zip("ab", XS, strict=True):
        assert run.pull(name) == Pair(0, 0)
        run.batch(name, x)
    return run


def check(run: Run) -> None:
    """The group of `ready` was committed once, in both lineages."""
    assert run.weights() == (1.0 - 4.0, 1.0 - 4.0)
    for lineage in ("body", "client"):
        (_, commit) = commits(run.store, lineage)
        assert sorted(batch.client_id for batch in commit.folded) == ["a", "b"]
        assert run.store.waiting(lineage) == []
    assert run.store.pair() == Pair(1, 1)
    assert run.pull("c") == Pair(1, 1)


def points(at: str = "") -> int:
    """How many operations the commit of a group takes."""
    run, log = ready(), Nth(at=at)
    both = accumulator(hooked(run.url, log))
    with log.armed():
        assert both.step() is not None
    return log.count


def test_a_group_makes_one_version_of_both_whose_record_names_the_halves() -> None:
    """One waits for the other, and the halves' record holds what was decided on the body's batches."""
    run = Run()
    run.pull("a")
    run.batch("a", 2.0)
    assert run.both.step() is None
    run.pull("b")
    run.backward("b", 6.0)
    assert run.both.step() is None, "its half's gradient hasn't come"
    run.client("b").push(gradient=True)
    made = run.both.step()
    assert made is not None
    assert (made.version, made.halves, made.num_batches) == (1, 1, 2)
    decision = run.store.lineage("client").commit(1)
    assert decision.body is not None
    assert list(decision.body.folded) == list(made.folded)
    check(run)


@pytest.mark.parametrize(("fault", "at"), [(crash, ""), (refuse, "create"), (lose_reply, "create")])
def test_a_commit_that_stops_anywhere_is_finished_once(fault: Any, at: str) -> None:
    """At each operation of it: readers have the old pair or the new one, and the next process ends in the same bits."""
    total = points(at)
    assert total > (5 if at else 30)
    for n in range(total):
        run, hook = ready(), Nth(n, fault, at=at)
        first = accumulator(hooked(run.url, hook))
        with hook.armed(), contextlib.suppress(Crash, StoreError):
            first.step()
        where = " ".join(hook.log[n])
        pair = run.pull("c")
        assert pair in (Pair(0, 0), Pair(1, 1)), where
        assert run.weights() == ((1.0, 1.0) if pair == Pair(0, 0) else (-3.0, -3.0)), where
        accumulator(GradientStore(run.url, sync="process")).step()
        check(run)


def test_a_rival_at_any_moment_leaves_one_group() -> None:
    """Whoever decides and whoever carries it out: one version of each, and both say which it is."""
    conflicts = 0
    for n in range(0, points(), 2):
        run = ready()
        rival = accumulator(GradientStore(run.url, sync="process"))
        hook = Nth(n, meanwhile(rival.step))
        mine = accumulator(hooked(run.url, hook))
        with hook.armed():
            made = mine.step()
        check(run)
        assert made is None or made.version == 1
        conflicts += mine.num_conflicts
    assert conflicts > 5, "the race was a race"


def test_a_rival_that_gets_another_group_at_any_moment_loses_none() -> None:
    """Two more batches come in and the rival folds what it sees: all four count once, in the same versions of both."""
    for n in range(1, points(), 4):
        run = ready()
        rival = accumulator(GradientStore(run.url, sync="process"))

        def more(run: Run = run, rival: Accumulator = rival) -> None:
            for name in "cd":
                run.pull(name)
                run.batch(name, 1.0)
            rival.step()

        hook = Nth(n, meanwhile(more))
        mine = accumulator(hooked(run.url, hook))
        with hook.armed():
            mine.step()
        while rival.step(1) is not None:
            pass
        closed = {}
        for lineage in ("body", "client"):
            closed[lineage] = [[batch.client_id for batch in commit.folded] for commit in commits(run.store, lineage)]
        assert closed["body"] == closed["client"]
        assert sorted(name for group in closed["body"] for name in group) == ["a", "b", "c", "d"]


def test_calls_run_at_the_body_of_the_half_that_was_pulled() -> None:
    """Whatever is committed in between, until the next pull; so no batch mixes two pairs."""
    run = ready()
    assert run.pull("c") == Pair(0, 0)
    assert run.both.step() is not None
    assert run.client("c")(torch.tensor([[1.0]])).item() == 1.0, "of the body's version 0"
    run.batch("c", 2.0)
    (late,) = run.store.waiting()
    assert run.store.pile().peek(late)["base_version"] == 0  # type: ignore[index]
    assert run.pull("c") == Pair(1, 1)
    assert run.client("c")(torch.tensor([[1.0]])).item() == 9.0
    with run.client("c").at(0):
        assert run.client("c")(torch.tensor([[1.0]])).item() == -3.0
    made = run.both.step(1)
    assert made is not None
    assert dict(made.staleness) == dict(run.store.lineage("client").commit(2).staleness) == {1: 1}
    assert made.weights[1] == pytest.approx(2**-0.5)


def test_a_client_that_died_before_its_push_holds_up_nobody() -> None:
    """The group goes on without; once its batch is older than `max_staleness` it is closed as stale, and reported."""
    run = ready(max_staleness=2)
    assert run.pull("dead") == Pair(0, 0)
    run.backward("dead", 100.0)
    assert run.both.step() is not None
    for version in range(2, 5):
        waiting = [batch.client_id for batch in run.store.waiting()]
        assert waiting == ["dead"]
        for name in "ab":
            run.pull(name)
            run.batch(name, 0.0)
        made = run.both.step()
        assert made is not None
        assert (made.version, made.num_batches, made.num_stale) == (version, 2, int(version == 4))
    assert run.store.waiting() == []
    assert run.weights() == (-3.0, -3.0)


def test_a_push_that_comes_late_brings_its_batch_along() -> None:
    """Both count in the same group, with the same staleness."""
    run = ready()
    run.pull("slow")
    run.backward("slow", 8.0)
    assert run.both.step() is not None
    run.client("slow").push(gradient=True)
    made = run.both.step(1)
    assert made is not None
    assert [batch.client_id for batch in made.folded] == ["slow"]
    assert (made.halves, dict(made.staleness)) == (2, {1: 1})


def test_several_batches_of_one_push_are_in_one_group_with_it() -> None:
    """Their gradients have added up in the half; a number that was given up between them is closed with them."""
    run = Run()
    run.pull("a")
    client = run.client("a")
    client.zero_grad()
    client(torch.tensor([[2.0]])).sum().backward()
    broken = client(torch.tensor([[2.0]])).sum()
    with pytest.raises(RuntimeError):
        (broken * torch.zeros(2, requires_grad=True)).backward()
    client(torch.tensor([[4.0]])).sum().backward()
    client.push(gradient=True)
    made = run.both.step(1)
    assert made is not None
    assert (made.num_batches, run.store.lineage("client").commit(1).num_batches) == (2, 1)
    assert run.weights() == (1.0 - 3.0, 1.0 - 3.0)
    assert run.store.waiting() == []


@pytest.mark.filterwarnings("ignore:a gradient of client 'b' isn't finite")
def test_what_isnt_finite_counts_in_neither() -> None:
    """It fills no group, and is closed with the next one."""
    run = Run()
    for name, x in (("a", 2.0), ("b", float("inf")), ("c", 6.0)):
        assert run.both.step() is None
        run.pull(name)
        run.batch(name, x)
    made = run.both.step()
    assert made is not None
    assert (made.num_batches, made.num_rejected) == (2, 1)
    assert run.store.lineage("client").commit(1).num_rejected == 1
    assert run.weights() == (-3.0, -3.0)


def test_both_go_back_together() -> None:
    """The half follows the body, and training goes on from that pair; a batch that is lost counts no more."""
    run = ready()
    assert run.both.step() is not None
    lost = run.store.rollback(0)
    assert [batch.split("/")[0] for batch in lost] == ["a", "b"]
    assert (run.store.pair(), run.weights()) == (Pair(2, 2), (1.0, 1.0))
    with pytest.raises(InputError, match="roll back lineage 'body', and the halves follow"):
        run.store.rollback(0, "client")
    for name, x in zip("ab", XS, strict=True):
        assert run.pull(name) == Pair(2, 2)
        run.batch(name, x)
    assert run.both.step() is not None
    assert (run.store.pair(), run.weights()) == (Pair(3, 3), (-3.0, -3.0))
    run.store.rollback(1)
    assert (run.store.pair(), run.weights()) == (Pair(4, 4), (-3.0, -3.0))


def test_going_back_that_stops_anywhere_is_finished() -> None:
    """By whoever commits next: until then the old pair is the newest."""
    log = Nth()
    run = ready()
    assert run.both.step() is not None
    with log.armed():
        hooked(run.url, log).rollback(0)
    for n in range(log.count):
        run, hook = ready(), Nth(n, crash)
        assert run.both.step() is not None
        with hook.armed(), contextlib.suppress(Crash):
            hooked(run.url, hook).rollback(0)
        where = " ".join(log.log[n])
        begun = run.store.latest_version("client") == 2
        done = run.store.latest_version() == 2
        assert run.weights() == ((1.0, 1.0) if done else (-3.0, -3.0)), where
        accumulator(GradientStore(run.url, sync="process")).step()
        assert run.weights() == ((1.0, 1.0) if begun else (-3.0, -3.0)), where


def test_a_position_goes_on_at_the_pair_that_was_pulled() -> None:
    """A restarted owner computes on the half that it has loaded and the body that belongs to it."""
    run = ready()
    run.pull("c")
    position = run.client("c").position()
    assert run.both.step() is not None
    again = SplitClient(halves()[0], run.server, "c")
    again.resume(position)
    assert again(torch.tensor([[1.0]])).item() == 1.0
    unpaired = SplitClient(halves()[0], SplitServer(halves()[1], GradientStore(f"memory://{uuid.uuid4()}")), "d")
    unpaired.pull()
    assert "body" not in unpaired.position()


def test_a_pair_that_has_left_the_window_is_said_to_be_gone() -> None:
    """The client's call fails with the error that asks for a newer version, and the loop may go on after a pull."""
    run = ready(keep_versions=2, max_staleness=0, keep_bytes=0)
    run.pull("c")
    for _ in range(4):
        run.both.step()
        for name in "ab":
            run.pull(name)
            run.batch(name, 0.0)
    run.server = run.client("c")._connection.transport = SplitServer(halves()[1], run.store)  # type: ignore[assignment]
    with pytest.raises(ExpiredError):
        run.client("c")(torch.tensor([[1.0]]))
    run.pull("c")
    run.batch("c", 0.0)


def test_the_two_are_accumulators_of_one_store() -> None:
    """Body and halves, in this order."""
    store, other = GradientStore(f"memory://{uuid.uuid4()}"), GradientStore(f"memory://{uuid.uuid4()}")
    half, body = halves()
    bodies = Accumulator(body, store, sgd())
    for wrong in (bodies, Accumulator(half, other, sgd(), lineage="client")):
        with pytest.raises(InputError, match="lineage='client'"):
            Grouped(bodies, wrong)
