"""An owner that checkpoints, dies at a chosen request, and is started again, beside an accumulator on a fixed schedule.

The schedule is by the owner's steps: when it has first come so far, what waits is committed. So a run with deaths has
the schedule of one without, and every bit of both can be compared.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Wire
from harness_store import Crash, adam, bits, commits
from torch import Tensor, nn

import splitfed
from splitfed.store.store import GradientStore

AT = "1:5"
STEPS = 9
EVERY = 2
"""Steps between two commits."""
Step = Callable[[Any, Tensor, Tensor], None]
"""What an owner does with a batch, between `zero_grad` and the optimizer's step."""


def model(*, ends_at_cut: bool = False) -> nn.Module:
    """A model whose body `1:5` has parameters, running statistics and dropout; the bottom draws too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh()]
        bottom = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1))
        return nn.Sequential(bottom, *layers, nn.Flatten() if ends_at_cut else nn.Linear(8, 3))


def cut(*, ends_at_cut: bool = False) -> tuple[nn.Module, nn.Module]:
    """Its halves; with `ends_at_cut` all from the cut on is the body."""
    return splitfed.split(model(ends_at_cut=ends_at_cut), "1:6" if ends_at_cut else AT)


class Mortal(Wire):
    """Dies at the n-th request: before it is delivered, or after it, when the answer is lost."""

    def __init__(self, server: Any, at: int = -1, *, delivered: bool = False) -> None:
        super().__init__(server)
        self.at, self.delivered, self.count = at, delivered, 0

    def send(self, method: str, request: Any) -> Any:
        """Pass it on, unless it is the last one."""
        here, self.count = self.count, self.count + 1
        if here != self.at:
            return super().send(method, request)
        if self.delivered:
            super().send(method, request)
        raise Crash(f"at request {here}")


class Owner:
    """A data owner's script: it loads its checkpoint if there is one, and goes on from there."""

    def __init__(self, server: Any, step: Step, saved: bytes | None = None, *, ends_at_cut: bool = False) -> None:
        self.client = splitfed.SplitClient(cut(ends_at_cut=ends_at_cut)[0], server, "a")
        self.optimizer = torch.optim.SGD(self.client.parameters(), lr=0.05, momentum=0.9)
        self.steps = 0
        self._step = step
        torch.manual_seed(7)
        if saved is not None:
            checkpoint = torch.load(io.BytesIO(saved), weights_only=True)
            self.client.load_state_dict(checkpoint["half"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.steps = checkpoint["steps"]
            torch.set_rng_state(checkpoint["random"])
            self.client.resume(json.loads(json.dumps(checkpoint["position"])))

    def save(self) -> bytes:
        """A checkpoint."""
        file = io.BytesIO()
        checkpoint = {
            "half": self.client.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "random": torch.get_rng_state(),
            "position": self.client.position(),
        }
        torch.save(checkpoint, file)
        return file.getvalue()

    def step(self) -> None:
        """Train on the next batch: of another size each time, so that its weight tells it."""
        generator = torch.Generator().manual_seed(self.steps)
        size = 3 + self.steps
        x = torch.randn(size, 6, generator=generator)
        y = torch.randint(0, 3, (size,), generator=generator)
        self.optimizer.zero_grad()
        self._step(self.client, x, y)
        self.optimizer.step()
        self.steps += 1


@dataclass
class Run:
    """What a run ends with."""

    half: dict[str, bytes]
    body: dict[str, bytes]
    folded: list[list[str]]
    samples: list[float]
    deaths: int = field(compare=False, default=0)
    requests: int = field(compare=False, default=0)


def train(
    store: GradientStore,
    server: Any,
    step: Step,
    *deaths: tuple[int, bool],
    steps: int = STEPS,
    saves: int = 4,
    ends_at_cut: bool = False,
) -> Run:
    """Train for some steps, with a checkpoint after every few of them.

    Args:
        store: Where it trains.
        server: The transport.
        step: What the owner does with a batch.
        deaths: The request of the first process, the second ... at which it dies, and whether that is delivered.
        steps: How many batches.
        saves: Steps from one checkpoint to the next.
        ends_at_cut: Whether the half ends at its cut.
    """
    accumulator = splitfed.Accumulator(cut(ends_at_cut=ends_at_cut)[1], store, adam)
    left, reached, died, saved = [*deaths], 0, 0, None
    while True:
        at, delivered = left.pop(0) if left else (-1, False)
        wire = Mortal(server, at, delivered=delivered)
        owner = Owner(wire, step, saved, ends_at_cut=ends_at_cut)
        saved = saved or owner.save()  # before the first batch, or that would be in no checkpoint's future
        with suppress(Crash):
            while owner.steps < steps:
                owner.step()
                if owner.steps % saves == 0:
                    saved = owner.save()
                if owner.steps > reached:
                    reached = owner.steps
                    if reached % EVERY == 0:
                        accumulator.step()
            break
        died += 1
    accumulator.step()
    record = commits(store)
    assert store.waiting() == []
    return Run(
        bits(owner.client.state_dict()),
        bits(store.load_weights()),
        [[str(batch) for batch in commit.folded] for commit in record],
        [commit.num_samples for commit in record],
        died,
        wire.count,
    )
