"""`python -m benchmarks`: run the benchmarks, print the tables, write the figures.

    python -m benchmarks --only resnet18            the cases whose name has this in it
    python -m benchmarks --docs docs/benchmarks.md  all of them, and the tables into the page

The time is shared out among the cases: more of it gives more rounds, and figures that vary less. Each case takes at
least five rounds, so a slow machine takes longer than it was given. `python -m benchmarks.scaling` has replicas and
balancers, `stragglers` and `leakage` what they say.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import commit, http_step, limits, page, peers, pipeline, rounds, split_step

Rows = dict[str, dict[str, float]]
OTHERS: dict[str, tuple[Callable[[float], Rows], str, float]] = {
    "tiny over HTTP": (http_step.run, "splitfed", 0.05),
    "resnet18 over HTTP": (http_step.run_resnet, "unsplit", 0.07),
    "limits": (limits.run, limits.BASE, 0.03),
}
"""What runs the case in so many seconds, what its ratios are to, and its share of the time."""
TURNS = 10
"""Of each loop of the pipeline."""
SPLIT, COMMIT = 0.65, 0.15
"""The shares of the steps in one process, and of the commits."""


def main() -> None:
    """Time, print the tables, write `benchmark.json`, and fill in the page of the docs if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="where benchmark.json goes")
    parser.add_argument("--docs", type=Path, help="write the tables into this page, between its markers")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all cases; those that are left out leave theirs"
    )
    parser.add_argument("--only", default="", help="only the cases whose name has this in it")
    settings = parser.parse_args()
    if settings.docs:
        page.check(settings.docs, "figures")
    begun = time.perf_counter()
    found: dict[str, Any] = page.machine()
    tables: dict[str, str] = {}
    settings.output.mkdir(parents=True, exist_ok=True)
    for name, figures, table in measured(settings.minutes, settings.only):
        found[name], tables[name] = figures, table
        found["minutes"] = (time.perf_counter() - begun) / 60
        # Part by part: it takes long, and what has been measured is there also if it is stopped.
        (settings.output / "benchmark.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n\n".join([page.described(found), *tables.values()])
    print(text)
    if settings.docs:
        page.fill(settings.docs, "figures", text)


def measured(minutes: float, only: str) -> Iterator[tuple[str, Any, str]]:
    """The name, figures and table of each part that has a case of such a name."""
    split = split_step.run(minutes * SPLIT, only)
    if split:
        yield "split", split, rounds.as_table(split, "unsplit")
    commits = commit.run(minutes * COMMIT, only)
    if commits:
        yield "commit", commits, commit.as_table(commits)
    for name, (run, base, share) in OTHERS.items():
        if only in name:
            figures = run(60 * minutes * share)
            yield name, figures, rounds.as_table({name: figures}, base)
    if only in "pipeline":
        turns = pipeline.run(TURNS)
        yield "pipeline", turns, pipeline.as_table(turns)
    if only in "peers":
        others = peers.run(60 * minutes * 0.05)
        yield "peers", others, peers.as_table(others)


if __name__ == "__main__":
    main()
