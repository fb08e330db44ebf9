"""A run as an iterator: what it is told, whom it tells, and when it stops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import toy
from torch import nn
from torch.nn.functional import cross_entropy

from splitfed.simulation.client import LocalMetrics, sum_by_client
from splitfed.simulation.data import evaluate
from splitfed.simulation.virtual_time import VirtualTime
from splitfed.store.layout import TRANSIENT
from splitfed.store.store import GradientStore
from splitfed.tracking.history import History


class Listener:
    """Keeps rows, and whether it was closed."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.closed = 0

    def on_row(self, row: dict[str, Any]) -> None:
        """Keep it."""
        self.rows.append(row)

    def close(self) -> None:
        """Count it."""
        self.closed += 1


def accuracies(most: int | None = None) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation in which the process dies after so many."""
    done = iter(itertools.count() if most is None else range(most))

    def judge(model: nn.Module) -> dict[str, float]:
        if next(done, None) is None:
            raise toy.Killed
        return evaluate(model, toy.examples(), cross_entropy)

    return judge


def test_it_is_its_own_iterator_and_ends_once() -> None:
    """Callbacks are closed with it, and it has no second life."""
    listener = Listener()
    simulation = toy.run(callbacks=[listener], rounds=3)
    assert iter(simulation) is simulation
    assert [row["round"] for row in simulation] == [1, 2, 3]
    assert listener.closed == 1
    with pytest.raises(StopIteration):
        next(simulation)


def test_a_run_that_is_left_closes_its_callbacks_too() -> None:
    """Its history has what was yielded."""
    listener = Listener()
    simulation = toy.run(callbacks=[listener], rounds=3)
    next(simulation)
    simulation.close()
    assert listener.closed == 1
    assert [row["kind"] for row in listener.rows] == ["run", "commit", "commit", "round"]


def test_the_model_can_be_had_at_any_time() -> None:
    """Before the first round it is the one that was given."""
    simulation = toy.run()
    assert toy.same(simulation.whole(), toy.model())
    next(simulation)
    assert not toy.same(simulation.whole(), toy.model())


def test_figures_of_ones_own_go_into_the_row() -> None:
    """Whatever the function returns; a number that isn't finite is None, as JSON has none."""
    rows = list(toy.run(rounds=1, evaluate=lambda model: {"f1": 0.5, "worst": float("nan")}))
    assert (rows[0]["f1"], rows[0]["worst"]) == (0.5, None)
    assert "accuracy" not in rows[0]


def test_several_runs_of_a_client_are_one_entry() -> None:
    """Sums, by client, in the order of ids; classes count only if all of them did."""
    found = sum_by_client(
        [
            LocalMetrics("b", 4, 1, 2.0, 3),
            LocalMetrics("a", 1, 1, 1.0, None),
            LocalMetrics("b", 6, 2, 3.0, 1, expired=1),
        ]
    )
    assert found == [LocalMetrics("a", 1, 1, 1.0, None), LocalMetrics("b", 10, 3, 5.0, 4, expired=1)]
    assert found[1].row() == {
        "num_samples": 10,
        "batches": 3,
        "train_loss": 0.5,
        "train_accuracy": 0.4,
        "expired": 1,
    }


@pytest.mark.parametrize("mode", ["round", "synchronous", "sflv1", "sflv2", "buffered"])
def test_a_local_run_that_was_killed_goes_on_under_its_numbers(mode: str) -> None:
    """In the second batch of a client, whose first is on file: each counts once, and the bits are those of one go."""
    whole, store = toy.run(mode=mode, rounds=1), GradientStore(f"memory://amid-{mode}")
    list(whole)
    with pytest.raises(toy.Killed):
        next(toy.run(mode=mode, rounds=1, store=store, loss_fn=toy.dying(4)))
    again = toy.run(mode=mode, rounds=1, store=store)
    (row,) = again
    assert (row["batches"], row["dropped"], row["gradients_rejected"]) == (6, {}, 0)
    assert toy.same(whole.whole(), again.whole())


def test_with_another_seed_a_killed_run_is_another_one() -> None:
    """Other batches under the old numbers would count nowhere: what was sent counts, and all of the new run."""
    store = GradientStore("memory://amid-other")
    with pytest.raises(toy.Killed):
        next(toy.run(rounds=1, store=store, loss_fn=toy.dying(1)))
    (row,) = toy.run(rounds=1, store=store, seed=1)
    assert row["batches"] == 7


@pytest.mark.parametrize("batches", [0, 2, 4])
def test_a_round_that_was_killed_goes_on_with_the_clients_that_are_missing(batches: int) -> None:
    """Two batches a client: whose update is in doesn't train again, and the round ends in the bits of one go."""
    whole, store = toy.run(), GradientStore(f"memory://killed-{batches}")
    list(whole)
    with pytest.raises(toy.Killed):
        next(toy.run(store=store, loss_fn=toy.dying(batches)))
    again = toy.run(store=store)
    rows = list(again)
    assert [(row["batches"], row["dropped"]) for row in rows] == [(6, {}), (6, {})]
    assert toy.same(whole.whole(), again.whole())


def test_a_round_that_is_decided_only_wants_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between decision and report, two global steps in: nobody trains for it any more."""

    def killed(*_: object) -> None:
        raise toy.Killed

    store = GradientStore("memory://decided")
    first = toy.run(store=store, mode="synchronous", rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(store.rounds(), "close", killed)
        with pytest.raises(toy.Killed):
            next(first)
    (row,) = toy.run(store=store, mode="synchronous", rounds=1)
    assert (row["status"], row["batches"], store.latest_version()) == ("complete", 6, 2)


@pytest.mark.parametrize("settings", [{}, {"virtual": VirtualTime()}])
def test_a_round_that_was_killed_before_it_was_told_is_told(settings: dict[str, Any]) -> None:
    """Killed in the evaluation of round 2, which is over: its row comes first and once, and time goes on."""
    store = GradientStore(f"memory://untold-{len(settings)}")
    whole = list(toy.run(**settings, rounds=3, evaluate=accuracies()))
    with pytest.raises(toy.Killed):
        list(toy.run(**settings, rounds=3, evaluate=accuracies(1), store=store, history=History(store)))
    rows = list(toy.run(**settings, rounds=2, evaluate=accuracies(), store=store, history=History(store)))
    assert [(row["round"], row["batches"], row["accuracy"]) for row in rows] == [(2, 6, whole[1]["accuracy"])]
    assert "bytes_up" not in rows[0]
    rows += toy.run(**settings, rounds=3, evaluate=accuracies(), store=store, history=History(store))
    told = History(store).rounds()
    assert told[1:] == rows
    assert [row["accuracy"] for row in told] == [row["accuracy"] for row in whole]
    assert [row["seconds"] for row in told] == sorted(row["seconds"] for row in told)
    assert not settings or [row["time"] for row in told] == [row["time"] for row in whole]


@pytest.mark.parametrize("batches", [6, 8])
def test_virtual_time_goes_on_where_it_was(batches: int) -> None:
    """A round takes 2 seconds: killed in the second at its beginning or amid it, that one begins at 2 again."""
    store, settings = GradientStore(f"memory://clock-{batches}"), {"virtual": VirtualTime(), "mode": "sflv2"}
    with pytest.raises(toy.Killed):
        list(toy.run(**settings, store=store, loss_fn=toy.dying(batches)))
    rows = list(toy.run(**settings, store=store, rounds=3))
    assert [row["time"] for row in rows] == pytest.approx([4, 6])
    assert [row["time"] for row in toy.run(**settings, store=store, rounds=4)] == pytest.approx([8])


@pytest.mark.parametrize("settings", [{"personal": ("3.*",)}, {"keep_optimizers": True}])
def test_going_on_without_what_clients_kept_is_said(settings: dict[str, Any]) -> None:
    """Once, and only if there is anything to go on with."""
    store = GradientStore(f"memory://kept-{'-'.join(settings)}")
    list(toy.run(**settings, store=store))
    with pytest.warns(UserWarning, match="it begins anew in this run") as told:
        assert len(list(toy.run(**settings, store=store, rounds=4))) == 2
    assert len(told) == 1
    assert told[0].filename == __file__
    assert list(toy.run(**settings, store=store, rounds=4)) == []


@pytest.mark.parametrize("mode", ["round", "buffered", "synchronous", "sflv1"])
def test_no_activations_stay_when_it_has_finished(mode: str) -> None:
    """Between rounds the last batch of each client is on record, for a round may follow; at the end none is."""
    simulation = toy.run(mode=mode)
    next(simulation)
    assert _open_calls(simulation.store)
    list(simulation)
    assert _open_calls(simulation.store) == []


def test_nor_those_of_clients_that_never_came_to_an_end() -> None:
    """Stragglers that no deadline waited for had a forward on record; a longer run on that store goes on."""
    store = GradientStore("memory://splitfed-tests-stragglers")
    settings: dict[str, Any] = {"virtual": VirtualTime(compute=3.0, latency=0.5), "deadline": 5.0, "store": store}
    list(toy.run(rounds=1, **settings))
    assert _open_calls(store) == []
    assert [row["round"] for row in toy.run(rounds=2, **settings)] == [2]
    assert _open_calls(store) == []


def _open_calls(store: GradientStore) -> list[str]:
    return [key for key in store.blobs.list("") if set(TRANSIENT) & set(key.split("/"))]
