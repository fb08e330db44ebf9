"""Running calls of a body out of a store: which version, from which record, and what is cached of it.

The caches hold models by version and graphs of the last few forwards. Neither changes a result: a model is a
function of its version, and a graph is dropped for a recompute with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import ExpiredError, StoreError
from splitfed.model import execution
from splitfed.model.execution import Model, Run
from splitfed.model.numerics import same_bits
from splitfed.model.skeleton import Template
from splitfed.protocol.messages import BufferUpdate, ForwardRecord, ForwardRequest, GradientRecord
from splitfed.store.batches import Pile
from splitfed.store.cache import Bounded
from splitfed.store.versions import Versions

CallKey = tuple[int, str, int, int]
"""(version, client id, incarnation, number of the call)"""


class Runner:
    """Runs and replays the calls of one lineage.

    Args:
        template: The body's structure.
        versions: Its weights.
        pile: Where forwards are recorded.
        numerics: The short name of this process's numerics class.
        device: Where to compute.
        keep_models: How many versions stay loaded.
        keep_graphs: How many forwards keep their graph.
    """

    def __init__(
        self,
        template: Template,
        versions: Versions,
        pile: Pile,
        numerics: str,
        device: torch.device,
        keep_models: int,
        keep_graphs: int,
    ) -> None:
        self._template = template
        self._versions = versions
        self._pile = pile
        self._numerics = numerics
        self._device = device
        self._models: Bounded[int, Model] = Bounded(max(1, keep_models))
        self._graphs: Bounded[CallKey, tuple[ForwardRecord, Run]] = Bounded(keep_graphs)

    def version(self, request: ForwardRequest) -> int:
        """The version to run at: the pinned one, or the head, for which the store is asked.

        Raises:
            StoreError: the head is older than what the client has seen.
        """
        if request.version is not None:
            return request.version
        head = self._versions.head()
        if head < request.seen:
            raise StoreError(
                f"this replica's store is at version {head}, the client has seen {request.seen}: is it the same store?"
            )
        return head

    def run_newest(self, request: ForwardRequest) -> tuple[int, ForwardRecord, Run]:
        """Run a call at the version that it asks for; the newest is looked up again if it expires meanwhile."""
        while True:
            version = self.version(request)
            try:
                return version, *self.run(request, version)
            except ExpiredError:
                if request.version is not None or self._versions.head() == version:
                    raise

    def run(
        self, request: ForwardRequest, version: int, finish: Callable[[Any], Any] | None = None
    ) -> tuple[ForwardRecord, Run]:
        """Run a call at a version; nothing is stored."""
        call = request.record(self._handed_on(request, version), self._numerics)
        return call, self._run(call, version, grad=request.grad, finish=finish)

    def keep(self, key: CallKey, call: ForwardRecord, done: Run) -> None:
        """Record a call that has run, and keep its graph at hand."""
        outputs = tuple((tuple(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad) for t in done.tensors)
        call = replace(call, outputs=outputs, crcs=done.crcs)
        self._pile.put_forward(*key, call)
        self._graphs.put(key, (call, done))

    def record(self, key: CallKey) -> ForwardRecord | None:
        """The record of a call, or `None` if it is gone."""
        held = self._graphs.get(key)
        return held[0] if held else self._pile.forward(*key)

    def take(self, key: CallKey, record: ForwardRecord) -> Run:
        """The call with its graph, for one backward: the one at hand, or a recompute.

        Raises:
            ReplayError: the recompute differs.
            ExpiredError: the version's weights are gone.
        """
        held = self._graphs.pop(key)
        return held[1] if held else self._replay(record, key[0])

    def forget(self, key: CallKey) -> None:
        """Drop a graph."""
        self._graphs.pop(key)

    def share(self, done: Run, gradients: dict[str, Tensor], digest: str, num_samples: float = 1.0) -> GradientRecord:
        """What a call contributes to its batch."""
        values = _changed(done)
        update = BufferUpdate(values, {name: done.bases[name] for name in values}, num_samples)
        return GradientRecord("gradient", done.version, num_samples, 1.0, digest, self._numerics, gradients, [update])

    def _model(self, version: int) -> Model:
        found = self._models.get(version)
        if found is None:
            with torch.inference_mode(False):
                found = self._models.put(
                    version, Model(self._template, self._versions.state(version), version, self._device)
                )
        return found

    def _run(self, call: ForwardRecord, version: int, *, grad: bool, finish: Callable[[Any], Any] | None = None) -> Run:
        model = self._model(version)
        try:
            return execution.run(model, call, grad=grad, finish=finish)
        finally:
            if model.is_spoilt():  # it shares memory with the version: nobody may read what it wrote
                self._models.pop(version)
                self._versions.forget(version)

    def _handed_on(self, request: ForwardRequest, version: int) -> dict[str, Tensor] | None:
        """What an earlier call of the same `client(...)` left in the buffers, where it isn't the version's."""
        if request.previous is None or request.incarnation is None:
            return None
        key = (version, request.client_id, request.incarnation, request.previous)
        held = self._graphs.get(key)
        if held is None:
            record = self._pile.forward(*key)
            if record is None:
                raise ExpiredError(
                    f"call {request.previous} of {request.client_id!r}, whose buffers this one continues, is gone"
                )
            held = self._graphs.put(key, (record, self._replay(record, version)))
        return _changed(held[1])

    def _replay(self, record: ForwardRecord, version: int) -> Run:
        again = self._run(record, version, grad=True)
        kind = "the same" if record.numerics == self._numerics else "another"
        execution.check_replay(record, again, f"the forward was computed in {kind} numerics class")
        return again


def _changed(done: Run) -> dict[str, Tensor]:
    """The buffers of each submodule that changed one of its own: a statistic may come out as it was and still count."""
    owners = {n.rpartition(".")[0] for n, value in done.buffers.items() if not same_bits(value, done.bases[n])}
    return {name: value for name, value in done.buffers.items() if name.rpartition(".")[0] in owners}
