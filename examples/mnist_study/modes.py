"""Split federated training in each mode, by the library's simulation; the rows are like those of the baselines."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

import splitfed
from mnist_study import recipe
from mnist_study.baselines import Row
from mnist_study.recipe import Deal, Rates
from splitfed import policies, simulation
from splitfed.simulation import data as held_out

SAME = ("round", "loss", "accuracy", "seconds", "bytes_up", "bytes_down", "round_trips")
SUMMED = ("bytes_up", "bytes_down", "round_trips")
"""The figures of a pass that are those of its rounds together."""


def train(
    deal: Deal,
    mode: policies.Mode,
    rates: Rates,
    rounds: int,
    seed: int,
    path: Path,
    compression: str | None = None,
    *,
    falls: bool = True,
    slow: float = 1.0,
) -> Iterator[Row]:
    """Train in one mode; yield a row per pass, which is a round but where nobody waits for others.

    Args:
        deal: The owners' digits.
        mode: How body and halves are updated.
        rates: Optimizers and rates of clients, body and halves.
        rounds: How many passes.
        seed: Seeds weights and orders.
        path: The file of the run's history; an older one is replaced.
        compression: The codec of all that crosses the cuts; exact if there is none.
        falls: Whether all rates fall over the run.
        slow: Every second owner is so many times slower than the others, in virtual time; 1 without such time.

    Yields:
        The keys of the baselines; bytes are those of tensors. Also `commits` of the body and `passes` over the digits,
        both since the start, how many commits the batches were behind (`staleness` on average, and `staleness_most`),
        and how many were `dropped` as too stale. With slow owners also the virtual `time`, in seconds since the start.
    """
    path.unlink(missing_ok=True)
    # In groups without a barrier a round is one push of each owner on average, and a pass is many of them.
    free = recipe.is_free(mode, slow)
    factors = recipe.slowness(deal, slow)
    sizes = recipe.batch_sizes(factors) if free else dict.fromkeys(factors, recipe.BATCH)
    paces = recipe.paces(factors, sizes)
    every = _rounds_of_a_pass(deal, sizes, paces) if free else 1
    turns = itertools.count(1)

    def judge(whole: nn.Module) -> dict[str, float]:
        return held_out.evaluate(whole, deal.test, cross_entropy) if next(turns) % every == 0 else {}

    run = splitfed.simulate(
        recipe.make_model(seed),
        recipe.CUT,
        deal.clients,
        loss_fn=cross_entropy,
        optimizer=rates.client,
        server_optimizer=rates.server,
        half_optimizer=rates.half,
        rounds=rounds * every,
        mode=mode,
        local=simulation.LocalTraining(batch_size=sizes, compression=compression),
        schedule=simulation.RoundSchedule(
            final_rate=recipe.LAST if falls else None,
            barrier=False if free else None,
            # By a clock owners have a pace of their own.
            pacing="even" if slow > 1 else recipe.PACING.get(mode.name, "even"),
        ),
        engine=splitfed.VirtualTime(compute=paces) if slow > 1 else None,
        evaluate=judge,
        seed=seed,
        name=f"study: {mode.name}",
        callbacks=[splitfed.History(path)],
    )
    trained, rows = 0, []
    for row in run:
        rows.append(row)
        trained += sum(client.get("num_samples", 0) for client in row["clients"].values())
        if len(rows) < every:
            continue
        figures = {key: sum(one[key] for one in rows) if key in SUMMED else row[key] for key in SAME}
        figures |= {"commits": row["version"], "passes": trained / len(deal.labels)}
        figures["dropped"] = sum(one["gradients_stale"] for one in rows)
        if slow > 1:
            figures["time"] = row["time"]
        yield figures | _behind(run, {one["round"] for one in rows})
        rows = []


def _rounds_of_a_pass(deal: Deal, sizes: Mapping[str, int], paces: Mapping[str, float]) -> int:
    """So many pushes of each owner, on average, until as many digits were trained on as there are."""
    pushes = sum(1 / pace for pace in paces.values())
    digits = sum(sizes[name] / pace for name, pace in paces.items())
    return max(1, round(len(deal.labels) * pushes / digits / len(deal.parts)))


def _behind(run: splitfed.Simulation, rounds: set[int]) -> dict[str, Any]:
    """How stale the batches were that the commits of the body in these rounds have folded."""
    ages: Counter[int] = Counter()
    for row in run.history.commits("body"):
        if row.get("round") in rounds:
            ages.update({int(age): count for age, count in row["staleness"].items()})
    count = sum(ages.values())
    mean = sum(age * number for age, number in ages.items()) / count if count else 0.0
    return {"staleness": mean, "staleness_most": max(ages, default=0)}
