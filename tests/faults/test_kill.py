"""Kill any server or accumulator at any moment: the same schedule ends in the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killed import check
from processes import train


def run(tmp_path: Path, *, steps: int, kills: int, seed: int, limit: float) -> None:
    """Three owners; the figures are shown when it fails."""
    url = (tmp_path / "store").as_uri()
    print(f"seed {seed}")
    outcome = train(url, owners=3, steps=steps, kills=kills, seed=seed, limit=limit)
    print(
        f"{len(outcome.acknowledged)} batches, {len(outcome.kills)} kills in {outcome.seconds:.1f} s: {outcome.kills}"
    )
    assert len(outcome.kills) == kills
    check(url, outcome, 3 * steps)


def test_sixty_batches_and_six_kills(tmp_path: Path) -> None:
    """Every acknowledged batch counts once, and the final bits are those of the serial replay."""
    run(tmp_path, steps=20, kills=6, seed=6, limit=60)


def test_three_hundred_batches_and_twenty_kills(tmp_path: Path) -> None:
    """The same for longer: 300 batches, 20 SIGKILLs of servers and accumulators."""
    run(tmp_path, steps=100, kills=20, seed=20, limit=120)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twelve_thousand_batches_and_250_kills(tmp_path: Path) -> None:
    """The same, each time at other moments."""
    run(tmp_path, steps=4_000, kills=250, seed=int.from_bytes(os.urandom(4), "little"), limit=3_000)
