"""What staleness costs."""

from __future__ import annotations

import pytest

from splitfed import policies
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
