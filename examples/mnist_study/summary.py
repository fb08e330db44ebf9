"""The summary of a run of the study: curves, how far they swing, and a table of the final values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from mnist_study.baselines import Row

Curve = dict[str, Any]
SETTLED = 4
"""After so many rounds no mode should drop any more."""
SWINGING = 50
"""From this round on the swings of the study's rule are measured."""


def curve(name: str, rows: Iterable[Row]) -> Curve:
    """Drain a training, with a line on the terminal per round; returns each figure as a list over rounds."""
    drained = []
    for row in rows:
        drained.append(row)
        right = f"accuracy {row['accuracy']:.4f}  loss {row['loss']:.4f}"
        print(f"{name:12} round {row['round']:3}  {right}  {row['seconds']:7.1f} s", flush=True)
    return {key: [row[key] for row in drained] for key in drained[-1] if key != "round"}


def swings(curve: Curve) -> dict[str, float]:
    """How far accuracy goes up and down from round 50 on: the range, and the largest drop from round to round."""
    tail = curve["accuracy"][SWINGING - 1 :]
    return {"lowest": min(tail), "highest": max(tail), "spread": max(tail) - min(tail), "largest_drop": _drop(tail)}


def table(curves: Mapping[str, Curve]) -> str:
    """Where each curve ended, as Markdown; a drop is from one round to the next, after the fourth."""
    lines = ["| training | accuracy | largest drop | commits | MB sent | seconds |", "|---|---|---|---|---|---|"]
    for name, curve in curves.items():
        drop = f"{_drop(curve['accuracy'][SETTLED - 1 :]):.4f}"
        commits = curve["commits"][-1] if "commits" in curve else ""
        sent, seconds = curve["bytes"][-1] / 1e6, curve["seconds"][-1]
        lines.append(f"| {name} | {curve['accuracy'][-1]:.4f} | {drop} | {commits} | {sent:.0f} | {seconds:.0f} |")
    return "\n".join(lines)


def _drop(accuracy: list[float]) -> float:
    """The largest drop from one round to the next; 0 if there is none."""
    return max([0.0, *(before - after for before, after in itertools.pairwise(accuracy))])
