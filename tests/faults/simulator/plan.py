"""What a seed stands for: the settings of a run and how probable each fault is in it.

Each seed draws its own mixture, so that some runs see many of one kind and none of another: faults that hide each other
are rare in one uniform mixture (swarm testing, Groce et al. 2012).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

FAULTS: dict[str, tuple[str, ...]] = {
    "get": ("fail", "garbled", "rotten", "sleep", "kill"),
    "create": ("fail", "lost", "exists", "late", "sleep", "kill", "kill after", "kill late"),
    "put": ("fail", "lost", "late", "sleep", "kill", "kill after", "kill late"),
    "delete": ("fail", "lost", "late", "sleep", "kill", "kill after"),
    "list": ("fail", "stale", "patchy", "sleep", "kill"),
    "request": ("unsent", "unanswered", "twice", "impatient", "sleep", "kill"),
}
"""What may happen at an operation.

fail: an error, without effect. garbled: a bit of what is read has changed on the way. rotten: a bit of the file has
changed for good, if it is one of a batch; of others it is garbled, as only `splitfed repair` mends those. lost: done,
and an error. exists: created, and said to have existed, as a retry within a storage library does. late: an error, and
it is done some time later, or never. kill: the process dies before, after, or its write lands later. sleep: the actor
goes on some commits later. stale: a listing of some time ago; patchy: one that lacks some new keys and has some that
are gone. unsent, unanswered: a request, or its answer, is lost. twice: it arrives twice. impatient: the client gives up
waiting and asks once more.
"""
KINDS = tuple(dict.fromkeys(kind for kinds in FAULTS.values() for kind in kinds))
LOGS = 3
"""One seed in so many is a log."""
_RATES = (0.0, 0.005, 0.012, 0.025)
_SELDOM = ("kill", "kill after", "kill late", "sleep")
_OFTEN = {"get": 0.66, "list": 0.09, "create": 0.08, "delete": 0.08, "request": 0.08, "put": 0.01}
"""The share of each operation in all of a run, roughly."""
_PER_OPERATION = 0.028
"""How many faults there are for each operation: with fewer, runs are over long before the faults are many enough; with
more, hardly anything gets through, and a run takes long without showing more."""


@dataclass(frozen=True)
class Plan:
    """The settings of a run."""

    seed: int
    rates: dict[str, float]
    """How probable each kind of fault is, at each operation where it can happen."""
    batches: int
    """The run goes on until clients have made so many batches,"""
    commits: int = 10
    """there were so many commits,"""
    faults: int = 20
    """and so many faults."""
    clients: int = 2
    servers: int = 2
    accumulators: int = 2
    rollbacks: int = 0
    has_fork: bool = False
    has_sweeper: bool = False
    has_hostile: bool = False
    clock_jumps: int = 0
    restlessness: float = 0.4
    keep_versions: int = 2
    max_staleness: int | None = None
    keep_graphs: int = 0
    most_pending: int = 2
    """Clients wait a while when so many batches do: an accumulator that is killed now and then has to get through."""
    momentum: bool = False
    """Whether the optimizer is SGD with momentum and a schedule; else Adam."""
    dropout: float = 0.0
    is_log: bool = False
    """Whether batches are acknowledged on their recipes, and servers hold sums."""
    is_attended: bool = False
    """Whether the first server's process has an accumulator too, which takes its sums from memory."""
    only: frozenset[str] | None = field(default=None)
    """If given, no other faults than these happen, by their labels."""

    @classmethod
    def of(cls, seed: int) -> Plan:
        """The plan of a seed."""
        random = Random(f"plan/{seed}")
        rates = {kind: random.choice(_RATES) / (4 if kind in _SELDOM else 1) for kind in KINDS}
        # No run without any.
        rates[random.choice(KINDS)] = 0.025
        rates["sleep"] = max(rates["sleep"], 0.002)
        rates = _scaled(rates)
        max_staleness = random.choice((None, None, 0, 1, 2))
        plan = cls(
            seed=seed,
            rates=rates,
            batches=random.randrange(8, 16),
            clients=random.choice((2, 2, 3)),
            servers=random.choice((2, 2, 3)),
            accumulators=random.choice((1, 2, 2, 3)),
            rollbacks=random.choice((0, 0, 1, 2)),
            has_fork=random.random() < 0.5,
            has_sweeper=random.random() < 0.4,
            has_hostile=random.random() < 0.5,
            clock_jumps=random.choice((0, 1, 3)),
            restlessness=random.choice((0.1, 0.3, 0.6)),
            keep_versions=(2 if max_staleness is None else max_staleness + 2) + random.choice((0, 0, 1, 3)),
            max_staleness=max_staleness,
            keep_graphs=random.choice((0, 0, 1, 2, 8)),
            most_pending=random.choice((1, 1, 1, 2, 4)),
            momentum=random.random() < 0.5,
            dropout=random.choice((0.0, 0.3)),
        )
        return plan.as_log(random) if seed % LOGS == 0 else plan

    @property
    def durability(self) -> str:
        """What is on file when a batch is acknowledged."""
        return "log" if self.is_log else "gradient"

    def as_log(self, random: Random) -> Plan:
        """The same run as a log: more batches wait, so that sums have several, and staleness is bounded.

        It is 1 at least: were most that wait stale, accumulators would read them until they are killed.
        """
        keep_versions = max(3, self.keep_versions + random.choice((0, 1, 2)))
        return replace(
            self,
            is_log=True,
            is_attended=random.random() < 0.5,
            accumulators=max(2, self.accumulators),
            most_pending=random.choice((3, 4, 6)),
            keep_versions=keep_versions,
            max_staleness=keep_versions - 2 if self.max_staleness is None else max(1, self.max_staleness),
        )

    def without(self, labels: frozenset[str], **smaller: int | bool) -> Plan:
        """The same run with only these faults, and perhaps with fewer actors."""
        return replace(self, only=labels, faults=0, **smaller)


def _scaled(rates: dict[str, float]) -> dict[str, float]:
    """The same mixture, with as many faults as other plans have."""
    expected = sum(often * sum(rates[kind] for kind in FAULTS[operation]) for operation, often in _OFTEN.items())
    share = min(4.0, _PER_OPERATION / expected)
    return {kind: rate * share for kind, rate in rates.items()}
