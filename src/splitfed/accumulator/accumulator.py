"""The accumulator: what waits in the pile becomes the next version.

One commit folds the waiting gradients into their sample-weighted mean, in an order that is a function of their ids
alone, takes one optimizer step, and publishes weights, buffers, optimizer state and the applied table as the next
version. Which gradients are folded, and what staleness costs, is policy; the mechanism is the same for every mode.

Accumulators may race: each computes, one wins, and a loser begins again from the winner's version. Any of them may
die at any moment; a new one continues from the store alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from splitfed.accumulator import optimizer as optimizers
from splitfed.accumulator.buffers import Rule, merge_buffers
from splitfed.accumulator.fold import Folded, Sorted, fold, sort_batches
from splitfed.accumulator.optimizer import Groups, OptimizerFactory, SchedulerFactory
from splitfed.accumulator.policies import constant
from splitfed.accumulator.stepping import Stepper
from splitfed.checks import at_least, positive
from splitfed.errors import MissingError, StoreError
from splitfed.model.fingerprint import personal_names
from splitfed.model.skeleton import Template, device_of
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet
from splitfed.store.commit import Commit
from splitfed.store.selection import Selection
from splitfed.store.store import GradientStore, check_store

KEEP_VERSIONS = 16


class Accumulator:
    """Commits waiting gradients of one lineage.

    Args:
        body: The module whose gradients these are; it isn't changed. Its weights become version 0 if the store is new.
        store: Where everything is.
        optimizer: Makes a torch optimizer from the trainable parameters, in `named_parameters()` order, each tied
            one once.
        lr_scheduler: Makes a scheduler from the optimizer; it steps once per commit.
        param_groups: Makes parameter groups from the module, in place of the plain list.
        lineage: `body`, `client` (FedAvg: SGD with rate 1) or `body@<id>`.
        min_batches: A commit comes about when so many batches wait; it folds all that wait.
        max_staleness: Batches whose base is more commits behind are reported as stale and not folded; `None` for any.
        staleness_weight: s(τ), by staleness in commits; see `splitfed.policies`.
        clip_norm: Clip the mean gradient to this global 2-norm.
        buffer_rules: How buffers that a pattern matches are merged, in place of the rule by their kind.
        personal: Patterns of names that the clients keep to themselves; the same as every `SplitClient`'s.
        keep_versions: How many versions stay readable, at least `max_staleness + 2`; 16 if neither says otherwise.
        device: Where the optimizer steps; the body's device if it isn't given.
        lock_seconds: How long to wait for another accumulator of this host to finish. It only saves duplicate work.

    Raises:
        ArchitectureError: the store was begun with another body.
        UnsupportedError: the optimizer can't work from a stored mean (LBFGS, SparseAdam), or the scheduler
            (ReduceLROnPlateau).
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        body: nn.Module,
        store: GradientStore,
        optimizer: OptimizerFactory,
        *,
        lr_scheduler: SchedulerFactory | None = None,
        param_groups: Groups | None = None,
        lineage: str = "body",
        min_batches: int = 1,
        max_staleness: int | None = None,
        staleness_weight: Callable[[int], float] = constant,
        clip_norm: float | None = None,
        buffer_rules: Mapping[str, Rule] | None = None,
        personal: Iterable[str] = (),
        keep_versions: int | None = None,
        device: torch.device | str | None = None,
        lock_seconds: float = 10.0,
    ) -> None:
        check_store(store)
        least = 2 + (max_staleness or 0)
        self.min_batches = at_least("min_batches", min_batches, 1)
        self.max_staleness = None if max_staleness is None else at_least("max_staleness", max_staleness, 0)
        self.keep_versions = (
            max(KEEP_VERSIONS, least) if keep_versions is None else at_least("keep_versions", keep_versions, least)
        )
        if clip_norm is not None:
            positive("clip_norm", clip_norm)
        self.store, self.lineage, self.staleness_weight = store, lineage, staleness_weight
        self.num_conflicts = 0
        """How often another accumulator won the version that this one had computed."""
        self._rules = buffer_rules
        self._lock_seconds = lock_seconds
        self._stop = threading.Event()
        self._template = Template(body, personal_names(body, personal))
        state = self._template.state(body)
        where = device_of(state, device)
        self._stepper = Stepper(self._template, optimizer, lr_scheduler, param_groups, clip_norm, where)
        merge_buffers(
            self._template.blueprint, {name: state[name] for name in self._template.buffers}, [], buffer_rules
        )
        self._versions, self._pile = store.lineage(lineage), store.pile(lineage)
        store.begin(where)
        self._versions.initialise(self._template.fingerprint(), state)
        self._unreported: Counter[str] = Counter()
        """What was cleaned up since the last commit of this accumulator, for the next one's record."""
        self._headers: dict[BatchId, dict[str, object]] = {}

    def step(self, min_batches: int | None = None, *, only: Selection | None = None) -> Commit | None:
        """Fold what waits into the next version.

        Args:
            min_batches: In place of the accumulator's own for this once; 1 folds what is left at the end of a round.
            only: Take up these batches alone; the rest goes on waiting. A round ends so.

        Returns:
            The commit, or `None` while fewer than `min_batches` wait.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later step continues.
            CorruptedError: the version to build upon was changed or deleted from outside.
        """
        least = self.min_batches if min_batches is None else at_least("min_batches", min_batches, 1)
        with self.store.blobs.lock(self._versions.keys.lock, self._lock_seconds):
            while True:
                head = self._versions.checked_head()
                try:
                    return self._try(head, least, only)
                except MissingError:
                    if self._versions.head() == head:
                        raise
                    self.num_conflicts += 1

    def run(
        self,
        stop: threading.Event | None = None,
        *,
        poll: float = 0.1,
        on_commit: Callable[[Commit], Any] | None = None,
    ) -> int:
        """Commit whenever enough batches wait, until told to stop.

        Args:
            stop: Set it to stop; or call `stop()`.
            poll: How long to wait before looking again, in seconds, when too few wait.
            on_commit: Called with each commit.

        Returns:
            How many commits were made.
        """
        ends = self._stop if stop is None else stop
        made = 0
        while not ends.is_set() and not self._stop.is_set():
            commit = self.step()
            if commit is None:
                ends.wait(poll)
                continue
            made += 1
            if on_commit is not None:
                on_commit(commit)
        return made

    def stop(self) -> None:
        """End `run()`, also one that begins later; a commit under way is finished."""
        self._stop.set()

    def _try(self, head: int, least: int, only: Selection | None) -> Commit | None:
        """One attempt: the commit, or `None` if too few wait.

        Raises:
            MissingError: what this attempt needs is gone; ordinarily because another accumulator won.
        """
        applied = self._versions.applied(head)
        if self._versions.commit(head).kind == "end":
            return None  # a client's round is over: what waits folds once its line begins anew
        piled = self._pile.waiting()
        counted = [batch for batch in piled if batch in applied]
        waiting = [batch for batch in piled if batch not in applied and (only is None or batch in only)]
        self._pile.drop(counted)
        self._unreported["duplicates"] += len(counted)
        if len(waiting) < least:
            return None
        found = sort_batches(waiting, self._header, head, self.max_staleness, only)
        if len(found.ready) < least:
            return None
        weight, numerics = self.staleness_weight, self.store.numerics()
        folded = fold(found, self._pile, self._versions.fingerprint(), head, weight, numerics)
        if not found.ready:
            return None
        commit = self._publish(head, found, folded, applied)
        self._clean(found.closed)
        return commit

    def _clean(self, closed: list[BatchId]) -> None:
        """Take what was closed off the pile, as far as the head of now says so; what stays is found counted later."""
        for batch in closed:
            self._headers.pop(batch, None)
        with contextlib.suppress(StoreError, MissingError):
            counted = self._versions.counted()
            self._pile.drop(batch for batch in closed if batch in counted)

    def _publish(self, head: int, found: Sorted, folded: Folded, applied: BatchSet) -> Commit:
        parent = self._versions.commit(head)
        self._unreported["expired"] += self._versions.sweep(self.keep_versions)
        live = self._stepper.take(self._versions, head)
        self._stepper.step(live, folded.mean.mean())
        state = self._template.state(live.module)
        held = self._versions.state(head)
        state |= merge_buffers(
            self._template.blueprint, {name: held[name] for name in self._template.buffers}, folded.updates, self._rules
        )
        commit = Commit(
            version=head + 1,
            kind="fold",
            nonce="",
            files={},
            frozen=parent.frozen,
            num_samples=folded.mean.num_samples,
            staleness=dict(sorted(folded.staleness.items())),
            folded=BatchSet(found.ready),
            older={version: BatchSet(batches) for version, batches in sorted(found.older.items())},
            stale=BatchSet(found.stale),
            rejected=BatchSet(found.rejected),
            skipped=BatchSet(found.skipped),
            num_duplicates=self._unreported["duplicates"],
            num_expired=self._unreported["expired"],
            num_foreign=folded.num_foreign,
        )
        optimizer = optimizers.capture(live.optimizer, live.scheduler)
        made = self._versions.publish(commit, state, optimizer, applied.union(found.closed))
        if made is None:
            raise MissingError(f"version {head + 1} was made by another accumulator")
        self._stepper.keep(live, made.nonce)
        self._unreported.clear()
        return made

    def _header(self, batch: BatchId) -> Mapping[str, Any]:
        if batch not in self._headers:
            header = self._pile.peek(batch)
            if header is None:
                raise MissingError(f"batch {batch} is neither counted nor on file: it was deleted from outside")
            self._headers[batch] = header
        return self._headers[batch]
