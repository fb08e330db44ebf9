"""A virtual client's local run: its owner's training loop, on a real `SplitClient`.

The loop is a generator that stops before each request, so that its driver decides when the request
happens: at once, in turns with other clients, or at an instant of virtual time. The client half,
its optimizer and its gradients exist only while the generator does. What a real client would have
on its own disk outlives them in a `ClientState`.

A run that was killed, with its worker or with the whole simulation, is begun again and repeats its
batches. Its process calls itself by a name that follows from the run, and so has the incarnation of
the killed one: the store knows by their numbers which batches it has (`SplitClient.resume`), and
each counts once.

The trap: torch's default generator belongs to the process, not to the client. A local run draws
from a stream of its own, which is in force only while the client computes, never while its
generator is suspended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from splitfed.accumulator.optimizer import steps_alone
from splitfed.client.client import SplitClient
from splitfed.errors import ExpiredError, InputError, UnsupportedError
from splitfed.model.copying import deep_copy
from splitfed.model.fingerprint import personal_names
from splitfed.protocol.flows import Flow, added, errors
from splitfed.protocol.transport import Transport
from splitfed.simulation import data as localdata
from splitfed.simulation.data import Data, Source
from splitfed.simulation.rates import ClientRates, Falling
from splitfed.simulation.rng import Stream, derive
from splitfed.simulation.settings import LocalTraining, check_function

LossFunction = Callable[[Any, Any], Tensor]
Optimizers = Callable[[Iterable[Any]], Optimizer]


class Verb(Enum):
    """The kind of request that a local run makes next."""

    PULL = "pull"
    FORWARD = "forward"
    BACKWARD = "backward"
    PUSH = "push"


@dataclass(frozen=True, slots=True, eq=False)
class ClientConfig:
    """The settings that all virtual clients of a run share.

    Raises:
        InputError: the loss function, or what makes an optimizer, can't be called.
    """

    half: nn.Module
    """The client half; each local run trains a copy."""
    loss_fn: LossFunction
    """`loss_fn(outputs, targets)`, a scalar: the mean over the batch."""
    optimizer: Optimizers
    local: LocalTraining = field(default_factory=LocalTraining)
    gradients: bool = False
    """Whether clients publish the half's gradient after each batch (synchronous, grouped).

    Local steps then train the personal parts alone.
    """
    personal: tuple[str, ...] = ()
    seed: int = 0
    falling: Falling | None = None
    """How clients' rates fall over the run; `None` if they don't."""
    device: torch.device | None = None
    """Where clients compute; `None` for wherever half and data are."""

    def __post_init__(self) -> None:
        check_function("loss_fn", self.loss_fn, "torch.nn.functional.cross_entropy")
        check_function(
            "optimizer",
            self.optimizer,
            "functools.partial(torch.optim.SGD, lr=0.1): each client makes its own",
        )


@dataclass(slots=True, eq=False)
class ClientState:
    """What a client keeps to itself from one local run to the next."""

    personal: dict[str, Tensor] = field(default_factory=dict)
    """Personal parameters and buffers by name; empty before the first local run."""
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    residuals: dict[str, Tensor] = field(default_factory=dict)
    """What the error feedback of its compression has still to send."""


@dataclass(slots=True)
class LocalMetrics:
    """Counts and summed loss of a client's local runs."""

    client_id: str
    num_samples: int = 0
    """Examples trained on; one that is trained on twice counts twice."""
    batches: int = 0
    loss_sum: float = 0.0
    """Σ over examples."""
    num_correct: int | None = 0
    """Examples classified right as they were trained on; `None` if nothing is classified."""
    expired: int = 0
    """Batches lost because their version left the retention window before their backward."""
    flows: dict[str, Flow] = field(default_factory=dict)
    """What compression has done, by flow."""

    def add_batch(self, num_samples: int, mean_loss: float, num_correct: int | None) -> None:
        """Count a batch that was trained on."""
        self.num_samples += num_samples
        self.batches += 1
        self.loss_sum += mean_loss * num_samples
        self.num_correct = _sum_if_known(self.num_correct, num_correct)

    def row(self) -> dict[str, Any]:
        """The client's entry in a round's row; metrics that aren't known are left out."""
        entry: dict[str, Any] = {"num_samples": self.num_samples, "batches": self.batches}
        if self.batches and math.isfinite(self.loss_sum):
            entry["train_loss"] = self.loss_sum / self.num_samples
        if self.batches and self.num_correct is not None:
            entry["train_accuracy"] = self.num_correct / self.num_samples
        if self.expired:
            entry["expired"] = self.expired
        return {**entry, **errors(self.flows)}


def sum_by_client(metrics: Iterable[LocalMetrics]) -> list[LocalMetrics]:
    """The metrics of all local runs of each client together, in the order of ids."""
    sums: dict[str, LocalMetrics] = {}
    for one in metrics:
        before = sums.get(one.client_id, LocalMetrics(one.client_id))
        sums[one.client_id] = LocalMetrics(
            one.client_id,
            before.num_samples + one.num_samples,
            before.batches + one.batches,
            before.loss_sum + one.loss_sum,
            _sum_if_known(before.num_correct, one.num_correct),
            before.expired + one.expired,
            added([before.flows, one.flows]),
        )
    return [sums[client_id] for client_id in sorted(sums)]


def _sum_if_known(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return None
    return one + other


class LocalRun:
    """One local run of one client: pull, train on its own data, push.

    Args:
        config: The settings that it shares with other clients.
        server: Its server.
        client_id: The client's id.
        data: Its examples, or their loader, which is called as the run begins.
        state: What it kept from earlier runs; brought up to date when this one ends.
        run_id: Numbers that tell this run from the client's others, such as (round, repetition).
            They seed all that it draws.
        repeats: Whether a run with these numbers may have been killed before: then this one goes on
            under its batches' numbers. Without it those are new.
    """

    def __init__(
        self,
        config: ClientConfig,
        server: Transport,
        client_id: str,
        data: Source,
        state: ClientState,
        run_id: tuple[int, ...],
        *,
        repeats: bool = False,
    ) -> None:
        self.metrics = LocalMetrics(client_id)
        """The metrics so far."""
        self.run_id = run_id
        self._config = config
        self._server = server
        self._data = data
        self._local = config.local.of(client_id)
        self._state = state
        self._repeats = repeats
        self._stream = Stream(config.seed, client_id, *run_id, device=config.device)
        self._rates: ClientRates | None = None
        self._pushed = 0
        """How many samples the updates hold that were pushed."""

    @property
    def num_batches(self) -> int | None:
        """How many batches the whole run has; `None` with a stream of unknown length."""
        local = self._local
        total = localdata.known_size(self._data)
        return None if total is None else local.local_passes * localdata.num_batches(total, local)

    def requests(self) -> Generator[Verb, None, LocalMetrics]:
        """Train; the generator stops before each request.

        Yields:
            The verb of the request that is made when the generator is resumed.

        Returns:
            The metrics of the run.

        Raises:
            InputError: the loss isn't a scalar tensor.
            UnsupportedError: an optimizer or a scheduler whose `step()` needs arguments.
        """
        loop = self._loop()
        while True:
            # Not around the yield: while this client is suspended, others and the caller draw.
            with self._stream.active():
                try:
                    upcoming = next(loop)
                except StopIteration:
                    return self.metrics
            yield upcoming

    def _loop(self) -> Generator[Verb, None, None]:
        config = self._config
        data = self._data = localdata.load(self._data)
        half = deep_copy(config.half).train()
        if config.device is not None:
            half.to(config.device)
        half.load_state_dict(
            self._state.personal, strict=False
        )  # all other names come with the pull
        client = SplitClient(
            half,
            self._server,
            self.metrics.client_id,
            personal=config.personal,
            compression=self._local.compression,
        )
        if self._repeats:
            client.resume({**client.position(), "process": self._process()})
        compression = client.compression
        if compression is not None:
            residuals = self._state.residuals
            if config.device is not None:
                residuals = localdata.moved(residuals, config.device)
            compression.load_state_dict(residuals)
        yield Verb.PULL
        client.pull()
        optimizer, scheduler = self._optimizer(client)
        for _ in range(self._local.local_passes):
            yield from self._local_pass(client, data, optimizer, scheduler)
        yield from self._push(client)
        self._keep_state(half, optimizer, scheduler)
        if compression is not None:
            self.metrics.flows = compression.flows
            self._state.residuals = self._kept(compression.state_dict())

    def _process(self) -> str:
        """What the process of this run calls itself: the same in whoever begins the run again.

        With another seed, or other batches, it is another run.
        """
        local = self._local
        order = (
            local.num_examples,
            local.local_passes,
            int(local.drop_last),
            local.local_steps or 0,
        )
        number = derive("process", self._config.seed, self.metrics.client_id, *self.run_id, *order)
        return f"simulated-{number:016x}"

    def _kept(self, value: Any) -> Any:
        """What is kept from run to run: in ordinary memory, wherever the client computes."""
        return value if self._config.device is None else localdata.moved(value, "cpu")

    def _push(self, client: SplitClient) -> Generator[Verb, None, None]:
        """Push the update of the half, if gradients aren't pushed instead."""
        # Without a sample every batch has expired: there is no update to push.
        if not self._config.gradients and self.metrics.num_samples > self._pushed:
            yield Verb.PUSH
            client.push()
            self._pushed = self.metrics.num_samples

    def _optimizer(self, client: SplitClient) -> tuple[Optimizer, LRScheduler | None]:
        """The client's optimizer and its scheduler, in the state that it kept."""
        local = self._local
        optimizer = self._config.optimizer(client.parameters())
        if self._config.falling is not None:
            self._rates = ClientRates(self._config.falling, optimizer)
        scheduler = None if local.scheduler is None else local.scheduler(optimizer)
        for made in (optimizer, scheduler):
            if made is not None and not steps_alone(made):
                raise UnsupportedError(
                    f"{type(made).__name__}.step() needs arguments, such as a closure or a metric, "
                    "and a simulated client's loop has none: use one that steps alone, "
                    "such as AdamW or StepLR"
                )
        # A scheduler sets its optimizer's rates when it is made, so states are loaded after both.
        if self._state.optimizer is not None:
            optimizer.load_state_dict(self._state.optimizer)
        if scheduler is not None and self._state.scheduler is not None:
            scheduler.load_state_dict(self._state.scheduler)
        return optimizer, scheduler

    def _local_pass(
        self,
        client: SplitClient,
        data: Data,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
    ) -> Generator[Verb, None, None]:
        """One pass over the client's data."""
        config = self._config
        before = self.metrics.batches + self.metrics.expired
        order = localdata.order(data, self._stream.generator)
        for found in localdata.batches(data, self._local, order):
            batch = found.on(config.device)
            # With gradients, every batch starts from the newest global step; else so many do, or
            # the first alone. The run's first pull has been made already; an expired batch had one.
            begun = self.metrics.batches + self.metrics.expired
            steps = 1 if config.gradients else self._local.local_steps
            if steps is not None and begun and begun % steps == 0:
                yield from self._push(client)
                yield Verb.PULL
                client.pull()
            yield Verb.FORWARD
            optimizer.zero_grad()
            try:
                # Its weight is said: the first tensor's leading dimension may be another one.
                with client.batch(batch.num_samples):
                    outputs = batch.outputs(client)
                loss = _scalar(localdata.compute_loss(config.loss_fn, outputs, batch))
                yield Verb.BACKWARD
                loss.backward()
            except ExpiredError:
                # Commits of others pushed its version out of the retention window: the batch is
                # lost, as it would be to a real client, and the pass goes on.
                self.metrics.expired += 1
                continue
            self.metrics.add_batch(
                batch.num_samples,
                loss.item(),
                localdata.num_correct(outputs, batch.target),
            )
            if config.gradients:
                yield Verb.PUSH
                client.push(gradient=True)
                _drop_shared_gradients(client, config.personal)
            self._set_rates()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        if self.metrics.batches + self.metrics.expired == before:
            raise InputError(
                f"the {type(data).__name__} of client {self.metrics.client_id!r} yielded no "
                f"batch of {self._local.num_examples} examples in a pass: expected one at least. "
                "Its __iter__ has to begin again each time, and drop_last needs a whole batch"
            )

    def _set_rates(self) -> None:
        """Set the rates of the step of the batch that was trained on last."""
        if self._rates is None:
            return
        number, repetition = self.run_id[0], self.run_id[-1]
        before = self.metrics.batches + self.metrics.expired - 1
        # Without a barrier a client may begin again in one round: it isn't faster then.
        done = 1.0 if repetition else before / (self.num_batches or 1)
        self._rates.set(number, done)

    def _keep_state(
        self, half: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None
    ) -> None:
        names = personal_names(half, self._config.personal)
        state = half.state_dict()
        own = {name: state[name].detach().clone() for name in sorted(names)}
        self._state.personal = self._kept(own)
        if self._local.keep_optimizers:
            self._state.optimizer = self._kept(optimizer.state_dict())
            self._state.scheduler = None if scheduler is None else scheduler.state_dict()


def _scalar(loss: object) -> Tensor:
    """The loss, if it is one: checked before autograd complains in words of its own."""
    if not isinstance(loss, Tensor):
        raise InputError(f"loss_fn returned a {type(loss).__name__}: expected a scalar tensor")
    if loss.dim():
        raise InputError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}: expected a scalar tensor, "
            "such as the mean over the batch"
        )
    return loss


def _drop_shared_gradients(client: SplitClient, personal: Iterable[str]) -> None:
    """Leave gradients to the personal parameters alone: an optimizer steps those that have one."""
    own = personal_names(client.client_half, personal)
    for name, parameter in client.client_half.named_parameters():
        if name not in own:
            parameter.grad = None
