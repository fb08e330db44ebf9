"""The rounds of a federation as files: plan, decision and report.

A coordinator holds nothing. Each round is three records, each created once: the plan (who is
sampled, and from which versions), the ending (which updates count), the report. Between two of them
anybody may be killed and anybody may go on: who finds a plan without an ending decides, who finds
an ending without a report carries it out. Of several coordinators that race, the first to create a
record has decided for all.

The trap is between deciding and doing. "Below quorum" and "fold these five" are both right, a
moment apart; were the commit itself the decision, one coordinator might report the first while
another did the second.

The names of `Plan` and `Ending` and of their fields are the format: the file's name, and its keys.
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
from splitfed.store.batchset import Verdict
from splitfed.store.cache import Bounded
from splitfed.store.rows import Row
from splitfed.store.search import newest

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
    """With updates of fewer clients nothing is averaged."""
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
    """The decision that ends a round; any coordinator can carry it out."""

    number: int
    status: str
    """'complete' (an update of each sampled client came), 'deadline' or 'below_quorum'."""
    time: float
    """When, by the coordinator's clock, in seconds."""
    ended: float
    """When, in seconds since 1970."""
    body: Verdict
    client: Verdict
    """What is folded and what is closed, by lineage."""
    heard: tuple[str, ...]
    """Sampled clients from which an update came, fit or not."""
    late: tuple[str, ...]
    """Clients whose update is of an earlier round."""
    dropped: Mapping[str, str]
    """Why an update of a client doesn't count."""
    samples: Mapping[str, float]
    """The weight of the updates to fold, in examples, by client."""

    def verdict(self, lineage: str) -> Verdict:
        """What is folded and what is closed of a lineage."""
        return self.client if lineage == "client" else self.body


class Rounds:
    """The rounds of a store.

    Args:
        blobs: The storage backend.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._newest = 0
        self._plans: Bounded[int, Plan] = Bounded(CACHED)
        self._endings: Bounded[int, Ending] = Bounded(CACHED)

    def newest(self) -> int:
        """The number of the newest round, or 0. Always asks the store."""
        self._newest = max(
            self._newest, newest(self._exists, self._newest)
        )  # other threads look too
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
        """How the round before was ended.

        The updates that it closed stay pending until a commit follows, and are no answer to `plan`.
        """
        return self.ending(plan.number - 1) if plan.number > 1 else None

    def report(self, number: int) -> Row | None:
        """The report of a round, or `None` if it hasn't got one."""
        data = self._blobs.get(layout.round_file(number, "report"))
        if data is None:
            return None
        return read_json(data, f"the report of round {number}")

    def begin(self, plan: Plan) -> Plan:
        """Open a round; returns the plan that holds, one's own or another coordinator's."""
        self._create(plan.number, "plan", asdict(plan))
        return self.plan(plan.number)

    def end(self, ending: Ending) -> Ending:
        """Decide a round; returns the decision that holds."""
        record = {name: getattr(ending, name) for name in Ending.__dataclass_fields__}
        for lineage in ("body", "client"):
            record[lineage] = ending.verdict(lineage).to_json()
        self._create(ending.number, "ending", record)
        return self.ending(ending.number) or ending

    def close(self, number: int, report: Mapping[str, Any]) -> Row:
        """Put a report on record; returns the one that holds."""
        self._create(number, "report", report)
        return self.report(number) or dict(report)

    def finish(self, number: int) -> None:
        """Say that no round follows, for the clients that wait; opening another takes it back."""
        self._create(number, "finished", {"after": number})

    def is_finished(self, number: int) -> bool:
        """Whether it was said that no round follows this one."""
        return self._blobs.get(layout.round_file(number, "finished")) is not None

    def started_at(self, lineage: str, base: int) -> list[Plan]:
        """The rounds in which a client may have begun from a version, newest first.

        There is more than one after a round below quorum: the next begins from the same version.
        """
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
            finished=closed and self.is_finished(plan.number),
        )

    def _exists(self, number: int) -> bool:
        return self._blobs.get(layout.round_file(number, "plan")) is not None

    def _create(self, number: int, kind: str, record: Mapping[str, Any]) -> None:
        data = json.dumps(record, separators=(",", ":")).encode()
        self._blobs.create(layout.round_file(number, kind), [data])

    def _find(self, cls: type[R], cache: Bounded[int, R], number: int) -> R | None:
        found = cache.get(number)
        if found is not None:
            return found
        data = self._blobs.get(layout.round_file(number, cls.__name__.lower()))
        return None if data is None else cache.put(number, _read(cls, number, data))


def _read(cls: type[R], number: int, data: bytes | memoryview) -> R:
    name = f"the {cls.__name__.lower()} of round {number}"
    fields = read_json(data, name)
    try:
        found = cls(**{field: _FIELDS[field](value) for field, value in fields.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{name} isn't one of ours: {error!r}") from error
    if found.number != number:
        raise FormatError(f"{name} says that it is round {found.number}")
    return found


def _of(*kinds: type) -> Callable[[Any], Any]:
    """A reader of fields that have one of these types."""

    def read(value: Any) -> Any:
        if type(value) not in kinds:
            expected = " or ".join(map(str, kinds))
            raise FormatError(f"{value!r:.60} is a {type(value).__name__}: expected {expected}")
        return value

    return read


def _ids(value: Any) -> tuple[str, ...]:
    return tuple(check_client_id(client_id) for client_id in _of(list)(value))


def _number(value: Any) -> int:
    return check_number("number", value)


# How each field of a plan or an ending is read from JSON; a field that isn't here is refused.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("number", "body_version", "client_version", "min_clients"), _number),
    **dict.fromkeys(("opened", "started", "time", "ended"), _of(int, float)),
    **dict.fromkeys(("sampled", "heard", "late"), _ids),
    **dict.fromkeys(("status", "late_policy", "below_quorum"), _of(str)),
    **dict.fromkeys(("body", "client"), Verdict.from_json),
    **dict.fromkeys(("dropped", "samples"), _of(dict)),
    "deadline": _of(int, float, type(None)),
    "barrier": _of(bool),
}
