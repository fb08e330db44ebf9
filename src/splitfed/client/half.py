"""The client half's own versions: pulled before training, pushed after it.

What is pushed is a pseudo-gradient, start − end, or in synchronous mode the gradient itself; its
weight is the client's samples, and buffers go with their start and end values. What is pulled is
copied in place, so the user's optimizer keeps its parameters and its state. Parameters that never
train travel at most once: a client asks with their digest, and the server leaves out what it has.

A client takes part in rounds by pulls and pushes alone (`take_part`): all that it knows of a round
is in the answers to its pulls, so it works through any transport. It asks often and cheaply,
without weights, and pulls in full only when it is its turn. The race: a round may end between the
look and the pull. What the pull itself answers is valid, since the weights belong to that.

The trap: autograd adds up. After several batches `.grad` is Σ λᵢgᵢ, each scaled as its loss was, so
what is published is `.grad` / Σ λᵢ: their mean, whether losses were scaled by 1/k, by GradScaler,
by their size, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from splitfed.checks import positive
from splitfed.client.connection import Connection, Counted
from splitfed.client.position import Position
from splitfed.errors import (
    ArchitectureError,
    ExpiredError,
    InputError,
    MissingError,
    ProtocolError,
)
from splitfed.model.fingerprint import compare, personal_names
from splitfed.model.skeleton import Inventory, named_state, unwrap
from splitfed.protocol.backoff import Backoff
from splitfed.protocol.compression import compression_of
from splitfed.protocol.flows import Flow, added, from_plain, to_plain
from splitfed.protocol.messages import (
    PullAnswer,
    PullRequest,
    PushRequest,
    RoundInfo,
    frozen_digest,
)


class HalfSync:
    """Keeps one client half in step with the `client` lineage.

    Args:
        half: The client half.
        connection: The way to the server.
        personal: Patterns of names that stay here.

    Raises:
        InputError: a pattern that fits nothing.
    """

    def __init__(
        self, half: nn.Module, connection: Connection, personal: Iterable[str] = ()
    ) -> None:
        self.version: int | None = None
        self.round: RoundInfo | None = None
        """The round under way, as the last answer had it."""
        self._half = half
        self._connection = connection
        self.patterns = personal if isinstance(personal, str) else tuple(personal)
        self._personal = personal_names(half, self.patterns)
        self._inventory: Inventory | None = None
        self._start: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] | None = None
        """Copies of the parameters that never train; `None` before the first pull."""
        self._frozen_digest = ""
        self.resumed: RoundInfo | None = None
        """The round that an earlier process was training in."""
        self.current: RoundInfo | None = None
        """The round that this client trains in, between its pull and its push."""
        self.done = 0
        """The last round that it has trained in."""
        self._start_version: int | None = None
        """The version that the next push is the change from, if it is one."""
        self._unanswered: tuple[PushRequest, dict[str, Tensor], Counted] | None = None
        """A push whose reply was lost, the half as it was then, and its samples; the next pull or
        push repeats it."""
        self.body_version: int | None = None
        """The version of the body that belongs to the half that was pulled, where both are
        committed together: calls run there until the next pull."""
        self._told: dict[str, Flow] = {}
        """What pushes have told of compression so far."""

    def pull(self) -> int:
        """Copy the newest client half in place; publish this one if there is none.

        Raises:
            ArchitectureError: the lineage's half isn't this one.
        """
        inventory = self._inventory = self._inventory or Inventory(self._half, self._personal)
        self._settle()
        answer = self._ask()
        if answer.version < 0:
            self._connection.transport.push(
                PushRequest(
                    client_id=self._connection.client_id,
                    incarnation=self._connection.incarnation,
                    process=self._connection.process,
                    seq=0,
                    base_version=-1,
                    fingerprint=inventory.fingerprint(),
                    gradients=self._state(),
                    values={},
                    bases={},
                    num_samples=1,
                    loss_scale=1.0,
                )
            )
            answer = self._ask()
        compare(answer.fingerprint, inventory.fingerprint(), "the client half")
        weights = self._weights(answer)
        for name, tensor in self._state().items():
            tensor.copy_(weights[name])
        self.version = answer.version
        self.body_version = answer.body_version
        self._begin(self._moving(), self._connection.counted)
        self._start_version = answer.version
        return answer.version

    def position(self) -> Position:
        """The client's place between two batches."""
        found = replace(
            self._connection.position(),
            half=self._start_version,
            body=self.body_version,
            round=self.current,
            done=self.done,
        )
        if self._unanswered is None:
            return found
        # A push whose reply was lost comes again, with what was learned since, under its number.
        return replace(found, push=self._unanswered[0].seq)

    def resume(self, position: Position) -> None:
        """Go on from the place of an earlier process; its half is loaded by the user.

        What the next push is the change from is fetched: the half may have moved since. If it has
        left the retention window, so has the round, and the next pull begins another one.

        Raises:
            ProtocolError: there is no such version.
        """
        start = None if position.half is None else self._fetch(position.half)
        self._connection.resume(position)
        self.done = position.done
        if start is not None:
            self._start = start
            self.version = self._start_version = position.half
            self.body_version = position.body
            self.resumed = self.round = position.round

    def _fetch(self, version: int) -> dict[str, Tensor] | None:
        """The half at a version, as the distinct tensors of this one; `None` if it has expired."""
        inventory = self._inventory = self._inventory or Inventory(self._half, self._personal)
        try:
            answer = self._connection.transport.pull(
                PullRequest(self._connection.client_id, version, frozen=self._known_frozen())
            )
        except ExpiredError:
            return None
        except MissingError as error:
            raise _foreign(version) from error
        if answer.version != version:
            raise _foreign(version)
        compare(answer.fingerprint, inventory.fingerprint(), "the client half")
        weights = self._weights(answer)
        state = self._moving()
        return {n: torch.empty_like(t).copy_(weights[n]) for n, t in state.items()}

    def look(self) -> RoundInfo | None:
        """Ask for the round under way, without weights."""
        self._ask(weights=False)
        return self.round

    def push(self, num_samples: float | None, *, gradient: bool) -> None:
        """Publish the change since the last pull or push, or the gradient of the parameters.

        Raises:
            InputError: nothing was pulled, there are no samples, or a gradient is asked for and
                isn't there.
        """
        if self._inventory is None or self.version is None:
            raise InputError(
                "this half has no version yet: call client.pull() "
                "before training and client.push() after it"
            )
        settled = self._settle()
        if settled is not None and not self._has_news(settled, gradient):
            return  # the user repeats a push that failed
        self._unanswered = self._update(self._inventory, num_samples, gradient)
        self._settle()

    def _settle(self) -> PushRequest | None:
        """Send the push whose reply was lost.

        It goes under its own number: if it has arrived before, it counts once all the same.
        """
        if self._unanswered is None:
            return None
        request, state, counted = self._unanswered
        if request.process != self._connection.process:  # forked since: it is the parent's
            self._unanswered = None
            return None
        try:
            answer = self._connection.transport.push(request)
        except (InputError, ArchitectureError, ProtocolError):  # refused for good
            self._unanswered = None
            raise
        self._unanswered = None
        self._told = added([self._told, from_plain(request.flows)])
        self._connection.opened(answer.incarnation, 0)
        self._connection.note_status(answer.status, 0, 0)
        self._begin(state, counted)
        return request

    def _has_news(self, settled: PushRequest, gradient: bool) -> bool:
        if not gradient:
            return self._has_moved(list(self._start))
        if self._connection.counted.num_samples or self._connection.counted.rejected:
            return True
        own = self._gradients()
        if own.keys() != settled.gradients.keys():
            return True
        return not all(own[name].equal(settled.gradients[name]) for name in own)

    def _has_moved(self, names: list[str]) -> bool:
        state = self._state()
        return any(not state[name].equal(self._start[name]) for name in names)

    def _update(
        self, names: Inventory, num_samples: float | None, gradient: bool
    ) -> tuple[PushRequest, dict[str, Tensor], Counted]:
        counted = self._connection.counted
        samples = _weight(num_samples, counted)
        state = {name: tensor.clone() for name, tensor in self._moving().items()}
        if gradient:
            gradients = self._gradients()
            scale = counted.loss_scale or self._connection.scale()
            self._check_gradients(names, gradients)
        else:
            gradients = {name: self._start[name] - state[name] for name in names.trainable}
            scale = 1.0
        # Only where a pull has brought a pair: a server from before there were any refuses it.
        says_upto = gradient and self.body_version is not None
        changed = {n: state[n] for n in names.buffers if not state[n].equal(self._start[n])}
        request = PushRequest(
            client_id=self._connection.client_id,
            incarnation=self._connection.incarnation,
            process=self._connection.process,
            seq=self._connection.number("push"),
            base_version=self.version or 0,
            fingerprint=None,
            gradients=gradients,
            values=changed,
            bases={name: self._start[name] for name in changed},
            num_samples=samples,
            loss_scale=scale,
            resumed=self._connection.resumed,
            upto=self._connection.next("batch") if says_upto else 0,
            flows=self._flows_since(),
        )
        return request, state, counted

    def _flows_since(self) -> dict[str, list[float]]:
        """What compression has done since the last push."""
        compression = compression_of(self._connection.transport)
        if compression is None:
            return {}
        flows = compression.flows
        return to_plain({name: flow - self._told.get(name, Flow()) for name, flow in flows.items()})

    def _check_gradients(self, names: Inventory, gradients: dict[str, Tensor]) -> None:
        if not gradients:
            raise InputError(
                "no shared parameter has a gradient: call loss.backward() "
                "before push(gradient=True)"
            )
        if self._has_moved(names.trainable):
            raise InputError(
                "the half has moved since it was pulled, so this isn't the gradient of what others "
                "have: take no local step before push(gradient=True), or publish the change with "
                "push()"
            )

    def _gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients of the shared parameters that have one."""
        names = self._inventory.parameters if self._inventory else {}
        found = {
            name: tensor.grad for name, tensor in named_state(unwrap(self._half)) if name in names
        }
        return {name: grad.detach().clone() for name, grad in found.items() if grad is not None}

    def _ask(self, *, weights: bool = True) -> PullAnswer:
        frozen = self._known_frozen() if weights else ""
        answer = self._connection.transport.pull(
            PullRequest(self._connection.client_id, weights=weights, frozen=frozen)
        )
        self.round = answer.round
        return answer

    def _known_frozen(self) -> str:
        """The digest of the frozen parameters that this client knows: at first the half's own."""
        if self._frozen is None:
            names = self._inventory.frozen if self._inventory else []
            state = self._state()
            self._know_frozen({name: state[name] for name in names})
        return self._frozen_digest

    def _know_frozen(self, parameters: dict[str, Tensor]) -> None:
        # Copies: whoever writes to the half's own gets the lineage's back by the next pull.
        self._frozen = {name: tensor.clone() for name, tensor in parameters.items()}
        self._frozen_digest = frozen_digest(self._frozen)

    def _weights(self, answer: PullAnswer) -> Mapping[str, Tensor]:
        """The whole half of an answer: with the frozen parameters, where it left them out."""
        names = self._inventory.frozen if self._inventory else []
        if not names:
            return answer.weights
        if all(name in answer.weights for name in names):
            self._know_frozen({name: answer.weights[name] for name in names})
        return {**answer.weights, **(self._frozen or {})}

    def _state(self) -> dict[str, Tensor]:
        """The half's distinct tensors, by first name; sharing memory with it."""
        names = self._inventory.names if self._inventory else {}
        return {
            name: t.detach()
            for name, t in named_state(unwrap(self._half))
            if names.get(name) == name
        }

    def _moving(self) -> dict[str, Tensor]:
        """Those of them that may change: without the parameters that never train."""
        frozen = set(self._inventory.frozen if self._inventory else ())
        return {name: tensor for name, tensor in self._state().items() if name not in frozen}

    def _begin(self, state: dict[str, Tensor], counted: Counted) -> None:
        """What the next push is the change from, and the batches that the last one has counted."""
        self._start = {name: tensor.clone() for name, tensor in state.items()}
        self._start_version = None
        self._connection.counted -= counted


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
    while True:
        # A restarted process goes on in the middle of its round, with the half that it has loaded.
        info, sync.resumed = sync.resumed, None
        if info is None:
            info = sync.look()
            if info is not None and info.finished:
                return
            if info is not None and _is_due(info, sync.done):
                sync.pull()
                info = sync.round
            if info is None or not _is_due(info, sync.done):
                looks.wait()
                continue
        sync.current = info
        try:
            yield info
            sync.push(num_samples, gradient=gradient)
        finally:
            sync.current = None
        sync.done = info.number


def _foreign(version: int) -> ProtocolError:
    return ProtocolError(
        f"the position is of version {version} of the client half, which was never published here: "
        "it is of another run. Give the server or store that it was taken with"
    )


def _is_due(info: RoundInfo, done: int) -> bool:
    """Whether to train now: once a round, or without a barrier again and again."""
    if not info.barrier:
        return not info.finished
    return info.sampled and not info.closed and not info.arrived and info.number > done


def _weight(num_samples: float | None, counted: Counted) -> float:
    """The weight of an update, in examples."""
    samples = num_samples
    if samples is None:
        # Where every batch was rejected, the update goes all the same: it is judged, and its client
        # heard from.
        samples = counted.num_samples or counted.rejected
    if not samples > 0:
        raise InputError(
            f"the update would count {samples} samples: train before push(), "
            "or give push(num_samples=...)"
        )
    return samples
