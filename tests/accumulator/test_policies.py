"""What staleness costs, and the modes."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from splitfed.accumulator import policies
from splitfed.errors import InputError


def test_constant_weight_is_one_at_any_staleness() -> None:
    """A stale gradient counts like a fresh one."""
    assert [policies.constant(staleness) for staleness in (0, 1, 100)] == [1.0, 1.0, 1.0]


def test_inverse_sqrt_halves_a_gradient_of_staleness_three() -> None:
    """s(0) = 1, s(3) = 1/√4 and s(8) = 1/√9."""
    assert [policies.inverse_sqrt(staleness) for staleness in (0, 3, 8)] == [1.0, 0.5, 1 / 3]


@pytest.mark.parametrize("weight", [policies.constant, policies.inverse_sqrt])
def test_negative_staleness_is_refused(weight: policies.StalenessWeight) -> None:
    """A gradient can't come from a version that doesn't exist yet."""
    with pytest.raises(InputError, match="staleness -1"):
        weight(-1)


def test_each_mode_is_one_policy() -> None:
    """What tells them apart: when a commit comes, what staleness costs, what clients publish, whose body it is."""
    found = {name: policies.mode(name) for name in policies.MODES}
    assert list(found) == ["round", "buffered", "synchronous", "sflv2", "sflv1"]
    assert [mode.min_batches for mode in found.values()] == [None, 8, None, 1, 1]
    assert [mode.max_staleness for mode in found.values()] == [None, 16, None, None, None]
    assert [mode.staleness_weight(3) for mode in found.values()] == [1, 0.5, 1, 1, 1]
    assert [name for name, mode in found.items() if mode.gradients] == ["synchronous"]
    assert [name for name, mode in found.items() if mode.per_client] == ["sflv1"]


def test_settings_take_the_place_of_the_usual_ones() -> None:
    """Of a mode by name or of one at hand, which stays as it was."""
    usual = policies.mode("buffered")
    own = policies.mode(usual, min_batches=20, max_staleness=None)
    assert (own.name, own.min_batches, own.max_staleness, own.staleness_weight) == (
        "buffered",
        20,
        None,
        policies.inverse_sqrt,
    )
    assert usual.min_batches == 8
    assert policies.mode("buffered") == usual


def test_the_settings_of_an_accumulator() -> None:
    """A round is folded by `step(min_batches=1)`; bodies per client have no such setting."""
    assert policies.mode("round").settings() == {
        "min_batches": 1,
        "max_batches": None,
        "max_staleness": None,
        "staleness_weight": policies.constant,
    }
    assert policies.mode("buffered", max_batches=9).settings()["max_batches"] == 9
    assert policies.mode("buffered", min_batches=3).settings()["min_batches"] == 3
    assert set(policies.mode("sflv1").settings()) == {"max_staleness", "staleness_weight"}


def test_a_mode_describes_itself_in_json() -> None:
    """For the first row of a history."""
    assert json.loads(json.dumps(policies.mode("buffered", min_batches=2).describe())) == {
        "name": "buffered",
        "min_batches": 2,
        "max_batches": None,
        "max_staleness": 16,
        "staleness_weight": "inverse_sqrt",
        "gradients": False,
        "per_client": False,
    }
    assert policies.mode("round", staleness_weight=functools.partial(pow, 2)).describe()["staleness_weight"] == "own"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fedbuff", {}, "mode 'fedbuff' isn't known: expected one of round, buffered, synchronous, sflv2, sflv1"),
        ("round", {"k": 3}, "a mode has no setting 'k': expected name, min_batches"),
        ("buffered", {"min_batches": 0}, "min_batches is 0: expected an integer of at least 1"),
        ("buffered", {"max_batches": 0}, "max_batches is 0: expected an integer of at least 1"),
        ("buffered", {"max_batches": 7}, "max_batches is 7: expected at least min_batches=8, the number that"),
        ("round", {"max_batches": 7}, "max_batches is 7 in mode 'round', whose commits aren't made by numbers"),
        ("sflv1", {"max_batches": 1}, "max_batches is 1 in mode 'sflv1', whose commits aren't"),
        ("buffered", {"max_staleness": -1}, "max_staleness is -1"),
        ("round", {"staleness_weight": 0.5}, "staleness_weight is 0.5: expected a function"),
        ("round", {"name": ""}, "a mode needs a name, got ''"),
    ],
)
def test_a_mode_that_isnt_one_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    """With what is there instead."""
    with pytest.raises(InputError, match=re.escape(message)):
        policies.mode(name, **settings)
