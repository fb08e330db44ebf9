"""A simulated process: its threads, its randomness, and the faults that meet its operations.

Everything that a process draws comes from streams of its own, named by it, and each operation draws as much as any
other: so a fault that is left out doesn't change what happens to others, and a failing run can be shrunk.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from tests.faults.simulator.plan import FAULTS
from tests.faults.simulator.scheduler import Fiber, Killed, current

if TYPE_CHECKING:
    from tests.faults.simulator.world import World


_LONGEST_SLEEP = 500
"""In steps, if no commit comes."""


class Fault(str):
    """What happens at an operation; `size` says how much of it, from 0 to 1."""

    size: float


class Process:
    """One process of the run.

    Args:
        world: The run.
        name: Its own: a role, and which process of that role it is.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.is_dead = False
        self.choose = Random(f"{world.plan.seed}/{name}/choices")
        """For what it decides itself."""
        self.entropy = Random(f"{world.plan.seed}/{name}/entropy")
        """What the operating system gives it."""
        self._faults = Random(f"{world.plan.seed}/{name}/faults")
        self._operations = 0
        self._fibers: list[Fiber] = []
        self.at_death: Callable[[], None] = lambda: None

    def start(self, act: Callable[[], Any], what: str = "main", at_end: Callable[[], None] | None = None) -> None:
        """Run something in a thread of this process; `at_end` is called even if it never begins."""
        fiber = self.world.scheduler.spawn(f"{self.name}/{what}", self, lambda: self._run(act, at_end))
        self._fibers.append(fiber)

    def _run(self, act: Callable[[], Any], at_end: Callable[[], None] | None) -> None:
        try:
            if not self.is_dead:
                act()
        finally:
            self._fibers.remove(current())
            if at_end is not None:
                at_end()

    def kill(self) -> None:
        """End it at once: SIGKILL."""
        if not self.is_dead:
            self.is_dead = True
            for fiber in self._fibers:
                self.world.scheduler.unpark(fiber)
            self.at_death()

    def step(self, operation: str, what: str) -> Fault | None:
        """An operation is about to happen: let others run before it, and draw what is to go wrong.

        Raises:
            Killed: the process is dead.
        """
        self._check()
        self._operations += 1
        self.world.scheduler.step()
        self._check()
        fault = self._draw(operation)
        self.world.note(self, operation, what, fault)
        if fault == "sleep":
            # Long enough that much has changed: others commit, sweep, and take it for dead.
            self.sleep(1 + int(fault.size * 6))
        elif fault == "kill":
            self.kill()
            raise Killed
        return fault

    def sleep(self, commits: int) -> None:
        """Go on only after so many further commits."""
        self.world.ledger.wake_after(commits, current())
        self.world.scheduler.park(_LONGEST_SLEEP)
        self._check()

    def pause(self, steps: int) -> None:
        """Go on in so many steps."""
        self.world.scheduler.park(steps)
        self._check()

    def _check(self) -> None:
        if self.is_dead:
            raise Killed

    def _draw(self, operation: str) -> Fault | None:
        drawn, size = self._faults.random(), self._faults.random()
        if not self.world.is_stormy:
            return None
        plan = self.world.plan
        for kind in FAULTS[operation]:
            drawn -= plan.rates[kind]
            if drawn < 0:
                label = f"{self.name}:{self._operations}:{kind}"
                if plan.only is not None and label not in plan.only:
                    return None
                self.world.faults.append(label)
                fault = Fault(kind)
                fault.size = size
                return fault
        return None
