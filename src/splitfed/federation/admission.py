"""The rules of a round, in one place: who is asked to train, and which updates count.

Who is sampled is a function of the seed, the round's number and the ids, and of nothing else but
the sizes of clients, if they are drawn in proportion to these. Each
client's ticket is a hash of the three, and the lowest tickets win. So any coordinator draws the
same clients, in any version of Python; and a client that joins displaces at most one other from a
round's sample.

Which round an update belongs to follows from the version that it began from, not from a field of
its own: a client that was asleep for three rounds still carries the version of its own. An update
counts if its client was sampled in a round that began there. It is late if that version isn't the
current one any more; after a round below quorum it still is, so an update that was kept is as good
as a new one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from splitfed.errors import FormatError, InputError
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet, Outcome, Verdict
from splitfed.store.rounds import Ending, Plan
from splitfed.store.store import GradientStore


def sample(
    ids: Iterable[str],
    count: int,
    seed: int,
    number: int,
    sizes: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """Draw clients without replacement, each equally likely or in proportion to a size.

    In proportion, one is drawn after the other, and the chance of each is its size over that of
    all that are left. That is a race in which a client arrives after an exponential time whose rate
    is its size (Efraimidis and Spirakis 2006, Information Processing Letters 97).

    Args:
        ids: The clients to draw from.
        count: How many; all if there are fewer.
        seed: The run's seed.
        number: The round's number.
        sizes: The size of each client, above 0; one that isn't there has the mean of the others.

    Returns:
        The drawn ids, sorted.
    """

    def ticket(client_id: str) -> bytes:
        return hashlib.sha256(f"{seed}/{number}/{client_id}".encode()).digest()

    if sizes is None:
        return tuple(sorted(sorted(set(ids), key=ticket)[:count]))
    usual = sum(sizes.values()) / len(sizes)

    def arrival(client_id: str) -> tuple[float, bytes]:
        drawn = ticket(client_id)
        # In the open interval from 0 to 1. A logarithm may differ in its last bit elsewhere, so
        # that another coordinator draws otherwise: the first to put its plan on record decides.
        chance = ((int.from_bytes(drawn[:8], "big") >> 11) + 0.5) / 2**53
        return -math.log(chance) / sizes.get(client_id, usual), drawn

    return tuple(sorted(sorted(set(ids), key=arrival)[:count]))


def sample_size(clients_per_round: int | float | None, known: int, least: int) -> int:
    """How many clients to draw.

    Args:
        clients_per_round: A number, a share of those known (above 0, at most 1), or `None` for all.
        known: How many there are.
        least: How many there must be at least.
    """
    if clients_per_round is None:
        return known
    if isinstance(clients_per_round, int):
        return min(clients_per_round, known)
    # Less a little, as a share is rounded: 0.07 · 100 is 7.000000000000001, and that isn't eight.
    return min(known, max(least, math.ceil(clients_per_round * known - 1e-9)))


def check_sample_size(clients_per_round: int | float | None, least: int) -> None:
    """Refuse a setting that can't be meant.

    Raises:
        InputError: not a number of at least `least`, nor a share above 0 and at most 1, nor `None`.
    """
    if clients_per_round is None:
        return
    is_count = type(clients_per_round) is int and clients_per_round >= least
    is_share = isinstance(clients_per_round, float) and 0 < clients_per_round <= 1
    if not is_count and not is_share:
        raise InputError(
            f"clients_per_round is {clients_per_round!r}: "
            f"expected an integer of at least min_clients={least}, "
            "a share such as 0.1, or None for all"
        )


@dataclass(slots=True)
class Findings:
    """What was found of the pending batches of a lineage, and of their clients."""

    outcomes: dict[BatchId, Outcome] = field(default_factory=dict)
    samples: dict[str, float] = field(default_factory=dict)
    """The weight of the updates to fold, in examples, by client."""
    heard: set[str] = field(default_factory=set)
    """Clients from which an update of this round has come, fit or not."""
    late: set[str] = field(default_factory=set)
    """Clients whose update is of an earlier round."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Why something of a client doesn't count; the first reason holds."""
    bases: set[tuple[str, int]] = field(default_factory=set)
    """Clients of the updates to fold, and the versions that these began from."""

    def close(self, batch: BatchId, outcome: Outcome, reason: str) -> None:
        """Let a batch count nowhere, and say why."""
        self.outcomes[batch] = outcome
        self.dropped.setdefault(batch.client_id, reason)


class Judge:
    """Judges the pending batches at the end of a round.

    Args:
        store: The store.
        plan: The round.
    """

    def __init__(self, store: GradientStore, plan: Plan) -> None:
        self._store = store
        self._plan = plan
        self._rounds = store.rounds()
        self._before = self._rounds.before(plan)

    def heard(self) -> set[str]:
        """The sampled clients from which an update of this round has come, fit or not.

        An update that the round before closed is no answer to this one, though it is pending until
        a commit comes: its client is asked again.
        """
        found = {
            batch.client_id for batch, base in self._closed() if base >= self._plan.client_version
        }
        for batch, header in self._pending("client"):
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
        """Whether an update of every sampled client came; without a barrier, as many updates."""
        came = len(self.heard()) if self._plan.barrier else self.num_closed()
        return came >= len(self._plan.sampled)

    def decide(self, now: float, is_streaming: bool) -> Ending:
        """The decision that ends the round as things are.

        Args:
            now: The time by the coordinator's clock.
            is_streaming: Whether the body's batches are committed while the round goes on; then
                none of them is judged here.
        """
        plan = self._plan
        if plan.barrier:
            updates = self.updates()
        else:
            # The halves are committed as updates come, so none is left to be judged.
            updates = Findings(heard=self.folded() & set(plan.sampled))
        batches = Findings() if is_streaming else self.batches()
        is_over = len(updates.heard) == len(plan.sampled) if plan.barrier else self.is_over()
        status = "complete" if is_over else "deadline"
        dropped = {**batches.dropped, **updates.dropped}
        # Updates that a commit has folded already count for the quorum: this decision may be made
        # by a coordinator that comes after the one that folded them.
        if plan.barrier and len({*updates.samples, *self.folded()}) < plan.min_clients:
            status = "below_quorum"
            if plan.below_quorum == "drop":
                reason = f"fewer than {plan.min_clients} clients had an update"
                dropped = {**dict.fromkeys(updates.samples, reason), **dropped}
        return Ending(
            number=plan.number,
            status=status,
            time=now,
            ended=time.time(),
            body=self._verdict(batches, status),
            client=self._verdict(updates, status),
            heard=tuple(sorted(updates.heard)),
            late=tuple(sorted(updates.late)),
            dropped=dict(sorted(dropped.items())),
            samples=dict(sorted(updates.samples.items())),
        )

    def updates(self) -> Findings:
        """The client halves' updates."""
        found = Findings()
        found.heard = {
            batch.client_id for batch, base in self._closed() if base >= self._plan.client_version
        }
        for batch, header in self._pending("client"):
            before = self._closed_before("client", batch)
            if before is None:
                self._add_update(found, batch, header)
            else:
                found.outcomes[batch] = before
        found.heard &= set(self._plan.sampled)
        return found

    def _add_update(self, found: Findings, batch: BatchId, header: dict[str, Any]) -> None:
        """Judge one update."""
        client_id = batch.client_id
        base = header.get("base_version")
        if not isinstance(base, int):
            found.close(batch, Outcome.REJECTED, "its update is unreadable")
            return
        sampled = self._sampled("client", base)
        is_late = base < self._plan.client_version
        # Heard from before it is judged: a client whose update is refused has answered, and the
        # round needn't wait for it.
        if client_id in sampled and not is_late:
            found.heard.add(client_id)
        refusal = self._refusal(found, batch, header, base, sampled)
        if refusal is not None:
            found.close(batch, Outcome.REJECTED, refusal)
            return
        if is_late:
            found.late.add(client_id)
        if is_late and self._plan.late_policy == "refuse":
            found.close(batch, Outcome.STALE, _late(base))
            return
        found.outcomes[batch] = Outcome.FOLDED
        found.bases.add((client_id, base))
        samples = float(header["num_samples"])
        found.samples[client_id] = found.samples.get(client_id, 0.0) + samples

    def batches(self) -> Findings:
        """The body's batches. Whether one is finite is for the commit to see."""
        plan = self._plan
        found = Findings()
        for batch in self._store.waiting("body"):
            before = self._closed_before("body", batch)
            if before is not None:
                found.outcomes[batch] = before
                continue
            # In the ordinary case no file is read for it: a round may have thousands of batches.
            if batch.client_id in plan.sampled and plan.late_policy == "count":
                found.outcomes[batch] = Outcome.FOLDED
                continue
            header = self._header("body", batch)
            base = header.get("base_version")
            if header.get("kind") == "skip" or not isinstance(base, int):
                found.outcomes[batch] = Outcome.FOLDED  # the commit will skip or reject it
            elif batch.client_id not in self._sampled("body", base):
                reason = f"it wasn't sampled in the round of version {base}"
                found.close(batch, Outcome.REJECTED, reason)
            elif base < plan.body_version and plan.late_policy == "refuse":
                found.close(batch, Outcome.STALE, _late(base))
            else:
                found.outcomes[batch] = Outcome.FOLDED
        return found

    def _verdict(self, found: Findings, status: str) -> Verdict:
        """What the commit is to take up, given how the round ended."""
        verdict = Verdict.of(found.outcomes)
        if status != "below_quorum":
            return verdict
        if self._plan.below_quorum == "keep":  # they stay pending, for the next round
            return replace(verdict, folded=BatchSet())
        rejected = verdict.rejected.union(verdict.folded)
        return replace(verdict, folded=BatchSet(), rejected=rejected)

    def _refusal(
        self,
        found: Findings,
        batch: BatchId,
        header: dict[str, Any],
        base: int,
        sampled: set[str],
    ) -> str | None:
        """Why an update is rejected, or `None`."""
        client_id = batch.client_id
        if client_id not in sampled:
            return f"it wasn't sampled in the round of version {base}"
        if header.get("kind") != "gradient":
            return "its update isn't finite (NaN or Inf)"
        # Two processes of one client may each have trained on the same round: ids differ, and
        # both would count.
        if (client_id, base) in found.bases or self._has_counted(client_id, base):
            return f"a second update of the round of version {base}"
        return None

    def _sampled(self, lineage: str, base: int) -> set[str]:
        """The clients sampled in a round that began from a version."""
        return {name for plan in self._rounds.started_at(lineage, base) for name in plan.sampled}

    def _closed_before(self, lineage: str, batch: BatchId) -> Outcome | None:
        """How the round before closed a batch that no commit has closed since; `None` if it didn't.

        It is judged the same again, and isn't reported a second time.
        """
        if self._before is None:
            return None
        found = self._before.verdict(lineage).outcome(batch)
        return None if found is Outcome.FOLDED else found

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
        """The updates that commits closed since the round began, with the versions they began from.

        Updates that clients gave up began from none.
        """
        versions = self._store.lineage("client")
        for version in range(self._plan.client_version + 1, versions.head() + 1):
            commit = versions.commit(version)
            for batch, outcome in commit.verdict.items():
                if outcome is not Outcome.SKIPPED:
                    yield batch, commit.base_of(batch)

    def _pending(self, lineage: str) -> Iterator[tuple[BatchId, dict[str, Any]]]:
        for batch in self._store.waiting(lineage):
            yield batch, self._header(lineage, batch)

    def _header(self, lineage: str, batch: BatchId) -> dict[str, Any]:
        try:
            return self._store.pile(lineage).peek(batch) or {}
        except FormatError:
            return {}


def _late(base: int) -> str:
    return f"late: the round of version {base} is over"
