"""Split federated training in each mode, by the library's simulation; the rows are like those of the baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.nn.functional import cross_entropy

import splitfed
from mnist_study import recipe
from mnist_study.baselines import Row
from mnist_study.recipe import Deal, Rates
from splitfed import policies, simulation

SAME = ("round", "loss", "accuracy", "seconds", "bytes_up", "bytes_down", "round_trips")


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
) -> Iterator[Row]:
    """Train in one mode; yield a row per round.

    Args:
        deal: The owners' digits.
        mode: How body and halves are updated.
        rates: Optimizers and rates of clients, body and halves.
        rounds: How many rounds, of one local pass each.
        seed: Seeds weights and orders.
        path: The file of the run's history; an older one is replaced.
        compression: The codec of all that crosses the cuts; exact if there is none.
        falls: Whether all rates fall over the run.

    Yields:
        The keys of the baselines; bytes are those of tensors. Also `commits` of the body and `passes` over the digits,
        both since the start, and how many commits the round's batches were behind: `staleness` on average, and
        `staleness_most`.
    """
    path.unlink(missing_ok=True)
    run = splitfed.simulate(
        recipe.make_model(seed),
        recipe.CUT,
        deal.clients,
        loss_fn=cross_entropy,
        optimizer=rates.client,
        server_optimizer=rates.server,
        half_optimizer=rates.half,
        rounds=rounds,
        mode=mode,
        local=simulation.LocalTraining(batch_size=recipe.BATCH, compression=compression),
        schedule=simulation.RoundSchedule(
            final_rate=recipe.LAST if falls else None, pacing=recipe.PACING.get(mode.name, "even")
        ),
        evaluate=deal.test,
        seed=seed,
        name=f"study: {mode.name}",
        callbacks=[splitfed.History(path)],
    )
    trained = 0
    for row in run:
        trained += sum(client.get("num_samples", 0) for client in row["clients"].values())
        figures = {key: row[key] for key in SAME}
        totals = {"commits": row["version"], "passes": trained / len(deal.labels)}
        yield figures | totals | _behind(run, row["round"])


def _behind(run: splitfed.Simulation, number: int) -> dict[str, Any]:
    """How stale the batches were that a round's commits of the body have folded."""
    ages: Counter[int] = Counter()
    for row in run.history.commits("body"):
        if row.get("round") == number:
            ages.update({int(age): count for age, count in row["staleness"].items()})
    count = sum(ages.values())
    mean = sum(age * number for age, number in ages.items()) / count if count else 0.0
    return {"staleness": mean, "staleness_most": max(ages, default=0)}
