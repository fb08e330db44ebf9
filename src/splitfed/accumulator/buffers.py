"""What a commit makes of the buffers that its batches changed: running statistics, counters, flags.

Each batch starts at the buffers of its version and ends with its own. A commit of one batch takes them bit for bit. A
commit of many must not lose steps: if each of 94 batches moved a running mean from 0 towards 5 by momentum 0.1, the
plain mean of their end values is 0.5, one step's worth, where the unsplit model would stand at 5·(1 − 0.9⁹⁴). So the
statistic that a batch saw is read off its step and the head advances by as many steps as there were updates.

    sᵢ = (bᵢ − (1−m)^uᵢ·baseᵢ) / (1 − (1−m)^uᵢ)                with uᵢ updates in batch i, U = Σ uᵢ, momentum m
    b ← (1−m)^U·b + (1 − (1−m)^U)·Σ nᵢsᵢ/Σ nᵢ
    b ← (T·b + U·Σ nᵢsᵢ/Σ nᵢ) / (T + U)                        for momentum None: the cumulative mean after T updates,
                                                               where sᵢ = ((Tᵢ+uᵢ)·bᵢ − Tᵢ·baseᵢ) / uᵢ

The trap: InstanceNorm never counts in `num_batches_tracked`; a change that no counter saw is taken for one update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from splitfed.errors import InputError
from splitfed.model.numerics import same_bits
from splitfed.protocol.messages import BufferUpdate

Buffers = Mapping[str, Tensor]
Merge = Callable[[Tensor, list[Tensor], list[Tensor], list[float]], Tensor]
Rule = str | Merge
_ROWS = 64  # updates that are computed at once
_RULES = ("mean", "sum", "or", "ema", "last", "keep")


_Counts = list[tuple[BufferUpdate, int]]


@torch.no_grad()
def merge_buffers(
    module: nn.Module,
    head: Buffers,
    updates: Sequence[BufferUpdate],
    rules: Mapping[str, Rule] | None = None,
) -> dict[str, Tensor]:
    """Return the buffers after a commit that folds `updates`, computed in float64 and cast back once.

    One update that began at the head is taken bit for bit. Else statistics of normalisation layers advance as this
    module's docstring says, an integer becomes b + Σ(bᵢ − baseᵢ), a bool is true if any batch ended with true, and any
    other float becomes Σ nᵢbᵢ / Σ nᵢ; a batch that left a buffer alone contributes the head's value.

    Args:
        module: Gives names, types and momenta only; it may live on the meta device.
        head: The current value of every persistent buffer by qualified name.
        updates: What the batches changed, in canonical order.
        rules: Patterns of qualified names (`fnmatch`; the first that fits counts) to one of "mean", "sum", "or", "ema",
            "last" (the last batch that changed it), "keep" (the head's value, always), or to a function
            `(head, values, bases, num_samples) -> Tensor` over the batches that changed it. "ema" needs a `momentum` on
            the module that holds the buffer.

    Returns:
        A value for each name of `head`; one that didn't change is the same tensor as in `head`.

    Raises:
        InputError: a rule that doesn't exist, fits no buffer or not this one; a buffer that the module or head doesn't
            have; a shape or dtype that isn't the head's; a momentum outside of 0 to 1.
    """
    _check_updates(head, updates)
    chosen = _choose(module, head, rules or {})
    fresh = len(updates) == 1 and all(same_bits(base, head[name]) for name, base in updates[0].bases.items())
    merged = {}
    for name, value in head.items():
        rule, new = chosen[name], value
        if fresh and rule != "keep" and not callable(rule):
            new = updates[0].values.get(name, value)
        elif any(name in update.values for update in updates):
            new = _Merger(module.get_submodule(name.rpartition(".")[0]), name, head, updates).apply(rule)
        merged[name] = value if same_bits(new, value) else new
    return merged


class _Merger:
    """The rules, for one buffer of one commit; every method returns its new value."""

    def __init__(self, owner: nn.Module, name: str, head: Buffers, updates: Sequence[BufferUpdate]) -> None:
        self.owner, self.name, self.head, self.updates = owner, name, head[name], updates
        prefix, _, self.leaf = name.rpartition(".")
        self.wide = torch.complex128 if self.head.is_complex() else torch.float64
        counter = f"{prefix}.num_batches_tracked".lstrip(".")
        self.counter = counter if counter in head and head[counter].numel() == 1 else ""
        self.counted = int(head[counter]) if self.counter else 0
        self.changed = [update for update in updates if name in update.values]

    def apply(self, rule: Rule) -> Tensor:
        if callable(rule):
            values, bases = zip(*((u.values[self.name], u.bases[self.name]) for u in self.changed), strict=True)
            result = rule(self.head, list(values), list(bases), [u.num_samples for u in self.changed])
            _check_like(result, self.head, f"the rule of buffer {self.name!r} made")
            return result
        if rule in ("last", "keep"):
            return self.changed[-1].values[self.name] if rule == "last" else self.head
        result = {"mean": self.mean, "sum": self.sum, "or": self.either, "ema": self.statistic}[rule]()
        return result.to(self.head.dtype)

    def mean(self) -> Tensor:
        mean = self._weighted([(update, 1) for update in self.updates], lambda ends, _: ends)
        return mean if _inexact(self.head) else mean.round()

    def sum(self) -> Tensor:
        total = self.head.to(self.wide if _inexact(self.head) else torch.int64, copy=True)
        for start in range(0, len(self.changed), _ROWS):
            some = self.changed[start : start + _ROWS]
            for step in self._rows(some, "values", total.dtype) - self._rows(some, "bases", total.dtype):
                total += step
        return total

    def either(self) -> Tensor:
        result = torch.zeros_like(self.head)
        for end in self._rows(self.updates, "values", self.head.dtype):
            result |= end
        return result

    def statistic(self) -> Tensor:
        momentum: float | None = self.owner.momentum  # type: ignore[assignment]
        if momentum == 0:
            return self.head
        if momentum is None and not self.counter:
            return self.mean()
        counts = [(update, steps) for update in self.updates if (steps := self._steps(update))]
        mean = self._weighted(counts, partial(self._seen, momentum))
        total, head = float(sum(steps for _, steps in counts)), self.head.to(mean.dtype)
        if momentum is None:
            result = (self.counted * head + total * mean) / (self.counted + total)
        else:
            result = (1 - momentum) ** total * head + (1 - (1 - momentum) ** total) * mean
        # Rounding in bᵢ is amplified by 1/m in sᵢ: a variance near zero could come out below it, and end in NaN.
        return result.clamp(min=0) if self.leaf == "running_var" else result

    def _seen(self, momentum: float | None, ends: Tensor, counts: _Counts) -> Tensor:
        """The statistics sᵢ `(K, *S)` that moved K buffers to their ends `(K, *S)` in so many steps each."""
        bases = self._rows([update for update, _ in counts], "bases", ends.dtype)
        if momentum is not None:
            kept = self._column([(1 - momentum) ** steps for _, steps in counts])
            return (ends - kept * bases) / (1 - kept)
        begun = [float(u.bases[self.counter]) if self.counter in u.bases else self.counted for u, _ in counts]
        before, taken = self._column(begun), self._column([float(steps) for _, steps in counts])
        return ((before + taken) * ends - before * bases) / taken

    def _steps(self, update: BufferUpdate) -> int:
        ends, bases = update.values, update.bases
        counted = int(ends[self.counter]) - int(bases[self.counter]) if self.counter in ends else 0
        return counted if counted > 0 else int(self.name in ends)

    def _weighted(self, counts: _Counts, of: Callable[[Tensor, _Counts], Tensor]) -> Tensor:
        """Σ nᵢ·of(bᵢ) / Σ nᵢ, a few updates at a time: one by one each of them would cost a dozen calls of torch's."""
        total = torch.zeros_like(self.head, dtype=self.wide)
        for start in range(0, len(counts), _ROWS):
            some = counts[start : start + _ROWS]
            ends = self._rows([update for update, _ in some], "values", total.dtype)
            for row in of(ends, some) * self._column([update.num_samples for update, _ in some]):
                total += row
        return total / sum(update.num_samples for update, _ in counts)

    def _rows(self, updates: Sequence[BufferUpdate], which: str, dtype: torch.dtype) -> Tensor:
        here = self.head.device
        rows = [getattr(update, which).get(self.name, self.head) for update in updates]
        return torch.stack([row if row.device == here else row.to(here) for row in rows]).to(dtype)

    def _column(self, numbers: Sequence[float]) -> Tensor:
        """K numbers as `(K, 1, ...)`, to be multiplied with K buffers `(K, *S)`."""
        column = torch.tensor(numbers, dtype=torch.float64, device=self.head.device)
        return column.view(-1, *(1 for _ in self.head.shape))


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _choose(module: nn.Module, head: Buffers, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rule of each buffer, checked."""
    listed = ", ".join(sorted(head)) or "none"
    for pattern, rule in rules.items():
        if not callable(rule) and rule not in _RULES:
            raise InputError(f"buffer rule {rule!r} doesn't exist: expected a function or one of {', '.join(_RULES)}")
        if not any(fnmatchcase(name, pattern) for name in head):
            raise InputError(f"buffer rule {pattern!r} fits no buffer: expected a pattern of one of {listed}")
    owners = dict(module.named_modules(remove_duplicate=False))
    chosen: dict[str, Rule] = {}
    for name, value in head.items():
        prefix, _, leaf = name.rpartition(".")
        owner = owners.get(prefix)
        if owner is None or leaf not in owner._buffers:
            raise InputError(f"the module has no buffer {name!r}: expected {[n for n, _ in module.named_buffers()]}")
        given = next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)
        rule = chosen[name] = _default(owner, leaf, value) if given is None else given
        if rule == "or" and _inexact(value):
            raise InputError(f"buffer rule 'or' doesn't fit {name!r}, a {value.dtype}: expected bool or integers")
        momentum = getattr(owner, "momentum", math.nan)
        if rule == "ema" and momentum is not None and not 0 <= momentum <= 1:
            raise InputError(f"buffer {name!r} can't be an 'ema': expected a momentum from 0 to 1, got {momentum}")
    return chosen


def _default(owner: nn.Module, leaf: str, value: Tensor) -> str:
    if isinstance(owner, _NormBase) and leaf in ("running_mean", "running_var"):
        return "ema"
    return "or" if value.dtype == torch.bool else "mean" if _inexact(value) else "sum"


def _check_updates(head: Buffers, updates: Sequence[BufferUpdate]) -> None:
    for update in updates:
        if not (update.num_samples > 0 and math.isfinite(update.num_samples)):
            raise InputError(f"num_samples of an update is {update.num_samples!r}: expected finite, above 0")
        if update.values.keys() != update.bases.keys() or not update.values.keys() <= head.keys():
            strange = sorted((update.values.keys() ^ update.bases.keys()) | (update.values.keys() - head.keys()))
            raise InputError(f"buffers {strange} lack a value, a base or a place: expected only {sorted(head)}")
        for name in update.values:
            _check_like(update.values[name], head[name], f"an update of buffer {name!r} ends with")
            _check_like(update.bases[name], head[name], f"an update of buffer {name!r} begins with")


def _check_like(value: object, head: Tensor, what: str) -> None:
    if not isinstance(value, Tensor) or (value.dtype, value.shape) != (head.dtype, head.shape):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{what} {got}: expected {head.dtype} {tuple(head.shape)}")
