"""Falling rates: one number that says how far every optimizer of a run slows down.

A run has three kinds of optimizer, which step at different times: the body's and the halves' once
per commit, each client's once per batch. A schedule in steps would have to be worked out for each,
and again for each mode. So the run says to which share of their rates they fall, and the steps
follow from the rounds, the data and the mode. All fall linearly.

At the accumulators it is torch's `LinearLR`: its state is kept in the store with the optimizer's,
and a replay builds it again. At a client the share follows from the round and the batch alone: a
client that makes a new optimizer in each round, or whose run was killed, goes on where it belongs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from splitfed.accumulator.policies import Mode
from splitfed.accumulator.settings import SchedulerFactory


@dataclass(frozen=True, slots=True)
class Falling:
    """Rates that fall linearly over a run."""

    share: float
    """Of the rate that an optimizer was made with, at the end of the run."""
    rounds: int
    """How many rounds the run has."""

    def scheduler(self, steps: int) -> SchedulerFactory:
        """Makes a scheduler that has fallen after so many steps, and stays there."""
        return functools.partial(
            LinearLR, start_factor=1.0, end_factor=self.share, total_iters=max(1, steps)
        )

    def factor(self, number: int, done: float) -> float:
        """What a client's rates are multiplied by.

        Args:
            number: The round, from 1.
            done: The part of the client's batches in this round that it has trained on, 0 to 1.
        """
        progress = min(1.0, (number - 1 + done) / self.rounds)
        return 1.0 + (self.share - 1.0) * progress


class ClientRates:
    """The rates of one optimizer of a client, which are set before each of its steps.

    Args:
        falling: How they fall.
        optimizer: As it was made, before a state was loaded: that has the rates of where it was.
    """

    def __init__(self, falling: Falling, optimizer: Optimizer) -> None:
        self._falling = falling
        self._optimizer = optimizer
        self._made_with = [group["lr"] for group in optimizer.param_groups]

    def set(self, number: int, done: float) -> None:
        """Set the rates, as `Falling.factor` has them."""
        factor = self._falling.factor(number, done)
        for group, rate in zip(self._optimizer.param_groups, self._made_with, strict=True):
            group["lr"] = rate * factor


def num_commits(
    mode: Mode, batches: Mapping[str, int], rounds: int, share: float, *, barrier: bool = True
) -> int:
    """How many commits of the body a run makes, about: exactly, where all clients take part.

    Args:
        mode: When a commit comes about.
        batches: How many batches each client has in a round.
        rounds: How many rounds there are.
        share: The part of the clients that is sampled for a round.
        barrier: Whether clients wait for each other at its end; if not, a round is as many pushes
            as sampled clients, where each batch has a push.
    """
    most = max(batches.values())
    if mode.per_client:
        # Bodies of clients with fewer batches end at a higher rate.
        return math.ceil(rounds * share * most)
    if mode.gradients and not mode.streams:
        return rounds * most
    enough = mode.group or mode.min_batches
    if enough is None:
        return rounds
    if mode.gradients and not barrier:
        return math.ceil(rounds * share * len(batches) / enough)
    # What is left at the end of a round is a commit too.
    return rounds * math.ceil(share * sum(batches.values()) / enough)
