"""Who makes which request when: the virtual clients of one process, driven along a timeline.

With virtual time each request happens at the instant that the client's pace gives it. Without, no time passes, and
clients come to their turns one after the other (if nothing that one does is seen by another before the round ends) or
batch by batch. Either way one request is made at a time and the order is a function of the settings.

A client that is asked while it is still busy with an earlier round begins when that is done, as a real one would.
"""

from __future__ import annotations

from collections.abc import Mapping

from splitfed.simulation.assembly import Assembly
from splitfed.simulation.client import Belongings, Next, Outcome, Recipe, Trainee
from splitfed.simulation.data import Data
from splitfed.simulation.rng import uniform
from splitfed.simulation.timeline import Process, Timeline
from splitfed.simulation.virtual_time import Pace, VirtualTime
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row


class Schedule:
    """Drives virtual clients through rounds.

    Args:
        assembly: The federation that they are clients of.
        recipe: What they have in common.
        clients: Their data, by id.
        timeline: The clock of the run.
        virtual: What they cost in virtual time; `None` for turns.
    """

    def __init__(
        self,
        assembly: Assembly,
        recipe: Recipe,
        clients: Mapping[str, Data],
        timeline: Timeline,
        virtual: VirtualTime | None,
    ) -> None:
        self._assembly = assembly
        self._recipe = recipe
        self._clients = clients
        self._timeline = timeline
        self._virtual = virtual
        self._in_turns = virtual is not None or assembly.mode.shares_steps
        self._belongings: dict[str, Belongings] = {}
        self._busy: set[str] = set()
        self._plan: Plan | None = None
        self._asked_for: frozenset[str] = frozenset()
        """Who is to train in this round, as far as is known: not those whose update is in already."""
        self._begun: dict[str, tuple[int, int]] = {}
        """The round of a client's last activation, and which of that round's it was."""
        self._outcomes: list[Outcome] = []
        self._pushed = self._waiting = False
        """Whether an update has come since the coordinator last looked; whether gradients wait for a global step."""

    def run(self, plan: Plan) -> Row:
        """Let clients train until the round is over; returns the coordinator's report."""
        asked = self._assembly.asked(plan)
        self._plan, self._asked_for = plan, frozenset(asked)
        self._in_turns |= not plan.barrier  # who goes on and on would never let another have a turn
        for client_id in asked:
            if client_id not in self._busy:
                self._busy.add(client_id)
                self._timeline.start(self._life(client_id))
        while True:
            if self._waiting and not len(self._timeline):
                self._global_step()
                continue
            if not (len(self._timeline) and self._asked_for) and (report := self._look()) is not None:
                return report
            self._pushed = False
            if not self._timeline.advance(plan.deadline):
                if self._waiting:  # a deadline doesn't wait for stragglers, nor does the step of the others
                    self._global_step()
                return self._look() or self._assembly.federation.close()
            if self._pushed and (report := self._look()) is not None:
                return report

    def outcomes(self) -> list[Outcome]:
        """What the activations came to that have ended since the last call."""
        ended, self._outcomes = self._outcomes, []
        return ended

    def belongings(self, client_id: str) -> Belongings:
        """What a client has kept from its last activation."""
        return self._belongings.get(client_id, Belongings())

    def close(self) -> None:
        """Leave every client where it is."""
        self._timeline.close()

    def _look(self) -> Row | None:
        """Let the coordinator do what is due; returns its report if the round has ended."""
        report = self._assembly.federation.poll()
        self._assembly.note()
        return report

    def _global_step(self) -> None:
        """All clients (at a deadline: all but stragglers) have sent a gradient and wait: commit, and let them go on."""
        self._waiting = False
        self._assembly.global_step()
        self._timeline.release()

    def _life(self, client_id: str) -> Process:
        """A client, from when it is asked to train until it isn't any more."""
        pace = Pace() if self._virtual is None else self._virtual.pace(client_id)
        while (occasion := self._asked(client_id)) is not None:
            own = self._belongings.setdefault(client_id, Belongings())
            data = self._clients[client_id]
            trainee = Trainee(self._recipe, self._assembly.meter, client_id, data, own, occasion)
            yield from self._activation(trainee, pace, self._vanishing(trainee, pace))
            self._outcomes.append(trainee.outcome)
        self._busy.discard(client_id)

    def _asked(self, client_id: str) -> tuple[int, int] | None:
        """The round in which the client is to train now, and which of its activations in that round it is."""
        plan = self._plan
        if plan is None or client_id not in self._asked_for:
            return None
        number, count = self._begun.get(client_id, (0, 0))
        if number == plan.number and plan.barrier:
            return None
        occasion = (plan.number, count + 1 if number == plan.number else 0)
        self._begun[client_id] = occasion
        return occasion

    def _activation(self, trainee: Trainee, pace: Pace, vanishing: int | None) -> Process:
        """One activation, each request at its instant; or its beginning, if the client vanishes at that batch."""
        made: Next | None = None
        begun = 0
        for ahead in trainee.run():
            self._after(made, trainee)
            if made is Next.PUSH:
                yield None
            if ahead is Next.FORWARD:
                if begun == vanishing:
                    if not self._recipe.gradients:  # a global step doesn't wait for who isn't there
                        yield trainee.num_batches * (pace.compute + 4 * pace.latency)
                    return
                begun += 1
            if self._virtual is not None:
                yield _delay(made, ahead, pace)
            elif self._in_turns and ahead is Next.FORWARD:
                yield 0.0
            made = ahead
        self._after(made, trainee)

    def _after(self, made: Next | None, trainee: Trainee) -> None:
        """What follows from a request that has been answered."""
        if made is Next.BACKWARD:
            self._assembly.commit(trainee.outcome.client_id)
        elif made is Next.PUSH and self._recipe.gradients:
            self._waiting = True
        elif made is Next.PUSH:
            self._pushed = True
            if self._plan is not None and self._plan.number != trainee.occasion[0]:
                self._asked_for = frozenset(self._assembly.asked(self._plan))  # below quorum, late may be in time

    def _vanishing(self, trainee: Trainee, pace: Pace) -> int | None:
        """The batch at which the client vanishes in this activation; `None` if it stays."""
        words: list[str | int] = [self._recipe.seed, trainee.outcome.client_id, *trainee.occasion]
        if uniform("vanishes", *words) >= pace.dropout:
            return None
        return int(uniform("when", *words) * trainee.num_batches)


def _delay(made: Next | None, ahead: Next, pace: Pace) -> float:
    """Seconds from one request of a client, at the server, to its next."""
    if ahead is Next.PULL:
        return pace.latency if made is None else 2 * pace.latency
    thirds = 2 if ahead is Next.FORWARD and made is Next.BACKWARD else 1
    return 2 * pace.latency + thirds * pace.compute / 3
