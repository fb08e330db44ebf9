"""Rounds from the client's side: wait until it is sampled, pull, let the user train, push.

All that a client knows of a round is in the answers to its pulls, so this works through any
transport. It asks often and cheaply (without weights), and pulls in full only when it is its turn.

The race: a round may end between the look and the pull. What the pull itself answers is valid,
since the weights belong to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from splitfed.checks import positive
from splitfed.client.half import HalfSync
from splitfed.protocol.backoff import Backoff
from splitfed.protocol.messages import RoundInfo


def take_part(
    sync: HalfSync, poll: float, num_samples: float | None, gradient: bool
) -> Iterator[RoundInfo]:
    """Yield each round in which this client trains, between a pull and a push, until the last one.

    Args:
        sync: The client half's versions.
        poll: Pause between two looks, in seconds.
        num_samples: As for `push`.
        gradient: As for `push`.
    """
    positive("poll", poll)
    looks = Backoff(itertools.repeat(poll))
    done = 0
    while True:
        info = sync.look()
        if info is not None and info.finished:
            return
        if info is not None and _is_due(info, done):
            sync.pull()
            info = sync.round
        if info is None or not _is_due(info, done):
            looks.wait()
            continue
        yield info
        sync.push(num_samples, gradient=gradient)
        done = info.number


def _is_due(info: RoundInfo, done: int) -> bool:
    """Whether to train now: once a round, or without a barrier again and again."""
    if not info.barrier:
        return not info.finished
    return info.sampled and not info.closed and not info.arrived and info.number > done
