"""Kill any server or accumulator at any moment: the same schedule ends in the same bits.

Where gradients are on file, at random moments; in a log, at each stage of a sum's life.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killed import check
from processes import Outcome, train
from stages import STAGES


def run(tmp_path: Path, durability: str, *, steps: int, kills: int, seed: int, limit: float) -> Outcome:
    """Three owners; the figures are shown when it fails."""
    url = (tmp_path / "store").as_uri()
    print(f"seed {seed}")
    folder = tmp_path if durability == "log" else None
    outcome = train(url, owners=3, steps=steps, kills=kills, seed=seed, limit=limit, folder=folder)
    print(
        f"{len(outcome.acknowledged)} batches, {len(outcome.kills)} kills in {outcome.seconds:.1f} s: {outcome.kills}"
    )
    assert len(outcome.kills) == kills
    check(url, outcome, 3 * steps)
    return outcome


@pytest.mark.parametrize("durability", ["gradient", "log"])
def test_a_hundred_and_fifty_batches_and_twenty_kills(tmp_path: Path, durability: str) -> None:
    """Every acknowledged batch counts once, and the final bits are those of the serial replay."""
    outcome = run(tmp_path, durability, steps=50, kills=20, seed=20, limit=120)
    if durability == "log":
        hit = {kill.rpartition(" ")[2] for kill in outcome.kills}
        assert hit >= set(STAGES), f"nobody was killed at {set(STAGES) - hit}"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("durability", "steps", "kills"), [("gradient", 4_000, 250), ("log", 1_000, 200)])
def test_thousands_of_batches_and_hundreds_of_kills(tmp_path: Path, durability: str, steps: int, kills: int) -> None:
    """The same, each time at other moments."""
    seed = int.from_bytes(os.urandom(4), "little")
    run(tmp_path, durability, steps=steps, kills=kills, seed=seed, limit=3_000)
