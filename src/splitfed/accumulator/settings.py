"""The settings of a commit, as one value that is checked once and passed on.

A user types them as keywords of an accumulator; from there on they travel together. What each of
them means is documented at `Accumulator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from splitfed.accumulator.buffers import Rule
from splitfed.accumulator.policies import Mode, StalenessWeight, check_most, constant
from splitfed.checks import at_least, positive
from splitfed.errors import InputError

OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Groups = Callable[[nn.Module], list[dict[str, Any]]]

KEEP_VERSIONS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CommitSettings:
    """When a commit comes about, what staleness costs, and how the optimizer steps.

    Raises:
        InputError: a setting out of its range.
    """

    min_batches: int = 1
    max_batches: int | None = None
    max_staleness: int | None = None
    staleness_weight: StalenessWeight = constant
    clip_norm: float | None = None
    lr_scheduler: SchedulerFactory | None = None
    param_groups: Groups | None = None
    buffer_rules: Mapping[str, Rule] | None = None
    personal: Iterable[str] = ()
    keep_versions: int | None = None
    keep_bytes: int | None = None
    device: torch.device | str | None = None
    lock_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.personal, str):
            # It may be read more than once: by an accumulator, and by one that gets its settings.
            object.__setattr__(self, "personal", tuple(self.personal))
        at_least("min_batches", self.min_batches, 1)
        if self.max_batches is not None:
            check_most(self.max_batches, self.min_batches)
        if self.max_staleness is not None:
            at_least("max_staleness", self.max_staleness, 0)
        if self.keep_versions is not None:
            at_least("keep_versions", self.keep_versions, self._least_window)
        if self.keep_bytes is not None:
            at_least("keep_bytes", self.keep_bytes, 0)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)

    @property
    def window(self) -> int:
        """How many versions stay readable; by default enough for any batch that may be stale."""
        if self.keep_versions is not None:
            return self.keep_versions
        return max(KEEP_VERSIONS, self._least_window)

    @property
    def _least_window(self) -> int:
        # A batch may begin max_staleness commits behind the head, and the commit under way moves
        # the head once more: its version must still be readable then.
        return 2 + (self.max_staleness or 0)

    def keywords(self) -> dict[str, Any]:
        """The settings as keywords of `Accumulator`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def check_mode(self, mode: Mode) -> None:
        """Check that these settings follow a mode; they are free where the mode says nothing.

        A mode without a number of batches commits at the end of a round, whatever the accumulator
        would do by itself; there only what the mode sets must be the same.

        Raises:
            InputError: commits come about at another time, or staleness costs something else here.
        """
        usual = CommitSettings()
        for name, expected in mode.settings().items():
            found = getattr(self, name)
            is_free = mode.min_batches is None and expected == getattr(usual, name)
            if found != expected and not is_free:
                raise InputError(
                    f"the accumulator's {name} is {found!r}, but mode {mode.name!r} says "
                    f"{expected!r}: give accumulator and federation the same mode, "
                    "as in Accumulator(..., **policies.mode(...).settings())"
                )
