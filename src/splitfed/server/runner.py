"""Running calls of a body out of a store, and what is cached of it.

All clients share one line of versions, or each has one of its own (Thapa et al. 2020, arXiv
2004.12088): then a client's calls run on `body@<id>`, which begins as a copy of the newest `body`
at the client's first call. Who commits there, and averages the lines, is no concern of a server.

The caches hold lines, models by version, and graphs of the last few forwards. None changes a
result: a model is a function of its version, and a graph is dropped for a recompute with the same
bits.

The trap: a client's first call may be under no_grad, and a line that nobody averages, because its
client isn't known, would stay behind for ever. A client is known by its process, so that is opened
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import BusyError, ExpiredError, MissingError, ReplayError
from splitfed.model import execution
from splitfed.model.attributes import Habits
from splitfed.model.execution import Model, Run
from splitfed.model.numerics import is_repeatable
from splitfed.model.rng import compute_turns
from splitfed.model.skeleton import Template
from splitfed.protocol.ids import BatchId, check_client_id
from splitfed.protocol.messages import (
    ForwardRecord,
    ForwardRequest,
)
from splitfed.server.graphs import CallKey, Graphs, Place, Uses
from splitfed.server.memory import Memory, extent
from splitfed.server.probe import Call, Probe, same_gradients, seeded_backward
from splitfed.store.batches import Pile, Sealer
from splitfed.store.cache import Bounded
from splitfed.store.earlier import Earlier, find_earlier
from splitfed.store.lineage import Lineage
from splitfed.store.quota import Ledger, Quota
from splitfed.store.store import GradientStore

KEPT_LINES = 16
WRITTEN = 256
"""Of so many attributes that a body sets a client is told."""

Buffers = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class RunnerSettings:
    """What all runners of a server share."""

    template: Template
    """The body's structure."""
    numerics: str
    """The short name of this process's numerics class."""
    device: torch.device
    """Where to compute."""
    keep_models: int
    """How many versions of a line stay loaded."""
    keep_graphs: int
    """How many batches of a line keep their graphs."""
    memory: Memory = field(default_factory=Memory)
    """How many bytes they may hold, and the calls under way."""
    quota: Quota = field(default_factory=Quota)
    """What each client may have open in the store."""
    habits: Habits = field(default_factory=Habits)
    """What the body's forwards were seen to do."""
    probe: Probe = field(default_factory=Probe)
    """Tries bodies that set attributes."""
    uses: Uses = field(default_factory=Uses)
    """How often a graph was at hand."""
    kept: Iterator[int] = field(default_factory=partial(count, 1))
    """The numbers of the backwards through kept graphs."""
    foreign: Iterator[int] = field(default_factory=partial(count, 1))
    """Those of the recomputes whose outputs differ, as the forward ran in another class."""


class Runner:
    """Runs and replays the calls of one line.

    Args:
        lineage: Its versions.
        pile: The files of its batches; forwards are recorded there.
        settings: What and where to compute, and what to keep.
    """

    def __init__(self, lineage: Lineage, pile: Pile, settings: RunnerSettings) -> None:
        self._lineage = lineage
        self._pile = pile
        self._settings = settings
        self._template = settings.template
        self._numerics = settings.numerics
        self._device = settings.device
        self._models: Bounded[int, Model] = Bounded(max(1, settings.keep_models))
        self._graphs = Graphs(settings.keep_graphs, settings.memory)
        self._ends: Bounded[CallKey, tuple[Buffers, Buffers]] = Bounded(settings.keep_graphs)
        """The buffers of calls whose graph is used up: at their end, and their version's."""

    def version(self, request: ForwardRequest) -> int:
        """The version to run at: the pinned one, or the head, for which the store is asked.

        Raises:
            BusyError: the head is older than what the client has seen, or says that it has.
        """
        if request.version is not None:
            self.check_branch(request.version)
            return request.version
        head = self._lineage.head()
        if head < request.seen:
            # A 429 and not a 503: whoever says it has seen what isn't there mustn't look like a
            # failure of the server.
            raise BusyError(
                f"this replica's store is at version {head}, the client has seen {request.seen}: "
                "is it the same store?"
            )
        return head

    def confirm(self) -> None:
        """Check that the run is still there, as something of it is missing.

        Raises:
            CorruptedError: it was deleted, or another one was begun in its place.
        """
        self._lineage.confirm(now=True)

    def check_branch(self, version: int) -> None:
        """Refuse a version that a rollback has undone.

        Raises:
            ExpiredError: it was undone.
        """
        self._lineage.check_branch(version)

    def earlier(self, batch: BatchId) -> Earlier:
        """What the store has of a batch that a client repeats, with the version if it can run."""
        found = find_earlier(self._lineage, self._pile, batch)
        if found.version is None or self.can_run(found.version):
            return found
        return replace(found, version=None)

    def can_run(self, version: int) -> bool:
        """Whether the weights of a version are there."""
        try:
            self._model(version)
        except ExpiredError:
            return False
        return True

    def run_newest(self, request: ForwardRequest) -> tuple[int, ForwardRecord, Run]:
        """Run a call at the version that it asks for, or at the newest."""
        # The newest may leave the retention window before it is read: then there is a newer one.
        while True:
            version = self.version(request)
            try:
                return version, *self.run(request, version)
            except ExpiredError:
                if request.version is not None or self._lineage.head() == version:
                    raise

    def run(
        self, request: ForwardRequest, version: int, finish: Callable[[Any], Any] | None = None
    ) -> tuple[ForwardRecord, Run]:
        """Run a call at a version; nothing is stored.

        Raises:
            UnsupportedError: the body's answers depend on what earlier calls left.
        """
        call = request.record(self._continued_buffers(request, version), self._numerics)
        model = self._model(version)
        done = self._run(model, call, request.client_id, grad=request.grad, finish=finish)
        probe = self._settings.probe
        if done.written or probe.is_waiting:
            probe.examine(model, Call(call, request.grad, finish), done, request.client_id)
        return call, done

    def written(self) -> tuple[str, ...]:
        """The plain attributes that forwards of this body were seen to set, by module and name."""
        return tuple(sorted(self._settings.habits.written)[:WRITTEN])

    def keep(
        self,
        request: ForwardRequest,
        incarnation: int,
        version: int,
        call: ForwardRecord,
        done: Run,
    ) -> bool:
        """Record a call that has run, and keep its graph at hand.

        Args:
            request: The call.
            incarnation: The client's process.
            version: The version that it ran at.
            call: What it ran on.
            done: Its run.

        Returns:
            Whether it can have a backward: not if it was computed for so long that its version has
            left the retention window before the record held it there.
        """
        key = CallKey(version, request.client_id, incarnation, request.call, request.nonce)
        own = request.previous if request.previous_version is None else None
        call = call.with_outputs(done.tensors, done.crcs)
        self._pile.put_forward(*key.place, call)
        before = None if own is None else CallKey(*key[:3], own, request.previous_nonce)
        self._graphs.put(key, call, done, self._bytes_of(call, done), before)
        if request.version is not None or not self._lineage.has_left(version):
            return True
        self.forget(key.place)
        self._pile.drop_forward(*key.place)
        return False

    def record(self, key: CallKey) -> ForwardRecord | None:
        """The record of a call, or `None` if it is gone."""
        held = self._graphs.get(key)
        return held[0] if held else self._pile.forward(*key.place)

    def keeps(self, key: CallKey) -> bool:
        """Whether the graph of a call is at hand."""
        return key in self._graphs

    def take(self, key: CallKey, record: ForwardRecord) -> Run:
        """The call with its graph, for one backward: the graph at hand, or a recompute.

        Raises:
            ReplayError: the recompute differs.
            ExpiredError: the version's weights are gone.
        """
        held = self._graphs.pop(key)
        if held is not None and record.training and held[1].buffers:
            # The next call may begin with what this one left.
            self._ends.put(key, (held[1].buffers, held[1].bases))
        self._settings.uses.count(Uses.RECOMPUTED if held is None else Uses.KEPT)
        if held is not None:
            return held[1]
        return self._replay(record, key.version, key.client_id)

    def check_kept(
        self,
        call: CallKey | ForwardRecord,
        done: Run,
        grad_outputs: Sequence[Tensor | None],
        answered: tuple[Sequence[Tensor | None], Mapping[str, Tensor]],
        client_id: str,
        finish: Callable[[Any], Any] | None = None,
    ) -> None:
        """Recompute a backward that went through a kept graph: the first, then ever more seldom.

        So a body that can't be run again with the same bits is found where nothing else would.

        Args:
            call: Where the call is on record, or the record itself.
            done: Its run, whose graph is used up.
            grad_outputs: The gradient of each of its outputs.
            answered: Those of its inputs and, by name, of the parameters.
            client_id: Whose call it is.
            finish: What was applied to its outputs.

        Raises:
            ReplayError: outputs or gradients differ.
        """
        if done.replayed or not _is_first(next(self._settings.kept)):
            return
        if not is_repeatable(self._device):
            return
        # As it was stored: what is at hand may hold the client's own tensors, changed since.
        record = self._pile.forward(*call.place) if isinstance(call, CallKey) else call
        if record is None:
            return
        try:
            record = replace(record, crcs=done.crcs, numerics=self._numerics)
            again = self._replay(record, done.version, client_id, finish)
        except MissingError:  # its weights are gone, and the graph was all that there was
            return
        found, drew = seeded_backward(record, again, self._device, grad_outputs)
        of_inputs, of_parameters = answered
        expected = [*of_inputs, *(of_parameters.get(name) for name in done.parameters)]
        # What a hook of the body draws in a backward is under no seed.
        if not drew and not same_gradients(found, expected):
            raise ReplayError(
                f"recomputing a backward at version {done.version} gave other gradients from the "
                "same outputs. A body must not keep state in Python that its backward uses, nor "
                "use generators other than torch's defaults there"
            )

    def forget(self, place: Place) -> None:
        """Drop a graph."""
        self._graphs.drop(place)

    def _model(self, version: int) -> Model:
        found = self._models.get(version)
        if found is None:
            # Built under inference mode, its parameters could never record a graph.
            with torch.inference_mode(False):
                state = self._lineage.state(version)
                habits = self._settings.habits
                model = Model(self._template, state, version, self._device, habits)
                found = self._models.put(version, model)
        return found

    def _run(
        self,
        model: Model,
        call: ForwardRecord,
        client_id: str,
        *,
        grad: bool,
        finish: Callable[[Any], Any] | None = None,
    ) -> Run:
        try:
            with compute_turns.of(client_id):
                return execution.run(model, call, grad=grad, finish=finish)
        finally:
            if model.is_spoilt():
                # It shares memory with the version's tensors: nobody may read what it wrote there.
                self._models.pop(model.version)
                self._lineage.forget(model.version)

    def _continued_buffers(self, request: ForwardRequest, version: int) -> dict[str, Tensor] | None:
        """The buffers that an earlier call of the client changed, as it left them."""
        if request.previous is None or request.incarnation is None:
            return None
        if request.previous_version not in (None, version):
            return None
        place = (version, request.client_id, request.incarnation, request.previous)
        key = CallKey(*place, request.previous_nonce)
        ended = self._ends.get(key)
        if ended is not None:
            return execution.changed_of(*ended)
        held = self._graphs.get(key)
        if held is not None:
            return held[1].changed_buffers()
        record = self._pile.forward(*place)
        if record is None:
            raise ExpiredError(
                f"call {request.previous} of {request.client_id!r}, "
                "whose buffers this one continues, is gone"
            )
        self._settings.uses.count(Uses.CONTINUED)
        done = self._replay(record, version, request.client_id)
        self._graphs.put(key, record, done, self._bytes_of(record, done))
        return done.changed_buffers()

    def _bytes_of(self, call: ForwardRecord, done: Run) -> int:
        """What a call holds as long as its graph is kept, roughly."""
        size = extent(done.leaves)[0]
        growth = self._settings.memory.growth
        growth.see(call.cut, size, done)
        return int(size * (1.0 + growth.of(call.cut)))

    def _replay(
        self,
        record: ForwardRecord,
        version: int,
        client_id: str,
        finish: Callable[[Any], Any] | None = None,
    ) -> Run:
        model = self._model(version)
        again = self._run(model, record, client_id, grad=True, finish=finish)
        is_foreign = record.numerics != self._numerics and record.crcs != again.crcs
        if is_foreign and _is_first(next(self._settings.foreign)):
            # Its bits can't be told from those of a body that has state. Those of one more run can.
            here = replace(record, crcs=again.crcs, numerics=self._numerics)
            once_more = self._run(model, record, client_id, grad=True, finish=finish)
            execution.check_replay(here, once_more, self._numerics)
        execution.check_replay(record, again, self._numerics)
        again.replayed = True
        return again


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """What answers the calls of one lineage."""

    pile: Pile
    sealer: Sealer
    runner: Runner
    ledger: Ledger


class Lines:
    """Finds the line that answers a client. What is kept of lines changes speed, never results.

    Args:
        store: The store of the run.
        lineage: The one that all clients share; `None` if each has a line of its own, which begins
            from `body`.
        settings: Those of each line's runner.
    """

    def __init__(self, store: GradientStore, lineage: str | None, settings: RunnerSettings) -> None:
        self._store = store
        self._settings = settings
        self.shared = None if lineage is None else self._open(lineage)
        """The line of all clients; `None` if each has its own."""
        self._own: Bounded[str, Line] = Bounded(KEPT_LINES)

    def of(self, client_id: str, process: str | None = None) -> Line:
        """The line of a client.

        Args:
            client_id: The client.
            process: What its process calls itself, if the request says so: then the line may begin
                here.

        Raises:
            MissingError: the line hasn't begun.
        """
        if self.shared is not None:
            return self.shared
        found = self._own.get(check_client_id(client_id))
        if found is None:
            self._begin(client_id, process)
            found = self._own.put(client_id, self._open(f"body@{client_id}"))
        return found

    def _begin(self, client_id: str, process: str | None) -> None:
        own = self._store.lineage(f"body@{client_id}")
        if own.head() >= 0:
            return
        if process is None:
            raise MissingError(
                f"client {client_id!r} has no body of its own yet: its first forward begins it"
            )
        self._store.open_client(client_id, process)
        body = self._store.lineage("body")
        source = body.head()
        own.initialise(body.fingerprint(), body.checked_state(source), source)

    def _open(self, name: str) -> Line:
        lineage = self._store.lineage(name)
        pile = self._store.pile(name)
        sealer = Sealer(
            lineage,
            pile,
            self._settings.numerics,
            self._store.archive(name),
            self._store.holder(name),
            repeatable=is_repeatable(self._settings.device),
        )
        ledger = Ledger(pile, self._settings.quota)
        runner = Runner(lineage, pile, self._settings)
        return Line(pile, sealer, runner, ledger)


def _is_first(number: int) -> bool:
    """Whether a backward is to be checked: numbers 1, 2, 8, 32, 128 and so on."""
    return number == 1 or (number & (number - 1) == 0 and number.bit_length() % 2 == 0)
