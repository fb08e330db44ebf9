"""The settings of a commit: checked once, passed on as they are."""

from __future__ import annotations

from typing import Any

import pytest
from harness_store import Point, sgd

from splitfed.accumulator import policies
from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.settings import CommitSettings
from splitfed.errors import InputError
from splitfed.store.store import GradientStore


@pytest.mark.parametrize(
    ("settings", "window"),
    [({}, 16), ({"max_staleness": 30}, 32), ({"max_staleness": 3}, 16), ({"keep_versions": 2}, 2)],
)
def test_the_window_holds_what_may_be_stale(settings: dict[str, Any], window: int) -> None:
    """Sixteen versions, or as many as staleness needs, or as many as are given."""
    assert CommitSettings(**settings).window == window


def test_a_window_that_is_too_narrow_is_refused() -> None:
    """A batch of the oldest version that counts must find its commit's successor still readable."""
    with pytest.raises(InputError, match="keep_versions is 5: expected an integer of at least 6"):
        CommitSettings(keep_versions=5, max_staleness=4)


@pytest.mark.parametrize(("most", "said"), [(0, "max_batches is 0"), (2, "max_batches is 2: .* min_batches=3")])
def test_the_most_of_a_commit_is_no_less_than_the_least(most: int, said: str) -> None:
    """None could ever come about."""
    with pytest.raises(InputError, match=said):
        CommitSettings(min_batches=3, max_batches=most)


def test_settings_go_through_an_accumulator_unchanged() -> None:
    """As keywords, to another accumulator of the same settings."""
    given = CommitSettings(min_batches=3, max_staleness=4, staleness_weight=policies.inverse_sqrt, clip_norm=1.0)
    accumulator = Accumulator(Point(), GradientStore("memory://settings"), sgd(), **given.keywords())
    assert accumulator.settings.keywords() == given.keywords()
    assert (accumulator.min_batches, accumulator.max_staleness, accumulator.keep_versions) == (3, 4, 16)


def test_a_mode_is_followed_where_it_says_something() -> None:
    """A mode without a number of batches leaves the number free, not the staleness that it limits."""
    round_ = policies.mode("round", max_staleness=2)
    CommitSettings(min_batches=7, max_staleness=2).check_mode(round_)
    with pytest.raises(InputError, match="max_staleness is None, but mode 'round' says 2"):
        CommitSettings().check_mode(round_)
    with pytest.raises(InputError, match="max_batches is 9, but mode 'buffered' says None"):
        CommitSettings(
            min_batches=8, max_batches=9, max_staleness=16, staleness_weight=policies.inverse_sqrt
        ).check_mode(policies.mode("buffered"))
    with pytest.raises(InputError, match="min_batches is 1, but mode 'buffered' says 8"):
        CommitSettings().check_mode(policies.mode("buffered"))
