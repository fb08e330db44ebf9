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
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from splitfed.errors import InputError

Merge = Callable[[Tensor, list[Tensor], list[Tensor], list[float]], Tensor]
Rule = str | Merge
_RULES = ("mean", "sum", "or", "ema", "last", "keep")


@dataclass(frozen=True, slots=True, eq=False)
class BufferUpdate:
    """The buffers that one batch changed.

    A changed buffer differs from its base in some bit. A statistic that an update left as it was may be named too: only
    then is its base known exactly, and the head's value stands in for it if not.
    """

    values: Mapping[str, Tensor]
    """The end value bᵢ of each, by qualified name."""
    bases: Mapping[str, Tensor]
    """The value that each began with, under the same names."""
    num_samples: float
    """nᵢ, in examples."""


def merge_buffers(
    module: nn.Module,
    head: Mapping[str, Tensor],
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
        new = value
        if any(name in update.values for update in updates):
            if fresh and chosen[name] != "keep" and not callable(chosen[name]):
                new = updates[0].values[name]
            else:
                new = _Merger(module, head, updates, name).apply(chosen[name])
        merged[name] = value if same_bits(new, value) else new
    return merged


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit: NaN equals itself here, and -0.0 differs from 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))


class _Merger:
    """The rules, for one buffer of one commit; every method returns its new value."""

    def __init__(
        self, module: nn.Module, head: Mapping[str, Tensor], updates: Sequence[BufferUpdate], name: str
    ) -> None:
        prefix, _, self.leaf = name.rpartition(".")
        self.owner = module.get_submodule(prefix)
        self.name, self.head, self.updates = name, head[name], updates
        counter = f"{prefix}.num_batches_tracked".lstrip(".")
        self.counter = counter if counter in head and head[counter].numel() == 1 else None
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
        whole = not (self.head.is_floating_point() or self.head.is_complex())
        mean = self._weighted([(self._end(update), update.num_samples) for update in self.updates])
        return mean.round() if whole else mean

    def sum(self) -> Tensor:
        wide = _wide if self.head.is_floating_point() or self.head.is_complex() else _long
        total = wide(self.head, self.head)
        for update in self.changed:
            total = total + (wide(update.values[self.name], self.head) - wide(update.bases[self.name], self.head))
        return total

    def either(self) -> Tensor:
        result = torch.zeros_like(self.head)
        for update in self.updates:
            result = result | update.values.get(self.name, self.head).to(self.head.device)
        return result

    def statistic(self) -> Tensor:
        momentum: float | None = self.owner.momentum  # type: ignore[assignment]
        if momentum == 0:
            return self.head
        if momentum is None and self.counter is None:
            return self.mean()
        seen, total = [], 0
        for update in self.updates:
            if steps := self._steps(update):
                seen.append((self._seen(update, momentum, steps), update.num_samples))
                total += steps
        mean, head = self._weighted(seen), _wide(self.head, self.head)
        if momentum is None:
            result = (self.counted * head + total * mean) / (self.counted + total)
        else:
            result = (1 - momentum) ** total * head + (1 - (1 - momentum) ** total) * mean
        # Rounding in bᵢ is amplified by 1/m in sᵢ: a variance near zero could come out below it, and end in NaN.
        return result.clamp(min=0) if self.leaf == "running_var" else result

    def _seen(self, update: BufferUpdate, momentum: float | None, steps: int) -> Tensor:
        """The mean statistic sᵢ that moved the buffer from its base to its end in so many steps."""
        end, base = self._end(update), _wide(update.bases.get(self.name, self.head), self.head)
        if momentum is not None:
            kept = (1 - momentum) ** steps
            return (end - kept * base) / (1 - kept)
        before = float(update.bases.get(self.counter or "", torch.tensor(self.counted)))
        return ((before + steps) * end - before * base) / steps

    def _steps(self, update: BufferUpdate) -> int:
        if self.counter is not None and self.counter in update.values:
            counted = int(update.values[self.counter]) - int(update.bases[self.counter])
            if counted > 0:
                return counted
        return int(self.name in update.values)

    def _end(self, update: BufferUpdate) -> Tensor:
        return _wide(update.values.get(self.name, self.head), self.head)

    def _weighted(self, items: list[tuple[Tensor, float]]) -> Tensor:
        total = torch.zeros_like(_wide(self.head, self.head))
        for value, num_samples in items:
            total += value * num_samples
        return total / sum(num_samples for _, num_samples in items)


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().to(like.device, torch.complex128 if like.is_complex() else torch.float64)


def _long(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().to(like.device, torch.int64)


def _choose(module: nn.Module, head: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> dict[str, Rule]:
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
        if rule == "or" and (value.is_floating_point() or value.is_complex()):
            raise InputError(f"buffer rule 'or' doesn't fit {name!r}, a {value.dtype}: expected bool or integers")
        momentum = getattr(owner, "momentum", math.nan)
        if rule == "ema" and momentum is not None and not 0 <= momentum <= 1:
            raise InputError(f"buffer {name!r} can't be an 'ema': expected a momentum from 0 to 1, got {momentum}")
    return chosen


def _default(owner: nn.Module, leaf: str, value: Tensor) -> str:
    if isinstance(owner, _NormBase) and leaf in ("running_mean", "running_var"):
        return "ema"
    if value.dtype == torch.bool:
        return "or"
    return "mean" if value.is_floating_point() or value.is_complex() else "sum"


def _check_updates(head: Mapping[str, Tensor], updates: Sequence[BufferUpdate]) -> None:
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
