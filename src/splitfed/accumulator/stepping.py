"""One optimizer step from a mean gradient, continued from wherever the last commit left it.

Module, optimizer and scheduler live in the store between commits. What stays in memory is a cache: it is used only
if the head is the very commit (by nonce) that it came from, and it equals what the store would give, bit for bit.

The optimizer's settings are of its state, so the store's win over those of a factory that was changed meanwhile. Who
restarts with another rate would wait for it in vain: that is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from splitfed.accumulator import optimizer as optimizers
from splitfed.accumulator.optimizer import Groups, OptimizerFactory, SchedulerFactory
from splitfed.model.skeleton import Template
from splitfed.store.versions import Versions

_SETTINGS = ("lr", "momentum", "betas", "weight_decay")


@dataclass(slots=True, eq=False)
class Live:
    """Module, optimizer and scheduler as one commit left them."""

    nonce: str
    module: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None


def _settings(optimizer: Optimizer) -> list[dict[str, object]]:
    """What people set, by group."""
    groups = optimizer.param_groups
    return [
        {key: group[key] for key in _SETTINGS if isinstance(group.get(key), float | int | tuple)} for group in groups
    ]


class Stepper:
    """Takes optimizer steps on the state of a lineage.

    Args:
        template: The module's structure.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the scheduler.
        param_groups: Makes parameter groups from the module.
        clip_norm: Clip the mean gradient to this global 2-norm.
        device: Where to step; where the weights are if it isn't given.

    Raises:
        UnsupportedError: optimizer or scheduler can't work from a stored mean.
    """

    def __init__(
        self,
        template: Template,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        param_groups: Groups | None,
        clip_norm: float | None,
        device: torch.device | None,
    ) -> None:
        self._template = template
        self._factories = (optimizer, lr_scheduler, param_groups)
        self._clip_norm = clip_norm
        self._device = device
        self._kept: Live | None = None
        optimizers.build(template.blueprint, *self._factories)

    def take(self, versions: Versions, head: int) -> Live:
        """The state at the head, for the caller to change: from memory if it is the same, else from the store."""
        nonce, kept, self._kept = versions.commit(head).nonce, self._kept, None
        if kept is not None and kept.nonce == nonce:
            return kept
        state = {name: tensor.clone() for name, tensor in versions.checked_state(head).items()}
        module = self._template.build(state, self._device)
        optimizer, scheduler = optimizers.build(module, *self._factories)
        saved = versions.optimizer(head)
        if saved is not None:
            given = _settings(optimizer)
            optimizers.restore(optimizer, scheduler, saved)
            if scheduler is None and _settings(optimizer) != given:
                warnings.warn(
                    f"the optimizer goes on with the store's {_settings(optimizer)}, not with {given} as it was "
                    "made now: settings are part of its state. Make it as before; for rates that change give a "
                    "lr_scheduler from the beginning, or begin a new run from load_weights()",
                    stacklevel=2,
                )
        return Live(nonce, module, optimizer, scheduler)

    def keep(self, live: Live, nonce: str) -> None:
        """Hold on to a state that has been committed."""
        live.nonce = nonce
        self._kept = live

    def step(self, live: Live, mean: Mapping[str, Tensor]) -> None:
        """One step of optimizer and scheduler; a parameter that isn't in `mean` keeps no gradient."""
        for name, parameter in live.module.named_parameters():
            gradient = mean.get(name.replace("_orig_mod.", ""))
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(live.module.parameters(), self._clip_norm)
        live.optimizer.step()
        if live.scheduler is not None:
            live.scheduler.step()
        live.optimizer.zero_grad(set_to_none=True)
