"""What a commit makes of the buffers that its batches changed: running statistics, counters, flags.

Each batch starts at the buffers of its version and ends with its own. A commit of one batch takes
them bit for bit. A commit of many must not lose steps: if each of 94 batches moved a running mean
from 0 towards 5 by momentum 0.1, the plain mean of their end values is 0.5, one step's worth, where
the unsplit model would stand at 5·(1 − 0.9⁹⁴). So the statistic that a batch saw is read off its
step and the head advances by as many steps as there were updates.

    sᵢ = (bᵢ − (1−m)^uᵢ·baseᵢ) / (1 − (1−m)^uᵢ)
    b ← (1−m)^U·b + (1 − (1−m)^U)·Σ nᵢsᵢ/Σ nᵢ

with uᵢ updates in batch i, U = Σ uᵢ, momentum m. For momentum None, which stands for the cumulative
mean, after T updates:

    sᵢ = ((Tᵢ+uᵢ)·bᵢ − Tᵢ·baseᵢ) / uᵢ
    b ← (T·b + U·Σ nᵢsᵢ/Σ nᵢ) / (T + U)

The trap: InstanceNorm never counts in `num_batches_tracked`; a change that no counter saw is taken
for one update.
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
_ROWS = 64  # updates that are computed at once: bounds the memory of a commit of thousands
_RULES = ("mean", "sum", "or", "ema", "last", "keep")
_Counts = list[tuple[BufferUpdate, int]]
"""Updates with the number of steps that each took."""


@torch.no_grad()
def merge_buffers(
    module: nn.Module,
    head: Buffers,
    updates: Sequence[BufferUpdate],
    rules: Mapping[str, Rule] | None = None,
) -> dict[str, Tensor]:
    """The buffers after a commit that folds `updates`, computed in float64 and cast back once.

    One update that began at the head is taken bit for bit. Else statistics of normalisation layers
    advance as this module's docstring says, an integer becomes b + Σ(bᵢ − baseᵢ), a bool is true if
    any batch ended with true, and any other float becomes Σ nᵢbᵢ / Σ nᵢ; a batch that left a buffer
    alone contributes the head's value.

    Args:
        module: Gives names, types and momenta only; it may live on the meta device.
        head: The current value of every persistent buffer by qualified name.
        updates: What the batches changed, in canonical order.
        rules: Patterns of qualified names (`fnmatch`; the first that fits counts) to one of "mean",
            "sum", "or", "ema", "last" (the last batch that changed it), "keep" (the head's value,
            always), or to a function `(head, values, bases, num_samples) -> Tensor` over the
            batches that changed it. "ema" needs a `momentum` on the module that holds the buffer.

    Returns:
        A value for each name of `head`; one that didn't change is the same tensor as in `head`.

    Raises:
        InputError: a rule that doesn't exist, fits no buffer or not this one; a buffer that the
            module or head doesn't have; a shape or dtype that isn't the head's; a momentum outside
            of 0 to 1.
    """
    _check_updates(head, updates)
    chosen = _choose(module, head, rules or {})
    is_exact = _is_exact(head, updates)
    merged = {}
    for name, value in head.items():
        rule = chosen[name]
        new = value
        if is_exact and rule != "keep" and not callable(rule):
            new = updates[0].values.get(name, value)
        elif any(name in update.values for update in updates):
            # Most buffers change in no batch: those cost nothing.
            owner = module.get_submodule(name.rpartition(".")[0])
            new = _Merger(owner, name, head, updates).apply(rule)
        if same_bits(new, value):
            new = value
        merged[name] = new
    return merged


def _is_exact(head: Buffers, updates: Sequence[BufferUpdate]) -> bool:
    """Whether the only update began at the head, so that its end is the unsplit model's."""
    if len(updates) != 1:
        return False
    return all(same_bits(base, head[name]) for name, base in updates[0].bases.items())


class _Merger:
    """The rules, for one buffer of one commit; every method returns its new value."""

    def __init__(
        self, owner: nn.Module, name: str, head: Buffers, updates: Sequence[BufferUpdate]
    ) -> None:
        self.owner = owner
        self.name = name
        self.head = head[name]
        self.updates = updates
        self.changed = [update for update in updates if name in update.values]
        self.wide = torch.complex128 if self.head.is_complex() else torch.float64
        prefix, _, self.leaf = name.rpartition(".")
        counter = f"{prefix}.num_batches_tracked".lstrip(".")
        self.counter = ""
        self.counted = 0
        if counter in head and head[counter].numel() == 1:
            self.counter = counter
            self.counted = int(head[counter])

    def apply(self, rule: Rule) -> Tensor:
        if callable(rule):
            return self.custom(rule)
        if rule == "keep":
            return self.head
        if rule == "last":
            return self.changed[-1].values[self.name]
        rules = {"mean": self.mean, "sum": self.sum, "or": self.either, "ema": self.statistic}
        return rules[rule]().to(self.head.dtype)

    def custom(self, rule: Merge) -> Tensor:
        values = [update.values[self.name] for update in self.changed]
        bases = [update.bases[self.name] for update in self.changed]
        result = rule(self.head, values, bases, [update.num_samples for update in self.changed])
        _check_like(result, self.head, f"the rule of buffer {self.name!r} made")
        return result

    def mean(self) -> Tensor:
        mean = self._weighted([(update, 1) for update in self.updates], lambda ends, _: ends)
        if not _inexact(self.head):
            mean = mean.round()
        return mean

    def sum(self) -> Tensor:
        total = self.head.to(self.wide if _inexact(self.head) else torch.int64, copy=True)
        for start in range(0, len(self.changed), _ROWS):
            some = self.changed[start : start + _ROWS]
            steps = self._rows(some, "values", total.dtype) - self._rows(some, "bases", total.dtype)
            for step in steps:
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
        steps = [(update, self._steps(update)) for update in self.updates]
        counts = [(update, count) for update, count in steps if count]
        mean = self._weighted(counts, partial(self._seen, momentum))
        head = self.head.to(mean.dtype)
        total = float(sum(count for _, count in counts))
        if momentum is None:
            result = (self.counted * head + total * mean) / (self.counted + total)
        else:
            result = (1 - momentum) ** total * head + (1 - (1 - momentum) ** total) * mean
        # Rounding in bᵢ is amplified by 1/m in sᵢ: a variance near zero could come out below it,
        # and end in NaN.
        if self.leaf == "running_var":
            result = result.clamp(min=0)
        return result

    def _seen(self, momentum: float | None, ends: Tensor, counts: _Counts) -> Tensor:
        """The statistics sᵢ `(K, *S)` that K batches saw, from their ends bᵢ `(K, *S)`."""
        bases = self._rows([update for update, _ in counts], "bases", ends.dtype)
        if momentum is not None:
            kept = self._column([(1 - momentum) ** steps for _, steps in counts])
            return (ends - kept * bases) / (1 - kept)
        before = self._column([self._counted_before(update) for update, _ in counts])
        taken = self._column([float(steps) for _, steps in counts])
        return ((before + taken) * ends - before * bases) / taken

    def _counted_before(self, update: BufferUpdate) -> float:
        base = update.bases.get(self.counter)
        if base is None:
            return self.counted
        return float(base)

    def _steps(self, update: BufferUpdate) -> int:
        """How many updates this buffer had in a batch; a change that no counter saw is one."""
        counted = 0
        if self.counter in update.values:
            counted = int(update.values[self.counter]) - int(update.bases[self.counter])
        return counted if counted > 0 else int(self.name in update.values)

    def _weighted(self, counts: _Counts, of: Callable[[Tensor, _Counts], Tensor]) -> Tensor:
        """Σ nᵢ·of(bᵢ) / Σ nᵢ."""
        # A few updates at a time: one by one, each would cost a dozen calls of torch.
        total = torch.zeros_like(self.head, dtype=self.wide)
        for start in range(0, len(counts), _ROWS):
            some = counts[start : start + _ROWS]
            ends = self._rows([update for update, _ in some], "values", total.dtype)
            weights = self._column([update.num_samples for update, _ in some])
            # Row by row, as sum() may add in an order that depends on their number.
            for row in of(ends, some) * weights:
                total += row
        return total / sum(update.num_samples for update, _ in counts)

    def _rows(self, updates: Sequence[BufferUpdate], which: str, dtype: torch.dtype) -> Tensor:
        """This buffer's 'values' or 'bases' in K updates `(K, *S)`; else the head's value."""
        device = self.head.device
        rows = [getattr(update, which).get(self.name, self.head) for update in updates]
        rows = [row if row.device == device else row.to(device) for row in rows]
        return torch.stack(rows).to(dtype)

    def _column(self, numbers: Sequence[float]) -> Tensor:
        """K numbers as `(K, 1, ...)`, to be multiplied with K buffers `(K, *S)`."""
        column = torch.tensor(numbers, dtype=torch.float64, device=self.head.device)
        return column.view(-1, *(1 for _ in self.head.shape))


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _choose(module: nn.Module, head: Buffers, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rule of each buffer, checked."""
    _check_patterns(head, rules)
    owners = dict(module.named_modules(remove_duplicate=False))
    chosen: dict[str, Rule] = {}
    for name, value in head.items():
        prefix, _, leaf = name.rpartition(".")
        owner = owners.get(prefix)
        if owner is None or leaf not in owner._buffers:
            expected = [other for other, _ in module.named_buffers()]
            raise InputError(f"the module has no buffer {name!r}: expected {expected}")
        given = next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)
        rule = _default(owner, leaf, value) if given is None else given
        _check_rule(rule, owner, name, value)
        chosen[name] = rule
    return chosen


def _check_patterns(head: Buffers, rules: Mapping[str, Rule]) -> None:
    for pattern, rule in rules.items():
        if not callable(rule) and rule not in _RULES:
            raise InputError(
                f"buffer rule {rule!r} doesn't exist: "
                f"expected a function or one of {', '.join(_RULES)}"
            )
        if not any(fnmatchcase(name, pattern) for name in head):
            listed = ", ".join(sorted(head)) or "none"
            raise InputError(
                f"buffer rule {pattern!r} fits no buffer: expected a pattern of one of {listed}"
            )


def _check_rule(rule: Rule, owner: nn.Module, name: str, value: Tensor) -> None:
    if rule == "or" and _inexact(value):
        raise InputError(
            f"buffer rule 'or' doesn't fit {name!r}, a {value.dtype}: expected bool or integers"
        )
    momentum = getattr(owner, "momentum", math.nan)  # NaN is out of any range
    if rule == "ema" and momentum is not None and not 0 <= momentum <= 1:
        raise InputError(
            f"buffer {name!r} can't be an 'ema': expected a momentum from 0 to 1, got {momentum}"
        )


def _default(owner: nn.Module, leaf: str, value: Tensor) -> str:
    if isinstance(owner, _NormBase) and leaf in ("running_mean", "running_var"):
        return "ema"
    if value.dtype == torch.bool:
        return "or"
    return "mean" if _inexact(value) else "sum"


def _check_updates(head: Buffers, updates: Sequence[BufferUpdate]) -> None:
    for update in updates:
        if not (update.num_samples > 0 and math.isfinite(update.num_samples)):
            raise InputError(
                f"num_samples of an update is {update.num_samples!r}: expected finite, above 0"
            )
        lonely = update.values.keys() ^ update.bases.keys()
        strange = sorted(lonely | (update.values.keys() - head.keys()))
        if strange:
            raise InputError(
                f"buffers {strange} lack a value, a base or a place: expected only {sorted(head)}"
            )
        for name in update.values:
            _check_like(update.values[name], head[name], f"an update of buffer {name!r} ends with")
            _check_like(update.bases[name], head[name], f"an update of buffer {name!r} begins with")


def _check_like(value: object, head: Tensor, subject: str) -> None:
    if not isinstance(value, Tensor):
        got = type(value).__name__
    elif (value.dtype, value.shape) != (head.dtype, head.shape):
        got = f"{value.dtype} {tuple(value.shape)}"
    else:
        return
    raise InputError(f"{subject} {got}: expected {head.dtype} {tuple(head.shape)}")
