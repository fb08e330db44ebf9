"""Split federated training in each mode, by the library's simulation; the rows are like those of the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch.nn.functional import cross_entropy

import splitfed
from mnist_study import recipe
from mnist_study.baselines import Row
from mnist_study.recipe import Deal, Rates
from splitfed import policies, simulation


def train(
    deal: Deal,
    mode: policies.Mode,
    rates: Rates,
    rounds: int,
    seed: int,
    path: Path,
    compression: str | None = None,
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

    Yields:
        The keys of the baselines; `bytes` counts tensors, both ways. Also `commits` of the body and `passes` over the
        digits, both since the start.
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
        evaluate=deal.test,
        seed=seed,
        name=f"study: {mode.name}",
        callbacks=[splitfed.History(path)],
    )
    sent = trained = 0
    for row in run:
        sent += row["bytes_up"] + row["bytes_down"]
        trained += sum(client.get("num_samples", 0) for client in row["clients"].values())
        metrics = {key: row[key] for key in ("round", "loss", "accuracy", "seconds")}
        yield metrics | {"bytes": sent, "commits": row["version"], "passes": trained / len(deal.labels)}
