"""What the study writes: all curves as JSON, plots, and the tables of a page."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mnist_study import cells, plots, rule
from mnist_study.cells import Cell, Settings
from mnist_study.summary import SKEWS, SWINGING, Curve, Place, curve, swings

MARKERS = "table"
"""Of the place in a page where the table goes."""


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


def check_page(path: Path) -> None:
    """End the program if a page of the docs has no place for the tables."""
    _page().check(path, MARKERS)


def fill(path: Path, table: str) -> None:
    """Write the tables into a page of the docs, with the machine that they were measured on."""
    page = _page()
    page.fill(path, MARKERS, f"{page.described(page.machine())}\n\n{table}")


def _page() -> ModuleType:
    # An example finds no `benchmarks` by itself, or that of another library.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        return importlib.import_module("benchmarks.page")
    finally:
        del sys.path[0]
