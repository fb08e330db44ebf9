"""Whole runs under faults, drawn from a seed: nothing is lost, nothing counts twice, all bits are right.

And the simulation is worth something: the same seed is the same run, wrong variants of the library's functions are
caught, and what is wrong is shrunk to a few faults.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

import pytest
from soak import totals
from tests.faults.simulator.mutants import MUTANTS, RARE, installed
from tests.faults.simulator.plan import FAULTS, KINDS, LOGS, Plan
from tests.faults.simulator.shrink import Shrinker, told
from tests.faults.simulator.world import Outcome, World, run

SEEDS = range(150)
LEAST_COMMITS, LEAST_FAULTS = 10, 20
CHUNK = 25
CHUNKS = range(0, len(SEEDS), CHUNK)
CATCHES_WITHIN = 75
BROKEN = ("TypeError(", "AttributeError(", "NameError(", "ImportError(")
"""What a variant ends with that was written for a function of before."""
SOAK_SEEDS = int(os.environ.get("SIMULATOR_SEEDS", "10000"))
"""So many seeds there are to be in all runs of the soak together,"""
SOAK_SECONDS = float(os.environ.get("SIMULATOR_SECONDS", "1200"))
"""and so long one run goes on."""


def checked(seed: int) -> Outcome:
    """A run in which enough has happened and nothing is wrong."""
    outcome = run(seed)
    assert not outcome.wrong, told(outcome)
    assert outcome.commits >= LEAST_COMMITS, f"seed {seed} has {outcome.commits} commits"
    assert len(outcome.faults) >= LEAST_FAULTS, f"seed {seed} has {len(outcome.faults)} faults"
    return outcome


@functools.cache
def met(first: int) -> Counter[str]:
    """How often each kind of fault was met by some seeds, in which nothing is wrong."""
    found: Counter[str] = Counter()
    for seed in SEEDS[first : first + CHUNK]:
        found.update(label.rpartition(":")[2] for label in checked(seed).faults)
    return found


@pytest.mark.parametrize("first", CHUNKS)
def test_nothing_is_lost_or_counted_twice_and_all_bits_are_right(first: int) -> None:
    """Each seed has 20 faults and 10 commits or more."""
    assert met(first)


def test_each_kind_of_fault_is_met() -> None:
    """By some of the seeds; which ones depends on the bits, so on the machine."""
    found = sum(map(met, CHUNKS), Counter())
    assert not set(KINDS) - set(found), found


def test_the_same_seed_is_the_same_run() -> None:
    """Operation for operation, also after other runs in the same process."""
    once = run(3)
    run(4)
    again = run(3)
    assert again.trace == once.trace
    assert again.faults == once.faults


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_variant_of_a_function_is_caught(name: str) -> None:
    """By one of the first 75 seeds; and it is a promise that is broken, not the variant itself."""
    with installed(name):
        wrong = next(filter(None, (run(seed).wrong for seed in range(CATCHES_WITHIN))), [])
    assert wrong, name
    assert not any(error in wrong[0] for error in BROKEN), f"{name} doesn't fit the function any more: {wrong[0]}"


def test_what_is_wrong_is_shrunk() -> None:
    """A mutant that shows among many faults still does with few of them, in a run that can be made again."""
    with installed("own files deleted after an ambiguous commit"):
        runs = map(run, range(CATCHES_WITHIN))
        found = next(outcome for outcome in runs if outcome.wrong and len(outcome.faults) > 10)
        small = Shrinker(most=25).shrink(found)
        assert small.wrong
        assert len(small.faults) < len(found.faults), small.faults
        assert run(small.plan).trace == small.trace
    assert f"seed {found.plan.seed}" in told(small)
    assert not run(small.plan).wrong


def test_servers_of_a_log_hand_over_sums_of_several_batches() -> None:
    """In memory and in files; the rest is computed again."""
    worlds = [World(Plan.of(seed)) for seed in range(0, 30, LOGS)]
    for world in worlds:
        assert not world.run().wrong
    assert {world.plan.is_attended for world in worlds} == {True, False}
    groups = [group for world in worlds for commit in world.ledger.commits for group in commit.groups]
    assert max(map(len, groups)) > 2
    assert sum(map(len, groups)) < sum(world.batches for world in worlds)
    assert any(len(found.batches) > 2 for world in worlds for found in world.ledger.sums)


def test_a_plan_is_a_function_of_its_seed() -> None:
    """And it keeps a window that its staleness allows."""
    for seed in range(200):
        plan = Plan.of(seed)
        assert plan == Plan.of(seed)
        assert plan.keep_versions >= 2 + (plan.max_staleness or 0)
        assert any(plan.rates[kind] for kinds in FAULTS.values() for kind in kinds)


@pytest.mark.soak
def test_another_process_makes_the_same_run() -> None:
    """Hash seeds and addresses have no part in it."""
    code = "from tests.faults.simulator.world import run; print(*(run(seed).digest for seed in range(5)))"
    found = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1, found
    assert found == {" ".join(run(seed).digest for seed in range(5)) + "\n"}


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", RARE)
def test_a_rare_race_is_caught(name: str) -> None:
    """By one of the first 2,000 seeds."""
    with installed(name):
        assert any(run(seed).wrong for seed in range(2_000)), name


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_seeds(record_property: Callable[[str, object], None]) -> None:
    """The seeds after those that the ledger has; wrong ones don't end the run, and are on record too."""
    done = int(totals().get("simulator", {}).get("seeds", 0))
    first = SEEDS[-1] + 1 + done
    counts: Counter[str] = Counter()
    shown: list[str] = []
    ends = time.monotonic() + SOAK_SECONDS
    for seed in range(first, SEEDS[-1] + 1 + SOAK_SEEDS):
        if time.monotonic() > ends:
            break
        outcome = run(seed)
        is_weak = outcome.commits < LEAST_COMMITS or len(outcome.faults) < LEAST_FAULTS
        counts.update(seeds=1, wrong=bool(outcome.wrong), weak=is_weak and not outcome.wrong)
        counts.update(commits=outcome.commits, faults=len(outcome.faults), batches=outcome.batches)
        if outcome.wrong:
            shown.append(told(outcome))
    for name, count in counts.items():
        record_property(name, count)
    print(f"seeds from {first} on: {dict(counts)}")
    assert not shown, "\n\n".join(shown[:10])
