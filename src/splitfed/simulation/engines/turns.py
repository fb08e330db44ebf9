"""The engine of one process: its virtual clients make one request at a time, along a timeline.

With virtual time each request happens at the instant that the client's pace gives it. Without, no
time passes: clients train one after the other where none sees what another does before the round
ends, and in turns, batch by batch, where one does. Either way the order is a function of the
settings.

A client that is sampled while it is still busy with an earlier round begins when that is done, as a
real one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from splitfed.simulation.assembly import Assembly
from splitfed.simulation.client import ClientConfig, ClientState, LocalMetrics, LocalRun, Verb
from splitfed.simulation.data import Source
from splitfed.simulation.rng import uniform
from splitfed.simulation.virtual_time import Pace, Process, Timeline, VirtualTime
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row


class Turns:
    """The `Driver` of virtual clients in this process.

    Args:
        assembly: The federation that they are clients of.
        config: The settings that they share.
        clients: Their data, by id.
        timeline: The clock of the run.
        virtual: What they cost in virtual time; `None` if no time passes.
        paced: How many batches each client has in a local run, if turns are in proportion to it;
            `None` if each takes a turn as often as another.
    """

    def __init__(
        self,
        assembly: Assembly,
        config: ClientConfig,
        clients: Mapping[str, Source],
        timeline: Timeline,
        virtual: VirtualTime | None,
        paced: Mapping[str, int] | None = None,
    ) -> None:
        self._assembly = assembly
        self._config = config
        self._clients = clients
        self._timeline = timeline
        self._virtual = virtual
        self._paced = paced
        self._turns: dict[str, list[int]] = {}
        """The places of each client's turns in a round, if they are paced."""
        self._cycle = 0
        """How many turns a round has."""
        self._starts: dict[str, float] = {}
        """When each client's turns of its next local run are counted from."""
        self._in_turns = virtual is not None or assembly.mode.shares_steps
        """Whether another client may come between two batches of one."""
        self._states: dict[str, ClientState] = {}
        self._busy: set[str] = set()
        """The clients that have a process on the timeline."""
        self._plan: Plan | None = None
        self._remaining: frozenset[str] = frozenset()
        """The clients that have yet to train in this round, as last looked up."""
        self._last_run: dict[str, tuple[int, int]] = {}
        """(round, repetition) of each client's newest local run."""
        self._ended: list[LocalMetrics] = []
        self._has_update = False
        """Whether an update was pushed since the coordinator last looked."""
        self._awaits_step = False
        """Whether pushed gradients wait for a global step."""
        self._taken = 0
        """How many global steps of this round a killed run has taken, that are still to come."""

    def run_round(self, plan: Plan) -> Row:
        """Let clients train until the round is over; returns the coordinator's report."""
        self._begin(plan)
        while True:
            if self._awaits_step and not len(self._timeline):
                # All that train have pushed and are parked; nothing else would ever release them.
                self._global_step()
                continue
            if not len(self._timeline) or not self._remaining:
                # Perhaps no push follows that would make the coordinator look.
                report = self._poll()
                if report is not None:
                    return report
            self._has_update = False
            if not self._timeline.advance(plan.deadline):
                return self._end()
            if self._has_update:
                report = self._poll()
                if report is not None:
                    return report

    def take_metrics(self) -> list[LocalMetrics]:
        """The metrics of the local runs that have ended since the last call."""
        taken = self._ended
        self._ended = []
        return taken

    def state(self, client_id: str) -> ClientState:
        """What a client has kept from its last local run."""
        return self._states.get(client_id, ClientState())

    def close(self) -> None:
        """Stop every client where it is."""
        self._timeline.close()

    def _begin(self, plan: Plan) -> None:
        """Start a process for each client that has to train and isn't busy."""
        remaining = self._assembly.remaining_clients(plan)
        self._plan = plan
        self._taken = self._assembly.steps_taken(plan)
        self._remaining = frozenset(remaining)
        # Without a barrier a client trains again and again: it would never let another have a turn.
        self._in_turns |= not plan.barrier
        self._plan_turns(plan)
        for client_id in remaining:
            if client_id not in self._busy:
                self._busy.add(client_id)
                self._timeline.start(self._process(client_id))

    def _plan_turns(self, plan: Plan) -> None:
        """Deal out the turns of a round, where they are paced.

        They are instants of the timeline, at which nobody looks without virtual time. All that are
        sampled have theirs, also who doesn't train any more in a round that was taken up again.
        """
        if self._paced is None:
            return
        order = interleave({client_id: self._paced[client_id] for client_id in plan.sampled})
        self._turns = {client_id: [] for client_id in plan.sampled}
        for place, client_id in enumerate(order):
            self._turns[client_id].append(place)
        self._cycle = len(order)
        if plan.barrier:
            self._starts = dict.fromkeys(plan.sampled, self._timeline.now)

    def _instants(self, client_id: str) -> Iterator[float]:
        """When each turn of a local run is due; none if they aren't paced."""
        if self._paced is None:
            return iter(())
        start = max(self._timeline.now, self._starts.get(client_id, 0.0))
        # Without a barrier it may train again in this round: in the next cycle of turns.
        self._starts[client_id] = start + self._cycle
        return iter([start + place for place in self._turns[client_id]])

    @property
    def _waits(self) -> bool:
        """Whether clients that have pushed a gradient wait for a global step."""
        return not self._assembly.mode.streams

    def _end(self) -> Row:
        """End the round at its deadline, or when nobody is left that trains."""
        if self._awaits_step:
            # The deadline doesn't wait for stragglers, so neither does the step of the others.
            self._global_step()
        return self._poll() or self._assembly.federation.close()

    def _poll(self) -> Row | None:
        """Let the coordinator do what is due; returns its report if the round has ended."""
        report = self._assembly.federation.poll()
        self._assembly.note()
        return report

    def _global_step(self) -> None:
        """Commit the gradients of all clients that wait for it, and let them go on."""
        self._awaits_step = False
        if self._taken:
            self._taken -= 1
        else:
            self._assembly.global_step()
        self._timeline.release()

    def _process(self, client_id: str) -> Process:
        """A client on the timeline, for as long as there is a round for it to train in."""
        pace = Pace() if self._virtual is None else self._virtual.pace(client_id)
        run_id = self._next_run(client_id)
        while run_id is not None:
            state = self._states.setdefault(client_id, ClientState())
            data = self._clients[client_id]
            # Without a barrier a client has many runs in a round, and a simulation that goes on
            # can't tell which of them was killed.
            run = LocalRun(
                self._config,
                self._assembly.meter,
                client_id,
                data,
                state,
                run_id,
                repeats=self._plan is not None and self._plan.barrier,
            )
            yield from self._drive(run, pace)
            self._ended.append(run.metrics)
            run_id = self._next_run(client_id)
        self._busy.discard(client_id)

    def _next_run(self, client_id: str) -> tuple[int, int] | None:
        """(round, repetition) of the local run that a client begins now; `None` if it is done."""
        plan = self._plan
        if plan is None or client_id not in self._remaining:
            return None
        round_number, repetition = self._last_run.get(client_id, (0, 0))
        if round_number != plan.number:
            run_id = (plan.number, 0)
        elif plan.barrier:
            return None
        else:
            run_id = (plan.number, repetition + 1)
        self._last_run[client_id] = run_id
        return run_id

    def _drive(self, run: LocalRun, pace: Pace) -> Process:
        """One local run, each request at its instant; or its beginning, if the client vanishes."""
        vanishing = self._vanishing_batch(run, pace)
        begun = 0
        answered: Verb | None = None
        instants = self._instants(run.metrics.client_id)
        for upcoming in run.requests():
            self._follow_up(answered, run)
            if answered is Verb.PUSH and self._waits:
                yield None  # parked until the global step
            if upcoming is Verb.FORWARD:
                if begun == vanishing:
                    # It is back after the time that the run would have taken. Global steps can't
                    # wait for that: to them it is gone at once.
                    if not self._config.gradients:
                        yield (run.num_batches or 0) * (pace.compute + 4 * pace.latency)
                    return
                begun += 1
            if self._virtual is not None:
                yield _delay(answered, upcoming, pace)
            elif self._in_turns and upcoming is self._turn_begins:
                yield max(0.0, next(instants, 0.0) - self._timeline.now)
            answered = upcoming
        self._follow_up(answered, run)

    @property
    def _turn_begins(self) -> Verb:
        """The request that a turn begins with. In a group each batch has a pull of its own."""
        return Verb.PULL if self._config.gradients and not self._waits else Verb.FORWARD

    def _follow_up(self, answered: Verb | None, run: LocalRun) -> None:
        """Do what follows from a request that has been answered."""
        if answered is Verb.BACKWARD and not self._config.gradients:
            self._assembly.commit(run.metrics.client_id)
        elif answered is Verb.PUSH and self._config.gradients:
            self._awaits_step = self._waits
            self._has_update = self._plan is not None and not self._plan.barrier
            self._assembly.commit(run.metrics.client_id)
        elif answered is Verb.PUSH:
            self._has_update = True
            if self._plan is not None and self._plan.number != run.run_id[0]:
                # After a round below quorum an update of that round counts in this one too, and its
                # client needn't train again.
                self._remaining = frozenset(self._assembly.remaining_clients(self._plan))

    def _vanishing_batch(self, run: LocalRun, pace: Pace) -> int | None:
        """The batch at which the client vanishes in this run; `None` if it stays."""
        if not pace.dropout:
            return None
        words: list[str | int] = [self._config.seed, run.metrics.client_id, *run.run_id]
        if uniform("vanishes", *words) >= pace.dropout:
            return None
        return int(uniform("when", *words) * (run.num_batches or 0))


def interleave(batches: Mapping[str, int]) -> list[str]:
    """The order of turns in which each client's are spread evenly over a round.

    The i-th of a client's n turns stands at (i + ½)/n of the round, so that clients with many
    batches and with few end together. Turns at one place are in the order of ids.

    Args:
        batches: How many turns each client has.

    Returns:
        The client of each turn.
    """
    # Exact below 2²⁶ batches: such fractions are equal as floats only if they are equal.
    turns = [
        ((2 * number + 1) / (2 * count), client_id)
        for client_id, count in batches.items()
        for number in range(count)
    ]
    return [client_id for _, client_id in sorted(turns)]


def _delay(answered: Verb | None, upcoming: Verb, pace: Pace) -> float:
    """Seconds from one request of a client, at the server, to its next.

    The way back of the one, the way there of the other, and the client's work in between: a third
    of a batch before its forward, a third before its backward, a third after.
    """
    if upcoming is Verb.PULL:
        return pace.latency if answered is None else 2 * pace.latency
    # From a backward to the next forward: the last third of one batch, the first of the next.
    thirds = 2 if upcoming is Verb.FORWARD and answered is Verb.BACKWARD else 1
    return 2 * pace.latency + thirds * pace.compute / 3
