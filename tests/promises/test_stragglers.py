"""The stragglers' benchmark on a problem that takes seconds: what it compares is what it says."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from benchmarks import stragglers


@pytest.fixture
def settings() -> argparse.Namespace:
    """Ten clients, one of them slow, a target that is soon reached, and two rates of which one can't."""
    return argparse.Namespace(clients=10, target=0.3, rates=(1e-9, 0.03), rounds=4, seed=0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the digits were few."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    images = torch.zeros(80, 784)
    images[torch.arange(80), labels * 7] = 4.0
    images += 0.1 * torch.randn(80, 784, generator=generator)
    pairs = [(images[part], labels[part]) for part in torch.arange(80).split([40, 20, 20])]
    monkeypatch.setattr(stragglers, "load", lambda seed: stragglers.Digits(*pairs))
    monkeypatch.setattr(stragglers, "CLIENT_RATE", 0.02)


def test_each_way_is_measured_on_test_digits_at_its_own_best_rate(settings: argparse.Namespace) -> None:
    """Both reach the target; the rate that was never sooner isn't taken."""
    found = {way: stragglers.measure(way, settings) for way in stragglers.WAYS}
    for one in found.values():
        assert one["rate"] in settings.rates
        assert one["accuracy"][-1] >= settings.target or math.isinf(one["seconds"])
        assert one["time"] == sorted(one["time"])
        best = min(time for time in one["validation"].values() if time is not None)
        assert one["validation"][f"{one['rate']:g}"] == best
    slowest = 10 * stragglers.COMPUTE + 4 * stragglers.LATENCY
    assert found["waiting for all"]["time"][0] == pytest.approx(slowest + 3 * stragglers.LATENCY)
    assert found["buffered"]["time"][0] < slowest


def test_the_table_and_the_picture_show_what_was_found(tmp_path: Path) -> None:
    """How many times sooner is the ratio of the two times."""
    one = {"rate": 0.01, "seconds": 300.0, "commits": 6, "time": [100, 300], "accuracy": [0.5, 0.93]}
    ways = {"waiting for all": one, "buffered": {**one, "seconds": 60.0, "time": [30, 60], "commits": 9}}
    found = {"target": 0.92, "clients": 100, "ways": ways}
    assert stragglers.table(found).splitlines()[-1] == "| buffered | 0.01 | 60 | 5.0 | 9 |"
    stragglers.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_target_is_reached_at_the_first_row_that_has_it() -> None:
    """Or never."""
    rows = [{"time": 1.0, "accuracy": 0.1}, {"time": 2.0, "accuracy": 0.5}, {"time": 3.0, "accuracy": 0.6}]
    assert stragglers.reached(rows, 0.5) == 2.0
    assert stragglers.reached(rows, 0.7) == math.inf
