"""One virtual client while it is active: the loop that its owner would run, on the real `SplitClient`.

It is written as a generator that stops before each request, so that whoever drives it decides when that request
happens: at once, in turns with other clients, or at an instant of virtual time. Client half, optimizer and gradients
exist only while the generator does. What a client's own disk would hold outlives it in a `Belongings`: its personal
parameters, and its optimizer's state if that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from splitfed.accumulator.optimizer import steps_alone
from splitfed.accumulator.settings import SchedulerFactory
from splitfed.client.client import SplitClient
from splitfed.errors import ExpiredError, InputError, UnsupportedError
from splitfed.model.copying import deep_copy
from splitfed.model.personal import personal_names
from splitfed.protocol.transport import Transport
from splitfed.simulation import data as localdata
from splitfed.simulation.data import Data
from splitfed.simulation.evaluation import num_right
from splitfed.simulation.rng import Stream

LossFunction = Callable[[Any, Any], Tensor]
Optimizers = Callable[[Iterable[Any]], Optimizer]


class Next(Enum):
    """The request that a trainee is about to make."""

    PULL = "pull"
    FORWARD = "forward"
    BACKWARD = "backward"
    PUSH = "push"


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What all virtual clients of a run have in common.

    Raises:
        InputError: a loss function, or what is to make an optimizer or a scheduler, can't be called.
    """

    half: nn.Module
    """The client half; each activation trains a copy."""
    loss_fn: LossFunction
    """`loss_fn(outputs, targets)`, a scalar: the mean over the batch."""
    optimizer: Optimizers
    batch_size: int = 64
    local_passes: int = 1
    gradients: bool = False
    """Publish the half's gradient after each batch, and take no local step but of personal parts: synchronous mode."""
    personal: tuple[str, ...] = ()
    keep_optimizers: bool = False
    scheduler: SchedulerFactory | None = None
    """Of the optimizer; steps once per batch, and is kept with it."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("loss_fn", "optimizer", "scheduler"):
            made = getattr(self, name)
            if made is not None and not callable(made):
                raise InputError(
                    f"{name} is {type(made).__name__}: expected a function, such as functools.partial(torch.optim.SGD, "
                    "lr=0.1) for an optimizer: each client makes its own"
                )


@dataclass(slots=True, eq=False)
class Belongings:
    """What stays at a client from one activation to the next."""

    personal: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None


@dataclass(slots=True)
class Outcome:
    """What an activation came to."""

    client_id: str
    num_samples: int = 0
    batches: int = 0
    loss: float = 0.0
    """Σ over examples."""
    right: int | None = 0
    """How many examples were classified right as they were trained on; `None` if nothing is classified."""
    expired: int = 0
    """Batches that were lost, because their version had left the retention window before the backward."""

    def row(self) -> dict[str, Any]:
        """Its part of a round's row."""
        found: dict[str, Any] = {"num_samples": self.num_samples, "batches": self.batches}
        if self.batches and math.isfinite(self.loss):
            found["train_loss"] = self.loss / self.num_samples
        if self.batches and self.right is not None:
            found["train_accuracy"] = self.right / self.num_samples
        if self.expired:
            found["expired"] = self.expired
        return found


def total(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One outcome for each client, of all its activations together, in the order of ids."""
    found: dict[str, Outcome] = {}
    for one in outcomes:
        before = found.get(one.client_id, Outcome(one.client_id))
        found[one.client_id] = Outcome(
            one.client_id,
            before.num_samples + one.num_samples,
            before.batches + one.batches,
            before.loss + one.loss,
            None if before.right is None or one.right is None else before.right + one.right,
            before.expired + one.expired,
        )
    return [found[name] for name in sorted(found)]


class Trainee:
    """One activation of one client.

    Args:
        recipe: What it shares with others.
        server: Its server.
        client_id: Who it is.
        data: Its examples.
        belongings: What it kept from before; brought up to date at the end.
        occasion: Numbers that tell this activation from the client's others: they seed what is drawn.
    """

    def __init__(
        self,
        recipe: Recipe,
        server: Transport,
        client_id: str,
        data: Data,
        belongings: Belongings,
        occasion: tuple[int, ...],
    ) -> None:
        self.outcome = Outcome(client_id)
        self.occasion = occasion
        self._recipe = recipe
        self._server = server
        self._data = data
        self._own = belongings
        self._stream = Stream(recipe.seed, client_id, *occasion)

    @property
    def num_batches(self) -> int:
        """How many batches the whole activation has."""
        return self._recipe.local_passes * -(-localdata.size(self._data) // self._recipe.batch_size)

    def run(self) -> Generator[Next, None, Outcome]:
        """The activation: pull, train, push; it stops before each request."""
        steps = self._steps()
        while True:
            with self._stream.active():
                try:
                    ahead = next(steps)
                except StopIteration:
                    return self.outcome
            yield ahead

    def _steps(self) -> Generator[Next, None, None]:
        recipe, own = self._recipe, self._own
        half = deep_copy(recipe.half).train()
        half.load_state_dict(own.personal, strict=False)
        client = SplitClient(half, self._server, self.outcome.client_id, personal=recipe.personal)
        yield Next.PULL
        client.pull()
        optimizer = recipe.optimizer(client.parameters())
        scheduler = None if recipe.scheduler is None else recipe.scheduler(optimizer)
        for made in (optimizer, scheduler):
            if made is not None and not steps_alone(made):
                raise UnsupportedError(
                    f"{type(made).__name__}.step() needs arguments, such as a closure or a metric, and a simulated "
                    "client's loop has none: use one that steps alone, such as AdamW or StepLR"
                )
        if own.optimizer is not None:
            optimizer.load_state_dict(own.optimizer)
        if scheduler is not None and own.scheduler is not None:
            scheduler.load_state_dict(own.scheduler)
        for _ in range(recipe.local_passes):
            yield from self._one_pass(client, optimizer, scheduler)
        if not recipe.gradients and self.outcome.num_samples:
            yield Next.PUSH
            client.push()
        names, state = personal_names(half, recipe.personal), half.state_dict()
        own.personal = {name: state[name].detach().clone() for name in sorted(names)}
        if recipe.keep_optimizers:
            own.optimizer = optimizer.state_dict()
            own.scheduler = None if scheduler is None else scheduler.state_dict()

    def _one_pass(
        self, client: SplitClient, optimizer: Optimizer, scheduler: LRScheduler | None
    ) -> Generator[Next, None, None]:
        recipe, order = self._recipe, localdata.order(self._data, self._stream.generator)
        for number, (inputs, targets) in enumerate(localdata.batches(self._data, recipe.batch_size, order)):
            if recipe.gradients and self.outcome.batches + self.outcome.expired:
                yield Next.PULL
                client.pull()
            yield Next.FORWARD
            optimizer.zero_grad()
            outputs = client(inputs)
            loss = recipe.loss_fn(outputs, targets)
            if not isinstance(loss, Tensor) or loss.dim():
                found = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise InputError(f"loss_fn returned a {found}: expected a scalar tensor")
            yield Next.BACKWARD
            try:
                loss.backward()
            except ExpiredError:
                self.outcome.expired += 1
                continue
            num_samples = min(recipe.batch_size, len(order) - number * recipe.batch_size)
            self._count(num_samples, loss, num_right(outputs, targets))
            if recipe.gradients:
                yield Next.PUSH
                client.push(gradient=True)
                _forget_shared(client, recipe.personal)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    def _count(self, num_samples: int, loss: Tensor, right: int | None) -> None:
        counted = self.outcome.right
        self.outcome.right = None if right is None or counted is None else counted + right
        self.outcome.num_samples += num_samples
        self.outcome.batches += 1
        self.outcome.loss += loss.item() * num_samples


def _forget_shared(client: SplitClient, personal: Iterable[str]) -> None:
    """Leave gradients to the personal parameters alone: an optimizer steps those that have one."""
    own = personal_names(client.client_half, personal)
    for name, parameter in client.client_half.named_parameters():
        if name not in own:
            parameter.grad = None
