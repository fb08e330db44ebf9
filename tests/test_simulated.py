"""A run as an iterator: what it is told, whom it tells, and when it stops."""

from __future__ import annotations

from typing import Any

import pytest
import toy

from splitfed.trainee import Outcome, total


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


def test_several_activations_of_a_client_are_one_entry() -> None:
    """Sums, by client, in the order of ids; classes count only if all of them did."""
    found = total([Outcome("b", 4, 1, 2.0, 3), Outcome("a", 1, 1, 1.0, None), Outcome("b", 6, 2, 3.0, 1, expired=1)])
    assert found == [Outcome("a", 1, 1, 1.0, None), Outcome("b", 10, 3, 5.0, 4, expired=1)]
    assert found[1].row() == {
        "num_samples": 10,
        "batches": 3,
        "train_loss": 0.5,
        "train_accuracy": 0.4,
        "expired": 1,
    }
