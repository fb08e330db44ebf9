"""Steps taken in turns: a drift of the machine's speed is the same for all of them.

The trap: a step is slower after one that leaves other things in the caches than itself. In one and the same order
that was a tenth of the time for two variants that were the same. So each round has an order of its own.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Step = Callable[[], Any]
Times = dict[str, list[float]]
"""Milliseconds of each step, by its name."""
LEAST = 5
"""Rounds, however long they take."""


def in_turns(steps: Mapping[str, Step], seconds: float, *, warm: int = 3, every: int = 1, rare: str = "\0") -> Times:
    """Take each step once a round, in any order, as many rounds as fit.

    Args:
        steps: By name.
        seconds: For all rounds, those that warm up included.
        warm: The first rounds, which aren't noted.
        every: Steps with a rare name are taken in one round of so many, after the others ...
        rare: ... and these are what such a name begins with. They are noted from the first on.
    """
    times: Times = {name: [] for name in steps}
    begun, number, drawn, order = time.perf_counter(), 0, random.Random(0), list(steps.items())
    while number < warm + LEAST or time.perf_counter() - begun < seconds:
        drawn.shuffle(order)
        # What is rare comes last: a commit has as many batches each time.
        for name, step in sorted(order, key=lambda one: one[0].startswith(rare)):
            is_rare = name.startswith(rare)
            if is_rare and number % every:
                continue
            before = time.perf_counter()
            step()
            if number >= warm or is_rare:
                times[name].append(1e3 * (time.perf_counter() - before))
            if is_rare:
                os.sync()  # what a commit has written is on the disk before another step is timed
        number += 1
    return times


def ratios(times: Times, base: str) -> dict[str, dict[str, float]]:
    """Minimum and median of each step, and the median of its ratio to `base`, round by round.

    A step that is rarer than `base` has the ratio of the two medians.
    """
    found = {}
    for name, taken in times.items():
        if len(taken) == len(times[base]):
            ratio = statistics.median(t / b for t, b in zip(taken, times[base], strict=True))
        else:
            ratio = statistics.median(taken) / statistics.median(times[base])
        found[name] = {"min": min(taken), "median": statistics.median(taken), "ratio": ratio, "count": len(taken)}
    return found


def as_table(found: Mapping[str, Mapping[str, Mapping[str, float]]], base: str) -> str:
    """The figures of several cases as one Markdown table."""
    lines = [f"| case | step | min, ms | median, ms | of {base} |", "|---|---|--:|--:|--:|"]
    for case, rows in found.items():
        lines += [
            f"| {case} | {name} | {row['min']:.2f} | {row['median']:.2f} | {row['ratio']:.2f} × |"
            for name, row in rows.items()
        ]
    return "\n".join(lines)
