"""`replay`: compute every version of a run again, from the record alone, and compare the bits.

What a commit folded, in which settings and at which staleness is in its record; what each gradient
follows from is in the archive of a run that was begun with `keep_forwards`. With the weights of
version 0 that is the whole run: each version is computed from the one before, and must have the
hashes that its record names. Files of versions that have left the retention window aren't needed.

A body of one client (SFLV1) begins again and again from `body`, whose versions are computed first.

A version that differs, or can't be computed, is told; the next one goes on from its file, if that
is still kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from splitfed.accumulator import recorded
from splitfed.accumulator.buffers import Rule, merge_buffers
from splitfed.accumulator.derive import Deriver
from splitfed.accumulator.fold import Folded, fold
from splitfed.accumulator.optimizer import Live, build, capture, restore, take_step
from splitfed.accumulator.recorded import Recorded
from splitfed.accumulator.settings import (
    CommitSettings,
    Groups,
    OptimizerFactory,
    SchedulerFactory,
)
from splitfed.errors import FormatError, InputError, MissingError, ReplayError, SplitFedError
from splitfed.model.fingerprint import compare, personal_names
from splitfed.model.numerics import same_bits
from splitfed.model.skeleton import Template
from splitfed.protocol import checksum
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.protocol.packing import pack_tree, unpack_tree
from splitfed.store.batchset import Verdict
from splitfed.store.commit import Commit
from splitfed.store.lineage import sha256
from splitfed.store.store import GradientStore, check_store
from splitfed.store.sums import Sum, shared_of

_SHOWN = 3

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Replayed:
    """One version, computed again."""

    lineage: str
    version: int
    kind: str
    """How it came about, as in its commit."""
    num_batches: int
    """Folded in it."""
    verdict: Literal["same", "differs", "unknown"]
    """Whether weights and optimizer state have the bits on record; 'unknown' if it can't be
    computed."""
    what: str = ""
    """What differs, or why it can't be computed."""

    @property
    def ok(self) -> bool:
        """Whether it has the bits on record."""
        return self.verdict == "same"


@dataclass(slots=True)
class Replay:
    """What `replay` has found."""

    url: str
    """Without credentials."""
    versions: list[Replayed] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every version has the bits on record."""
        return all(version.ok for version in self.versions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Given:
    """What isn't data, and so on no record: functions of one's own, in place of what is on record.

    Each is what the accumulator was given under that name.
    """

    optimizer: OptimizerFactory | None = None
    lr_scheduler: SchedulerFactory | None = None
    param_groups: Groups | None = None
    buffer_rules: Mapping[str, Rule] | None = None


def replay(
    body: nn.Module,
    store: GradientStore,
    *,
    lineage: str = "body",
    optimizer: OptimizerFactory | None = None,
    lr_scheduler: SchedulerFactory | None = None,
    param_groups: Groups | None = None,
    buffer_rules: Mapping[str, Rule] | None = None,
    device: torch.device | str = "cpu",
    on_version: Callable[[Replayed], Any] | None = None,
) -> Replay:
    """Compute every version of a lineage again, from the record alone; nothing is written.

    Args:
        body: The module of the run, or the client half for `lineage="client"`. Its weights don't
            matter.
        store: The store of a run that was begun with `keep_forwards=True`.
        lineage: Which line: `body`, `client` or `body@<id>`.
        optimizer: What the accumulator was given, if it isn't a class of torch.optim.
        lr_scheduler: As the accumulator's, if it isn't made of numbers alone.
        param_groups: As the accumulator's; needed only beside `optimizer`.
        buffer_rules: As the accumulator's, if one of them is a function.
        device: Where to compute; for the same bits, the kind of device that the run used.
        on_version: Called with each version.

    Raises:
        MissingError: there is no run in the store, or it was begun without `keep_forwards`.
        ArchitectureError: the run was begun with another module.
        InputError: an optimizer, scheduler or rule that can't be built from the record alone.
        StoreError: the storage failed.
    """
    check_store(store)
    store.latest_version(lineage)
    if not store.keeps_forwards:
        raise MissingError(
            "this run was begun without keep_forwards, so what its gradients follow from is gone "
            "once they are counted: a run can be replayed that begins with "
            "GradientStore(url, keep_forwards=True), or --keep-forwards"
        )
    given = Given(
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        param_groups=param_groups,
        buffer_rules=buffer_rules,
    )
    place = torch.device(device)
    numerics = store.begin(place)
    found = Replay(store.shown)

    def tell(version: Replayed) -> None:
        if version.lineage == lineage:
            found.versions.append(version)
            if on_version is not None:
                on_version(version)

    sources: Mapping[int, State] = {}
    if "@" in lineage:
        own = store.lineage(lineage)
        wanted = {own.commit(version).source for version in range(own.head() + 1)} - {None}
        sources = _Line(body, store, "body", given, place, numerics).run(tell, wanted)
    _Line(body, store, lineage, given, place, numerics, sources).run(tell)
    return found


class _Line:
    """Computes one lineage again."""

    def __init__(
        self,
        body: nn.Module,
        store: GradientStore,
        name: str,
        given: Given,
        device: torch.device,
        numerics: str,
        sources: Mapping[int, State] | None = None,
    ) -> None:
        self._store = store
        self._lineage = store.lineage(name)
        self._archive = store.archive(name)
        self._given = given
        self._device = device
        self._numerics = numerics
        self._sources = {} if sources is None else sources
        head = self._lineage.head()
        self._commits = [self._lineage.commit(version) for version in range(head + 1)]
        self._settings: dict[str, Recorded] = {}
        self._template = Template(body, personal_names(body, self._personal()))
        compare(self._lineage.fingerprint(), self._template.fingerprint(), "the module")
        self._states: dict[int, State] = {}
        self._trees: dict[int, Any] = {}
        """The states of optimizer and scheduler."""
        self._live: tuple[str, int, Live] | None = None
        """As the last commit left them: by its settings and version."""
        self._deriver = Deriver(self._template, self._state, device, numerics)

    def run(
        self, tell: Callable[[Replayed], None], wanted: Iterable[int | None] = ()
    ) -> dict[int, State]:
        """Compute all versions; returns the states of those that are wanted."""
        found: dict[int, State] = {}
        wanted = set(wanted)
        ends = self._last_uses()
        for commit in self._commits:
            verdict: Literal["same", "differs", "unknown"] = "differs"
            try:
                what = self._version(commit)
            except ReplayError as error:
                what = str(error)
            except InputError as error:
                if not isinstance(error, FormatError):
                    raise  # what was given, not what is on record
                verdict, what = "unknown", str(error)
            except SplitFedError as error:
                verdict, what = "unknown", str(error)
            if what and commit.num_foreign:
                what += f" (batches of another numerics class: {commit.num_foreign})"
            if what:
                self._from_file(commit)
            version, lineage = commit.version, self._lineage.name
            if version in wanted and version in self._states:
                found[version] = self._states[version]
            verdict = verdict if what else "same"
            tell(Replayed(lineage, version, commit.kind, commit.num_batches, verdict, what))
            for earlier in ends.get(version, ()):
                self._states.pop(earlier, None)
                self._trees.pop(earlier, None)
        return found

    def _personal(self) -> tuple[str, ...]:
        for commit in reversed(self._commits):
            if commit.settings:
                return self._recorded(commit.settings).personal
        return ()

    def _recorded(self, digest: str) -> Recorded:
        if digest not in self._settings:
            self._settings[digest] = recorded.read(self._lineage, digest)
        return self._settings[digest]

    def _last_uses(self) -> dict[int, list[int]]:
        """By version: the earlier ones, and itself, that no later version is computed from."""
        last = {commit.version: commit.version + 1 for commit in self._commits}
        for commit in self._commits:
            # The parts of a batch may have run at any version from its oldest on.
            first = min(commit.older, default=commit.version)
            needed = [*range(first, commit.version)]
            needed += [] if commit.restored is None else [commit.restored]
            for version in needed:
                last[version] = max(last[version], commit.version)
        found: dict[int, list[int]] = {}
        for version, at in last.items():
            found.setdefault(at, []).append(version)
        return found

    # --------------------------------------------------------------------------------- one version

    def _version(self, commit: Commit) -> str:
        """Compute a version; returns what is wrong with it, or ''."""
        version = commit.version
        if commit.kind == "initial":
            self._states[0] = self._lineage.checked_state(0)
            source = self._sources.get(-1 if commit.source is None else commit.source)
            if source is not None and not _same(source, self._states[0]):
                return f"it isn't version {commit.source} of 'body', which it began from"
            return ""
        if commit.kind == "fold":
            state, tree = self._folded(commit)
        elif commit.kind == "rollback":
            at = version if commit.restored is None else commit.restored
            state, tree = self._state(at), self._trees.get(at)
        elif commit.kind == "end":
            state, tree = self._state(version - 1), self._trees.get(version - 1)
        elif commit.kind == "begin":
            at = -1 if commit.source is None else commit.source
            if at not in self._sources:
                raise MissingError(
                    f"version {commit.source} of 'body', which it began from, isn't known"
                )
            state, tree = self._sources[at], self._trees.get(version - 1)
        else:
            raise MissingError("its record was lost: `repair` has put another in its place")
        if "optimizer" not in commit.files:
            tree = None
        return self._compared(commit, state, tree)

    def _compared(self, commit: Commit, state: State, tree: Any) -> str:
        """Note a version's state, as its files would hold it, and compare these with the record."""
        wrong = []
        version = commit.version
        data = b"".join(checksum.sealed(self._lineage.weights_file(version, state)))
        self._states[version] = self._lineage.decoded(version, memoryview(data))
        if sha256([data]) != commit.files["weights"]:
            wrong.append(self._differing(version))
        if tree is not None:
            packed = b"".join(checksum.sealed(pack_tree("Optimizer", tree)))
            self._trees[version] = unpack_tree("Optimizer", packed)
            if sha256([packed]) != commit.files.get("optimizer"):
                wrong.append("the state of the optimizer differs")
        elif "optimizer" in commit.files:
            wrong.append("the state of the optimizer isn't known")
        return "; ".join(wrong)

    def _differing(self, version: int) -> str:
        """Which weights differ from those on record, as far as these are still kept."""
        try:
            expected = self._lineage.checked_state(version)
        except SplitFedError:
            return "the weights differ from the hash on record"
        found = self._states[version]
        names = [name for name in expected if not same_bits(found[name], expected[name])]
        return f"the weights {names[:_SHOWN]} differ ({len(names)} of {len(expected)})"

    def _from_file(self, commit: Commit) -> None:
        """Let the next version go on from this one's files, if they are there."""
        version = commit.version
        self._live = None
        try:
            self._states[version] = self._lineage.checked_state(version)
            self._trees[version] = self._lineage.optimizer(version)
        except SplitFedError:
            self._states.pop(version, None)

    def _state(self, version: int) -> State:
        if version not in self._states:
            raise MissingError(f"version {version}, which it follows from, isn't known")
        return self._states[version]

    # ------------------------------------------------------------------------------------- a commit

    def _folded(self, commit: Commit) -> tuple[State, Any]:
        last = commit.version - 1
        state = self._state(last)
        if not commit.settings:
            raise MissingError("the settings that it was made with aren't on record")
        settings = self._recorded(commit.settings)
        live = self._take(commit, settings, state)
        folded = self._fold(commit)
        if folded.verdict.folded:
            take_step(live, folded.mean.mean(), settings.clip_norm)
        now = self._template.state(live.module)
        buffers = {name: state[name] for name in self._template.buffers}
        blueprint = self._template.blueprint
        now |= merge_buffers(blueprint, buffers, folded.updates, self._rules(settings))
        self._live = (commit.settings, commit.version, live)
        tree = None if live.optimizer is None else capture(live.optimizer, live.scheduler)
        return now, tree

    def _take(self, commit: Commit, settings: Recorded, state: State) -> Live:
        """Module, optimizer and scheduler as the version before left them."""
        last = commit.version - 1
        if self._live is not None and self._live[:2] == (commit.settings, last):
            return self._live[2]
        copies = {name: tensor.clone() for name, tensor in state.items()}
        module = self._template.build(copies, self._device)
        if not self._template.trainable:
            return Live("", module, None, None)
        given = self._given
        if given.optimizer is None and given.lr_scheduler is None:
            optimizer, scheduler = settings.build(module)
        elif given.optimizer is None:
            optimizer, _ = settings.without_scheduler().build(module)
            scheduler = given.lr_scheduler(optimizer) if given.lr_scheduler else None
        else:
            factories = (given.optimizer, given.lr_scheduler, given.param_groups)
            optimizer, scheduler = build(module, *factories)
        tree = self._trees.get(last)
        if tree is not None:
            restore(optimizer, scheduler, tree)
        return Live("", module, optimizer, scheduler)

    def _rules(self, settings: Recorded) -> Mapping[str, Rule]:
        if self._given.buffer_rules is not None:
            return self._given.buffer_rules
        for pattern, rule in settings.buffer_rules.items():
            if ":" in rule:
                raise InputError(
                    f"the rule for buffers {pattern!r} on record is the function {rule}: "
                    "give it, replay(..., buffer_rules=...)"
                )
        return settings.buffer_rules

    def _fold(self, commit: Commit) -> Folded:
        """Add up the gradients that a commit folded, each computed again."""
        weights = commit.weights
        settings = CommitSettings(staleness_weight=lambda age: weights.get(age, 1.0))
        expected = commit.verdict.folded
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            folded = fold(
                Verdict(folded=expected),
                self._gradient,
                self._lineage.fingerprint(),
                commit.version - 1,
                settings,
                self._numerics,
                sums=[self._sum(group) for group in commit.groups],
            )
        for error in folded.deferred.values():
            raise error
        if len(folded.verdict.folded) != len(expected):
            raise ReplayError("; ".join(str(warning.message) for warning in told)[:400])
        return folded

    def _sum(self, group: Sequence[BatchId]) -> Sum:
        """What a server had added up, in its order."""
        found: Sum | None = None
        for batch in group:
            record = self._gradient(batch)
            found = Sum(shared_of(record)) if found is None else found
            found.add([(batch, record)])
        if found is None:
            raise FormatError("a group of the commit has no batches")
        return found

    def _gradient(self, batch: BatchId) -> GradientRecord:
        """The gradient of a batch, computed again.

        Raises:
            MissingError: nothing is kept that it follows from.
            ReplayError: a call gave other outputs than on record.
        """
        kept = None if self._archive is None else self._archive.read(batch)
        if kept is None:
            is_forgotten = batch.client_id in self._store.registry().forgotten()
            raise MissingError(
                f"nothing is kept that the gradient of batch {batch} follows from"
                + (": its client was forgotten" if is_forgotten else "")
            )
        try:
            return self._deriver.gradient(kept)
        except ReplayError as error:
            raise ReplayError(f"batch {batch}: {error}") from error


def _same(one: State, other: State) -> bool:
    return all(same_bits(one[name], other[name]) for name in other)
