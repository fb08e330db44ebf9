"""Rounds: who trains, when a round is over, and what is averaged then.

The coordinator keeps nothing: plan, decision and report of each round are files (`store.rounds`),
and the averaging is the accumulators' commit. Kill it at any moment and start another, or run two
at once: the same round ends once, with the same updates. A round never hangs: whoever vanishes is
missing at the deadline, and the round goes on without.

The order that makes it so: decide which updates count, put that on record, commit exactly those,
report. A coordinator that dies in between has left a decision that any other carries out to the
same bits; a commit of batches that were counted before is no commit, so carrying it out twice
changes nothing.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, Protocol

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.grouped import Grouped
from splitfed.accumulator.policies import Mode
from splitfed.accumulator.policies import mode as mode_of
from splitfed.checks import at_least, positive
from splitfed.errors import InputError
from splitfed.federation.admission import (
    Judge,
    check_group,
    check_sample_size,
    sample,
    sample_size,
)
from splitfed.federation.reports import make_report
from splitfed.protocol.ids import check_client_id
from splitfed.store.rounds import Ending, Plan
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore


class Body(Protocol):
    """The body as rounds see it: one for all clients, or one for each."""

    store: GradientStore

    def suits(self, mode: Mode) -> bool:
        """Whether this is how a mode wants the body's batches committed."""
        ...

    def lineages(self) -> list[str]:
        """The lineages on which the calls of clients run."""
        ...

    def stream(self, clients: Iterable[str]) -> bool:
        """Commit the pending batches of clients that needn't wait for the end of the round.

        Returns:
            Whether the lineage `body` has a new version.
        """
        ...

    def global_step(self) -> None:
        """Commit one step over all pending batches, whatever their number."""
        ...

    def end_round(self, plan: Plan, ending: Ending) -> None:
        """Commit what was decided; what has been committed already stays as it is."""
        ...


class SharedBody:
    """One body that all clients train, as a `Body`.

    Args:
        accumulator: Its accumulator.
        mode: How it is updated.
    """

    def __init__(self, accumulator: Accumulator, mode: Mode) -> None:
        self.store = accumulator.store
        self._accumulator = accumulator
        self._streams = mode.streams

    def suits(self, mode: Mode) -> bool:
        """Whether this is how a mode wants the body's batches committed."""
        return "body" in mode.shared_lineages

    def lineages(self) -> list[str]:
        """The lineages on which the calls of clients run: one that all share."""
        return ["body"]

    def stream(self, clients: Iterable[str]) -> bool:
        """Commit the pending batches, if they are enough and the mode commits within rounds."""
        return self._streams and self._fold() > 0

    def global_step(self) -> None:
        """Commit one step over all pending batches, whatever their number."""
        self._accumulator.step(min_batches=1)

    def end_round(self, plan: Plan, ending: Ending) -> None:
        """Commit what was decided; what has been committed already stays as it is."""
        if ending.body.folded:
            self._accumulator.step(1, only=ending.body)
        elif self._streams and plan.barrier:
            # Too few for a commit of their own; but after the last round nothing would follow.
            self._fold(1)

    def _fold(self, least: int | None = None) -> int:
        """Commit what is pending now, in several commits if one may not fold all; how many."""
        commits = 1
        most = self._accumulator.max_batches
        if most is not None:
            # Counted beforehand: whoever sends as fast as this commits would keep it here forever.
            commits = max(1, -(-len(self.store.waiting("body")) // most))
        for made in range(commits):
            if self._accumulator.step(least) is None:
                return made
        return commits


class GroupedBody:
    """One body that is committed together with the halves, as a `Body`.

    Args:
        accumulator: Its accumulator.
        half: That of the halves.
        mode: How they are updated.

    Raises:
        InputError: the accumulator of the halves doesn't follow the mode.
    """

    def __init__(self, accumulator: Accumulator, half: Accumulator, mode: Mode) -> None:
        half.settings.check_mode(mode)
        self.store = accumulator.store
        self._both = Grouped(accumulator, half)
        self._streams = mode.streams

    def suits(self, mode: Mode) -> bool:
        """Whether this is how a mode wants the body's batches committed."""
        return mode.gradients

    def lineages(self) -> list[str]:
        """The lineages on which the calls of clients run: one that all share."""
        return ["body"]

    def stream(self, clients: Iterable[str]) -> bool:
        """Commit a group, if enough wait and the mode doesn't wait for all clients."""
        return self._streams and self._both.step() is not None

    def global_step(self) -> None:
        """Commit one step over all pending batches, whatever their number."""
        self._both.step(1)

    def end_round(self, plan: Plan, ending: Ending) -> None:
        """Commit what was decided; what has been committed already stays as it is."""
        if ending.client.folded:
            self._both.step(1, only=(ending.body, ending.client))
        elif self._streams and plan.barrier:
            self._both.step(1)  # too few for a group; but after the last round none would follow


def as_body(accumulator: Accumulator | Body, mode: Mode, half: Accumulator | None = None) -> Body:
    """What commits the body's batches, as rounds see it, after a check that it follows the mode.

    Args:
        accumulator: The body's, or the bodies of clients.
        mode: The mode.
        half: The accumulator of the halves, in whose mode body and halves may be committed
            together.

    Raises:
        InputError: it doesn't.
    """
    body: Body
    if isinstance(accumulator, Accumulator) and mode.gradients and half is not None:
        body = GroupedBody(accumulator, half, mode)
    elif isinstance(accumulator, Accumulator):
        body = SharedBody(accumulator, mode)
    elif callable(getattr(accumulator, "suits", None)):
        body = accumulator
    else:
        raise InputError(f"body is a {type(accumulator).__name__}: expected {mode.accumulator}")
    if not body.suits(mode):
        raise InputError(
            f"mode {mode.name!r} doesn't go with a {type(accumulator).__name__}: "
            f"expected {mode.accumulator}"
        )
    if isinstance(accumulator, Accumulator):
        accumulator.settings.check_mode(mode)
    return body


class Federation:
    """Coordinates the rounds of a store.

    Args:
        body: The accumulator of the body; in a mode with a body for each client, of these.
        half: The accumulator of the client halves, with `lineage="client"`.
        mode: How the body is updated: the name of a mode, or a `Mode` of `splitfed.policies`.
        clients: Ids that are known beforehand; besides them, whoever ever pulled or trained. With
            `sampling="data"` a mapping of ids to how many examples each client has.
        clients_per_round: How many are sampled for a round: a number, a share such as 0.1, or
            `None` for all. A round for which fewer are known asks all of them, and warns once.
        sampling: Clients are drawn each as likely as another (`"uniform"`), or one after the other
            in proportion to their examples (`"data"`); one that isn't in `clients` counts as the
            mean of those that are. In proportion is meant for rounds in which each trains on as
            many batches: means weigh clients by their examples already.
        min_clients: Below so many clients with an update nothing is averaged.
        deadline: How long a round lasts at most, in seconds of the clock; `None` for as long as it
            takes.
        late: Updates of earlier rounds `"count"` in the round in which they arrive, weighted by
            `half`'s `staleness_weight` (1 unless you give one), or are closed as stale
            (`"refuse"`). Either is reported.
        below_quorum: What came to a round with too few is there for the next (`"keep"`), or refused
            (`"drop"`).
        barrier: Whether clients wait for each other. If not, the halves too are committed when
            `half.min_batches` are pending, and a round is a stretch of as many updates as it has
            sampled clients.
        seed: Of the sampling.
        clock: Tells the time, in seconds; by default that of day, as it goes on from here on: a
            round isn't ended, nor prolonged, by somebody who sets the machine's clock.

    Raises:
        InputError: a setting out of its range, or accumulators that don't belong together or to the
            mode.
    """

    def __init__(
        self,
        body: Accumulator | Body,
        half: Accumulator,
        *,
        mode: str | Mode = "round",
        clients: Iterable[str] | Mapping[str, float] = (),
        clients_per_round: int | float | None = None,
        sampling: Literal["uniform", "data"] = "uniform",
        min_clients: int = 1,
        deadline: float | None = None,
        late: Literal["count", "refuse"] = "count",
        below_quorum: Literal["keep", "drop"] = "keep",
        barrier: bool = True,
        seed: int = 0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.mode = mode_of(mode)
        if half.lineage != "client" or half.store is not body.store:
            raise InputError(
                f"half accumulates lineage {half.lineage!r} of {half.store.url}: expected lineage "
                f"'client' of the body's own store object, {body.store.url}"
            )
        check_sample_size(clients_per_round, at_least("min_clients", min_clients, 1))
        if isinstance(clients_per_round, int):
            check_group(self.mode, clients_per_round)
        if self.mode.gradients and not self.mode.streams and not barrier:
            raise InputError(
                f"mode {self.mode.name!r} takes its steps when all clients have pushed, and with "
                "barrier=False nobody waits for that: leave it out, or take mode 'grouped'"
            )
        self._body = as_body(body, self.mode, half)
        if isinstance(clients, str):
            raise InputError(f"clients is {clients!r}: expected several ids, such as [{clients!r}]")
        if deadline is not None:
            positive("deadline", deadline)
        _one_of("late", late, ("count", "refuse"))
        _one_of("sampling", sampling, ("uniform", "data"))
        _one_of("below_quorum", below_quorum, ("keep", "drop"))
        self.body = body
        self.half = half
        self.rounds = body.store.rounds()
        self._store = body.store
        self._clients = frozenset(map(check_client_id, clients))
        self._sizes = _checked_sizes(clients) if sampling == "data" else None
        self._per_round = clients_per_round
        self._min_clients = min_clients
        self._deadline = deadline
        self._late = late
        self._below_quorum = below_quorum
        self._barrier = barrier
        self._seed = seed
        self._clock = steady_clock() if clock is None else clock
        self._has_noted_few = False

    def __repr__(self) -> str:
        place = f"{self._store.shown!r}, mode={self.mode.name!r}"
        sampled = f"clients_per_round={self._per_round!r}, min_clients={self._min_clients}"
        return f"Federation({place}, {sampled}, deadline={self._deadline!r})"

    def open(self) -> Plan | None:
        """The round under way, or the next.

        Returns:
            Its plan; `None` while fewer than `min_clients` clients are known.
        """
        return self._open(None)

    def _open(self, last: int | None) -> Plan | None:
        """As `open()`; but no round after number `last`.

        Another coordinator may have just ended that one, and nobody would end a round more.
        """
        newest = self.rounds.newest()
        before = self.rounds.report(newest) if newest else None
        if newest and (before is None or (last is not None and newest >= last)):
            return self.rounds.plan(newest)
        known = self._clients.union(self._store.clients())
        if len(known) < self._min_clients:
            return None
        number = newest + 1
        opened = self._clock()
        if before is None:
            pair = self._store.pair()
            body_version, client_version = pair.body, pair.client
        else:
            # A round begins where the report of the one before ends: each commit is in one report.
            body_version = before["version"]
            client_version = before["client_version"]
        self._note_few(number, len(known))
        count = sample_size(self._per_round, len(known), self._min_clients)
        plan = Plan(
            number=number,
            sampled=sample(known, count, self._seed, number, self._sizes),
            body_version=body_version,
            client_version=client_version,
            min_clients=self._min_clients,
            opened=opened,
            deadline=None if self._deadline is None else opened + self._deadline,
            late_policy=self._late,
            below_quorum=self._below_quorum,
            barrier=self._barrier,
            started=time.time(),
        )
        return self.rounds.begin(plan)

    def _note_few(self, number: int, known: int) -> None:
        """Warn, once, of a round for which fewer clients are known than are to be sampled."""
        wanted = self._per_round
        if self._has_noted_few or not isinstance(wanted, int) or wanted <= known:
            return
        self._has_noted_few = True
        warnings.warn(
            f"clients_per_round is {wanted}, but only {known} clients are known as round {number} "
            "opens, and all of them are asked. Others can be sampled once they have pulled: "
            f"to wait for them, give min_clients={wanted}",
            stacklevel=4,  # the caller of open()
        )

    def poll(self) -> Row | None:
        """Do what is due: commit what streams, and end the round if it is over or its time is.

        Returns:
            The report, if the round has ended; else `None`, also where none was opened.
        """
        plan = self.rounds.current()
        if plan is None:
            return None
        report = self.rounds.report(plan.number)
        if report is not None:
            return report
        if self.rounds.ending(plan.number) is None:
            self._stream(plan)
            is_past = plan.deadline is not None and self._clock() >= plan.deadline
            if not is_past and not Judge(self._store, plan).is_over():
                return None
        return self.close()

    def close(self) -> Row:
        """End the round now, whoever is missing.

        Returns:
            Its report.

        Raises:
            InputError: no round was opened.
        """
        plan = self.rounds.current()
        if plan is None:
            raise InputError("there is no round to close: call open() first")
        report = self.rounds.report(plan.number)
        if report is not None:
            return report
        ending = self.rounds.ending(plan.number)
        if ending is None:
            decided = Judge(self._store, plan).decide(self._clock(), self.mode)
            ending = self.rounds.end(decided)
        self._carry_out(plan, ending)
        report = self.rounds.close(plan.number, make_report(self._store, plan, ending))
        if self.rounds.is_finished(plan.number):  # said before the round was over
            self._remove_calls(plan.number)
        return report

    def run(
        self, rounds: int, *, poll: float = 0.1, stop: threading.Event | None = None
    ) -> Iterator[Row]:
        """Run rounds until number `rounds` is over, and let the clients' `rounds()` end.

        A coordinator that begins on a store with rounds goes on where they are. Reports come as
        rounds end, whichever coordinator ended them.

        Args:
            rounds: The number of the last round.
            poll: How often to look, in seconds.
            stop: Set it to return early; the clients go on waiting.

        Raises:
            InputError: there is no deadline, so a client that vanishes would hang the round.
        """
        if self._deadline is None:
            raise InputError(
                "run() waits for clients, and one may vanish: "
                "give Federation(deadline=...) in seconds"
            )
        last = at_least("rounds", rounds, 1)
        wait = threading.Event() if stop is None else stop
        positive("poll", poll)
        done = self._num_done()
        while done < last and not wait.is_set():
            if self._open(last) is None or self.poll() is None:
                wait.wait(poll)
            # Not poll()'s answer alone: another coordinator may have ended several rounds since.
            report = self._report_of(done + 1, last)
            while report is not None:
                done += 1
                yield report
                report = self._report_of(done + 1, last)
        if done >= last:
            self._finish(done)  # not a round that a longer run may have opened since

    def _num_done(self) -> int:
        """The number of rounds that are over."""
        newest = self.rounds.newest()
        if newest and self.rounds.report(newest) is None:
            return newest - 1
        return newest

    def _report_of(self, number: int, last: int) -> Row | None:
        return self.rounds.report(number) if number <= last else None

    def finish(self) -> None:
        """Tell the clients that no round follows; `open()` takes it back.

        Once the last round is over, the records of open calls are removed: activations of batches
        that nobody will ask for again. A client that is late, and whose graph no replica has at
        hand, gets `ExpiredError` from its `backward()`; that batch counts nowhere. What it sends
        after that is recorded again, until it confirms it or `finish()` is called again.
        """
        number = self.rounds.newest()
        if number:
            self._finish(number)

    def _finish(self, number: int) -> None:
        """Say that no round follows this one, and remove what open calls have left."""
        self.rounds.finish(number)
        self._remove_calls(number)

    def _remove_calls(self, number: int) -> None:
        """Remove the records of open calls, if a round is over and none was opened after it.

        They are listed before the look at the rounds: what the clients of a next round record
        meanwhile isn't on the list.
        """
        piles = [self._store.pile(lineage) for lineage in self._body.lineages()]
        listed = [(pile, pile.open_calls()) for pile in piles]
        if self.rounds.ending(number) is None or self.rounds.newest() > number:
            return
        for pile, keys in listed:
            pile.drop_calls(keys)

    def _stream(self, plan: Plan) -> None:
        """Commit what needn't wait for the round's end."""
        self._body.stream(plan.sampled)
        if not plan.barrier and not self.mode.gradients:
            self.half.step()

    def _carry_out(self, plan: Plan, ending: Ending) -> None:
        """Commit what was decided; what has been committed already stays as it is."""
        if ending.status == "below_quorum":
            return
        self._body.end_round(plan, ending)
        if ending.client.folded and not self.mode.gradients:
            self.half.step(1, only=ending.client)


def steady_clock() -> Callable[[], float]:
    """A clock in seconds since 1970 that never jumps: the time of now, and what has gone since."""
    ahead = time.time() - time.monotonic()
    return lambda: time.monotonic() + ahead


def _checked_sizes(clients: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """How many examples each client has."""
    if not isinstance(clients, Mapping) or not clients:
        raise InputError(
            "sampling='data' needs to know how much data clients have: expected clients as a "
            "mapping of ids to numbers of examples, such as {'a': 600, 'b': 50}"
        )
    return {name: positive(f"the size of client {name!r}", clients[name]) for name in clients}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}: expected one of {', '.join(map(repr, allowed))}")
