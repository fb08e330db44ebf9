"""The bits that must come out, computed once more: serially, in plain torch, by none of the code under test.

A call is the body's module with the version's weights, under the seed. A commit is the sample-weighted mean in the
canonical order, in float64, one step of a torch optimizer that never stopped, and the steps of the statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.faults.simulator import model
from tests.faults.simulator.plan import Plan
from torch import Tensor, nn

from splitfed.protocol import pytree
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import BufferUpdate, ForwardRequest, GradientRecord
from splitfed.store.commit import Commit

Named = Mapping[str, Tensor]
_GROUP = 32
"""Batches of one process that are added up before they meet others: a part of the format."""
STATISTICS = ("1.running_mean", "1.running_var")
COUNTER = "1.num_batches_tracked"
BUFFERS = (*STATISTICS, COUNTER)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same bits."""
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def differing(some: Named, others: Named) -> list[str]:
    """The names under which two sets of tensors differ."""
    return sorted(name for name in {*some, *others} if not same(some.get(name), others.get(name)))


@dataclass
class Call:
    """What a forward is, at a version."""

    version: int
    outputs: Tensor
    entered: Tensor
    module: nn.Module
    bases: Named
    """The version's buffers."""
    start: Named | None
    """Those that it began with, where they aren't the version's."""
    end: Named

    def gradients(self, gradient: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Those of its input and of the parameters; may be asked for again."""
        names = [name for name, _ in self.module.named_parameters()]
        inputs = [self.entered] if self.entered.requires_grad else []
        targets = [*inputs, *self.module.parameters()]
        found = torch.autograd.grad(self.outputs, targets, gradient, retain_graph=True, allow_unused=True)
        of_parameters = zip(names, found[len(inputs) :], strict=True)
        return found[0] if inputs else None, {name: g for name, g in of_parameters if g is not None}

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
        self._plan = plan
        self._weights = weights
        self._modules: dict[int, nn.Module] = {}

    def call(self, request: ForwardRequest, version: int, start: Named | None, target: Any = None) -> Call:
        """Run a call.

        Args:
            request: The call.
            version: Where it ran.
            start: The buffers that an earlier call left, if it continues one.
            target: For a loss on the server.
        """
        module = self._module(version)
        weights = self._weights[version]
        bases = {name: weights[name] for name in BUFFERS}
        for name in BUFFERS:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = (start or bases)[name].clone()
        module.train(request.training)
        entered = pytree.flatten(request.inputs)[1][0].detach().requires_grad_(request.requires_grad[0])
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(request.seed)
        outputs = module(entered * 1)
        if target is not None:
            outputs = model.loss_fn(outputs, target)
        torch.default_generator.set_state(before)
        end = dict(module.named_buffers())
        return Call(version, outputs, entered, module, bases, start, end)

    def _module(self, version: int) -> nn.Module:
        if version not in self._modules:
            made = self._modules[version] = copy.deepcopy(model.body_of(self._plan))
            made.load_state_dict(self._weights[version])
        return self._modules[version]


class Replica:
    """The run once more, from its records and gradient files alone, by an optimizer that never stops.

    Args:
        plan: The settings of the commits.
        weights: Of version 0.
    """

    def __init__(self, plan: Plan, weights: Named) -> None:
        self._plan = plan
        self._module = copy.deepcopy(model.body_of(plan))
        self._module.load_state_dict(weights)
        self._optimizer = model.optimizer_of(plan)(list(self._module.parameters()))
        schedule = model.schedule_of(plan)
        self._schedule = None if schedule is None else schedule(self._optimizer)
        self._versions = [self._snapshot()]

    @property
    def state(self) -> Named:
        """The weights and buffers now."""
        found: Named = self._module.state_dict()
        return found

    def optimizer(self) -> dict[str, Any]:
        """The state of the optimizer now."""
        return self._optimizer.state_dict()

    def commit(self, commit: Commit, files: Mapping[BatchId, GradientRecord]) -> None:
        """Do what a commit did."""
        if commit.restored is not None:
            self._restore(self._versions[commit.restored])
        elif commit.kind == "fold" and commit.folded:
            records = [(batch, files[batch]) for batch in sorted(commit.folded)]
            self._step(records)
            head = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
            updates = [update for _, record in records for update in record.buffers]
            for name, value in merged(head, updates).items():
                self._module.get_buffer(name).copy_(value)
        self._versions.append(self._snapshot())

    def _step(self, records: Sequence[tuple[BatchId, GradientRecord]]) -> None:
        means = mean(records)
        for name, parameter in self._module.named_parameters():
            parameter.grad = means.get(name)
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()

    def _snapshot(self) -> tuple[Any, ...] | None:
        if not self._plan.rollbacks:
            return None
        schedule = None if self._schedule is None else self._schedule.state_dict()
        return copy.deepcopy((self._module.state_dict(), self._optimizer.state_dict(), schedule))

    def _restore(self, snapshot: tuple[Any, ...] | None) -> None:
        assert snapshot is not None
        state, optimizer, schedule = copy.deepcopy(snapshot)
        self._module.load_state_dict(state)
        self._optimizer.load_state_dict(optimizer)
        if self._schedule is not None:
            self._schedule.load_state_dict(schedule)


def mean(records: Sequence[tuple[BatchId, GradientRecord]]) -> dict[str, Tensor]:
    """Σ nᵢgᵢ/λᵢ / Σ nᵢ, with batches of a group added up first."""
    if len(records) == 1:
        record = records[0][1]
        return {name: (g.double() / record.loss_scale).to(g.dtype) for name, g in record.gradients.items()}
    groups: dict[tuple[str, int, int], list[GradientRecord]] = {}
    for (client_id, incarnation, seq), record in records:
        groups.setdefault((client_id, incarnation, seq // _GROUP), []).append(record)
    sums: dict[str, list[Tensor]] = {}
    samples = [sum(record.num_samples for record in group) for group in groups.values()]
    for group in groups.values():
        for name, total in _sums(group).items():
            sums.setdefault(name, []).append(total)
    dtypes = {name: g.dtype for _, record in records for name, g in record.gradients.items()}
    return {name: (_add(totals) / sum(samples)).to(dtypes[name]) for name, totals in sums.items()}


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
