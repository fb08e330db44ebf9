"""Commits of body and halves together: a group of batches makes one step of both.

Clients publish the gradient of each batch's half and take no local step, so a group is a large
batch of one model that happens to lie in two lineages; of all clients, it is a global step of
synchronous training. Which versions belong together, and how two records make one commit, is in
`store.together`: the halves' record decides on the body's batches too, and the body's carries that
out. Here is who does it, and the arithmetic is that of two `Accumulator`s.

Kill this anywhere: before the halves' record nothing was decided; after it whoever steps next, of
however many processes, carries the decision out before anything else, and one of them wins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

from splitfed.accumulator.fold import Older
from splitfed.accumulator.settings import CommitSettings
from splitfed.checks import at_least
from splitfed.errors import InputError, MissingError
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage
from splitfed.store.store import GradientStore


class Side(Protocol):
    """An `Accumulator`, as one of the two."""

    lineage: str
    store: GradientStore
    settings: CommitSettings
    num_conflicts: int
    _versions: Lineage

    @property
    def min_batches(self) -> int:
        """As there."""
        ...

    @property
    def max_staleness(self) -> int | None:
        """As there."""
        ...

    @property
    def keep_versions(self) -> int:
        """As there."""
        ...

    def _attempt(
        self, head: int, least: int, only: Verdict | None, together: Mapping[str, Any]
    ) -> Commit | None: ...

    def _sorted(
        self, head: int, newest: Commit, applied: BatchSet, only: Verdict | None, least: int
    ) -> tuple[Verdict, Older] | None: ...


class Grouped:
    """Steps the accumulators of body and halves together.

    From here on the store says so: clients are handed pairs of versions.

    Args:
        body: The body's accumulator.
        halves: That of the halves, on the same store.

    Raises:
        InputError: they aren't these two, of one store.
    """

    def __init__(self, body: Side, halves: Side) -> None:
        lineages = (body.lineage, getattr(halves, "lineage", None))
        if lineages != ("body", "client") or halves.store is not body.store:
            raise InputError(
                f"halves accumulates lineage {lineages[1]!r}, and this one {lineages[0]!r}: "
                "expected an Accumulator(half, store, optimizer, lineage='client') on the store "
                "object of the body's"
            )
        self._body = body
        self._halves = halves
        self._together = body.store.together()
        self._together.begin()

    def step(
        self, min_batches: int | None = None, *, only: tuple[Verdict, Verdict] | None = None
    ) -> Commit | None:
        """Commit a group, and before it what another has decided and not carried out.

        Args:
            min_batches: So many gradients of halves make a group; the body's accumulator's own
                number if it isn't given.
            only: What was decided on batches of the body, and on gradients of the halves.

        Returns:
            The body's commit, the last one that was made; `None` if there was none, as fewer wait.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later step continues.
            CorruptedError: a version to build upon was changed or deleted from outside.
        """
        least = self._body.min_batches
        if min_batches is not None:
            least = at_least("min_batches", min_batches, 1)
        with contextlib.ExitStack() as locks:
            for one in (self._body, self._halves):
                lock = one.store.blobs.lock(one._versions.keys.lock, one.settings.lock_seconds)
                locks.enter_context(lock)
            made = decision = None
            while True:
                heads = [one._versions.checked_head() for one in (self._body, self._halves)]
                try:
                    # First, and again after a decision, which another may have carried out.
                    made = self._carry_out() or made
                    if decision is not None:
                        return self._carried_out(decision)
                    decision = self._decide(heads[1], least, only)
                    if decision is None:
                        return made
                except MissingError:
                    # As for one accumulator: another has won, or files are truly gone.
                    now = [one._versions.head() for one in (self._body, self._halves)]
                    if now == heads:
                        raise
                    self._body.num_conflicts += 1

    def _carry_out(self) -> Commit | None:
        """Make the body's version of the newest decision; `None` if that is done."""
        found = self._together.decided()
        if found is None:
            return None
        head, decision = found
        if decision.body is None:
            return self._together.follow(decision)
        # Whatever has become of its batches: without a version the pair would never be seen.
        together = {"halves": decision.version}
        return self._body._attempt(head, 0, decision.body, together)

    def _decide(self, head: int, least: int, only: tuple[Verdict, Verdict] | None) -> Commit | None:
        """Commit the halves of a group, if enough wait; that is the decision."""
        judged = None if only is None else only[1]
        newest = self._halves._versions.commit(head)
        applied = self._halves._versions.applied(head)
        found = self._halves._sorted(head, newest, applied, judged, least)
        if found is None:
            return None
        verdict = found[0]
        partners = self._partners(verdict) if only is None else only[0]
        return self._halves._attempt(head, 1, verdict, {"body": partners})

    def _partners(self, verdict: Verdict) -> Verdict:
        """What becomes of the body's batches in a group."""
        limit = self._body.max_staleness
        if limit is None:
            # Older ones can't be computed on any more: their clients can't but be gone.
            limit = self._body.keep_versions - 2
        return self._together.partners(verdict, self._body._versions.head() - limit)

    def _carried_out(self, decision: Commit) -> Commit:
        """The body's version of a decision that was carried out, by whomever."""
        versions = self._body._versions
        commit = versions.commit(versions.head())
        while (commit.halves or 0) > decision.version:
            commit = versions.commit(commit.version - 1)
        return commit
