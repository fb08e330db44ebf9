"""Pairs of faults at single system calls: a schedule goes on over both, and ends as it does without any."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from faulty import Faults, Outcome, Remote, Training, opened

BACKENDS = ["found", "unnamed", "named", "locked", "memory", "remote"]
FEW = 5
APART = 80
"""Calls from one pair to the next, in the mean."""
MANY = {"found": 1000, "unnamed": 1000, "named": 1000, "locked": 600, "memory": 900, "remote": 900}
"""Pairs of the soak, by backend."""


@pytest.fixture(autouse=True)
def remote() -> Iterator[None]:
    """The faulty object store under its protocol, empty."""
    Remote.objects.clear()
    fsspec.register_implementation(Remote.protocol, Remote, clobber=True)
    yield
    Remote.objects.clear()


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without names are Linux's")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_few_pairs_of_faults(backend: str, tmp_path: Path) -> None:
    """Two system calls fail, the second often on the way out of the first: the same bits, each batch counted once."""
    pairs(backend, tmp_path, FEW, seed=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["named", "remote"])
def test_the_same_pairs_are_the_same_run(backend: str, tmp_path: Path) -> None:
    """Call for call, or a seed that has failed couldn't be looked into."""
    runs = []
    for _ in range(2):
        faults = Faults(random.Random(5), [(150, 155), (300, 302)])
        with opened(backend, tmp_path / "run", faults) as make:
            outcome = Training(make, anew=False).run(faults)
        runs.append((faults.trace, outcome.keys))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        Remote.objects.clear()
    assert runs[0] == runs[1]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_pairs_of_faults(backend: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Row 7: the same for thousands of pairs, other ones in each run."""
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    record_property("pairs", pairs(backend, tmp_path, MANY[backend], seed))


def pairs(backend: str, folder: Path, count: int, seed: int) -> int:
    """At least so many pairs of faults, some in each run; how many came about."""
    expected, length = reference(backend, folder)
    kinds = Counter[str]()
    number = done = 0
    while done < count:
        number += 1
        chance = random.Random(f"{backend}-{seed}-{number}")
        faults = Faults(chance, [*places(chance, length)])
        place = folder / str(number)
        try:
            with opened(backend, place, faults) as make:
                found = Training(make, anew=chance.random() < 0.5).run(faults)
            compare(found, expected)
        except (AssertionError, OSError) as error:
            pytest.fail(f"pair {number} of seed {seed} on {backend}, {faults.seen}: {error!r}")
        shutil.rmtree(place, ignore_errors=True)
        Remote.objects.clear()
        done += faults.num_pairs
        kinds.update(f"{name} {kind}" for name, _, kind in faults.seen)
    print(backend, number, done, dict(sorted(kinds.items())))
    return done


def places(chance: random.Random, length: int) -> Iterator[tuple[int, int]]:
    """Where pairs of faults are in a run of so many calls: the second soon after the first, the next pair later."""
    first = 0
    while True:
        first += int(chance.expovariate(1 / APART))
        if first >= length:
            return
        second = first + 1 + int(chance.expovariate(1 / 8))
        yield first, second
        first = second + 1


def reference(backend: str, folder: Path) -> tuple[Outcome, int]:
    """What the schedule leaves without faults, and how many calls it has."""
    faults = Faults(random.Random(0))
    with opened(backend, folder / "reference", faults) as make:
        expected = Training(make, anew=False).run(faults)
    return expected, faults.count


def compare(found: Outcome, expected: Outcome) -> None:
    """The same bits at each version, the same files, and no others."""
    assert found.bits == expected.bits, "other weights"
    assert found.optimizers == expected.optimizers, "another state of the optimizer"
    assert found.foreign == [], f"left: {found.foreign}"
    assert found.keys == expected.keys, set(found.keys) ^ set(expected.keys)
