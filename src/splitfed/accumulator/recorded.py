"""The settings of a commit on record: what a replay needs besides the gradients, as one small file.

It holds which optimizer and scheduler were built and their state at that moment, the names of the
parameters of each group, and what else the bits depend on. Commit records name it by its hash. So
a record can be replayed, and two accumulators that step in different ways don't take turns in
silence.

Functions aren't data: of one's own function only the name is on record, and of a scheduler that
holds one, or holds other schedulers, the class. Classes are built from a record only if they are
torch's own: a store says what a run did, and not which code to import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from splitfed.accumulator.optimizer import build, capture, restore
from splitfed.accumulator.settings import CommitSettings, OptimizerFactory
from splitfed.errors import CorruptedError, FormatError, InputError
from splitfed.model.skeleton import Template, plain_name
from splitfed.protocol import checksum
from splitfed.protocol.packing import pack_tree, unpack_tree
from splitfed.store.lineage import Lineage

_KIND = "Settings"
_TOLD = "groups clip_norm max_staleness staleness_weight buffer_rules personal device".split()
_DIGITS = 16
_BY_FUNCTIONS = (lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR)


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """How a commit steps, as it is on record."""

    optimizer: str | None
    """The optimizer's class, as module and name; `None` where nothing trains."""
    scheduler: str | None
    """The scheduler's, if there is one."""
    groups: tuple[tuple[str, ...], ...]
    """The names of the parameters of each group."""
    built: Any
    """Both as they were built, before any step."""
    clip_norm: float | None
    max_staleness: int | None
    staleness_weight: str
    """The name of the function."""
    buffer_rules: Mapping[str, str]
    """By pattern: a rule, or the name of one's own, with its module."""
    personal: tuple[str, ...]
    """Patterns of names that clients keep to themselves."""
    device: str
    """Where it stepped."""

    def without_scheduler(self) -> Recorded:
        """The same, as if there were no scheduler."""
        return replace(self, scheduler=None, built={**self.built, "scheduler": None})

    def build(self, module: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
        """Optimizer and scheduler of a module, as they were built then.

        Raises:
            InputError: they aren't torch's own, or the scheduler isn't made of numbers alone.
        """
        optimizer_class = _class(self.optimizer or "", torch.optim, Optimizer, "optimizer")
        named = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        saved = self.built["optimizer"]["state"]["param_groups"]
        groups = [
            {**group, "params": [named[name] for name in names]}
            for group, names in zip(saved, self.groups, strict=True)
        ]
        optimizer: Optimizer = optimizer_class(groups)
        scheduler = None
        if self.scheduler is not None:
            kind = _class(self.scheduler, lr_scheduler, LRScheduler, "lr_scheduler")
            if issubclass(kind, _BY_FUNCTIONS) or "(" in self.built["scheduler"]["kind"]:
                raise _unknown("lr_scheduler", self.scheduler)
            # torch marks the methods of an optimizer that has a scheduler.
            lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
            scheduler = kind.__new__(kind)
            scheduler.optimizer = optimizer
        restore(optimizer, scheduler, self.built)
        return optimizer, scheduler


def record_of(
    template: Template,
    optimizer: OptimizerFactory,
    settings: CommitSettings,
    device: torch.device,
) -> Recorded:
    """The settings of an accumulator; optimizer and scheduler are built for it.

    Args:
        template: The module's structure.
        optimizer: Makes the optimizer.
        settings: All else.
        device: Where it steps.

    Raises:
        InputError: a factory that isn't one, or returns something else.
        UnsupportedError: optimizer or scheduler can't work from a stored mean.
    """
    module = template.blueprint
    optimizer_name = scheduler_name = state = None
    groups: tuple[tuple[str, ...], ...] = ()
    if template.trainable:
        built, scheduler = build(module, optimizer, settings.lr_scheduler, settings.param_groups)
        names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
        optimizer_name = _name_of(type(built))
        scheduler_name = None if scheduler is None else _name_of(type(scheduler))
        groups = tuple(
            tuple(names[id(parameter)] for parameter in group["params"])
            for group in built.param_groups
        )
        state = capture(built, scheduler)
    rules = settings.buffer_rules or {}
    return Recorded(
        optimizer=optimizer_name,
        scheduler=scheduler_name,
        groups=groups,
        built=state,
        clip_norm=settings.clip_norm,
        max_staleness=settings.max_staleness,
        staleness_weight=getattr(settings.staleness_weight, "__name__", "own"),
        buffer_rules={
            pattern: rule if isinstance(rule, str) else _name_of(rule)
            for pattern, rule in rules.items()
        },
        personal=tuple(settings.personal),
        device=device.type,
    )


def note(lineage: Lineage, recorded: Recorded) -> str:
    """Put settings on record, once; returns the hash that names them.

    Raises:
        StoreError: the storage failed.
    """
    # Their order is the format.
    fields = {name: getattr(recorded, name) for name in Recorded.__dataclass_fields__}
    parts = pack_tree(_KIND, fields)
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:_DIGITS]
    lineage.blobs.create(lineage.keys.settings(digest), checksum.sealed(parts))
    return digest


def read(lineage: Lineage, digest: str) -> Recorded:
    """The settings of that hash.

    Raises:
        CorruptedError: they aren't on file any more, or are damaged.
    """
    key = lineage.keys.settings(digest)
    data = lineage.blobs.get(key)
    if data is None:
        raise CorruptedError(
            f"{key!r} is missing, which says how commits of lineage {lineage.name!r} stepped: "
            "restore it from a copy, or start an accumulator with the same settings once more, "
            "which writes it again"
        )
    try:
        return Recorded(**unpack_tree(_KIND, data))
    except TypeError as error:
        raise FormatError(f"{key!r} isn't a record of settings: {error}") from error


def differences(one: Recorded, other: Recorded) -> list[str]:
    """What is otherwise in two records, in words, as far as nobody else says so.

    Another class of optimizer or scheduler is refused, and of other rates that the optimizer was
    made with the stepper warns.
    """
    found = []
    for name in _TOLD:
        before, now = getattr(one, name), getattr(other, name)
        if before != now:
            found.append(f"{name} {before!r} → {now!r}"[:200])
    return found


def _name_of(kind: Any) -> str:
    module = getattr(kind, "__module__", "")
    return f"{module}:{getattr(kind, '__qualname__', type(kind).__qualname__)}"


def _class(name: str, module: Any, base: type, setting: str) -> Any:
    """A class of torch by the name that is on record."""
    place, _, kind = name.partition(":")
    found = getattr(module, kind, None)
    is_torch = place == "torch" or place.startswith("torch.")
    if not is_torch or not isinstance(found, type) or not issubclass(found, base):
        raise _unknown(setting, name)
    return found


def _unknown(setting: str, name: str) -> InputError:
    return InputError(
        f"the {setting} on record is {name}, which can't be built from the record alone: give "
        f"its function, replay(..., {setting}=...) or --{setting.replace('_', '-')}"
    )
