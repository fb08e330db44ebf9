"""The run of a simulation: rounds that are opened, trained and evaluated, and a row for each.

It is a lazy iterator: nothing trains until the first row is asked for, and a run that is left
behind stops where it is. All results are in the store; the run itself only holds how to go on.

The trap: a run may be killed anywhere, and another begins on its store. The round that was under
way is then open, decided but not reported, or reported but missing in the history. Each of these is
taken up where it is, and no round is trained twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from splitfed.errors import InputError
from splitfed.model.copying import deep_copy
from splitfed.model.cut import join
from splitfed.protocol.flows import added, entry
from splitfed.simulation import data as localdata
from splitfed.simulation.assembly import Assembly
from splitfed.simulation.client import (
    ClientConfig,
    LocalMetrics,
    sum_by_client,
)
from splitfed.simulation.data import Evaluation
from splitfed.simulation.engines.driver import Driver
from splitfed.simulation.traffic import Traffic
from splitfed.simulation.virtual_time import Timeline
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row, plain
from splitfed.tracking.callbacks import AnyCallback, Callbacks
from splitfed.tracking.history import History

_log = logging.getLogger("splitfed")


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far a store's rounds had come when the run began."""

    newest: int
    """The newest round that was opened; 0 for none."""
    done: int
    """The newest round that was reported; 0 for none."""
    unrecorded: Row | None
    """The report of the newest round, if the kept history lacks its row."""
    seconds: float
    """The seconds that the kept history has on record."""


class Simulation(Iterator[Row]):
    """A run of `simulate`: iterate over it for a row per round; nothing trains before.

    Args:
        assembly: The federation.
        driver: Lets its clients train.
        timeline: The virtual clock; `None` for real time.
        config: The settings that the clients share.
        head: The row that the run begins with; its settings say how many rounds there are.
        evaluate: Held-out data, or a function of the model, for metrics after each round.
        history: Keeps the rows.
        callbacks: Receive each row too.
    """

    def __init__(
        self,
        assembly: Assembly,
        driver: Driver,
        timeline: Timeline | None,
        config: ClientConfig,
        head: Row,
        *,
        evaluate: Evaluation | None,
        history: History,
        callbacks: Sequence[AnyCallback],
    ) -> None:
        self.store = assembly.store
        """The store of the run; `store.load_weights()` has the body's newest weights."""
        self.history = history
        """The rows of the run: its head, its rounds, and the commits between them."""
        self._assembly = assembly
        self._driver = driver
        self._timeline = timeline
        self._config = config
        self._head = head
        self._evaluate = evaluate
        self._callbacks = callbacks
        self._done = 0
        self._rows = self._run()

    def __repr__(self) -> str:
        settings = self._head["settings"]
        of = f"{self._done} of {settings['rounds']} rounds, {len(self._head['clients'])} clients"
        return f"Simulation({self._head['name']!r}, mode={self._head['mode']!r}: {of})"

    def __next__(self) -> Row:
        return next(self._rows)

    def close(self) -> None:
        """End the run here; what is in the store stays."""
        self._rows.close()

    def whole(self) -> nn.Module:
        """The whole model at the newest versions, with its original keys, in eval mode.

        Personal parts are the initial ones.
        """
        half = deep_copy(self._config.half)
        half.load_state_dict({**half.state_dict(), **self.store.load_weights(lineage="client")})
        return join(half, self.store.load_weights()).eval()

    def _run(self) -> Generator[Row, None, None]:
        rounds = self._head["settings"]["rounds"]
        progress = self._progress()
        self._done = done = progress.done
        if done >= rounds:
            about = "all %d rounds of %s are done: ask for more, or begin a new run (fresh=True)"
            _log.warning(about, rounds, self.store.shown)
        watchers = Callbacks([self.history, *self._callbacks])
        with watchers, contextlib.closing(self._driver):
            # Seconds go on from those on record: they never fall within a history.
            started = time.time() - progress.seconds
            watchers.on_row(self._head)
            if progress.newest and (done < rounds or progress.unrecorded is not None):
                self._resume(progress.newest)
            if progress.unrecorded is not None:
                row = self._row(progress.unrecorded, started)
                # What crossed the cut was known to the killed run alone: left out, not 0.
                for name in ("bytes_up", "bytes_down", "round_trips"):
                    del row[name]
                watchers.on_row(row)
                yield row
            while done < rounds:
                plan = self._open()
                row = self._row(self._train(plan), started)
                # A commit's time counts from 0 of the virtual clock, or from the run's beginning.
                begin = started if self._timeline is None else 0.0
                for commit in self._assembly.commit_rows(plan.number, begin):
                    watchers.on_row(commit)
                watchers.on_row(row)
                self._done = done = plan.number
                yield row
            self._assembly.federation.finish()

    def _progress(self) -> _Progress:
        """How far the rounds in the store have come, and the history that is kept of them."""
        federation = self._assembly.federation
        newest = federation.rounds.newest()
        if not newest:
            return _Progress(0, 0, None, 0.0)
        report = federation.rounds.report(newest)
        done = newest if report is not None else newest - 1
        if self.history.run is None:
            # A new history begins with the run: rounds before it are none of its own.
            return _Progress(newest, done, None, 0.0)
        recorded = self.history.rounds()
        seconds = max((row.get("seconds") or 0.0 for row in recorded), default=0.0)
        is_recorded = newest in {row["round"] for row in recorded}
        return _Progress(newest, done, None if is_recorded else report, seconds)

    def _resume(self, newest: int) -> None:
        """Go on from a store's newest round: by its clock, and without the clients' own states."""
        if self._timeline is not None:
            rounds = self._assembly.federation.rounds
            ending = rounds.ending(newest)
            instant = rounds.plan(newest).opened if ending is None else ending.time
            self._timeline.now = max(self._timeline.now, instant)
        if self._config.personal or self._config.local.keep_optimizers:
            warnings.warn(
                f"{self.store!r} has rounds already, but what clients keep to themselves "
                "(personal parts, optimizers) isn't in a store: it begins anew in this run",
                stacklevel=4,  # the caller of next()
            )

    def _open(self) -> Plan:
        """The plan of the round under way, or of the next."""
        plan = self._assembly.federation.open()
        if plan is None:
            raise InputError(
                f"{len(self._head['clients'])} clients are fewer than min_clients: "
                "a round needs more"
            )
        return plan

    def _train(self, plan: Plan) -> Row:
        """Let clients train for a round; returns the coordinator's report."""
        federation = self._assembly.federation
        if federation.rounds.ending(plan.number) is not None:
            # A killed run decided which updates count: what is trained now would count nowhere.
            return federation.close()
        return self._driver.run_round(plan)

    def _row(self, report: Row, started: float) -> Row:
        """The coordinator's report, with what only the simulation knows: losses, traffic, time."""
        metrics = sum_by_client(self._driver.take_metrics())
        traffic = self._assembly.meter.take()
        samples = sum(one.num_samples for one in metrics)
        seconds = time.time() - started
        row = {
            **report,
            "seconds": seconds,
            "time": seconds if self._timeline is None else self._timeline.now,
            "train_loss": sum(one.loss_sum for one in metrics) / samples if samples else None,
            "clients": _client_entries(report["clients"], metrics, traffic),
            "bytes_up": sum(crossed.up for crossed in traffic.values()),
            "bytes_down": sum(crossed.down for crossed in traffic.values()),
            "round_trips": sum(crossed.round_trips for crossed in traffic.values()),
            **entry(added(one.flows for one in metrics)),
        }
        if self._evaluate is not None:
            row |= localdata.evaluate(
                self.whole(), self._evaluate, self._config.loss_fn, self._config.local
            )
        return plain(row)


def _client_entries(
    reported: Mapping[str, Row], metrics: Iterable[LocalMetrics], traffic: Traffic
) -> dict[str, Row]:
    """The clients' entries of a row by id, sorted: of all that were sampled, trained or sent."""
    entries = {client_id: dict(entry) for client_id, entry in reported.items()}
    for one in metrics:
        entries.setdefault(one.client_id, {}).update(one.row())
    for client_id, crossed in traffic.items():
        entries.setdefault(client_id, {}).update(
            bytes_up=crossed.up, bytes_down=crossed.down, round_trips=crossed.round_trips
        )
    return dict(sorted(entries.items()))
