"""What becomes of each update when a round ends: the rules, in one place.

Whose round an update belongs to is told by the version that it began from, not by what it says of itself: a client
that was asleep for three rounds still carries the version of its own. An update counts if its client was sampled in a
round that began there. It is late if that version isn't the current one any more; after a round below quorum it
still is, so what was kept is as good as new.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from splitfed.errors import FormatError
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet
from splitfed.store.rounds import Ending, Plan
from splitfed.store.selection import Selection
from splitfed.store.store import GradientStore


@dataclass(slots=True)
class Judged:
    """The batches of a lineage that wait, and what was found of their clients."""

    fold: list[BatchId] = field(default_factory=list)
    stale: list[BatchId] = field(default_factory=list)
    rejected: list[BatchId] = field(default_factory=list)
    samples: dict[str, float] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)

    def selection(self, status: str, policy: str) -> Selection:
        """What the commit is to take up, given how the round ended.

        Args:
            status: 'below_quorum' folds nothing.
            policy: What becomes of the rest then: 'keep' or 'drop'.
        """
        fold, rejected = self.fold, self.rejected
        if status == "below_quorum":
            fold, rejected = [], rejected if policy == "keep" else [*rejected, *fold]
        return Selection(BatchSet(fold), BatchSet(self.stale), BatchSet(rejected))

    def reject(self, batch: BatchId, why: str) -> None:
        """Refuse a batch and say why."""
        self.rejected.append(batch)
        self.dropped.setdefault(batch.client_id, why)


class Judge:
    """Judges what waits at the end of a round.

    Args:
        store: Where it waits.
        plan: The round.
    """

    def __init__(self, store: GradientStore, plan: Plan) -> None:
        self._store = store
        self._plan = plan
        self._rounds = store.rounds()
        self._before = self._rounds.before(plan)

    def heard(self) -> set[str]:
        """The sampled clients from which an update of this round has come, fit or not, counted or waiting.

        What the round before refused is told and over, though it waits for a commit: its client is asked anew.
        """
        found = {batch.client_id for batch, base in self._closed() if base >= self._plan.client_version}
        for batch, header in self._waiting("client"):
            if self._before is not None and self._before.client.closes(batch):
                continue
            base = header.get("base_version")
            if isinstance(base, int) and base >= self._plan.client_version:
                found.add(batch.client_id)
        return found & set(self._plan.sampled)

    def folded(self) -> set[str]:
        """The clients whose update a commit has folded since the round began."""
        versions = self._store.lineage("client")
        made = range(self._plan.client_version + 1, versions.head() + 1)
        return {batch.client_id for version in made for batch in versions.commit(version).folded}

    def num_closed(self) -> int:
        """How many updates commits have closed since the round began."""
        return sum(1 for _ in self._closed())

    def is_over(self) -> bool:
        """Whether every sampled client was heard from; or without a barrier, so many updates as there are of them."""
        return (len(self.heard()) if self._plan.barrier else self.num_closed()) >= len(self._plan.sampled)

    def decide(self, now: float, is_streaming: bool) -> Ending:
        """The decision that ends the round as things are.

        Args:
            now: The time by the coordinator's clock.
            is_streaming: Whether the body's batches are committed while the round runs; then none is chosen here.
        """
        plan = self._plan
        updates = self.updates() if plan.barrier else Judged(heard=self.folded() & set(plan.sampled))
        batches = Judged() if is_streaming else self.batches()
        is_over = len(updates.heard) == len(plan.sampled) if plan.barrier else self.is_over()
        status = "complete" if is_over else "deadline"
        dropped = {**batches.dropped, **updates.dropped}
        if plan.barrier and len({*updates.samples, *self.folded()}) < plan.min_clients:
            status = "below_quorum"
            if plan.below_quorum == "drop":
                why = f"fewer than {plan.min_clients} clients had an update"
                dropped = {**dict.fromkeys(updates.samples, why), **dropped}
        return Ending(
            number=plan.number,
            status=status,
            time=now,
            ended=time.time(),
            body=batches.selection(status, plan.below_quorum),
            client=updates.selection(status, plan.below_quorum),
            heard=tuple(sorted(updates.heard)),
            late=tuple(sorted(updates.late)),
            dropped=dict(sorted(dropped.items())),
            samples=dict(sorted(updates.samples.items())),
        )

    def updates(self) -> Judged:
        """The client halves' updates."""
        found = Judged()
        plan, seen = self._plan, set()
        found.heard = {batch.client_id for batch, base in self._closed() if base >= plan.client_version}
        for batch, header in self._waiting("client"):
            if self._carry(found, "client", batch):
                continue
            base, client_id = header.get("base_version"), batch.client_id
            if not isinstance(base, int):
                found.reject(batch, "its update is unreadable")
                continue
            sampled = {name for round_ in self._rounds.started_at("client", base) for name in round_.sampled}
            if client_id in sampled and base >= plan.client_version:
                found.heard.add(client_id)
            if client_id not in sampled:
                found.reject(batch, f"it wasn't sampled in the round of version {base}")
            elif header.get("kind") != "gradient":
                found.reject(batch, "its update isn't finite (NaN or Inf)")
            elif (client_id, base) in seen or self._has_counted(client_id, base):
                found.reject(batch, f"a second update of the round of version {base}")
            elif self._is_late(found, batch, base):
                continue
            else:
                found.fold.append(batch)
                seen.add((client_id, base))
                found.samples[client_id] = found.samples.get(client_id, 0.0) + float(header["num_samples"])
        found.heard &= set(plan.sampled)
        return found

    def batches(self) -> Judged:
        """The body's batches. Whether one is finite is for the commit to see."""
        found = Judged()
        for batch in self._store.waiting("body"):
            if self._carry(found, "body", batch):
                continue
            if batch.client_id in self._plan.sampled and self._plan.late_policy == "count":
                found.fold.append(batch)
                continue
            header = self._header("body", batch)
            base = header.get("base_version")
            if header.get("kind") == "skip" or not isinstance(base, int):
                found.fold.append(batch)
                continue
            sampled = {name for round_ in self._rounds.started_at("body", base) for name in round_.sampled}
            if batch.client_id not in sampled:
                found.reject(batch, f"it wasn't sampled in the round of version {base}")
            elif base < self._plan.body_version and self._plan.late_policy == "refuse":
                found.stale.append(batch)
                found.dropped.setdefault(batch.client_id, _late(base))
            else:
                found.fold.append(batch)
        return found

    def _is_late(self, found: Judged, batch: BatchId, base: int) -> bool:
        """Take note of a late update; answer whether it is refused."""
        if base >= self._plan.client_version:
            return False
        found.late.add(batch.client_id)
        if self._plan.late_policy == "count":
            return False
        found.stale.append(batch)
        found.dropped.setdefault(batch.client_id, _late(base))
        return True

    def _carry(self, found: Judged, lineage: str, batch: BatchId) -> bool:
        """Judge a batch as the round before did, if it closed it and no commit has come since; it isn't told again."""
        if self._before is None:
            return False
        before: Selection = getattr(self._before, lineage)
        if batch in before.rejected:
            found.rejected.append(batch)
        elif batch in before.stale:
            found.stale.append(batch)
        else:
            return False
        return True

    def _has_counted(self, client_id: str, base: int) -> bool:
        """Whether a commit has folded an update of a client from that version."""
        versions = self._store.lineage("client")
        for version in range(base + 1, versions.head() + 1):
            commit = versions.commit(version)
            own = (batch for batch in commit.folded if batch.client_id == client_id)
            if any(commit.base_of(batch) == base for batch in own):
                return True
        return False

    def _closed(self) -> Iterator[tuple[BatchId, int]]:
        """The updates that commits have closed since the round began, with the versions that they began from."""
        versions = self._store.lineage("client")
        for version in range(self._plan.client_version + 1, versions.head() + 1):
            commit = versions.commit(version)
            for batches in (commit.folded, commit.stale, commit.rejected):
                yield from ((batch, commit.base_of(batch)) for batch in batches)

    def _waiting(self, lineage: str) -> Iterator[tuple[BatchId, dict[str, Any]]]:
        for batch in self._store.waiting(lineage):
            yield batch, self._header(lineage, batch)

    def _header(self, lineage: str, batch: BatchId) -> dict[str, Any]:
        try:
            return self._store.pile(lineage).peek(batch) or {}
        except FormatError:
            return {}


def _late(base: int) -> str:
    return f"late: the round of version {base} is over"
