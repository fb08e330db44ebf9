"""The client half's own versions: pulled before training, pushed after it.

What is pushed is a pseudo-gradient, start − end, with the client's samples as its weight; buffers go with their
start and end values. What is pulled is copied in place, so the user's optimizer keeps its parameters and its state.
"""

from __future__ import annotations

from torch import Tensor, nn

from splitfed.connection import Connection
from splitfed.errors import ArchitectureError, InputError, ProtocolError
from splitfed.messages import PullAnswer, PullRequest, PushRequest
from splitfed.template import Template, compare, named_state, unwrap


class HalfSync:
    """Keeps one client half in step with the `client` lineage.

    Args:
        half: The client half.
        connection: The way to the server.
    """

    def __init__(self, half: nn.Module, connection: Connection) -> None:
        self.version: int | None = None
        self._half = half
        self._connection = connection
        self._template: Template | None = None
        self._start: dict[str, Tensor] = {}
        self._unanswered: tuple[PushRequest, dict[str, Tensor], float] | None = None
        """A push whose reply was lost, the half as it was then, and its samples; the next pull or push repeats it."""

    def pull(self) -> int:
        """Copy the newest client half in place; publish this one if there is none.

        Raises:
            ArchitectureError: the lineage's half isn't this one.
        """
        template = self._template = self._template or Template(self._half)
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
                    fingerprint=template.fingerprint(),
                    gradients=self._state(),
                    values={},
                    bases={},
                    num_samples=1,
                )
            )
            answer = self._ask()
        compare(answer.fingerprint, template.fingerprint(), "the client half")
        for name, tensor in self._state().items():
            tensor.copy_(answer.weights[name])
        self.version = answer.version
        self._begin(self._state(), self._connection.num_samples)
        return answer.version

    def push(self, num_samples: float | None) -> None:
        """Publish the change since the last pull or push.

        Raises:
            InputError: nothing was pulled, or there are no samples.
        """
        if self._template is None or self.version is None:
            raise InputError(
                "this half has no version yet: call client.pull() before training and client.push() after it"
            )
        if self._settle() and not self._has_changed():
            return  # the user repeats a push that failed, and nothing is new
        self._unanswered = self._update(num_samples)
        self._settle()

    def _settle(self) -> bool:
        """Send the push whose reply was lost, under its own number: if it has arrived, it counts once all the same."""
        if self._unanswered is None:
            return False
        request, state, counted = self._unanswered
        try:
            answer = self._connection.transport.push(request)
        except (InputError, ArchitectureError, ProtocolError):  # refused for good
            self._unanswered = None
            raise
        self._unanswered = None
        self._connection.opened(answer.incarnation, 0)
        self._connection.note_status(answer.status, 0)
        self._begin(state, counted)
        return True

    def _has_changed(self) -> bool:
        return any(not tensor.equal(self._start[name]) for name, tensor in self._state().items())

    def _update(self, num_samples: float | None) -> tuple[PushRequest, dict[str, Tensor], float]:
        samples = self._connection.num_samples if num_samples is None else num_samples
        if not samples > 0:
            raise InputError(
                f"the update would count {samples} samples: train before push(), or give push(num_samples=...)"
            )
        names = self._template or Template(self._half)
        state = {name: tensor.clone() for name, tensor in self._state().items()}
        changed = {n: state[n] for n in names.buffers if not state[n].equal(self._start[n])}
        request = PushRequest(
            client_id=self._connection.client_id,
            incarnation=self._connection.incarnation,
            process=self._connection.process,
            seq=self._connection.number("push"),
            base_version=self.version or 0,
            fingerprint=None,
            gradients={name: self._start[name] - state[name] for name in names.trainable},
            values=changed,
            bases={name: self._start[name] for name in changed},
            num_samples=samples,
        )
        return request, state, self._connection.num_samples

    def _ask(self) -> PullAnswer:
        return self._connection.transport.pull(PullRequest(self._connection.client_id))

    def _state(self) -> dict[str, Tensor]:
        """The half's distinct tensors, by first name; sharing memory with it."""
        names = self._template.names if self._template else {}
        return {name: t.detach() for name, t in named_state(unwrap(self._half)) if names.get(name) == name}

    def _begin(self, state: dict[str, Tensor], counted: float) -> None:
        """What the next push is the change from, and the samples that the last one has counted."""
        self._start = {name: tensor.clone() for name, tensor in state.items()}
        self._connection.num_samples -= counted
