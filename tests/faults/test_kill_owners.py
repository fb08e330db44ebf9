"""Kill anybody, owners included: each example counts once, in the bits of a run in which nobody was killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from killed import check
from restarts import by_commands, by_sockets, check_samples, train


def run(tmp_path: Path, way: Any, *, owners: int, steps: int, kills: int, seed: int, limit: float, **more: Any) -> None:
    """Some owners; the figures are shown when it fails."""
    url = (tmp_path / "store").as_uri()
    print(f"seed {seed}")
    outcome = train(url, tmp_path, way, owners=owners, steps=steps, kills=kills, seed=seed, limit=limit, **more)
    killed = sum(name.startswith("owner") for name in outcome.kills)
    print(f"{owners * steps} batches, {kills} kills, {killed} of owners, in {outcome.seconds:.1f} s: {outcome.kills}")
    assert len(outcome.kills) == kills
    assert killed > 0
    check(url, outcome, owners * steps)
    check_samples(url, owners * steps)


@pytest.mark.parametrize("durability", ["gradient", "log"])
def test_twenty_four_batches_and_four_kills(tmp_path: Path, durability: str) -> None:
    """Every example counts once, and the final bits are those of the serial replay."""
    run(tmp_path, by_sockets, owners=3, steps=8, kills=4, seed=8, limit=60, durability=durability)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("durability", "steps", "kills"), [("gradient", 3_000, 300), ("log", 1_000, 200)])
def test_thousands_of_batches_and_hundreds_of_kills(tmp_path: Path, durability: str, steps: int, kills: int) -> None:
    """The same, each time at other moments."""
    seed = int.from_bytes(os.urandom(4), "little")
    run(tmp_path, by_sockets, owners=3, steps=steps, kills=kills, seed=seed, limit=3_000, durability=durability)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_by_the_commands_and_over_http(tmp_path: Path) -> None:
    """Replicas and accumulator are processes of the command line."""
    seed = int.from_bytes(os.urandom(4), "little")
    run(tmp_path, by_commands, owners=3, steps=400, kills=60, seed=seed, limit=3_000)
