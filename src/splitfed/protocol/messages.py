"""What travels between a client and a server, and what is kept of it: frozen dataclasses without behaviour.

Every field is a tree (`trees`), so any of them packs into safetensors bytes the same way (`packing`): a request on the
wire and the record of it on disk are one format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Housekeeping:
    """What a client's next request confirms: graphs that are gone, and sequence numbers that it gave up."""

    released: tuple[tuple[int, int], ...] = ()
    """(version, call) of forwards whose graph is gone: their answers have arrived or are no longer wanted."""
    abandoned: tuple[int, ...] = ()
    """Sequence numbers of passes that failed before their seal."""
    answered: tuple[int, ...] = ()
    """Sequence numbers of one-trip loss calls whose answer has arrived."""


@dataclass(frozen=True, slots=True, eq=False)
class ForwardRequest:
    """One call of a cut point. Everything that its bits depend on is in here or pinned by the answer's version."""

    client_id: str
    incarnation: int | None
    """The client's process; `None` at its first recorded call: the server opens one and answers it."""
    process: str
    """What that process calls itself: a repeated first request opens nothing new."""
    call: int
    """Number of this call within the incarnation."""
    cut: str
    """Which cut of the body: '' for the body itself."""
    inputs: Any
    """The tree (args, kwargs) of the call."""
    requires_grad: tuple[bool, ...]
    """For each distinct tensor of `inputs`."""
    training: bool
    grad: bool
    """The client's grad mode: with it on, the forward is recorded and its backward answered."""
    seed: int
    autocast: str | None
    """The autocast dtype, such as 'bfloat16', or `None` outside autocast."""
    version: int | None
    """Run at this version; `None` for the newest."""
    seen: int
    """The newest version that this client has seen: no replica may answer at an older one unasked."""
    previous: int | None
    """Number of the call of the same `client(...)` whose buffers this one continues."""
    housekeeping: Housekeeping = Housekeeping()


@dataclass(frozen=True, slots=True, eq=False)
class ForwardAnswer:
    """The outputs of one call, detached, and what ran."""

    incarnation: int | None
    version: int
    outputs: Any
    requires_grad: tuple[bool, ...]
    """For each distinct tensor of `outputs`."""
    drew: bool
    """Whether the body drew random numbers; if not, the client puts its generator back."""
    changed: Mapping[int, Tensor]
    """The input tensors that the body changed in place, by place: their new values."""
    crcs: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """The calls of one `client(...)` within a batch: their buffers are handed on, so the last one's count."""

    num_samples: float
    last_part: int
    """The part whose call came last in the forward order."""


@dataclass(frozen=True, slots=True, eq=False)
class Seal:
    """Closes a batch: which parts make its gradient, in the order in which autograd added them."""

    parts: tuple[tuple[int, int], ...]
    """(version, part) of the parts sent before; a call that rides along comes last."""
    num_samples: float
    loss_scale: float
    chains: tuple[Chain, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BackwardRequest:
    """Gradients of one call's outputs, the close of a batch, or (ordinarily) both."""

    client_id: str
    incarnation: int
    seq: int
    """The batch; taken at the backward. Calls in eval mode make no batch: theirs is not stored."""
    part: int
    """Place of this call in the pass."""
    version: int
    """The version that the call ran at, as answered."""
    call: int | None
    """`None` if only `seal` is asked for."""
    grad_outputs: tuple[Tensor | None, ...]
    seal: Seal | None
    housekeeping: Housekeeping = Housekeeping()


@dataclass(frozen=True, slots=True, eq=False)
class BackwardAnswer:
    """Gradients of the call's inputs, and what became of the parameter gradient."""

    grad_inputs: tuple[Tensor | None, ...]
    status: str
    """'stored', 'rejected' (not finite), 'part' (the seal is still to come) or 'uncounted' (eval mode)."""


@dataclass(frozen=True, slots=True, eq=False)
class LossRequest:
    """Activations and labels in one trip: forward, loss and backward on the server."""

    forward: ForwardRequest
    seq: int
    target: Any
    num_samples: float


@dataclass(frozen=True, slots=True, eq=False)
class LossAnswer:
    """The loss (detached) and its gradients for the call's inputs."""

    incarnation: int | None
    version: int
    loss: Tensor
    grad_inputs: tuple[Tensor | None, ...]
    status: str
    drew: bool


@dataclass(frozen=True, slots=True, eq=False)
class PullRequest:
    """Asks for the newest client half."""

    client_id: str
    version: int | None = None
    weights: bool = True
    """False asks for the round alone."""


@dataclass(frozen=True, slots=True, eq=False)
class RoundInfo:
    """The round under way, as one client sees it."""

    number: int
    sampled: bool
    """Whether this client is asked to train."""
    deadline: float | None
    """By the coordinator's clock, ordinarily seconds since 1970; `None` for none."""
    barrier: bool
    """Whether clients wait for each other; if not, each goes on as soon as it has pushed."""
    arrived: bool
    """Whether an update of this client is in already, of this process or an earlier one."""
    closed: bool
    """Whether the round has ended: an update that comes now is late."""
    finished: bool
    """Whether no round follows."""


@dataclass(frozen=True, slots=True, eq=False)
class PullAnswer:
    """The client half at `version`; -1 if nobody has published one yet."""

    version: int
    fingerprint: Any
    weights: Mapping[str, Tensor]
    round: RoundInfo | None = None
    """`None` where nobody runs rounds."""


@dataclass(frozen=True, slots=True, eq=False)
class PushRequest:
    """A client half's update (start − end as a pseudo-gradient, or its gradient), or its lineage's first weights."""

    client_id: str
    incarnation: int | None
    process: str
    seq: int
    base_version: int
    """-1 publishes version 0: `gradients` then holds the weights, and nothing happens if it exists."""
    fingerprint: Any
    gradients: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    """Buffers that changed: their end values ..."""
    bases: Mapping[str, Tensor]
    """... and what they were at the pull."""
    num_samples: float
    loss_scale: float
    """What `gradients` are to be divided by; 1 for start − end."""


@dataclass(frozen=True, slots=True, eq=False)
class PushAnswer:
    """What became of a push: 'stored', 'rejected' or 'published'."""

    incarnation: int | None
    status: str


@dataclass(frozen=True, slots=True, eq=False)
class ForwardRecord:
    """A forward as it is kept: all that a replica needs to run it again, and to know that it did."""

    cut: str
    inputs: Any
    requires_grad: tuple[bool, ...]
    training: bool
    seed: int
    autocast: str | None
    buffers: Mapping[str, Tensor] | None
    """What the buffers were at its start; `None` for the version's own."""
    outputs: tuple[tuple[tuple[int, ...], str, bool], ...]
    """Shape, dtype and requires_grad of each output tensor."""
    crcs: tuple[int, ...]
    numerics: Any


@dataclass(frozen=True, slots=True, eq=False)
class GradientRecord:
    """A gradient file: one batch, or one part of it."""

    kind: str
    """'gradient', 'rejected', 'skip' or 'part'."""
    base_version: int
    num_samples: float
    loss_scale: float
    digest: str
    numerics: str
    gradients: Mapping[str, Tensor]
    buffers: Sequence[Mapping[str, Any]]
    """A mapping of values, bases (by buffer name) and num_samples for each chain."""
