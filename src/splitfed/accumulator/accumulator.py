"""The accumulator: pending gradients become the next version.

One commit folds the pending gradients into their sample-weighted mean, in an order that is a
function of their ids alone, takes one optimizer step, and publishes weights, buffers, optimizer
state and the applied table as the next version. Which gradients are folded, and what staleness
costs, is policy; the mechanism is the same for every mode. Where nothing that waits can be folded,
as it proved unfit, a commit closes it all the same: the optimizer takes no step then.

Accumulators may race: each computes, one wins, and a loser begins again from the winner's version.
Any of them may die at any moment; a new one continues from the store alone.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.accumulator.buffers import Rule, merge_buffers
from splitfed.accumulator.derive import Deriver
from splitfed.accumulator.fold import Folded, Older, fold, oldest, sort_batches
from splitfed.accumulator.gather import Gatherer
from splitfed.accumulator.grouped import Grouped
from splitfed.accumulator.optimizer import Stepper, capture
from splitfed.accumulator.policies import StalenessWeight, constant
from splitfed.accumulator.recorded import differences, note, read, record_of
from splitfed.accumulator.settings import (
    CommitSettings,
    Groups,
    OptimizerFactory,
    SchedulerFactory,
)
from splitfed.checks import at_least
from splitfed.errors import (
    CorruptedError,
    ExpiredError,
    FormatError,
    InputError,
    MissingError,
    ReplayError,
    StoreError,
)
from splitfed.model.fingerprint import personal_names
from splitfed.model.skeleton import Template, device_of
from splitfed.model.stamp import stamp_of
from splitfed.protocol.backoff import looking
from splitfed.protocol.flows import Flow, added, from_plain
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import BufferUpdate, GradientRecord
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.beginning import begin_with, check_durability
from splitfed.store.commit import Commit
from splitfed.store.holder import Held
from splitfed.store.store import GradientStore, check_store
from splitfed.store.sums import Sum

MANY_SKIPS = 256
"""So many numbers that clients have given up are closed without waiting for gradients. Fewer wait:
each commit is a version, and takes one out of the retention window."""
_MOST_KEPT = 64
"""So many gradients are added up in one pass at most: each is a file that is open."""
_KEPT_BYTES = 64 << 20
"""Where they aren't mapped files, so many bytes of them."""
_ALONE: Mapping[str, Any] = MappingProxyType({})
"""What a record says of the other lineage where each is committed by itself."""


class Accumulator:
    """Commits the pending gradients of one lineage.

    Args:
        body: The module whose gradients these are; it isn't changed. Its weights become version 0
            if the store is new.
        store: The store of the run.
        optimizer: Makes a torch optimizer from the trainable parameters, in `named_parameters()`
            order, each tied one once. Of a body that is wholly frozen only buffers move: then it
            isn't called.
        lr_scheduler: Makes a scheduler from the optimizer; it steps once per commit.
        param_groups: Makes parameter groups from the module, in place of the plain list.
        lineage: `body`, `client` (FedAvg: SGD with rate 1) or `body@<id>`.
        min_batches: A commit comes about when so many batches are pending; it folds all of them.
        max_batches: It folds so many at most: the oldest by the version that they were computed at,
            and of one version, as many of each client as of another. The others stay pending, and
            grow older by a commit: with `max_staleness`, a backlog that never ends becomes stale.
            `None` for all of them.
        max_staleness: Batches whose base is more commits behind are reported as stale and not
            folded; `None` for any.
        staleness_weight: s(τ), by staleness in commits; see `splitfed.policies`.
        clip_norm: Clip the mean gradient to this global 2-norm.
        buffer_rules: How buffers that a pattern matches are merged, in place of the rule by their
            kind.
        personal: Patterns of names that the clients keep to themselves; the same as every
            `SplitClient`'s.
        keep_versions: How many versions stay readable, at least `max_staleness + 2`; 16 if neither
            says otherwise.
        keep_bytes: So many bytes of older versions stay for calls that are still open, with what
            these have stored; 0 for none. By default 64 MiB, or four versions' weights if that is
            more. The oldest calls go first, and so do those of clients with many.
        device: Where the optimizer steps; the body's device if it isn't given.
        lock_seconds: How long to wait for another accumulator of this host to finish. It only saves
            duplicate work.
        halves: The accumulator of the client halves, whose clients publish gradients: each commit
            is then one of both, over the same batches (`splitfed.policies`, mode `grouped`).
        durability: What is on file when a batch is acknowledged, as for `SplitServer`. In a
            `"log"` a gradient may be computed here, from the weights that it ran at: so staleness
            is bounded by what stays readable, `keep_versions - 2` of the lineage's first
            accumulator, and all of them keep at least as many versions as that one.

    Raises:
        ArchitectureError: the store was begun with another body, or one that was cut elsewhere.
        UnsupportedError: the optimizer can't work from a stored mean (LBFGS, SparseAdam), or the
            scheduler (ReduceLROnPlateau).
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
        max_batches: int | None = None,
        max_staleness: int | None = None,
        staleness_weight: StalenessWeight = constant,
        clip_norm: float | None = None,
        buffer_rules: Mapping[str, Rule] | None = None,
        personal: Iterable[str] = (),
        keep_versions: int | None = None,
        keep_bytes: int | None = None,
        device: torch.device | str | None = None,
        lock_seconds: float = 10.0,
        halves: Accumulator | None = None,
        durability: str | None = None,
    ) -> None:
        check_store(store)
        check_durability(durability)
        self.settings = CommitSettings(
            min_batches=min_batches,
            max_batches=max_batches,
            max_staleness=max_staleness,
            staleness_weight=staleness_weight,
            clip_norm=clip_norm,
            lr_scheduler=lr_scheduler,
            param_groups=param_groups,
            buffer_rules=buffer_rules,
            personal=personal,
            keep_versions=keep_versions,
            keep_bytes=keep_bytes,
            device=device,
            lock_seconds=lock_seconds,
        )
        """When it commits, what staleness costs, and how the optimizer steps."""
        self.store = store
        self.lineage = lineage
        self.num_conflicts = 0
        """How often another accumulator won the version that this one had computed."""
        self._stop = threading.Event()
        self._template = Template(body, personal_names(body, self.settings.personal))
        state = self._template.state(body)
        place = device_of(state, self.settings.device)
        self._recorded = record_of(self._template, optimizer, self.settings, place)
        self._stepper = Stepper(self._template, optimizer, self.settings, place)
        # All that can be wrong with the arguments is found before anything is written: this merge
        # of nothing checks the rules.
        self._merge(state, [])
        self._noted = ""
        self._compared: set[str] = set()
        """The settings of others that this one's were compared with."""
        self._versions = store.lineage(lineage)
        self._pile = store.pile(lineage)
        numerics = store.begin(place)
        self._gatherer = Gatherer(store, lineage)
        self._deriver = Deriver(self._template, self._versions.state, place, numerics)
        self._archive = store.archive(lineage)
        store.attended = True
        begin_with(
            self._versions,
            self._template.fingerprint(),
            state,
            part=stamp_of(body),
            durability=durability,
        )
        store.note_begun(self._versions.known)
        is_log = self._versions.durability == "log"
        self._bounded = self._within_window() if is_log else self.settings
        """The settings within the window that a log has."""
        self._unreported: Counter[str] = Counter()
        """What was cleaned up since the last commit of this accumulator, for the next record."""
        self._headers: dict[BatchId, dict[str, object]] = {}
        self._unfit: set[BatchId] = set()
        """Pending batches that were found unfit, and warned of."""
        self._deferred: set[BatchId] = set()
        """Pending batches of a log whose gradients this process can't compute, and has said so."""
        self._group = None if halves is None else Grouped(self, halves)

    def __repr__(self) -> str:
        folds = f"min_batches={self.min_batches}"
        if self.max_batches is not None:
            folds += f", max_batches={self.max_batches}"
        place = f"{self.store.shown!r}, lineage={self.lineage!r}"
        return f"Accumulator({place}, version={self._versions.known}, {folds})"

    @property
    def min_batches(self) -> int:
        """The number of pending batches that makes a commit."""
        return self.settings.min_batches

    @property
    def max_batches(self) -> int | None:
        """A commit folds so many batches at most; `None` for all that are pending."""
        return self.settings.max_batches

    @property
    def max_staleness(self) -> int | None:
        """Batches whose base is more commits behind aren't folded; `None` for any."""
        return self._bounded.max_staleness

    @property
    def staleness_weight(self) -> StalenessWeight:
        """s(τ), by staleness in commits."""
        return self.settings.staleness_weight

    @property
    def keep_versions(self) -> int:
        """The number of versions that stay readable."""
        return self._bounded.window

    def step(self, min_batches: int | None = None, *, only: Verdict | None = None) -> Commit | None:
        """Fold the pending batches into the next version.

        Args:
            min_batches: In place of the accumulator's own for this once; 1 folds what is left at
                the end of a round.
            only: What was decided on these batches; others stay pending. A round ends so, and
                `max_batches` doesn't apply.

        Returns:
            The commit, or `None` while fewer than `min_batches` are pending. If all that would have
            been folded proved unfit, it closes them, with `num_batches` 0 and the same weights.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later step continues.
            CorruptedError: the version to build upon was changed or deleted from outside.
        """
        if self._group is not None and only is None:
            return self._group.step(min_batches)
        least = self.settings.min_batches
        if min_batches is not None:
            least = at_least("min_batches", min_batches, 1)
        with self.store.blobs.lock(self._versions.keys.lock, self.settings.lock_seconds):
            while True:
                head = self._versions.checked_head()
                try:
                    return self._attempt(head, least, only)
                except MissingError:
                    # Files are missing because another accumulator won: then the head has moved,
                    # and this one begins again from there. If it hasn't, they are truly gone.
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
        """Commit whenever enough batches are pending, until it is stopped.

        Args:
            stop: Set it to stop; or call `stop()`.
            poll: Longest pause between two looks when too few are pending, in seconds. The first
                pauses after a commit are much shorter: while batches come, each is seen at once.
            on_commit: Called with each commit.

        Returns:
            The number of commits that were made.
        """
        ends = self._stop if stop is None else stop
        looks = looking(poll, ends)
        made = 0
        while not ends.is_set() and not self._stop.is_set():
            commit = self.step()
            if commit is None:
                looks.wait()
                continue
            looks = looking(poll, ends)
            made += 1
            if on_commit is not None:
                on_commit(commit)
        return made

    def stop(self) -> None:
        """End `run()`, also one that begins later; a commit under way is finished."""
        self._stop.set()

    def _attempt(
        self, head: int, least: int, only: Verdict | None, together: Mapping[str, Any] = _ALONE
    ) -> Commit | None:
        """One attempt: the commit, or `None` if too few batches are pending.

        Args:
            head: The version to build upon.
            least: So many batches make a commit; 0 if one comes about in any case.
            only: As for `step`.
            together: What the record says of the other lineage, if both are committed together.

        Raises:
            MissingError: files that it needs are gone; ordinarily another accumulator won.
        """
        applied = self._versions.applied(head)
        newest = self._versions.commit(head)
        self._compare_settings(newest)
        if newest.kind == "end":
            return None  # a client's round is over: its batches fold once its line begins again
        found = self._sorted(head, newest, applied, only, least)
        if found is None:
            return None
        verdict, older = found
        ready = [batch for batch in verdict.folded if batch not in self._deferred]
        waiting = {batch: str(self._header(batch).get("holder") or "") for batch in ready}
        is_held = any(waiting.values())
        used: list[Sum] = []
        try:
            held = self._gatherer.gather(waiting, applied) if is_held else Held()
            if is_held:
                # Listed again, after the sums: these name no batch that isn't there.
                found = self._sorted(head, newest, applied, only, least)
                if found is None:
                    return None
                verdict, older = found
                headers = {batch: self._header(batch) for batch in verdict.folded}
                used = [one for one in held.sums if one.is_usable(headers)]
            folded = self._fold(verdict, head, Held(held.gradients, used))
            self._warn_deferred(folded)
            if least and not list(folded.verdict):
                return None
            commit = self._publish(head, folded, older, together)
            # Not where that was interrupted: another thread may still read the sums.
            self._gatherer.recycle(used)
            return commit
        finally:
            if is_held:
                self._gatherer.give_back(used)

    def _sorted(
        self, head: int, newest: Commit, applied: BatchSet, only: Verdict | None, least: int
    ) -> tuple[Verdict, Older] | None:
        """What becomes of the pending batches, if they are enough for a commit."""
        pending = self._pending(applied, only)
        if len(pending) < min(least, MANY_SKIPS):
            return None
        verdict, older = sort_batches(
            pending,
            self._header_at(head),
            head,
            self._bounded,
            only,
            self._unfit,
            newest.is_abandoned,
        )
        ready = sum(batch not in self._deferred for batch in verdict.folded)
        # Too few: but nobody would ever take away what can't be read, if nothing else comes.
        if ready < least and (ready or self._unfit.isdisjoint(pending)):
            if len(verdict.skipped) < MANY_SKIPS:
                return None
            # Nor numbers that were given up: their files pile up, and no gradient need ever come.
            verdict, older = Verdict(skipped=verdict.skipped), {}
        most = self.settings.max_batches
        if most is None or only is not None:
            return verdict, older
        return oldest(verdict, older, most, self._deferred)

    def _fold(self, verdict: Verdict, head: int, held: Held) -> Folded:
        """Add up what is to be folded; what is held needn't be read."""

        def read(batch: BatchId) -> GradientRecord | None:
            found = held.gradients.get(batch)
            if found is not None and found.digest == self._header(batch)["digest"]:
                return found
            if batch in self._deferred:
                raise ReplayError("it was tried before")
            return self._read(batch, head)

        return fold(
            verdict,
            read,
            self._versions.fingerprint(),
            head,
            self.settings,
            self.store.numerics(),
            self._unfit,
            held.sums,
            # Those that are held anyway can as well wait for the mean: no sum of them is made.
            max(self._keeps, len(held.gradients) + 1),
        )

    def _warn_deferred(self, folded: Folded) -> None:
        """Say, once, which acknowledged batches this process can't compute."""
        new = {b: error for b, error in folded.deferred.items() if b not in self._deferred}
        self._deferred |= new.keys()
        if new:
            batch, error = next(iter(new.items()))
            warnings.warn(
                f"the gradients of {len(new)} batches can't be computed again here, as of batch "
                f"{batch}: {error}. They are acknowledged, so they stay pending, until an "
                "accumulator commits them whose body computes as the servers' do, or until they "
                f"are older than {self.max_staleness} commits",
                stacklevel=4,
            )

    def _pending(self, applied: BatchSet, only: Verdict | None) -> list[BatchId]:
        """The batches to take up; files of batches that are counted already are deleted."""
        piled = self._pile.waiting()
        self._forget(piled)
        # A commit deletes its batches last. One that was killed before has left them behind: the
        # applied table says that they are counted, so they may go, and must not fold again.
        counted = [batch for batch in piled if batch in applied]
        self._drop(counted)
        self._unreported["duplicates"] += len(counted)
        uncounted = (batch for batch in piled if batch not in applied)
        return [batch for batch in uncounted if only is None or batch in only]

    def _forget(self, piled: list[BatchId]) -> None:
        """Drop what is known of batches that aren't on file any more.

        One's own are dropped as they are closed; these another accumulator has closed.
        """
        if self._headers or self._unfit or self._deferred:
            there = set(piled)
            self._headers = {batch: self._headers[batch] for batch in there & self._headers.keys()}
            self._unfit &= there
            self._deferred &= there

    def _publish(
        self, head: int, folded: Folded, older: Older, together: Mapping[str, Any]
    ) -> Commit:
        parent = self._versions.commit(head)
        keeps_first = self._archive is not None
        self._unreported["expired"] += self._versions.sweep(
            self._bounded.window, self.settings.keep_bytes, first=keeps_first
        )
        live = self._stepper.take(self._versions, head)
        if folded.verdict.folded:
            self._stepper.step(live, folded.mean)
        state = self._template.state(live.module)
        # Buffers are those of the head as it is in the store, not the module's: it may live on
        # another device, and nothing but this merge changes them.
        buffers = self._merge(live.buffers, folded.updates)
        state |= buffers
        commit = Commit(
            version=head + 1,
            kind="fold",
            nonce="",
            files={},
            frozen=parent.frozen,
            num_samples=folded.num_samples,
            staleness=dict(sorted(folded.staleness.items())),
            verdict=folded.verdict,
            older=older,
            num_duplicates=self._unreported["duplicates"],
            num_expired=self._unreported["expired"],
            num_foreign=folded.num_foreign,
            settings=self._own_settings(),
            weights=folded.weights,
            groups=tuple(tuple(one.batches) for one in folded.sums),
            flows=self._flows(folded.verdict.folded),
            **together,
        )
        optimizer = None
        if live.optimizer is not None:
            # It is written before anything changes it again.
            optimizer = capture(live.optimizer, live.scheduler, copied=False)
        made = self._versions.publish(commit, state, optimizer)
        if made is None:
            raise MissingError(f"version {head + 1} was made by another accumulator")
        self._stepper.keep(live, made.nonce, buffers)
        self._unreported.clear()
        self._clean(list(folded.verdict))
        return made

    def _flows(self, folded: Iterable[BatchId]) -> dict[str, Flow]:
        """What is told of compression by updates; nothing of an update whose file says nonsense."""
        told = []
        for batch in folded:
            flows = self._header(batch).get("flows")
            if isinstance(flows, dict) and flows:
                with contextlib.suppress(FormatError):
                    told.append(from_plain(flows))
        return added(told)

    def _within_window(self) -> CommitSettings:
        """The settings, within what the first accumulator of a log has decided on.

        Batches are computed from weights that no accumulator may have deleted: so all keep as many
        versions as that one does, and none waits for batches that are older.

        Raises:
            InputError: batches may be older than the versions that are kept.
        """
        settings = self.settings
        staleness = settings.max_staleness
        own = settings.window - 2 if staleness is None else staleness
        keep = self._versions.window(settings.window)
        if staleness is not None and staleness > keep - 2:
            raise InputError(
                f"max_staleness is {staleness}: expected at most {keep - 2}, since the "
                f"accumulators of lineage {self.lineage!r}, a log, keep {keep} versions, as the "
                "first of them has decided, and a batch is computed from the weights of its version"
            )
        return replace(
            settings,
            max_staleness=min(own, keep - 2),
            keep_versions=max(keep, settings.window),
        )

    def _own_settings(self) -> str:
        """The hash of this accumulator's settings, which are on record from its first commit on."""
        if not self._noted:
            self._noted = note(self._versions, self._recorded)
        return self._noted

    def _compare_settings(self, newest: Commit) -> None:
        """Warn, once, of a commit before this accumulator's own that was made in another way."""
        if newest.settings in self._compared:
            return
        self._compared.add(newest.settings)
        if not newest.settings or newest.settings == self._own_settings():
            return
        with contextlib.suppress(CorruptedError, FormatError):
            before = read(self._versions, newest.settings)
            found = differences(before, self._recorded)
            if not found:
                return
            warnings.warn(
                f"version {newest.version} of lineage {self.lineage!r} was committed with other "
                f"settings than this accumulator's: {', '.join(found)}. Both are on record, and "
                "commits of the two may alternate: stop one of them, if that isn't meant",
                stacklevel=4,
            )

    def _read(self, batch: BatchId, head: int) -> GradientRecord | None:
        """The gradient of a pending batch; in a log it is computed from its recipes.

        Raises:
            MissingError: the weights that it ran at have left the window, as others have committed.
            CorruptedError: these weights were deleted from outside: nobody can compute it any more.
        """
        record = self._pile.read(batch)
        if record is None or not record.recipes:
            return record
        try:
            return self._deriver.gradient(record)
        except ExpiredError as error:
            if self._versions.head() != head:
                raise
            what = f"what it follows from was deleted from outside: {error}"
            raise CorruptedError(what) from error

    @property
    def _keeps(self) -> int:
        """How many gradients a commit may hold at a time: mapped files take no memory."""
        if self.store.blobs.is_mapped and self._versions.durability == "gradient":
            return _MOST_KEPT
        trainable = (self._template.parameters[name] for name in self._template.trainable)
        num_bytes = sum(parameter.nbytes for parameter in trainable)
        return max(1, min(_MOST_KEPT, _KEPT_BYTES // max(1, num_bytes)))

    def _merge(self, held: Mapping[str, Tensor], updates: list[BufferUpdate]) -> dict[str, Tensor]:
        """The buffers after a commit with these updates, from their values before it."""
        buffers = {name: held[name] for name in self._template.buffers}
        return merge_buffers(self._template.blueprint, buffers, updates, self.settings.buffer_rules)

    def _clean(self, closed: list[BatchId]) -> None:
        """Delete the files of closed batches, as far as the applied table of now holds them.

        What stays is found counted by a later commit.
        """
        for batch in closed:
            self._headers.pop(batch, None)
            self._unfit.discard(batch)
            self._deferred.discard(batch)
        # The table is read again and not taken from the commit: a batch may be deleted only if the
        # head of now has it as counted.
        with contextlib.suppress(StoreError, MissingError):
            counted = self._versions.counted()
            self._drop([batch for batch in closed if batch in counted])
            if self._versions.durability == "log":
                oldest = self._versions.head() - (self.max_staleness or 0)
                self._gatherer.clean(counted, oldest)

    def _drop(self, counted: list[BatchId]) -> None:
        """Delete the files of counted batches, or move them where they are kept."""
        if not counted:
            return
        self._versions.confirm_hint()
        if self._archive is not None:
            for batch in counted:
                self._archive.adopt(batch)
        self._pile.drop(counted)

    def _header_at(self, head: int) -> Callable[[BatchId], Mapping[str, Any]]:
        """What reads headers for a commit that builds upon a version.

        A batch of a later one was computed after another accumulator had won: then this attempt
        begins again, and only if there is no such version is something wrong with the batch.
        """

        def header(batch: BatchId) -> Mapping[str, Any]:
            found = self._header(batch)
            base = found.get("base_version")
            if isinstance(base, int) and base > head and self._versions.head() > head:
                raise MissingError(f"version {head + 1} was made by another accumulator")
            return found

        return header

    def _header(self, batch: BatchId) -> Mapping[str, Any]:
        if batch not in self._headers:
            header = self._pile.peek(batch)
            if header is None:
                raise MissingError(
                    f"batch {batch} is neither counted nor on file: it was deleted from outside"
                )
            self._headers[batch] = header
        return self._headers[batch]
