"""A body per client, averaged when a round ends: SFLV1 (Thapa et al. 2020, arXiv 2004.12088, algorithm 1).

Each client's batches are committed on its own lineage `body@<id>`, one optimizer step each. When the round ends, each
line's change, start − end with the weight of its samples, is one gradient on the `body` lineage, where SGD with rate 1
applies their mean: FedAvg by the same accumulator and commit protocol as everywhere. Then every line begins anew there.

The race: a batch that is committed on a line while the round ends would be in the change or not, and a killed average
would be repeated with another change under another id. So a line is closed first, by a commit of its own ('end'), on
which nothing folds; what arrives meanwhile waits. From there all is a function of that commit: the change is created
once under an id that it determines, and a line begins anew ('begin') once `body` has counted it. Stop anywhere, call
`average()` again: each step finds what was done.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.buffers import Rule
from splitfed.accumulator.optimizer import Groups, OptimizerFactory, SchedulerFactory
from splitfed.accumulator.policies import StalenessWeight, constant
from splitfed.checks import at_least
from splitfed.errors import ExpiredError, MissingError
from splitfed.federation.changes import BEGUN, change, since
from splitfed.model.copying import deep_copy
from splitfed.model.skeleton import device_of, unwrap
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord, content_digest
from splitfed.store.batchset import BatchSet
from splitfed.store.cache import Bounded
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage
from splitfed.store.sealing import Sealer
from splitfed.store.selection import Selection
from splitfed.store.store import GradientStore


def fedavg(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer that applies the mean of start − end as it is."""
    return torch.optim.SGD(parameters, lr=1.0)


class PerClient:
    """Commits the batches of each client on a body of its own, and averages these bodies.

    Args:
        body: The server's part of the network; a copy is kept.
        store: Where everything is.
        optimizer: Makes the optimizer of each client's body; each has its own state, which goes on across rounds.
        average: Makes the optimizer that applies the mean change; SGD with rate 1, which is FedAvg, if not given.
        lr_scheduler: Makes the scheduler of each client's body; it steps once per commit there.
        param_groups: Makes parameter groups from a body, in place of the plain list.
        max_staleness: Changes that began more averages ago are reported as stale and not folded; `None` for any.
        staleness_weight: s(τ) of a change, by averages since it began; see `splitfed.policies`.
        clip_norm: Clip each client's mean gradient to this global 2-norm.
        buffer_rules: How buffers that a pattern matches are merged, in place of the rule by their kind.
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
        self._settings: dict[str, Any] = {
            "buffer_rules": buffer_rules,
            "keep_versions": keep_versions,
            "device": device,
            "lock_seconds": lock_seconds,
        }
        self.accumulator = Accumulator(
            body, store, average, max_staleness=max_staleness, staleness_weight=staleness_weight, **self._settings
        )
        """The accumulator of the `body` lineage."""
        self.store = store
        self._settings |= {"lr_scheduler": lr_scheduler, "param_groups": param_groups, "clip_norm": clip_norm}
        self._body = deep_copy(unwrap(body))
        self._optimizer = optimizer
        self._numerics = store.begin(device_of(dict(body.named_parameters()), device))
        self._kept: Bounded[str, Accumulator] = Bounded(at_least("keep_bodies", keep_bodies, 1))

    def clients(self) -> list[str]:
        """The clients that have a body of their own, in order."""
        return [client_id for client_id in self.store.clients() if self._line(client_id).head() >= 0]

    def step(self, clients: Iterable[str] | None = None) -> list[Commit]:
        """Commit what waits, each client's on its own line.

        Args:
            clients: Look at these alone; all if it isn't given.

        Returns:
            The commits.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later step continues.
        """
        commits = []
        for client_id in self._begun(clients):
            line = self._line(client_id)
            if line.commit(line.head()).kind == "end":
                self._begin(client_id)  # whoever averaged may have stopped before it came to this
            commits.append(self._accumulator(client_id).step())
        return [commit for commit in commits if commit is not None]

    def average(self, clients: Iterable[str] | None = None, *, upto: int | None = None) -> Commit | None:
        """End the round: average the bodies that have moved, by samples, and begin all lines anew from there.

        What waits on these clients' lines is committed first. A repeated call counts nothing twice.

        Args:
            clients: Average these alone; the others keep what they have for a later round.
            upto: Only lines that began at this version of `body` or before. Whoever ends a round that another has
                ended meanwhile leaves the next one alone with it.

        Returns:
            The commit of `body`, or `None` if no change waits for one.

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
        commit = self.accumulator.step(min_batches=1, only=self._only(changes)) if changes else None
        for client_id in self.clients():
            self._begin(client_id)
        return commit

    def _only(self, changes: list[BatchId]) -> Selection:
        """These changes, and what isn't the change of any line or counts nowhere; not those of a round to come."""
        pile = self.store.pile("body")
        others = (batch for batch in pile.waiting() if batch not in changes)
        free = [batch for batch in others if batch.incarnation or (pile.peek(batch) or {}).get("kind") == "rejected"]
        return Selection(BatchSet([*changes, *free]))

    def _begun(self, clients: Iterable[str] | None) -> list[str]:
        if clients is None:
            return self.clients()
        return [client_id for client_id in sorted(set(clients)) if self._line(client_id).head() >= 0]

    def _line(self, client_id: str) -> Lineage:
        return self.store.lineage(f"body@{client_id}")

    def _accumulator(self, client_id: str) -> Accumulator:
        found = self._kept.get(client_id)
        if found is None:
            made = Accumulator(self._body, self.store, self._optimizer, lineage=f"body@{client_id}", **self._settings)
            found = self._kept.put(client_id, made)
        return found

    def _end(self, line: Lineage, upto: int | None) -> Commit | None:
        """Close a line that has moved; its closing commit, or `None` if it hasn't or began after `upto`."""
        while True:
            head = line.head()
            began, samples = since(line, head)
            if upto is not None and began.source is not None and began.source > upto:
                return None
            if line.commit(head).kind == "end":
                return line.commit(head)
            if not samples:
                return None
            turn = next(commit.turn for commit in map(line.commit, range(head, -1, -1)) if commit.kind in BEGUN)
            commit = Commit(head + 1, "end", "", {}, source=began.source, turn=turn, num_samples=samples)
            made = line.restate(commit, line.checked_state(head))
            if made is not None:
                return made

    def _publish(self, client_id: str, ended: Commit) -> BatchId:
        """Put a closed line's change on the pile of `body`, once: all of it follows from `ended`. Answer its id."""
        batch, body = BatchId(client_id, 0, ended.turn), self.store.lineage("body")
        sealer = Sealer(body, self.store.pile("body"), self._numerics)
        if sealer.is_known(batch):
            return batch
        if ended.source is None:
            raise MissingError(
                f"lineage 'body@{client_id}' doesn't say which version of 'body' it began from: expected one that a "
                "SplitServer(per_client=True) began"
            )
        said = (batch, ended.source, ended.version, ended.num_samples)
        record = GradientRecord(
            "gradient", ended.source, ended.num_samples, 1.0, content_digest(said, ()), self._numerics, {}, []
        )
        try:
            start = body.checked_state(ended.source)
            record = change(record, body.fingerprint(), start, self._line(client_id).checked_state(ended.version))
        except ExpiredError:
            record = replace(record, kind="rejected")
        if sealer.store(batch, record) == "rejected":
            warnings.warn(
                f"what client {client_id!r} changed in its body since version {ended.source} counts nowhere: it isn't "
                "finite, or that version has left the retention window (keep_versions). Its line begins anew",
                stacklevel=3,
            )
        return batch

    def _begin(self, client_id: str) -> None:
        """Let a line go on from the newest average, once its change has counted or if there is none."""
        line, body, pile = self._line(client_id), self.store.lineage("body"), self.store.pile("body")
        head, newest = line.head(), body.head()
        began, samples = since(line, head)
        last = line.commit(head)
        turn, rejected = last.turn, False
        if last.kind == "end":
            batch = BatchId(client_id, 0, last.turn)
            rejected = (pile.peek(batch) or {}).get("kind") == "rejected"
            if not rejected and batch not in body.counted():
                return
            turn += 1
        elif samples or last.kind not in BEGUN or began.source == newest:
            return
        commit = Commit(head + 1, "begin", "", {}, source=newest, turn=turn)
        line.restate(commit, body.checked_state(newest), optimizer=not rejected)
