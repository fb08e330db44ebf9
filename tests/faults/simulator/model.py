"""The model of all runs, as small as one can be that has what can go wrong: weights, statistics and dropout.

It is in float64: sums of a mean are made in that, and in float32 the result would hide in which order they were made.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from tests.faults.simulator.plan import Plan
from torch import Tensor, nn

import splitfed

MOMENTUM = 0.1
"""Of the statistics."""
INPUTS, CUT, OUTPUTS = 2, 2, 1
DTYPE = torch.float64


@functools.cache
def halves(dropout: float) -> tuple[nn.Module, nn.Module]:
    """The client's half, which ends at its cut, and the body."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Linear(CUT, 3), nn.BatchNorm1d(3, momentum=MOMENTUM), nn.Dropout(dropout), nn.Linear(3, OUTPUTS)
        )
        half, cut = splitfed.split(nn.Sequential(nn.Linear(INPUTS, CUT), body).to(DTYPE), "1")
    return half, cut


def half_of(plan: Plan) -> nn.Module:
    """A new client half."""
    return copy.deepcopy(halves(plan.dropout)[0])


def body_of(plan: Plan) -> nn.Module:
    """The body; nobody changes it."""
    return halves(plan.dropout)[1]


def optimizer_of(plan: Plan) -> Callable[[Any], torch.optim.Optimizer]:
    """The optimizer of all accumulators of a run: each step depends on all steps before."""
    if plan.momentum:
        return lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return lambda params: torch.optim.Adam(params, lr=0.05)


def schedule_of(plan: Plan) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None:
    """Its schedule, if it has one."""
    if not plan.momentum:
        return None
    return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


def loss_fn(outputs: Tensor, target: Tensor) -> Tensor:
    """The loss, on whichever side."""
    return nn.functional.mse_loss(outputs, target)
