"""Rounds, as files: what was planned, what was decided, what came of it.

A coordinator holds nothing. Each round is three records, each created once: the plan (who is sampled, and from which
versions), the ending (which updates count), the report. Between two of them anybody may be killed and anybody may go
on: who finds a plan without an ending decides, who finds an ending without a report carries it out. Of several
coordinators that race, the first to create a record has decided for all.

The trap is between deciding and doing. "Below quorum" and "fold these five" are both right, a moment apart; were the
commit itself the decision, one coordinator might report the first while another did the second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from splitfed.blobs.contract import Blobs
from splitfed.errors import FormatError, MissingError
from splitfed.protocol.ids import check_client_id, check_number
from splitfed.protocol.messages import RoundInfo
from splitfed.protocol.packing import read_json
from splitfed.store import layout
from splitfed.store.cache import Bounded
from splitfed.store.rows import Row
from splitfed.store.selection import Selection

CACHED = 32
R = TypeVar("R", "Plan", "Ending")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a round begins."""

    number: int
    """1, 2, ..."""
    sampled: tuple[str, ...]
    """The clients that are asked to train, sorted."""
    body_version: int
    client_version: int
    """The versions that it begins from."""
    min_clients: int
    """Of how many clients there must be an update, or nothing is averaged."""
    opened: float
    """When, by the coordinator's clock, in seconds."""
    deadline: float | None
    """By the same clock; `None` for none."""
    late_policy: str
    """What becomes of updates of earlier rounds: 'count' or 'refuse'."""
    below_quorum: str
    """What becomes of updates if there are too few: 'keep' (for the next round) or 'drop'."""
    barrier: bool
    """Whether clients wait for each other; if not, each goes on as soon as it has pushed."""
    started: float
    """When, in seconds since 1970, whatever the clock says."""

    def version(self, lineage: str) -> int:
        """The version of a lineage that the round begins from."""
        return self.client_version if lineage == "client" else self.body_version


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """The decision that ends a round; whoever lives carries it out."""

    number: int
    status: str
    """'complete' (each sampled client was heard from), 'deadline' or 'below_quorum'."""
    time: float
    """When, by the coordinator's clock, in seconds."""
    ended: float
    """When, in seconds since 1970."""
    body: Selection
    client: Selection
    """What is folded and what is closed, by lineage."""
    heard: tuple[str, ...]
    """Sampled clients from which an update came, fit or not."""
    late: tuple[str, ...]
    """Clients whose update is of an earlier round."""
    dropped: Mapping[str, str]
    """Why an update of a client doesn't count."""
    samples: Mapping[str, float]
    """What the updates to fold count, in examples."""


class Rounds:
    """The rounds of a store.

    Args:
        blobs: Where they lie.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._newest = 0
        self._joined: set[str] = set()
        self._plans: Bounded[int, Plan] = Bounded(CACHED)
        self._endings: Bounded[int, Ending] = Bounded(CACHED)

    def newest(self) -> int:
        """The number of the newest round, or 0. Asks the store, and finds by doubling where to look."""
        start, reach = self._newest, 1
        while self._exists(start + reach):
            reach *= 2
        low, high = start + reach // 2, start + reach
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(middle) else (low, middle)
        self._newest = max(self._newest, low)  # other threads look too
        return self._newest

    def current(self) -> Plan | None:
        """The plan of the newest round; `None` before the first."""
        number = self.newest()
        return self.plan(number) if number else None

    def plan(self, number: int) -> Plan:
        """The plan of a round.

        Raises:
            MissingError: there is no such round.
        """
        found = self._find(Plan, self._plans, number)
        if found is None:
            raise MissingError(f"there is no round {number}: the newest is {self.newest()}")
        return found

    def ending(self, number: int) -> Ending | None:
        """How a round was ended, or `None` while it goes on."""
        return self._find(Ending, self._endings, number)

    def before(self, plan: Plan) -> Ending | None:
        """How the round before was ended; what that closed waits until a commit follows, and counts as no answer."""
        return self.ending(plan.number - 1) if plan.number > 1 else None

    def report(self, number: int) -> Row | None:
        """The report of a round, or `None` if it hasn't got one."""
        data = self._blobs.get(layout.round_file(number, "report"))
        return None if data is None else read_json(data, f"the report of round {number}")

    def begin(self, plan: Plan) -> Plan:
        """Open a round; answer the plan that holds, one's own or another coordinator's."""
        self._create(plan.number, "plan", asdict(plan))
        return self.plan(plan.number)

    def end(self, ending: Ending) -> Ending:
        """Decide a round; answer the decision that holds."""
        record = {name: getattr(ending, name) for name in Ending.__dataclass_fields__}
        record |= {lineage: getattr(ending, lineage).to_json() for lineage in ("body", "client")}
        self._create(ending.number, "ending", record)
        return self.ending(ending.number) or ending

    def close(self, number: int, report: Mapping[str, Any]) -> Row:
        """Put a report on record; answer the one that holds."""
        self._create(number, "report", report)
        return self.report(number) or dict(report)

    def finish(self, number: int) -> None:
        """Say that nothing is to follow on a round, for the clients that wait; opening another one takes it back."""
        self._create(number, "finished", {"after": number})

    def join(self, client_id: str) -> None:
        """Make a client known, so that it can be sampled."""
        if client_id not in self._joined:
            self._blobs.create(layout.joined(client_id), [b"{}"], durable=False)
            self._joined.add(client_id)

    def started_at(self, lineage: str, base: int) -> list[Plan]:
        """The rounds, newest first, in which a client may have begun from a version; more than one below quorum."""
        number = self.newest()
        while number > 1 and self.plan(number).version(lineage) > base:
            number -= 1
        found = [self.plan(number)] if number else []
        while found and base == found[-1].version(lineage) and found[-1].number > 1:
            earlier = self.plan(found[-1].number - 1)
            if earlier.version(lineage) != base:
                break
            found.append(earlier)
        return found

    def info(self, plan: Plan, client_id: str, has_update: bool) -> RoundInfo:
        """What a round is to a client, now."""
        closed = self.ending(plan.number) is not None
        return RoundInfo(
            number=plan.number,
            sampled=not plan.barrier or client_id in plan.sampled,
            deadline=plan.deadline,
            barrier=plan.barrier,
            arrived=plan.barrier and has_update,
            closed=closed,
            finished=closed and self._blobs.get(layout.round_file(plan.number, "finished")) is not None,
        )

    def _exists(self, number: int) -> bool:
        return self._blobs.get(layout.round_file(number, "plan")) is not None

    def _create(self, number: int, kind: str, record: Mapping[str, Any]) -> None:
        self._blobs.create(layout.round_file(number, kind), [json.dumps(record, separators=(",", ":")).encode()])

    def _find(self, cls: type[R], cache: Bounded[int, R], number: int) -> R | None:
        found = cache.get(number)
        if found is not None:
            return found
        data = self._blobs.get(layout.round_file(number, cls.__name__.lower()))
        return None if data is None else cache.put(number, _read(cls, number, data))


def _read(cls: type[R], number: int, data: bytes | memoryview) -> R:
    what = f"the {cls.__name__.lower()} of round {number}"
    fields = read_json(data, what)
    try:
        found = cls(**{name: _READ[name](value) for name, value in fields.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{what} isn't one of ours: {error!r}") from error
    if found.number != number:
        raise FormatError(f"{what} says that it is round {found.number}")
    return found


def _ids(value: Any) -> tuple[str, ...]:
    return tuple(check_client_id(client_id) for client_id in _is(list)(value))


def _is(*kinds: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) not in kinds:
            raise FormatError(f"{value!r:.60} is a {type(value).__name__}: expected {' or '.join(map(str, kinds))}")
        return value

    return check


def _number(value: Any) -> int:
    return check_number("number", value)


_TIME = _is(int, float)
_READ: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("number", "body_version", "client_version", "min_clients"), _number),
    **dict.fromkeys(("opened", "started", "time", "ended"), _TIME),
    **dict.fromkeys(("sampled", "heard", "late"), _ids),
    **dict.fromkeys(("status", "late_policy", "below_quorum"), _is(str)),
    **dict.fromkeys(("body", "client"), Selection.from_json),
    **dict.fromkeys(("dropped", "samples"), _is(dict)),
    "deadline": _is(int, float, type(None)),
    "barrier": _is(bool),
}
