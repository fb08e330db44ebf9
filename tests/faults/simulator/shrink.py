"""Shrinking: the fewest faults, and the smallest cast, with which a run still shows that something is wrong.

Faults are named by the process and the operation that they meet, and each process draws from streams of its own: so one
that is left out leaves the others where they are, until the run itself takes another way.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.simulator.plan import Plan
from tests.faults.simulator.world import Outcome, run

MOST_RUNS = 150
_SMALLER: tuple[dict[str, int | bool], ...] = (
    {"has_hostile": False},
    {"has_sweeper": False},
    {"has_fork": False},
    {"rollbacks": 0},
    {"clock_jumps": 0},
    {"clients": 1},
    {"accumulators": 1},
    {"servers": 1},
)


class Shrinker:
    """Looks for a smaller run.

    Args:
        most: So many runs are made at most.
        runs: How a plan is run.
    """

    def __init__(self, most: int = MOST_RUNS, runs: Callable[[Plan], Outcome] = run) -> None:
        self.left = most
        self._runs = runs

    def shrink(self, outcome: Outcome) -> Outcome:
        """A run with fewer faults that is wrong as well; the very one if there is none."""
        best = self._try(outcome.plan.without(frozenset(outcome.faults))) or outcome
        for smaller in _SMALLER:
            if self._differs(best.plan, smaller):
                best = self._try(best.plan.without(_labels(best), **smaller)) or best
        return self._fewer(best)

    def _fewer(self, best: Outcome) -> Outcome:
        """Leave parts of the faults out, first halves, then smaller ones (Zeller and Hildebrandt 2002)."""
        size = len(best.faults) // 2
        while size >= 1 and self.left > 0:
            found = self._one_less(best, size)
            if found is None:
                size //= 2
            else:
                best = found
                size = min(size, len(best.faults) // 2)
        return best

    def _one_less(self, best: Outcome, size: int) -> Outcome | None:
        faults = best.faults
        for start in range(0, len(faults), size):
            kept = frozenset(faults[:start] + faults[start + size :])
            found = self._try(best.plan.without(kept))
            if found is not None and len(found.faults) < len(faults):
                return found
        return None

    def _try(self, plan: Plan) -> Outcome | None:
        if self.left <= 0:
            return None
        self.left -= 1
        found = self._runs(plan)
        return found if found.wrong else None

    def _differs(self, plan: Plan, smaller: dict[str, int | bool]) -> bool:
        return any(getattr(plan, name) != value for name, value in smaller.items())


def _labels(outcome: Outcome) -> frozenset[str]:
    return frozenset(outcome.faults)


def told(outcome: Outcome, lines: int = 40) -> str:
    """A run that is wrong, as text: what, by which faults, and the operations before."""
    return "\n".join(
        [
            f"seed {outcome.plan.seed}, {outcome.steps} steps, {outcome.commits} commits, trace {outcome.digest}",
            f"again: python -m tests.faults.simulator {outcome.plan.seed} --shrink",
            *outcome.wrong[:5],
            f"{len(outcome.faults)} faults: {', '.join(sorted(outcome.faults)[:60])}",
            *outcome.trace[-lines:],
        ]
    )
