"""A body per client, averaged when a round ends: SFLV1.

This is algorithm 1 of Thapa et al. 2020 (arXiv 2004.12088). Each client's batches are committed on
its own lineage `body@<id>`, one optimizer step each. When the round ends, each line's change, start
− end with the weight of its samples, is one gradient on the `body` lineage, where SGD with rate 1
applies their mean: FedAvg by the same accumulator and commit protocol as everywhere. Then every
line begins again from there.

The race: a batch that is committed on a line while the round ends would be in the change or not,
and a killed average would be repeated with another change under another id. So a line is closed
first, by a commit of its own ('end'), on which nothing folds; what arrives meanwhile stays pending.
From there all is a function of that commit: the change is created once under an id that it
determines, and a line begins again ('begin') once `body` has counted it. Stop anywhere, call
`average()` again: each step finds what was done.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.buffers import Rule
from splitfed.accumulator.policies import Mode, StalenessWeight, constant
from splitfed.accumulator.settings import (
    CommitSettings,
    Groups,
    OptimizerFactory,
    SchedulerFactory,
)
from splitfed.checks import at_least
from splitfed.errors import ExpiredError, MissingError
from splitfed.federation.reports import AVERAGED
from splitfed.model.copying import deep_copy
from splitfed.model.numerics import same_bits
from splitfed.model.skeleton import Fingerprint, device_of, unwrap
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import BufferUpdate, GradientRecord, content_digest
from splitfed.store.batches import Sealer
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.cache import Bounded
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage
from splitfed.store.rounds import Ending, Plan
from splitfed.store.store import GradientStore, check_store

BEGUN = ("initial", "begin")
"""The kinds of commit that a line's turn begins with."""


def fedavg(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer that applies the mean of start − end as it is."""
    return torch.optim.SGD(parameters, lr=1.0)


class PerClient:
    """Commits the batches of each client on a body of its own, and averages these bodies.

    Args:
        body: The server's part of the network; a copy is kept.
        store: The store of the run.
        optimizer: Makes the optimizer of each client's body; each has its own state, which goes on
            across rounds.
        average: Makes the optimizer that applies the mean change; SGD with rate 1, which is FedAvg,
            if not given.
        lr_scheduler: Makes the scheduler of each client's body; it steps once per commit there.
        param_groups: Makes parameter groups from a body, in place of the plain list.
        max_staleness: Changes that began more averages ago are reported as stale and not folded;
            `None` for any.
        staleness_weight: s(τ) of a change, by averages since it began; see `splitfed.policies`.
        clip_norm: Clip each client's mean gradient to this global 2-norm.
        buffer_rules: How buffers that a pattern matches are merged, in place of the rule by their
            kind.
        keep_versions: How many versions of each line stay readable.
        device: Where optimizers step; the body's device if it isn't given.
        lock_seconds: How long to wait for another accumulator of this host to finish.
        keep_bodies: How many clients' bodies and optimizers stay in memory; changes speed only.

    Raises:
        ArchitectureError: the store was begun with another body.
        UnsupportedError: an optimizer or scheduler that can't work from a stored mean.
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        body: nn.Module,
        store: GradientStore,
        optimizer: OptimizerFactory,
        *,
        average: OptimizerFactory = fedavg,
        lr_scheduler: SchedulerFactory | None = None,
        param_groups: Groups | None = None,
        max_staleness: int | None = None,
        staleness_weight: StalenessWeight = constant,
        clip_norm: float | None = None,
        buffer_rules: Mapping[str, Rule] | None = None,
        keep_versions: int | None = None,
        device: torch.device | str | None = None,
        lock_seconds: float = 10.0,
        keep_bodies: int = 32,
    ) -> None:
        shared = CommitSettings(
            buffer_rules=buffer_rules,
            keep_versions=keep_versions,
            device=device,
            lock_seconds=lock_seconds,
        )
        averaging = replace(shared, max_staleness=max_staleness, staleness_weight=staleness_weight)
        # Checked before the accumulator begins the store: a wrong setting leaves nothing behind.
        self._settings = replace(
            shared, lr_scheduler=lr_scheduler, param_groups=param_groups, clip_norm=clip_norm
        )
        """Those of each client's line."""
        check_store(store)
        # A change is on file as it is, and may be as old as `max_staleness` says: no log has that.
        is_new = store.lineage("body").head() < 0
        durability = "gradient" if is_new else None
        self.accumulator = Accumulator(
            body, store, average, durability=durability, **averaging.keywords()
        )
        """The accumulator of the `body` lineage."""
        self.store = store
        self._body = deep_copy(unwrap(body))
        self._optimizer = optimizer
        self._numerics = store.begin(device_of(dict(body.named_parameters()), device))
        self._kept: Bounded[str, Accumulator] = Bounded(at_least("keep_bodies", keep_bodies, 1))

    def clients(self) -> list[str]:
        """The clients that have a body of their own, in order."""
        return [name for name in self.store.clients() if self._line(name).head() >= 0]

    def step(self, clients: Iterable[str] | None = None) -> list[Commit]:
        """Commit the pending batches, each client's on its own line.

        Args:
            clients: Only theirs; all clients' if it isn't given.

        Returns:
            The commits.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later step continues.
        """
        commits = []
        for client_id in self._begun(clients):
            line = self._line(client_id)
            if line.commit(line.head()).kind == "end":
                self._begin(client_id)  # an average may have been killed before it came to this
            commits.append(self._accumulator(client_id).step())
        return [commit for commit in commits if commit is not None]

    def average(
        self, clients: Iterable[str] | None = None, *, upto: int | None = None
    ) -> Commit | None:
        """End the round: average the bodies that have moved, by samples, and begin all lines again.

        The pending batches of these clients are committed first. A repeated call counts nothing
        twice.

        Args:
            clients: Average these alone; the others keep what they have for a later round.
            upto: Only lines that began at this version of `body` or before. Whoever ends a round
                that another has ended meanwhile leaves the next one alone with it.

        Returns:
            The commit of `body`, or `None` if no change is pending.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later call continues.
        """
        chosen = self._begun(clients)
        self.step(chosen)
        changes = []
        for client_id in chosen:
            ended = self._end(self._line(client_id), upto)
            if ended is not None:
                changes.append(self._publish(client_id, ended))
        commit = None
        if changes:
            commit = self.accumulator.step(min_batches=1, only=self._selection(changes))
        for client_id in self.clients():
            self._begin(client_id)
        return commit

    def suits(self, mode: Mode) -> bool:
        """Whether this is how a mode wants the body's batches committed."""
        return mode.per_client

    def lineages(self) -> list[str]:
        """The lineages on which the calls of clients run: one for each."""
        return [f"body@{client_id}" for client_id in self.clients()]

    def stream(self, clients: Iterable[str]) -> bool:
        """Commit the pending batches of clients on their lines; `body` stays as it is."""
        self.step(clients)
        return False

    def global_step(self) -> None:
        """Nothing: bodies of clients have no step in common before the round ends."""

    def end_round(self, plan: Plan, ending: Ending) -> None:
        """Average the bodies of the clients whose updates count; once, however often called."""
        is_done = self.store.latest_version("body") > plan.body_version
        self.average(() if is_done else ending.samples, upto=plan.body_version)

    def _selection(self, changes: list[BatchId]) -> Verdict:
        """These changes, and pending batches that are no line's change or count nowhere.

        Changes of a round to come aren't among them: another coordinator may be ending it already.
        """
        pile = self.store.pile("body")
        free = []
        for batch in pile.waiting():
            if batch in changes:
                continue
            is_change = batch.incarnation == AVERAGED
            if not is_change or (pile.peek(batch) or {}).get("kind") == "rejected":
                free.append(batch)
        return Verdict(folded=BatchSet([*changes, *free]))

    def _begun(self, clients: Iterable[str] | None) -> list[str]:
        """The clients of these that have a line, in order."""
        if clients is None:
            return self.clients()
        return [name for name in sorted(set(clients)) if self._line(name).head() >= 0]

    def _line(self, client_id: str) -> Lineage:
        return self.store.lineage(f"body@{client_id}")

    def _accumulator(self, client_id: str) -> Accumulator:
        found = self._kept.get(client_id)
        if found is None:
            lineage = f"body@{client_id}"
            settings = self._settings.keywords()
            made = Accumulator(self._body, self.store, self._optimizer, lineage=lineage, **settings)
            found = self._kept.put(client_id, made)
        return found

    def _end(self, line: Lineage, upto: int | None) -> Commit | None:
        """Close a line that has moved.

        Returns:
            Its closing commit, or `None` if it hasn't moved or began after `upto`.
        """
        while True:
            head = line.head()
            began, samples = since(line, head)
            if upto is not None and began.source is not None and began.source > upto:
                return None
            if line.commit(head).kind == "end":
                return line.commit(head)
            if not samples:
                return None
            commit = Commit(
                version=head + 1,
                kind="end",
                nonce="",
                files={},
                source=began.source,
                turn=_turn(line, head),
                num_samples=samples,
            )
            made = line.restate(commit, line.checked_state(head))
            if made is not None:  # else the line has moved meanwhile, and is looked at again
                return made

    def _publish(self, client_id: str, ended: Commit) -> BatchId:
        """Make a closed line's change a pending batch of `body`, once; returns its id.

        All of it follows from `ended`, so whoever repeats this makes the same file.
        """
        batch = BatchId(client_id, AVERAGED, ended.turn)
        body = self.store.lineage("body")
        sealer = Sealer(body, self.store.pile("body"), self._numerics)
        if sealer.is_known(batch):
            return batch
        if ended.source is None:
            raise MissingError(
                f"lineage 'body@{client_id}' doesn't say which version of 'body' it began from: "
                "expected one that a SplitServer(per_client=True) began"
            )
        content = (batch, ended.source, ended.version, ended.num_samples)
        record = GradientRecord(
            kind="gradient",
            base_version=ended.source,
            num_samples=ended.num_samples,
            loss_scale=1.0,
            digest=content_digest(content, ()),
            numerics=self._numerics,
            gradients={},
            buffers=[],
        )
        try:
            start = body.checked_state(ended.source)
            fingerprint = body.fingerprint()
            end = self._line(client_id).checked_state(ended.version)
            record = change(record, fingerprint, start, end)
        except ExpiredError:
            record = replace(record, kind="rejected")
        if sealer.store(batch, record) == "rejected":
            warnings.warn(
                f"what client {client_id!r} changed in its body since version {ended.source} "
                "counts nowhere: it isn't finite, or that version has left the retention window "
                "(keep_versions). Its line begins again",
                stacklevel=3,
            )
        return batch

    def _begin(self, client_id: str) -> None:
        """Let a line go on from the newest average, unless a change of it is still to count."""
        line = self._line(client_id)
        body = self.store.lineage("body")
        head = line.head()
        newest = body.head()
        began, samples = since(line, head)
        last = line.commit(head)
        turn = last.turn
        is_rejected = False
        if last.kind == "end":
            change_id = BatchId(client_id, AVERAGED, last.turn)
            header = self.store.pile("body").peek(change_id) or {}
            is_rejected = header.get("kind") == "rejected"
            # A line that began again before its change counted would lose the change: the end
            # that it follows from would have left the head.
            if not is_rejected and change_id not in body.counted():
                return
            turn += 1
        elif samples or last.kind not in BEGUN or began.source == newest:
            return
        commit = Commit(head + 1, "begin", "", {}, source=newest, turn=turn)
        # The optimizer goes on across rounds; not one whose steps made the body useless.
        line.restate(commit, body.checked_state(newest), optimizer=not is_rejected)


def make_body(
    mode: Mode,
    module: nn.Module,
    store: GradientStore,
    optimizer: OptimizerFactory,
    **settings: Any,
) -> Accumulator | PerClient:
    """The accumulator of the body, or of the bodies, that follows a mode.

    Args:
        mode: The mode.
        module: The server's part of the network.
        store: The store of the run.
        optimizer: Makes the optimizer of each body.
        settings: Further keywords, such as `lr_scheduler`.
    """
    keywords = {**mode.settings(), **settings}
    if mode.per_client:
        return PerClient(module, store, optimizer, **keywords)
    return Accumulator(module, store, optimizer, **keywords)


def since(line: Lineage, head: int) -> tuple[Commit, float]:
    """The commit that a line's turn began with, and the samples folded since.

    The trap: a rollback undoes folds, whose samples must not be counted, so the walk back follows
    what was restored.
    """
    samples = 0.0
    commit = line.commit(head)
    while commit.kind not in BEGUN:
        if commit.kind == "fold":
            samples += commit.num_samples
        before = commit.version - 1 if commit.restored is None else commit.restored
        commit = line.commit(before)
    return commit, samples


def change(
    record: GradientRecord,
    fingerprint: Fingerprint,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
) -> GradientRecord:
    """`record` with start − end of the parameters, and the buffers that changed."""

    def names(role: str) -> list[str]:
        return [name for name, entry in fingerprint.items() if entry.get("role") == role]

    changed = [name for name in names("buffer") if not same_bits(start[name], end[name])]
    update = BufferUpdate(
        values={name: end[name] for name in changed},
        bases={name: start[name] for name in changed},
        num_samples=record.num_samples,
    )
    gradients = {name: start[name] - end[name] for name in names("trainable")}
    return replace(record, gradients=gradients, buffers=[update])


def _turn(line: Lineage, head: int) -> int:
    """The number of a line's turn: that of the newest commit that began one, rolled back or not."""
    for version in range(head, -1, -1):
        commit = line.commit(version)
        if commit.kind in BEGUN:
            return commit.turn
    return 0
