"""One simulated run: rounds that are coordinated, driven and judged, and a row for each.

It is an iterator, and lazy: nothing trains until the first row is asked for, and a run that is left behind stops where
it is. All that it came to is in the store; what it holds itself is how to go on.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from torch import nn

from splitfed.errors import InputError
from splitfed.model.copying import deep_copy
from splitfed.model.cut import join
from splitfed.simulation.assembly import Assembly
from splitfed.simulation.client import Outcome, Recipe, total
from splitfed.simulation.data import Evaluation
from splitfed.simulation.data import evaluate as score
from splitfed.simulation.virtual_time import Timeline
from splitfed.store.rounds import Ending, Plan
from splitfed.store.rows import Row, plain
from splitfed.tracking.callbacks import AnyCallback, Callbacks
from splitfed.tracking.history import History


class Driver(Protocol):
    """Who lets the clients train: turn by turn, along virtual time, or in worker processes."""

    def run(self, plan: Plan) -> Row:
        """Let clients train until the round is over; returns the coordinator's report."""
        ...

    def outcomes(self) -> list[Outcome]:
        """What the activations came to that have ended since the last call."""
        ...

    def close(self) -> None:
        """Leave every client where it is."""
        ...


class Simulation(Iterator[Row]):
    """A run of `simulate`: iterate over it for a row per round; nothing trains before.

    Args:
        assembly: The federation.
        driver: Lets its clients train.
        timeline: The virtual clock; `None` for real time.
        recipe: What the clients have in common.
        head: The row that the run begins with; its settings say how many rounds there are.
        evaluate: How the model is judged after a round.
        history: Where rows are kept.
        callbacks: Who else is told of them.
    """

    def __init__(
        self,
        assembly: Assembly,
        driver: Driver,
        timeline: Timeline | None,
        recipe: Recipe,
        head: Row,
        *,
        evaluate: Evaluation | None,
        history: History,
        callbacks: Sequence[AnyCallback],
    ) -> None:
        self.store = assembly.store
        """Where everything is; `store.load_weights()` has the body's newest weights."""
        self.history = history
        """The rows of the run, and of the commits between them."""
        self._assembly, self._driver, self._timeline = assembly, driver, timeline
        self._recipe, self._head, self._evaluate, self._callbacks = (
            recipe,
            head,
            evaluate,
            callbacks,
        )
        self._running = self._run()

    def __next__(self) -> Row:
        return next(self._running)

    def close(self) -> None:
        """End the run here; what is in the store stays."""
        self._running.close()

    def whole(self) -> nn.Module:
        """The whole model at the newest versions, with its original keys, in eval mode; personal parts are initial."""
        half = deep_copy(self._recipe.half)
        half.load_state_dict({**half.state_dict(), **self.store.load_weights(lineage="client")})
        return join(half, self.store.load_weights()).eval()

    def _run(self) -> Generator[Row, None, None]:
        federation, rounds = self._assembly.federation, self._head["settings"]["rounds"]
        newest = federation.rounds.newest()
        report = federation.rounds.report(newest) if newest else None
        done = newest if newest == 0 or report is not None else newest - 1
        before = self.history.rounds() if newest and self.history.run is not None else None
        untold = None if before is None or newest in {row["round"] for row in before} else report
        with (
            Callbacks([self.history, *self._callbacks]) as watchers,
            contextlib.closing(self._driver),
        ):
            started = time.time() - max(
                (row.get("seconds") or 0.0 for row in before or ()), default=0.0
            )
            watchers.on_row(self._head)
            if newest and (done < rounds or untold is not None):
                self._go_on(federation.rounds.plan(newest), federation.rounds.ending(newest))
            if (
                untold is not None
            ):  # by a run that was killed after the round, which knew what crossed the cut
                row = self._row(untold, started)
                watchers.on_row(
                    row := {name: row[name] for name in row if not name.startswith("bytes_")}
                )
                yield row
            while done < rounds:
                plan = federation.open()
                if plan is None:
                    raise InputError(
                        f"{len(self._head['clients'])} clients are fewer than min_clients: a round needs more"
                    )
                is_decided = (
                    federation.rounds.ending(plan.number) is not None
                )  # by a run that was killed
                row = self._row(
                    federation.close() if is_decided else self._driver.run(plan), started
                )
                for commit in self._assembly.commit_rows(
                    plan.number, started if self._timeline is None else 0.0
                ):
                    watchers.on_row(commit)
                watchers.on_row(row)
                done = plan.number
                yield row
            federation.finish()

    def _go_on(self, plan: Plan, ending: Ending | None) -> None:
        """Go on from a store's newest round: by its clock, and without what clients keep to themselves."""
        if self._timeline is not None:
            self._timeline.now = max(
                self._timeline.now, plan.opened if ending is None else ending.time
            )
        if self._recipe.personal or self._recipe.local.keep_optimizers:
            warnings.warn(
                f"{self.store!r} has rounds already, but what clients keep to themselves (personal parts, optimizers) "
                "isn't in a store: it begins anew in this run",
                stacklevel=4,
            )

    def _row(self, report: Row, started: float) -> Row:
        """The coordinator's report, and what only the simulation knows besides."""
        clients: dict[str, Row] = {name: dict(entry) for name, entry in report["clients"].items()}
        outcomes = total(self._driver.outcomes())
        for outcome in outcomes:
            clients[outcome.client_id] = {**clients.get(outcome.client_id, {}), **outcome.row()}
        traffic = self._assembly.meter.take()
        for client_id, (up, down) in traffic.items():
            clients.setdefault(client_id, {}).update(bytes_up=up, bytes_down=down)
        samples = sum(outcome.num_samples for outcome in outcomes)
        row = {
            **report,
            "seconds": (seconds := time.time() - started),
            "time": seconds if self._timeline is None else self._timeline.now,
            "train_loss": sum(outcome.loss for outcome in outcomes) / samples if samples else None,
            "clients": dict(sorted(clients.items())),
            "bytes_up": sum(up for up, _ in traffic.values()),
            "bytes_down": sum(down for _, down in traffic.values()),
        }
        if self._evaluate is not None:
            row |= score(self.whole(), self._evaluate, self._recipe.loss_fn)
        return plain(row)
