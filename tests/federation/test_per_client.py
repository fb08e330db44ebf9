"""A body per client and their average: killed, raced and rolled back at any place, each change counts once.

The model is two numbers, a at the client and b in the body, with output a·b; with loss ½(ab − y)² and a = 1 the body's
gradient is b − y. Rates are powers of two, so numbers are exact.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness_store import Crash, Hook, Nth, again, bits, commits, crash, hooked, lose_reply, meanwhile
from torch import Tensor, nn

import splitfed
from splitfed.accumulator.policies import inverse_sqrt
from splitfed.errors import ExpiredError, InputError, MissingError, StoreError

LINES = ("body", "body@a", "body@b")


def sgd(params: Any) -> torch.optim.Optimizer:
    """Rate one half."""
    return torch.optim.SGD(params, lr=0.5)


def number() -> nn.Module:
    """The number 1 as a layer."""
    made = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(made.weight)
    return made


def normalised() -> nn.Module:
    """The number 1, and a layer that keeps statistics of it."""
    return nn.Sequential(number(), nn.BatchNorm1d(1, affine=False, momentum=0.5, dtype=torch.float64))


class Site:
    """A store, a server and clients with bodies of their own."""

    def __init__(self, url: str = "", hook: Hook | None = None, body: Callable[[], nn.Module] = number) -> None:
        self.url = url or f"memory://{uuid.uuid4()}"
        self.body = body
        self.store = splitfed.GradientStore(self.url, sync="process") if hook is None else hooked(self.url, hook)
        self.server = splitfed.SplitServer(body(), self.store, per_client=True)
        self.clients: dict[str, splitfed.SplitClient] = {}

    def bodies(self, optimizer: Any = sgd, **settings: Any) -> splitfed.PerClient:
        """Whoever commits and averages, anew."""
        return splitfed.PerClient(self.body(), self.store, optimizer, **settings)

    def batch(self, name: str, target: float = 0.0, samples: int = 2) -> None:
        """One backward pass of a client over x = 1 and x = 3 in turn."""
        if name not in self.clients:
            half = nn.Sequential(number(), splitfed.CutPoint())
            self.clients[name] = splitfed.SplitClient(half.requires_grad_(False), self.server, name)
        x = torch.ones(samples, 1, dtype=torch.float64)
        if self.body is normalised:
            x[::2] = 3.0
        (self.clients[name](x) - target).pow(2).mean().div(2).backward()

    def weight(self, lineage: str = "body") -> float:
        """The first number of a lineage."""
        return next(iter(self.store.load_weights(lineage=lineage).values())).item()

    def heads(self) -> list[str]:
        """What made the newest version of each line."""
        lines = [again(self.store).lineage(name) for name in LINES]
        return [line.commit(line.head()).kind for line in lines]


def test_the_lines_know_where_they_began() -> None:
    """A line begins as version 0 from `body`, ends and begins around an average, and its turn goes up."""
    site = Site()
    bodies = site.bodies()
    for _ in range(2):
        site.batch("a")
        site.batch("a")
        bodies.step()
        bodies.average()
    found = commits(site.store, "body@a")
    assert [commit.kind for commit in found] == ["initial", *["fold", "end", "begin"] * 2]
    assert [commit.source for commit in found] == [0, None, 0, 1, None, 1, 2]
    assert [commit.turn for commit in found if commit.kind == "begin"] == [1, 2]
    assert [commit.num_samples for commit in found] == [0, 4, 4, 0, 4, 4, 0]
    assert [str(batch) for commit in commits(site.store) for batch in commit.folded] == ["a/0/0", "a/0/1"]


def test_a_line_that_rests_begins_anew_too() -> None:
    """Client b has evaluated only, and trained nothing: after the average of a it stands at a's 0.5 as well."""
    site = Site()
    site.batch("a")
    with torch.no_grad():
        look(site, "b")
    bodies = site.bodies()
    assert bodies.clients() == ["a", "b"]
    assert [commit.version for commit in bodies.step()] == [1]
    bodies.average()
    assert [site.weight(line) for line in LINES] == [0.5, 0.5, 0.5]
    assert site.heads() == ["fold", "begin", "begin"]


def look(site: Site, name: str) -> Tensor:
    """The output of a client that has just come."""
    half = nn.Sequential(number(), splitfed.CutPoint())
    return splitfed.SplitClient(half, site.server, name)(torch.ones(1, 1, dtype=torch.float64))


def test_an_average_of_nothing_changes_nothing() -> None:
    """Nobody there, nobody moved, or a rollback that undid all there was."""
    site = Site()
    bodies = site.bodies()
    assert bodies.average() is None
    site.batch("a")
    bodies.step()
    site.store.rollback(0, "body@a")
    assert bodies.average() is None
    assert site.store.latest_version() == 0
    site.batch("a", target=-1.0, samples=1)
    commit = bodies.average()
    assert commit is not None
    assert (commit.num_samples, site.weight()) == (1, 0.0)


def test_a_rollback_is_left_out_of_the_change() -> None:
    """1, ½, back to 1, and with three samples to 0: the change weighs three, not five."""
    site = Site()
    bodies = site.bodies()
    site.batch("a")
    bodies.step()
    site.store.rollback(0, "body@a")
    site.batch("a", target=-1.0, samples=3)
    commit = bodies.average()
    assert commit is not None
    assert (commit.num_samples, site.weight()) == (3, 0.0)


def test_each_optimizer_has_its_own_state_and_keeps_it() -> None:
    """Momentum ½: 1 − ½ = ½ in the first round; then the gradient ½ + ½·1, and ½ − ½·1 = 0."""
    site = Site()
    bodies = site.bodies(lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5), keep_bodies=1)
    for expected in (0.5, 0.0):
        site.batch("a")
        site.batch("b")
        bodies.average()
        assert [site.weight(line) for line in LINES] == [expected] * 3


def test_some_can_be_averaged_and_the_rest_later() -> None:
    """Client b alone: 2; then a's change of ½ is one average old: 2 − ½·1/√2, and all stand there."""
    site = Site()
    bodies = site.bodies(staleness_weight=inverse_sqrt)
    site.batch("a")
    site.batch("b", target=3.0)
    bodies.step(["a", "nobody"])
    commit = bodies.average(["b"])
    assert commit is not None
    assert commit.num_batches == 1
    assert [site.weight(line) for line in LINES] == [2.0, 0.5, 2.0]
    commit = bodies.average()
    assert commit is not None
    assert commit.staleness == {1: 1}
    assert [site.weight(line) for line in LINES] == pytest.approx([2 - 0.5 / 2**0.5] * 3, abs=1e-15)


def test_a_line_that_began_later_is_left_alone() -> None:
    """It moved on from version 1, so an average of those that began at version 0 neither ends nor folds it."""
    site = Site()
    bodies = site.bodies()
    site.batch("a")
    assert bodies.average(upto=0) is not None
    site.batch("a")
    assert bodies.average(upto=0) is None
    assert (site.weight("body"), site.weight("body@a")) == (0.5, 0.25)
    assert bodies.average(upto=1) is not None
    assert site.weight("body") == 0.25


def test_a_change_that_is_too_stale_is_reported() -> None:
    """With max_staleness 0 it closes as stale with the next average, and its line begins anew."""
    site = Site()
    bodies = site.bodies(max_staleness=0)
    site.batch("a")
    site.batch("b", target=3.0)
    bodies.step()
    bodies.average(["b"])
    site.batch("b", target=2.0)
    commit = bodies.average()
    assert commit is not None
    assert (commit.num_batches, commit.num_stale) == (1, 1)
    assert [site.weight(line) for line in LINES] == [2.0] * 3


def test_a_change_whose_start_is_gone_is_reported() -> None:
    """Two versions of `body` are kept, and a missed three averages: warned of, closed as rejected, begun anew."""
    site = Site()
    bodies = site.bodies(keep_versions=2)
    site.batch("a")
    bodies.step()
    for _ in range(3):
        site.batch("b")
        bodies.average(["b"])
    with pytest.raises(ExpiredError):
        site.store.load_weights(0)
    site.batch("b")
    with pytest.warns(UserWarning, match=r"client 'a' changed in its body since version 0 counts nowhere"):
        commit = bodies.average()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected) == (1, 1)
    assert [site.weight(line) for line in LINES] == [0.0625] * 3


def test_a_body_that_left_the_numbers_begins_anew() -> None:
    """A step to infinity is rejected at the average; weight and optimizer state are new, and it trains on."""
    site = Site()
    bodies = site.bodies(lambda params: torch.optim.SGD(params, lr=2.0**1023, momentum=0.5))
    site.batch("a", target=-63.0)
    bodies.step()
    assert site.weight("body@a") == -torch.inf
    with pytest.warns(UserWarning, match="isn't finite"):
        assert bodies.average() is None
    assert [site.weight("body"), site.weight("body@a")] == [1.0, 1.0]
    assert site.store.lineage("body@a").optimizer(3) is None
    site.batch("a", target=1.0)
    commit = bodies.average()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected, site.weight()) == (1, 1, 1.0)


def test_statistics_are_advanced_by_all_updates() -> None:
    """Means of 2 seen in three updates with momentum ½, two by a and one by b: 2·(1 − ⅛) = 1.75."""
    site = Site(body=normalised)
    bodies = site.bodies(lambda params: torch.optim.SGD(params, lr=0.0))
    for name in ("a", "a", "b"):
        site.batch(name)
        bodies.step()
    bodies.average()
    state = site.store.load_weights()
    assert state["1.running_mean"].item() == pytest.approx(1.75, abs=1e-14)
    assert state["1.num_batches_tracked"].item() == 3


def trained(hook: Hook | None = None) -> Site:
    """Two clients that have trained, a twice."""
    site = Site(hook=hook, body=normalised)
    bodies = site.bodies()
    for name, target in (("a", 0.0), ("b", 1.0), ("a", 0.5)):
        site.batch(name, target)
        bodies.step()
    return site


def check_averaged(site: Site, expected: dict[str, bytes]) -> None:
    """One commit of both changes, the bits of an average that nobody disturbed, and all lines at it."""
    assert [commit.num_batches for commit in commits(site.store)] == [0, 2]
    for line in LINES:
        assert bits(again(site.store).load_weights(lineage=line)) == expected, line
    assert again(site.store).waiting() == []


def undisturbed(at: str) -> tuple[dict[str, bytes], int]:
    """The bits of an average, and how many operations of one kind it takes."""
    count = Nth(at=at)
    site = trained(count)
    bodies = site.bodies()
    with count.armed():
        bodies.average()
    expected = bits(site.store.load_weights())
    check_averaged(site, expected)
    return expected, count.count


@pytest.mark.parametrize(("act", "at"), [(crash, "create"), (crash, "delete"), (lose_reply, "create")])
def test_an_average_that_stops_anywhere_is_finished_by_the_next(act: Hook, at: str) -> None:
    """Killed before any write of its own, or left without the reply: the same bits, each change counted once."""
    expected, operations = undisturbed(at)
    assert operations == {"create": 20, "delete": 2}[at]
    for n in range(operations):
        nth = Nth(n, act, at)
        site = trained(nth)
        bodies = site.bodies()
        with nth.armed(), contextlib.suppress(Crash, StoreError):
            bodies.average()
        fresh = splitfed.PerClient(normalised(), again(site.store), sgd)
        fresh.average()
        fresh.step()
        check_averaged(site, expected)


def test_a_line_that_was_left_closed_goes_on_with_the_next_step() -> None:
    """Killed after the average was committed, before a's line began anew: its next batch isn't kept waiting for it."""
    nth = Nth(1, crash, "create body@a/weights")
    site = trained(nth)
    with nth.armed(), pytest.raises(Crash):
        site.bodies().average()
    assert site.heads() == ["fold", "end", "end"]
    site.batch("a")
    (commit,) = site.bodies().step(["a"])
    assert (commit.kind, commit.num_batches) == ("fold", 1)
    assert [entry.source for entry in commits(site.store, "body@a")][-2:] == [1, None]


def test_two_that_average_at_once_count_once() -> None:
    """Before any write of one, the other runs its whole average: the same bits, each change counted once."""
    expected, operations = undisturbed("create")
    for n in range(operations):
        nth = Nth(n, at="create")
        site = trained(nth)
        other = splitfed.PerClient(normalised(), again(site.store), sgd, lock_seconds=0)
        nth.act = meanwhile(other.average)
        bodies = site.bodies()
        with nth.armed():
            bodies.average()
        check_averaged(site, expected)


def test_a_batch_that_comes_while_the_round_ends_counts_in_this_one_or_the_next() -> None:
    """Before any write a trains on, and somebody commits: all of its samples are averaged in the end, once."""
    _, operations = undisturbed("create")
    for n in range(operations):
        nth = Nth(n, at="create")
        site = trained(nth)
        other = Site(site.url, body=normalised)
        other.clients["a"] = splitfed.SplitClient(
            nn.Sequential(number(), splitfed.CutPoint()).requires_grad_(False), other.server, "a"
        )

        def train_on(other: Site = other) -> None:
            other.batch("a", 0.25, samples=4)
            other.bodies(lock_seconds=0).step(["a"])

        nth.act = meanwhile(train_on)
        bodies = site.bodies()
        with nth.armed():
            bodies.average()
        bodies.average()
        assert sum(commit.num_samples for commit in commits(site.store)) == 10
        assert sum(commit.num_samples for commit in commits(site.store, "body@a") if commit.kind == "fold") == 8
        assert again(site.store).waiting("body@a") == []


def test_a_line_that_nobody_began_from_body_is_refused() -> None:
    """An accumulator made it by hand: it doesn't say where it began."""
    site = Site()
    splitfed.Accumulator(number(), site.store, sgd, lineage="body@a")
    site.batch("a")
    bodies = site.bodies()
    bodies.step()
    with pytest.raises(MissingError, match=r"'body@a' doesn't say which version of 'body' it began from"):
        bodies.average()


@pytest.mark.parametrize("settings", [{"keep_bodies": 0}, {"max_staleness": -1}, {"average": 3}], ids=str)
def test_settings_out_of_their_range_are_refused(settings: dict[str, Any]) -> None:
    """As an accumulator's."""
    with pytest.raises(InputError):
        Site().bodies(**settings)
