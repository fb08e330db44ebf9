"""The table of mutants, and how one enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Changes = Iterator[tuple[Any, str, Any]]
"""What to replace: of which object, under which name, by what."""
MUTANTS: dict[str, Callable[[], Changes]] = {}
RARE: dict[str, Callable[[], Changes]] = {}
"""Those that take more seeds than a test can run."""


def mutant(make: Callable[[], Changes]) -> Callable[[], Changes]:
    """Enter a mutant into the table, under its name in words."""
    MUTANTS[make.__name__.replace("_", " ")] = make
    return make


def rare(make: Callable[[], Changes]) -> Callable[[], Changes]:
    """Enter a mutant into the table of those that are seldom caught."""
    RARE[make.__name__.replace("_", " ")] = make
    return make
