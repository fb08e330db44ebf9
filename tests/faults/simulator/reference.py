"""The bits that must come out, computed once more: serially, in plain torch, by none of the code under test.

A call is the body's module with the version's weights, under the seed. A commit is the sample-weighted mean in the
canonical order, in float64, one step of a torch optimizer that never stopped, and the steps of the statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.faults.simulator import model
from tests.faults.simulator.plan import Plan
from torch import Tensor
from torch.nn import functional

from splitfed.protocol import pytree
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import BufferUpdate, ForwardRequest, GradientRecord
from splitfed.store.commit import Commit

Named = Mapping[str, Tensor]
Records = Sequence[tuple[BatchId, GradientRecord]]
_GROUP = 32
"""Batches of one process that are added up before they meet others: a part of the format."""
STATISTICS = ("1.running_mean", "1.running_var")
COUNTER = "1.num_batches_tracked"
BUFFERS = (*STATISTICS, COUNTER)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same bits."""
    if one is None or other is None or one is other:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def differing(some: Named, others: Named) -> list[str]:
    """The names under which two sets of tensors differ."""
    return sorted(name for name in some.keys() | others.keys() if not same(some.get(name), others.get(name)))


@dataclass
class Call:
    """What a forward is, at a version."""

    version: int
    outputs: Tensor
    entered: Tensor
    parameters: Named
    bases: Named
    """The version's buffers."""
    start: Named | None
    """Those that it began with, where they aren't the version's."""
    end: Named
    _made: dict[bytes, tuple[Tensor | None, dict[str, Tensor]]] = field(default_factory=dict)

    def gradients(self, gradient: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Those of its input and of the parameters; may be asked for again."""
        key = _bytes(gradient)
        if key not in self._made:
            inputs = [self.entered] if self.entered.requires_grad else []
            targets = [*inputs, *self.parameters.values()]
            found = torch.autograd.grad(self.outputs, targets, gradient, retain_graph=True)
            of_parameters = dict(zip(self.parameters, found[len(inputs) :], strict=True))
            self._made[key] = (found[0] if inputs else None, of_parameters)
        return self._made[key]

    def update(self, num_samples: float, *, own: bool = False) -> BufferUpdate | None:
        """What it did to the buffers, as change from the version or from what it began with."""
        if not differing(self.end, self.bases):
            return None
        bases = {**self.bases, **(self.start or {})} if own else self.bases
        return BufferUpdate(self.end, bases, num_samples)


class Body:
    """Runs calls of the body at any version.

    Args:
        plan: Which body.
        weights: Of each version.
    """

    def __init__(self, plan: Plan, weights: Sequence[Named]) -> None:
        self._dropout = plan.dropout
        self._weights = weights
        self._parameters: dict[int, dict[str, Tensor]] = {}

    def call(self, request: ForwardRequest, version: int, start: Named | None, target: Any = None) -> Call:
        """Run a call.

        Args:
            request: The call.
            version: Where it ran.
            start: The buffers that an earlier call left, if it continues one.
            target: For a loss on the server.
        """
        weights = self._weights[version]
        bases = {name: weights[name] for name in BUFFERS}
        end = {name: buffer.clone() for name, buffer in (start or bases).items()}
        entered = pytree.flatten(request.inputs)[1][0].detach().requires_grad_(request.requires_grad[0])
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(request.seed)
        parameters = self._of(version)
        outputs = self._run(entered * 1, parameters, end, is_training=request.training)
        if target is not None:
            outputs = model.loss_fn(outputs, target)
        torch.default_generator.set_state(before)
        return Call(version, outputs, entered, parameters, bases, start, end)

    def _run(self, entered: Tensor, weights: Named, buffers: Named, *, is_training: bool) -> Tensor:
        """The body, as a function: it moves the buffers."""
        found = functional.linear(entered, weights["0.weight"], weights["0.bias"])
        if is_training:
            buffers[COUNTER].add_(1)
        statistics = (buffers[name] for name in STATISTICS)
        scale = (weights["1.weight"], weights["1.bias"])
        found = functional.batch_norm(found, *statistics, *scale, is_training, model.MOMENTUM)
        found = functional.dropout(found, self._dropout, is_training)
        return functional.linear(found, weights["3.weight"], weights["3.bias"])

    def _of(self, version: int) -> dict[str, Tensor]:
        """The parameters of a version."""
        if version not in self._parameters:
            weights = self._weights[version].items()
            parameters = {name: tensor.detach().requires_grad_() for name, tensor in weights if name not in BUFFERS}
            self._parameters[version] = parameters
        return self._parameters[version]


class Replica:
    """The run once more, from its records and gradient files alone, by an optimizer that never stops.

    Args:
        plan: The settings of the commits.
        weights: Of version 0.
        needed: The versions that are restored later on.
    """

    def __init__(self, plan: Plan, weights: Named, needed: Set[int]) -> None:
        self._needed = needed
        self._module = copy.deepcopy(model.body_of(plan))
        self._module.load_state_dict(weights)
        self._optimizer = model.optimizer_of(plan)(list(self._module.parameters()))
        schedule = model.schedule_of(plan)
        self._schedule = None if schedule is None else schedule(self._optimizer)
        self._parameters = dict(self._module.named_parameters())
        self._buffers = dict(self._module.named_buffers())
        self._versions: dict[int, tuple[Any, ...]] = {}
        self._keep(0)

    @property
    def state(self) -> Named:
        """The weights and buffers now."""
        return {**self._parameters, **self._buffers}

    def optimizer(self) -> dict[str, Any]:
        """The state of the optimizer now."""
        return self._optimizer.state_dict()

    def commit(self, commit: Commit, files: Mapping[BatchId, GradientRecord]) -> None:
        """Do what a commit did."""
        if commit.restored is not None:
            self._restore(self._versions[commit.restored])
        elif commit.kind == "fold" and commit.folded:
            records = [(batch, files[batch]) for batch in sorted(commit.folded)]
            self._step(records, commit.groups)
            head = {name: buffer.clone() for name, buffer in self._buffers.items()}
            updates = [update for _, record in records for update in record.buffers]
            for name, value in merged(head, updates).items():
                self._buffers[name].copy_(value)
        self._keep(commit.version)

    def _step(self, records: Records, groups: Sequence[Sequence[BatchId]]) -> None:
        means = mean(records, groups)
        for name, parameter in self._parameters.items():
            parameter.grad = means.get(name)
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()

    def _keep(self, version: int) -> None:
        if version in self._needed:
            schedule = None if self._schedule is None else self._schedule.state_dict()
            now = (self._module.state_dict(), self._optimizer.state_dict(), schedule)
            self._versions[version] = copy.deepcopy(now)

    def _restore(self, snapshot: tuple[Any, ...]) -> None:
        state, optimizer, schedule = copy.deepcopy(snapshot)
        self._module.load_state_dict(state)
        self._optimizer.load_state_dict(optimizer)
        if self._schedule is not None:
            self._schedule.load_state_dict(schedule)


def mean(records: Records, added: Sequence[Sequence[BatchId]] = ()) -> dict[str, Tensor]:
    """Σ nᵢgᵢ/λᵢ / Σ nᵢ, with batches of a group added up first.

    Args:
        records: The batches, in order.
        added: What servers have added up, each in the order in which they did.
    """
    if len(records) == 1:
        record = records[0][1]
        return {name: (g.double() / record.loss_scale).to(g.dtype) for name, g in record.gradients.items()}
    groups: dict[tuple[str, int, int], list[GradientRecord]] = {}
    by_server = {batch for batches in added for batch in batches}
    for batch, record in records:
        if batch not in by_server:
            groups.setdefault((batch.client_id, batch.incarnation, batch.seq // _GROUP), []).append(record)
    sums: dict[str, list[Tensor]] = {}
    held = dict(records)
    samples = [record.num_samples for record in held.values()]
    for batches in added:
        factor = 1.0 / held[batches[0]].loss_scale
        for name, total in total_of([held[batch] for batch in batches]).items():
            sums.setdefault(name, []).append(total * factor)
    for group in groups.values():
        for name, total in _sums(group).items():
            sums.setdefault(name, []).append(total)
    dtypes = {name: g.dtype for _, record in records for name, g in record.gradients.items()}
    return {name: (_add(totals) / sum(samples)).to(dtypes[name]) for name, totals in sums.items()}


def total_of(records: Sequence[GradientRecord]) -> dict[str, Tensor]:
    """Σ nᵢgᵢ, in the order given."""
    found: dict[str, list[Tensor]] = {}
    for record in records:
        for name, gradient in record.gradients.items():
            found.setdefault(name, []).append(gradient.double() * record.num_samples)
    return {name: _add(terms) for name, terms in found.items()}


def _sums(group: Sequence[GradientRecord]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for record in group:
        for name, gradient in record.gradients.items():
            found.setdefault(name, []).append(gradient.double() * (record.num_samples / record.loss_scale))
    return {name: _add(terms) for name, terms in found.items()}


def _add(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total = total + term
    return total


def merged(head: Named, updates: Sequence[BufferUpdate]) -> dict[str, Tensor]:
    """The buffers after a commit."""
    if len(updates) == 1 and all(same(base, head[name]) for name, base in updates[0].bases.items()):
        return {**head, **updates[0].values}
    made = dict(head)
    changed = [update for update in updates if COUNTER in update.values]
    if not changed:
        return made
    steps = [int(update.values[COUNTER]) - int(update.bases[COUNTER]) for update in changed]
    made[COUNTER] = head[COUNTER] + sum(steps)
    kept = 1 - model.MOMENTUM
    for name in STATISTICS:
        total = torch.zeros_like(head[name], dtype=torch.float64)
        for update, count in zip(changed, steps, strict=True):
            seen = (update.values[name].double() - kept**count * update.bases[name].double()) / (1 - kept**count)
            total += seen * update.num_samples
        average = total / sum(update.num_samples for update in changed)
        share = kept ** sum(steps)
        value = share * head[name].double() + (1 - share) * average
        made[name] = (value.clamp(min=0) if name.endswith("var") else value).to(head[name].dtype)
    return made
