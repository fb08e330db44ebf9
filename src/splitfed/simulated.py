"""One simulated run: rounds that are coordinated, driven and judged, and a row for each.

It is an iterator, and lazy: nothing trains until the first row is asked for, and a run that is left behind stops where
it is. All that it came to is in the store; what it holds itself is how to go on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence

from torch import nn

from splitfed import localdata
from splitfed.assembly import Assembly, Plans
from splitfed.callbacks import AnyCallback, Callbacks
from splitfed.cutting import join
from splitfed.errors import InputError
from splitfed.evaluation import Evaluation
from splitfed.evaluation import evaluate as score
from splitfed.history import History
from splitfed.localdata import Data
from splitfed.rows import Row, plain
from splitfed.schedule import Schedule
from splitfed.store import GradientStore
from splitfed.template import deep_copy
from splitfed.timeline import Timeline
from splitfed.trainee import Recipe
from splitfed.virtual import VirtualTime


class Simulation(Iterator[Row]):
    """A run of `simulate`: iterate over it for a row per round; nothing trains before.

    Args:
        plans: How the federation is built.
        recipe: What the clients have in common.
        clients: Their data.
        store: Where the run is kept.
        rounds: The number of the last round.
        virtual: What clients cost in virtual time.
        evaluate: How the model is judged after a round.
        name: What the run is called.
        history: Where rows are kept.
        callbacks: Who else is told of them.
    """

    def __init__(
        self,
        plans: Plans,
        recipe: Recipe,
        clients: Mapping[str, Data],
        store: GradientStore,
        rounds: int,
        *,
        virtual: VirtualTime | None,
        evaluate: Evaluation | None,
        name: str,
        history: History,
        callbacks: Sequence[AnyCallback],
    ) -> None:
        self.store = store
        """Where everything is; `store.load_weights()` has the body's newest weights."""
        self.history = history
        """The rows of the run, and of the commits between them."""
        self._plans, self._recipe, self._clients, self._rounds = plans, recipe, clients, rounds
        self._virtual, self._evaluate, self._name, self._callbacks = virtual, evaluate, name, callbacks
        self._timeline = Timeline()
        self._assembly = Assembly(plans, store, list(clients), self.time)
        self._schedule = Schedule(self._assembly, recipe, clients, self._timeline, virtual)
        self._started: float | None = None
        self._running = self._run()

    def __next__(self) -> Row:
        return next(self._running)

    def close(self) -> None:
        """End the run here; what is in the store stays."""
        self._running.close()

    def time(self) -> float:
        """Seconds since the run began: virtual ones in virtual time, else real ones."""
        if self._virtual is not None:
            return self._timeline.now
        return 0.0 if self._started is None else time.monotonic() - self._started

    def whole(self) -> nn.Module:
        """The whole model at the newest versions, with its original keys, in eval mode; personal parts are initial."""
        half = deep_copy(self._recipe.half)
        half.load_state_dict({**half.state_dict(), **self.store.load_weights(lineage="client")})
        return join(half, self.store.load_weights()).eval()

    def _run(self) -> Generator[Row, None, None]:
        federation = self._assembly.federation
        newest = federation.rounds.newest()
        done = newest if newest == 0 or federation.rounds.report(newest) is not None else newest - 1
        with Callbacks([self.history, *self._callbacks]) as watchers, contextlib.closing(self._schedule):
            self._started = time.monotonic()
            watchers.on_row(self._head())
            while done < self._rounds:
                plan = federation.open()
                if plan is None:
                    raise InputError(
                        f"{len(self._clients)} clients are fewer than min_clients={self._plans.settings['min_clients']}"
                    )
                row = self._row(self._schedule.run(plan))
                for commit in self._assembly.commit_rows(plan.number):
                    watchers.on_row(commit)
                watchers.on_row(row)
                done = plan.number
                yield row
            federation.finish()

    def _head(self) -> Row:
        """The row that says who takes part, and with which settings."""
        clients: dict[str, Row] = {}
        for client_id, data in self._clients.items():
            counts = localdata.classes(data)
            known = {} if counts is None else {"classes": counts}
            clients[client_id] = {"num_samples": localdata.size(data), **known}
        recipe = self._recipe
        return {
            "kind": "run",
            "name": self._name,
            "seed": recipe.seed,
            "mode": self._plans.mode.name,
            "clients": clients,
            "settings": {
                "rounds": self._rounds,
                "batch_size": recipe.batch_size,
                "local_passes": recipe.local_passes,
                "personal": list(recipe.personal),
                "virtual_time": self._virtual is not None,
                "policy": self._plans.mode.describe(),
                **self._plans.settings,
            },
        }

    def _row(self, report: Row) -> Row:
        """The coordinator's report, and what only the simulation knows besides."""
        clients: dict[str, Row] = {name: dict(entry) for name, entry in report["clients"].items()}
        outcomes = self._schedule.outcomes()
        for outcome in outcomes:
            clients[outcome.client_id] = {**clients.get(outcome.client_id, {}), **outcome.row()}
        traffic = self._assembly.meter.take()
        for client_id, (up, down) in traffic.items():
            clients.setdefault(client_id, {}).update(bytes_up=up, bytes_down=down)
        samples = sum(outcome.num_samples for outcome in outcomes)
        row = {
            **report,
            "seconds": time.monotonic() - (self._started or 0.0),
            "time": self.time(),
            "train_loss": sum(outcome.loss for outcome in outcomes) / samples if samples else None,
            "clients": dict(sorted(clients.items())),
            "bytes_up": sum(up for up, _ in traffic.values()),
            "bytes_down": sum(down for _, down in traffic.values()),
        }
        if self._evaluate is not None:
            row |= score(self.whole(), self._evaluate, self._recipe.loss_fn)
        return plain(row)
