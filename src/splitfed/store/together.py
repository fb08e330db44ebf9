"""Body and halves that are committed together: which versions and batches belong together.

Two lineages can't get a version by one create. So one of the two commits is the decision, and the
other carries it out. The halves come first: the record of version w + 1 of `client` holds what was
decided on the body's batches too, and nobody is handed that half yet. Then comes version v + 1 of
`body`, of exactly those batches, whose record names w + 1; from then on the two are the newest
pair. Whoever finds a decision that isn't carried out does so, to the same bits.

A client gets a pair, and its calls run at the pair's body until it pulls again: so no batch is
computed on a half and a body that don't belong together, whatever is committed in between.

The race is at the beginning, when no record names a pair yet: a mark in the store, made before the
first commit, says that there will be pairs.

The trap: which of the body's batches belong to a gradient of a half isn't in their ids. A push says
how far its process had numbered them; those before it, which no earlier push has, are its own.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from dataclasses import dataclass

from splitfed.errors import FormatError, InputError, MissingError
from splitfed.protocol.ids import BatchId
from splitfed.store.batches import Pile
from splitfed.store.batchset import Outcome, Verdict
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Pair:
    """A version of the body, and the version of the halves that belongs to it."""

    body: int
    client: int


class Together:
    """What a store knows of the two.

    Args:
        body: The lineage `body`, ...
        batches: ... and its batches.
        halves: The lineage `client`, ...
        updates: ... and its batches: the gradients of halves.
    """

    def __init__(self, body: Lineage, batches: Pile, halves: Lineage, updates: Pile) -> None:
        self._body = body
        self._batches = batches
        self._halves = halves
        self._updates = updates
        self._is_begun = False

    def begin(self) -> None:
        """Say that body and halves are committed together from here on.

        Raises:
            StoreError: the storage failed.
        """
        if not self.is_begun():
            record = json.dumps({"body": self._body.name}).encode()
            self._halves.blobs.create(self._halves.keys.together, [record])
            self._is_begun = True

    def is_begun(self) -> bool:
        """Whether they are committed together."""
        if not self._is_begun:
            self._is_begun = self._halves.blobs.get(self._halves.keys.together) is not None
        return self._is_begun

    def newest(self) -> Pair:
        """The newest version of the body, and the half that belongs to it.

        Raises:
            MissingError: nobody has begun one of the two.
        """
        body = self._body.head()
        named = self._named(body)
        if named is None:
            # No group was carried out yet: what was decided since isn't to be seen.
            named = max(0, self._halves.head())
            while named and self._halves.commit(named).body is not None:
                named -= 1
        return Pair(body, named)

    def decided(self) -> tuple[int, Commit] | None:
        """The body's newest version, and the decision that its next one is to carry out.

        Returns:
            `None` if all that was decided is carried out. The decision may also be a rollback of
            the halves, which the body has still to follow.
        """
        head = self._body.head()
        named = self._named(head)
        newest = self._halves.head()
        if newest <= 0 or (named is not None and newest <= named):
            return None
        decision = self._halves.commit(newest)
        is_decision = decision.body is not None or decision.kind == "rollback"
        return (head, decision) if is_decision else None

    def _named(self, version: int) -> int | None:
        """The version of the halves that a version of the body names; `None` before the first."""
        commit = self._body.commit(version)
        while commit.halves is None and commit.was is not None:
            # A record that `repair` has made in place of a lost one doesn't say it. That of the
            # one before is no newer, and what was decided since is carried out without batches.
            commit = self._body.commit(commit.version - 1)
        return commit.halves

    def partners(self, verdict: Verdict, oldest: int = 0) -> Verdict:
        """What becomes of the body's batches, by what becomes of the gradients of the halves.

        Args:
            verdict: On pending gradients of halves.
            oldest: Batches whose gradient of the half hasn't come, and which were computed at an
                earlier version than this, are stale: their client has died, or will never push.

        Returns:
            A verdict on pending batches of the body; others wait for their push.
        """
        ends = self._ends(verdict)
        applied = self._body.counted()
        outcomes: dict[BatchId, Outcome] = {}
        for batch in self._batches.waiting():
            if batch in applied:
                continue
            own = ends.get((batch.client_id, batch.incarnation), [])
            place = bisect_right(own, batch.seq, key=lambda end: end[0])
            if place < len(own):
                outcomes[batch] = own[place][1]
            elif oldest > 0 and self._is_older(batch, oldest):
                outcomes[batch] = Outcome.STALE
        return Verdict.of(outcomes)

    def _ends(self, verdict: Verdict) -> dict[tuple[str, int], list[tuple[int, Outcome]]]:
        """By process: where its pushes end among its batches, and what becomes of each."""
        found: dict[tuple[str, int], list[tuple[int, Outcome]]] = {}
        for batch, outcome in verdict.items():
            try:
                header = self._updates.peek(batch)
            except FormatError:
                continue  # it is rejected, and says of no batch that it is its own
            if header is None or outcome is Outcome.SKIPPED:
                continue
            upto = header.get("upto")
            # A client of an earlier version doesn't say it: all that it has sent is meant.
            end = upto if isinstance(upto, int) and upto > 0 else sys.maxsize
            found.setdefault((batch.client_id, batch.incarnation), []).append((end, outcome))
        for ends in found.values():
            ends.sort(key=lambda end: end[0])
        return found

    def _is_older(self, batch: BatchId, oldest: int) -> bool:
        try:
            base = (self._batches.peek(batch) or {}).get("base_version")
        except FormatError:
            return True
        return isinstance(base, int) and base < oldest

    # ---------------------------------------------------------------------------- going back

    def rollback(self, version: int) -> tuple[Commit, list[str]]:
        """Make the next pair from that of an older version of the body.

        The halves go back first, and the body's record names them: stopped in between, the old
        pair is still the newest, and whoever commits or goes back next finishes it.

        Returns:
            The body's commit, and the ids of its batches that are thereby lost.

        Raises:
            InputError: the version isn't older than the body's newest.
            ExpiredError: it has left the retention window.
        """
        if not 0 <= version < self._body.head():
            raise InputError(
                f"can't roll back to version {version}: expected one from 0 to "
                f"{self._body.head() - 1}"
            )
        self._body.checked_state(version)
        half = self._half_of(version)
        decided = self.decided()
        is_begun = decided is not None and decided[1].restored == half
        if not is_begun and half < self._halves.head():
            self._halves.rollback(half)
        return self._body.rollback(version, halves=self._halves.head())

    def follow(self, decision: Commit) -> Commit:
        """Let the body follow a rollback of the halves that was stopped in between.

        Raises:
            MissingError: no version of the body belongs to what was restored.
            StoreError: another commit came first.
        """
        for version in range(self._body.head() - 1, -1, -1):
            if self._half_of(version) == decision.restored:
                return self._body.rollback(version, halves=decision.version)[0]
        raise MissingError(
            f"version {decision.version} of the client halves was rolled back to version "
            f"{decision.restored}, and no version of the body belongs to that: roll the body back "
            "with `splitfed rollback`"
        )

    def _half_of(self, version: int) -> int:
        """The version of the halves that belongs to a version of the body."""
        head = self._body.head()
        named = self._named(version)
        if named is not None:
            return named
        for later in range(version + 1, head + 1):
            named = self._body.commit(later).halves
            if named is not None:
                return named - 1  # the first group's halves were made of those before
        return self.newest().client
