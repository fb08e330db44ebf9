"""Rates that fall over a run: the same line in every mode, for whoever steps, and after a kill."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy

from splitfed.accumulator import policies
from splitfed.errors import InputError
from splitfed.simulation.rates import Falling, num_commits
from splitfed.store.store import GradientStore


def spied(rates: list[float], lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Makes SGD optimizers of a rate that note the rate of each step."""

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    return lambda params: Spy(params, lr=lr)


def run(**settings: Any) -> dict[str, list[float]]:
    """The rates of each step of a run of two clients, with 2 and with 3 batches a round."""
    rates: dict[str, list[float]] = {"clients": [], "body": [], "halves": []}
    clients = {"a": toy.examples(8), "b": toy.examples(12)}
    made = {
        "optimizer": spied(rates["clients"], 1.0),
        "server_optimizer": spied(rates["body"], 0.5),
        "half_optimizer": spied(rates["halves"], 1.0),
    }
    list(toy.run(**{"clients": clients, "final_rate": 0.2, **made, **settings}))
    return rates


def line(steps: int, start: float = 1.0) -> list[float]:
    """From `start` towards a fifth of it, which follows after the last of so many steps."""
    return [pytest.approx(start * (1 - 0.8 * step / steps)) for step in range(steps)]


@pytest.mark.parametrize(
    ("mode", "commits"),
    [
        (policies.mode("round"), 2),
        (policies.mode("buffered", min_batches=2), 6),
        (policies.mode("sflv2"), 10),
        (policies.mode("synchronous"), 6),
    ],
    ids=lambda value: value.name if isinstance(value, policies.Mode) else "",
)
def test_all_rates_fall_on_one_line_in_every_mode(mode: policies.Mode, commits: int) -> None:
    """Two rounds: the body's by its commits, each client's by its batches; averaging stays as it is."""
    rates = run(mode=mode, personal=("3.*",))
    assert rates["body"] == line(commits, 0.5)
    assert sorted(rates["clients"], reverse=True) == sorted([*line(4), *line(6)], key=lambda one: -one.expected)  # type: ignore[attr-defined]
    assert rates["halves"] == (line(commits) if mode.gradients else [1.0, 1.0])


def test_bodies_of_clients_fall_by_the_batches_of_the_largest() -> None:
    """Six of its own commits in two rounds; the other body has four, and ends at a higher rate."""
    rates = run(mode="sflv1")
    assert sorted(rates["body"]) == sorted([*line(6, 0.5), *line(6, 0.5)[:4]], key=lambda one: one.expected)  # type: ignore[attr-defined]


def test_clients_fall_whether_they_keep_their_optimizers_or_not() -> None:
    """The rate that a kept state has isn't multiplied once more."""
    assert run(keep_optimizers=True) == run()


def test_a_run_that_goes_on_falls_from_where_it_was() -> None:
    """Another process, on the same store: clients by the round, accumulators by their state."""
    store, rates = GradientStore("memory://falling"), []
    whole = run(mode="synchronous", personal=("3.*",))
    optimizers = {
        name: spied(rates, rate)
        for name, rate in (("server_optimizer", 0.5), ("half_optimizer", 1.0), ("optimizer", 1.0))
    }
    clients = {"a": toy.examples(8), "b": toy.examples(12)}
    settings = {"mode": "synchronous", "personal": ("3.*",), "final_rate": 0.2, "clients": clients, **optimizers}
    next(toy.run(**settings, store=store))
    with pytest.warns(UserWarning, match="begins anew"):
        list(toy.run(**settings, store=store))
    assert sorted(rates) == sorted(itertools.chain(*whole.values()))


def test_halves_may_have_a_schedule_of_their_own() -> None:
    """It steps once per commit of theirs."""
    halving = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # noqa: E731
    assert run(final_rate=None, half_scheduler=halving, rounds=3)["halves"] == [1.0, 0.5, 0.25]


def test_a_share_of_clients_makes_a_share_of_the_commits() -> None:
    """About: whoever is drawn may have more batches, or fewer."""
    batches = {"a": 10, "b": 30}
    assert num_commits(policies.mode("buffered", min_batches=4), batches, 10, 0.5) == 50
    assert num_commits(policies.mode("sflv1"), batches, 10, 0.5) == 150
    assert num_commits(policies.mode("round"), batches, 10, 0.5) == 10
    group = policies.mode("grouped", group=2)
    assert num_commits(group, batches, 10, 1.0) == 200
    assert num_commits(group, batches, 10, 1.0, barrier=False) == 10  # a round is a batch of each
    assert Falling(0.1, 4).factor(9, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"final_rate": 0.0}, "final_rate is 0.0: expected a finite number above 0"),
        ({"final_rate": 1.5}, "final_rate is 1.5: expected a share of the rates"),
        ({"final_rate": 0.1, "half_scheduler": len}, "and half_scheduler is given too: leave one of them out"),
        ({"final_rate": 0.1, "scheduler": len}, "and LocalTraining.scheduler is given too"),
        ({"final_rate": 0.1, "server_scheduler": len}, "and server_scheduler is given too"),
        ({"half_scheduler": 0.1}, "half_scheduler is float: expected a function"),
    ],
)
def test_schedules_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    """And those that are none."""
    with pytest.raises(InputError, match=said):
        toy.run(**settings)
