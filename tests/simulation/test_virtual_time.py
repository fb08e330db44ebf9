"""What virtual clients cost: figures by number, mapping or function, and their range."""

from __future__ import annotations

import math
import statistics

import pytest

import splitfed
from splitfed.errors import InputError
from splitfed.simulation.virtual_time import Pace, VirtualTime, lognormal, stragglers


def test_a_figure_is_a_number_a_mapping_or_a_function_of_the_id() -> None:
    """Each is asked for the one client."""
    virtual = VirtualTime(compute={"a": 3, "b": 4.0}, latency=0.5, dropout=lambda name: 0.25 if name == "b" else 0)
    assert virtual.pace("a") == Pace(3.0, 0.5, 0.0)
    assert virtual.pace("b") == Pace(4.0, 0.5, 0.25)
    assert VirtualTime().pace("z") == Pace(1.0, 0.0, 0.0)
    assert splitfed.VirtualTime is VirtualTime


@pytest.mark.parametrize(
    ("virtual", "said"),
    [
        (VirtualTime(compute={"b": 1.0}), "compute has no figure for client 'a'"),
        (VirtualTime(compute=-1.0), "compute of client 'a' is -1.0"),
        (VirtualTime(latency=math.inf), "latency of client 'a' is inf"),
        (VirtualTime(latency=lambda _: "soon"), "latency of client 'a' is 'soon'"),  # type: ignore[arg-type, return-value]
        (VirtualTime(dropout=1.0), "dropout of 'a' is 1.0"),
    ],
)
def test_a_figure_that_cant_be_is_refused(virtual: VirtualTime, said: str) -> None:
    """The message names it and the client."""
    with pytest.raises(InputError, match=said):
        virtual.pace("a")


def test_some_are_slow_and_always_the_same_ones() -> None:
    """About the share that was asked for, by so much, whichever run it is; another seed picks others."""
    names = [f"client-{number}" for number in range(1000)]
    figures = [stragglers(0.1, 10, base=2)(name) for name in names]
    assert set(figures) == {2, 20}
    assert 70 < figures.count(20) < 130
    assert figures == [stragglers(0.1, 10, base=2)(name) for name in names]
    assert figures != [stragglers(0.1, 10, base=2, seed=1)(name) for name in names]


def test_lognormal_speeds_have_their_median_and_spread() -> None:
    """Of a thousand clients; with no spread all have the median."""
    figures = [lognormal(2.0, 1.0)(f"client-{number}") for number in range(1000)]
    assert statistics.median(figures) == pytest.approx(2.0, rel=0.15)
    assert statistics.stdev(map(math.log, figures)) == pytest.approx(1.0, rel=0.1)
    assert lognormal(2.0, 0.0)("a") == 2.0
