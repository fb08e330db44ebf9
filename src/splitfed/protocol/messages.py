"""The messages between client and server, and the records that a store keeps of them.

All are frozen dataclasses. Any of them packs into safetensors bytes the same way (`packing`), so a
request on the wire and its record on disk are one format. What follows from the fields alone is a
method: tensors, samples, digest. Whether each field has the type of its annotation is checked at
the borders (`fields`).

The trap: class names, field names and their order are the format, and so is what a digest hashes.
Rename or reorder one, and an older store can't be read; change a digest, and a retry after the
upgrade is refused as another request. A new field goes last, as `ADDED`: it is left out of bytes
and digests while it has its default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from torch import Tensor

from splitfed.protocol import checksum, pytree, safetensors
from splitfed.protocol.coding import Coded, decode_all, encode_all
from splitfed.protocol.deltas import Delta, Lookup, nothing, restore_all
from splitfed.protocol.fields import ADDED, CHECKED_AS_KEY, Request
from splitfed.protocol.ids import BatchId

if TYPE_CHECKING:
    from splitfed.protocol.coding import Codec

ClientId = Annotated[str, CHECKED_AS_KEY]
Number = Annotated[int, CHECKED_AS_KEY]
Seed = Annotated[int, range(2**64)]
Settings = Mapping[str, Any]
"""Plain values by module and attribute."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The pytree (args, kwargs) of a call."""


Answer = TypeVar("Answer", "BackwardAnswer", "LossAnswer")


@dataclass(frozen=True, slots=True, eq=False)
class Housekeeping:
    """What a client's next request confirms: graphs that are gone, numbers that it gave up."""

    released: tuple[tuple[int, int], ...] = ()
    """(version, call) of forwards whose graph is gone: their answers have arrived or are no longer
    wanted."""
    abandoned: tuple[int, ...] = ()
    """Sequence numbers of passes that failed before their seal."""
    answered: tuple[int, ...] = ()
    """Sequence numbers of one-trip loss calls whose answer has arrived."""
    references: tuple[str, ...] = field(default=(), metadata=ADDED)
    """The names of kept rows that no delta will refer to any more."""

    def counts(self) -> list[tuple[str, int]]:
        """How many numbers of each kind ride along, with what they are."""
        return [
            ("calls that were released", len(self.released)),
            ("calls that were abandoned", len(self.abandoned)),
            ("batches that were answered", len(self.answered)),
            ("references that were given up", len(self.references)),
        ]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardRequest(Request):
    """One call of a cut point.

    All that its bits depend on is in here, or pinned by the answer's version.
    """

    client_id: ClientId
    incarnation: int | None
    """The client's process; `None` at its first recorded call: the server opens one and answers
    it."""
    process: str
    """What that process calls itself: a repeated first request opens nothing new."""
    call: int
    """Number of this call within the incarnation."""
    cut: str
    """Which cut of the body: '' for the body itself."""
    inputs: Arguments
    """The tree (args, kwargs) of the call."""
    requires_grad: tuple[bool, ...]
    """For each distinct tensor of `inputs`."""
    training: bool
    grad: bool
    """The client's grad mode: with it on, the forward is recorded and its backward answered."""
    seed: Seed
    autocast: str | None
    """The autocast dtype, such as 'bfloat16', or `None` outside autocast."""
    version: int | None
    """Run at this version; `None` for the newest."""
    seen: int
    """The newest version that this client has seen: no replica may answer at an older one
    unasked."""
    previous: int | None
    """Number of the call of the same `client(...)` whose buffers this one continues."""
    housekeeping: Housekeeping = Housekeeping()
    part: str | None = field(default=None, metadata=ADDED)
    """Which part of which model the half was cut for, as `split` has marked it; `None` for a cut
    point that was placed by hand."""
    settings: Settings = field(default_factory=dict, metadata=ADDED)
    """What the half has changed of the part: by module and attribute (`layer.beta`,
    `1.training`)."""
    previous_version: int | None = field(default=None, metadata=ADDED)
    """The version that `previous` ran at, if it is a call of an earlier `client(...)`: at any other
    this call begins with the version's own buffers."""
    resumed: Number = field(default=0, metadata=ADDED)
    """What tells a process that goes on under the numbers of an earlier one from that: a random
    number; 0 for a process that has its own."""
    nonce: int = field(default=0, metadata=ADDED)
    """A random number of this call: what tells it from that of a copy of the process, which bears
    the same number. 0 for a client that draws none."""
    previous_nonce: int = field(default=0, metadata=ADDED)
    """That of `previous`."""
    repeats: int | None = field(default=None, metadata=ADDED)
    """The batch that such a call is to be part of: if the store has it, the call runs at the
    version that the batch ran at."""
    coding: tuple[Coded, ...] = field(default=(), metadata=ADDED)
    """The tensors that travel in fewer bytes, and how; whoever serves the request decodes them
    first."""
    answer_codec: str = field(default="", metadata=ADDED)
    """What the client wants the answer's tensors to be coded by; '' for as they are."""
    deltas: tuple[Delta, ...] = field(default=(), metadata=ADDED)
    """The tensors of which only what has changed travels, after it was decoded."""

    def tensors(self) -> list[Tensor]:
        """The tensors that it carries, each distinct one once."""
        return pytree.flatten(self.inputs)[1]

    def num_bytes(self) -> int:
        """Bytes of its tensors once they are expanded and decoded."""
        return _decoded_bytes(self.tensors(), self.made())

    def samples(self) -> list[float]:
        """How many examples it is of: the leading dimension of its first tensor."""
        return [_leading(self.tensors(), self.made())]

    def made(self) -> tuple[Coded | Delta, ...]:
        """How those of its tensors are made that don't travel as they are."""
        return (*self.coding, *self.deltas)

    def decoded(self, lookup: Lookup = nothing) -> ForwardRequest:
        """The request with its tensors as they were before they were coded.

        Args:
            lookup: Where the rows are that its deltas refer to.

        Raises:
            ReferenceLostError: these aren't there.
            InputError: this end doesn't have the codec.
            FormatError: what is coded isn't a tensor of it.
        """
        if not self.coding and not self.deltas:
            return self
        spec, tensors = pytree.flatten(self.inputs)
        found = restore_all(decode_all(tensors, self.coding), self.deltas, lookup)
        return replace(self, inputs=pytree.unflatten(spec, found), coding=(), deltas=())

    def counts(self) -> list[tuple[str, int]]:
        """How many numbers of each kind ride along, with what they are."""
        named = sum(len(delta.references) for delta in self.deltas)
        return [*self.housekeeping.counts(), ("references", named)]

    def record(self, buffers: Mapping[str, Tensor] | None, numerics: str) -> ForwardRecord:
        """The record of this call before it has run: its outputs aren't known yet.

        Args:
            buffers: What the buffers are at its start; `None` for the version's own.
            numerics: The short name of the numerics class of the process that runs it.
        """
        return ForwardRecord(
            cut=self.cut,
            inputs=self.inputs,
            requires_grad=self.requires_grad,
            training=self.training,
            seed=self.seed,
            autocast=self.autocast,
            buffers=buffers,
            outputs=(),
            crcs=(),
            numerics=numerics,
            settings=self.settings,
        )


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
    moved: bool = field(default=False, metadata=ADDED)
    """Whether the run changed buffers."""
    written: tuple[str, ...] = field(default=(), metadata=ADDED)
    """The plain attributes that the body's forward sets (`layer.kl`): only the server has their
    values."""
    repeated: bool = field(default=False, metadata=ADDED)
    """Whether the store has the batch that the request repeats."""
    coding: tuple[Coded, ...] = field(default=(), metadata=ADDED)
    """The outputs that travel in fewer bytes, and how."""

    def coded(self, codec: Codec | None) -> ForwardAnswer:
        """The answer with its outputs in fewer bytes."""
        spec, tensors = pytree.flatten(self.outputs)
        found, coding = encode_all(tensors, codec)
        return replace(self, outputs=pytree.unflatten(spec, found), coding=coding)

    def decoded(self) -> ForwardAnswer:
        """The answer with its outputs as they were before that, as far as they can be."""
        if not self.coding:
            return self
        spec, tensors = pytree.flatten(self.outputs)
        return replace(
            self, outputs=pytree.unflatten(spec, decode_all(tensors, self.coding)), coding=()
        )


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """The calls of one `client(...)` within a batch.

    Their buffers are handed on, so those of the last one count.
    """

    num_samples: float
    last_part: int
    """The part whose call came last in the forward order."""
    after: int | None = field(default=None, metadata=ADDED)
    """What its buffers are the change from: `None` for those of the version, -1 for what its call
    began with, else the end of the chain whose last part this is."""

    def plain(self) -> tuple[Any, ...]:
        """Its content for a digest, in plain values."""
        after = () if self.after is None else (self.after,)
        return (self.num_samples, self.last_part, *after)

    def numbered_from(self, first: int) -> Chain:
        """The same for parts that are numbered from `first` on, and not from 0."""
        after = self.after
        if after is not None and after >= 0:
            after += first
        return Chain(self.num_samples, self.last_part + first, after)


@dataclass(frozen=True, slots=True, eq=False)
class Seal:
    """The close of a batch: the parts of its gradient, in the order of autograd."""

    parts: tuple[tuple[int, int], ...]
    """(version, part) of the parts sent before; a call that rides along comes last."""
    num_samples: float
    loss_scale: float
    chains: tuple[Chain, ...]

    def plain(self) -> tuple[Any, ...]:
        """Its content for a digest, in plain values: their `repr` is ten times as fast."""
        chains = [chain.plain() for chain in self.chains]
        return self.parts, self.num_samples, self.loss_scale, chains

    def digest(self, batch: BatchId) -> str:
        """The digest of a batch that is closed by a request of its own, without a call."""
        return content_digest((*batch, self.plain()), ())


@dataclass(frozen=True, slots=True, eq=False)
class BackwardRequest(Request):
    """Gradients of one call's outputs, the close of a batch, or (ordinarily) both."""

    client_id: ClientId
    incarnation: Number
    seq: Number
    """The batch; taken at the backward. Calls in eval mode make no batch: theirs is not stored."""
    part: Number
    """Place of this call in the pass."""
    version: Number
    """The version that the call ran at, as answered."""
    call: Annotated[int | None, CHECKED_AS_KEY]
    """`None` if only `seal` is asked for."""
    grad_outputs: tuple[Tensor | None, ...]
    seal: Seal | None
    housekeeping: Housekeeping = Housekeeping()
    counted: bool = field(default=True, metadata=ADDED)
    """Whether the pass accumulates parameter gradients; if not, the inputs get theirs, and nothing
    is stored."""
    resumed: Number = field(default=0, metadata=ADDED)
    """As in the forward: a batch that an earlier process has stored under this number stays."""
    nonce: int = field(default=0, metadata=ADDED)
    """That of the call's forward."""
    coding: tuple[Coded, ...] = field(default=(), metadata=ADDED)
    """The tensors that travel in fewer bytes, and how; whoever serves the request decodes them
    first."""
    answer_codec: str = field(default="", metadata=ADDED)
    """What the client wants the answer's tensors to be coded by; '' for as they are."""

    def tensors(self) -> list[Tensor]:
        """The gradients that it carries."""
        return [gradient for gradient in self.grad_outputs if gradient is not None]

    def num_bytes(self) -> int:
        """Bytes of its tensors once they are expanded and decoded."""
        return _decoded_bytes(self.grad_outputs, self.coding)

    def decoded(self) -> BackwardRequest:
        """The request with its gradients as they were before they were coded.

        Raises:
            InputError: this end doesn't have the codec.
            FormatError: what is coded isn't a gradient of it.
        """
        if not self.coding:
            return self
        grads = tuple(decode_all(self.grad_outputs, self.coding))
        return replace(self, grad_outputs=grads, coding=())

    def samples(self) -> list[float]:
        """How many examples its batch has, as a whole and by chain; none if it closes no batch."""
        if self.seal is None:
            return []
        return [self.seal.num_samples, *(chain.num_samples for chain in self.seal.chains)]

    def counts(self) -> list[tuple[str, int]]:
        """How many numbers of each kind ride along, with what they are."""
        found = self.housekeeping.counts()
        if self.seal is not None:
            found.append(("parts of a batch", len(self.seal.parts)))
            found.append(("chains of a batch", len(self.seal.chains)))
        return found

    def digest(self) -> str:
        """What tells this request from another under the same batch id."""
        seal = None if self.seal is None else self.seal.plain()
        place = (self.client_id, self.incarnation, self.seq, self.part, self.version, self.call)
        uncounted = () if self.counted else ("uncounted",)
        return content_digest((*place, seal, *uncounted), self.grad_outputs)


def _coded(answer: Answer, codec: Codec | None) -> Answer:
    found, coding = encode_all(answer.grad_inputs, codec)
    return replace(answer, grad_inputs=tuple(found), coding=coding)


def _decoded(answer: Answer) -> Answer:
    if not answer.coding:
        return answer
    found = decode_all(answer.grad_inputs, answer.coding)
    return replace(answer, grad_inputs=tuple(found), coding=())


@dataclass(frozen=True, slots=True, eq=False)
class BackwardAnswer:
    """Gradients of the call's inputs, and what became of the parameter gradient."""

    grad_inputs: tuple[Tensor | None, ...]
    status: str
    """'stored', 'rejected' (not finite), 'part' (the seal is still to come) or 'uncounted' (eval
    mode); 'skipped' if it repeats a batch that an earlier process gave up."""
    coding: tuple[Coded, ...] = field(default=(), metadata=ADDED)
    """The gradients that travel in fewer bytes, and how."""

    def coded(self, codec: Codec | None) -> BackwardAnswer:
        """The answer with its gradients in fewer bytes."""
        return _coded(self, codec)

    def decoded(self) -> BackwardAnswer:
        """The answer with its gradients as they were before that, as far as they can be."""
        return _decoded(self)


@dataclass(frozen=True, slots=True, eq=False)
class LossRequest(Request):
    """Activations and labels in one trip: forward, loss and backward on the server."""

    forward: ForwardRequest
    seq: Number
    target: Any
    num_samples: float
    counted: bool = field(default=True, metadata=ADDED)
    """Whether the parameter gradients count; if not, the inputs get theirs, and nothing is
    stored."""

    @property
    def client_id(self) -> str:
        """The client that it speaks for: that of its forward."""
        return self.forward.client_id

    def tensors(self) -> list[Tensor]:
        """The activations and the target, each distinct tensor once."""
        return pytree.flatten((self.forward.inputs, self.target))[1]

    def samples(self) -> list[float]:
        """How many examples it is of: as its first tensor has them, and as it says."""
        return [_leading(self.tensors(), self.forward.made()), self.num_samples]

    def num_bytes(self) -> int:
        """Bytes of its tensors once they are expanded and decoded."""
        return _decoded_bytes(self.tensors(), self.forward.made())

    def decoded(self, lookup: Lookup = nothing) -> LossRequest:
        """The request with its tensors as they were before they were coded.

        Args:
            lookup: Where the rows are that its deltas refer to.

        Raises:
            ReferenceLostError: these aren't there.
            InputError: this end doesn't have the codec.
            FormatError: what is coded isn't a tensor of it.
        """
        decoded = self.forward.decoded(lookup)
        return self if decoded is self.forward else replace(self, forward=decoded)

    def counts(self) -> list[tuple[str, int]]:
        """How many numbers of each kind ride along, with what they are."""
        return self.forward.counts()

    def digest(self, batch: BatchId, version: int) -> str:
        """What tells this request from another under the same batch id.

        Args:
            batch: The batch that it makes; its incarnation may have been opened by this request.
            version: The version that it runs at.
        """
        spec, sent = pytree.flatten((self.forward.inputs, self.target))
        ahead = self.forward
        settings = (ahead.call, ahead.cut, ahead.seed, ahead.autocast, self.num_samples, spec)
        changed = sorted(ahead.settings.items())
        return content_digest((batch, version, *settings, *changed), sent)


@dataclass(frozen=True, slots=True, eq=False)
class LossAnswer:
    """The loss (detached) and its gradients for the call's inputs."""

    incarnation: int | None
    version: int
    loss: Tensor
    grad_inputs: tuple[Tensor | None, ...]
    status: str
    drew: bool
    repeated: bool = field(default=False, metadata=ADDED)
    """Whether the store has the batch already, from an earlier process."""
    coding: tuple[Coded, ...] = field(default=(), metadata=ADDED)
    """The gradients that travel in fewer bytes, and how."""

    def coded(self, codec: Codec | None) -> LossAnswer:
        """The answer with its gradients in fewer bytes."""
        return _coded(self, codec)

    def decoded(self) -> LossAnswer:
        """The answer with its gradients as they were before that, as far as they can be."""
        return _decoded(self)


@dataclass(frozen=True, slots=True, eq=False)
class PullRequest(Request):
    """A question for the newest client half."""

    client_id: ClientId
    version: int | None = None
    weights: bool = True
    """False asks for the round alone."""
    frozen: str = field(default="", metadata=ADDED)
    """The `frozen_digest` of the parameters that never train, as the client has them: where they
    are the version's, the answer leaves them out."""


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
    """By first name; without the frozen parameters if the request says that the client has them."""
    round: RoundInfo | None = None
    """`None` where nobody runs rounds."""
    body_version: int | None = field(default=None, metadata=ADDED)
    """The version of the body that this half belongs to, where both are committed together: calls
    run there until the next pull."""


@dataclass(frozen=True, slots=True, eq=False)
class PushRequest(Request):
    """A client half's update, or the first weights of its lineage.

    The update is start − end as a pseudo-gradient, or the gradient itself.
    """

    client_id: ClientId
    incarnation: int | None
    process: str
    seq: Number
    base_version: int
    """-1 publishes version 0: `gradients` then holds the weights, and nothing happens if it
    exists."""
    fingerprint: Any
    gradients: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    """Buffers that changed: their end values ..."""
    bases: Mapping[str, Tensor]
    """... and what they were at the pull."""
    num_samples: float
    loss_scale: float
    """What `gradients` are to be divided by; 1 for start − end."""
    resumed: Number = field(default=0, metadata=ADDED)
    """As in a forward: an update that an earlier process has pushed under this number stays."""
    upto: Number = field(default=0, metadata=ADDED)
    """Of a gradient: the body's batches below this number, of the same process, belong to it, if
    they belong to no earlier one."""
    flows: Mapping[str, Any] = field(default_factory=dict, metadata=ADDED)
    """What its compression has done since the last push, by flow (`flows`). It tells of the update
    and is no part of it, so the digest leaves it out."""

    samples_limit = "push_samples"  # it counts all batches since the pull

    def tensors(self) -> list[Tensor]:
        """The gradients, then the buffers at their end and at their start."""
        return [*self.gradients.values(), *self.values.values(), *self.bases.values()]

    def samples(self) -> list[float]:
        """How many examples it counts."""
        return [self.num_samples]

    def digest(self, incarnation: int) -> str:
        """What tells this request from another under the same batch id.

        Args:
            incarnation: The client's process; this request may have opened it.
        """
        place = (self.client_id, incarnation, self.seq, self.base_version)
        names = (list(self.gradients), list(self.values))
        return content_digest((*place, self.num_samples, self.loss_scale, *names), self.tensors())


@dataclass(frozen=True, slots=True, eq=False)
class PushAnswer:
    """What became of a push: 'stored', 'rejected', 'published', or 'skipped' as for a batch."""

    incarnation: int | None
    status: str


@dataclass(frozen=True, slots=True, eq=False)
class ForwardRecord:
    """The record of a forward: what a replica needs to run it again, and to know that it did."""

    cut: str
    inputs: Arguments
    requires_grad: tuple[bool, ...]
    training: bool
    seed: Seed
    autocast: str | None
    buffers: Mapping[str, Tensor] | None
    """What the buffers were at its start; `None` for the version's own."""
    outputs: tuple[tuple[tuple[int, ...], str, bool], ...]
    """Shape, dtype and requires_grad of each output tensor."""
    crcs: tuple[int, ...]
    numerics: str
    """The short name of the numerics class that it ran in."""
    settings: Settings = field(default_factory=dict, metadata=ADDED)
    """As in the request."""

    def with_outputs(self, tensors: Sequence[Tensor], crcs: Iterable[int]) -> ForwardRecord:
        """The record once the call has run."""
        outputs = tuple(
            (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
            for tensor in tensors
        )
        # Field by field: `replace` takes three times as long, in each forward.
        return ForwardRecord(
            cut=self.cut,
            inputs=self.inputs,
            requires_grad=self.requires_grad,
            training=self.training,
            seed=self.seed,
            autocast=self.autocast,
            buffers=self.buffers,
            outputs=outputs,
            crcs=tuple(crcs),
            numerics=self.numerics,
            settings=self.settings,
        )


@dataclass(frozen=True, slots=True, eq=False)
class BufferUpdate:
    """The buffers that one batch changed.

    A changed buffer differs from its base in some bit. A statistic that an update left as it was
    may be named too: only then is its base known exactly, and the head's value stands in for it if
    not.
    """

    values: Mapping[str, Tensor]
    """The end value bᵢ of each, by qualified name."""
    bases: Mapping[str, Tensor]
    """The value that each began with, under the same names."""
    num_samples: float
    """nᵢ, in examples."""


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What a call's share of a gradient follows from, with the weights of its version."""

    version: int
    part: int
    """The place of the call in its batch."""
    forward: ForwardRecord
    grad_outputs: tuple[Tensor | None, ...]
    """The gradient of each output, as the client sent it or the loss gave it."""
    crcs: tuple[int, ...]
    """Of the gradients of the inputs, as they were answered; 0 where there is none."""
    digest: str
    """Of the request."""


@dataclass(frozen=True, slots=True, eq=False)
class GradientRecord:
    """A gradient file: one batch, or one part of it.

    It holds the gradient, or the recipes that it follows from.
    """

    kind: str
    """'gradient', 'rejected', 'skip' or 'part'."""
    base_version: int
    num_samples: float
    loss_scale: float
    digest: str
    numerics: str
    """The short name of the numerics class that it was computed in; 'mixed' for several."""
    gradients: Mapping[str, Tensor]
    buffers: Sequence[BufferUpdate]
    """One for each chain."""
    resumed: int = field(default=0, metadata=ADDED)
    """Which process of those that share an incarnation has sent it, as in the request."""
    recipes: Sequence[Recipe] = field(default=(), metadata=ADDED)
    """Those of its calls, in the order in which their shares are added."""
    seal: Seal | None = field(default=None, metadata=ADDED)
    """What closed the batch, beside recipes; `None` for a loss on the server."""
    holder: str = field(default="", metadata=ADDED)
    """Beside recipes: which process has computed the gradient, and may hold it in a sum."""
    upto: int = field(default=0, metadata=ADDED)
    """Of a half's gradient: as in the push."""
    flows: Mapping[str, Any] = field(default_factory=dict, metadata=ADDED)
    """Of a half's update: as in the request."""

    def as_recipes(self) -> GradientRecord:
        """The record without its gradient, which can be computed again."""
        return replace(self, gradients={}, buffers=[])

    def as_gradient(self) -> GradientRecord:
        """The record without its recipes."""
        return replace(self, recipes=(), seal=None) if self.recipes else self


@dataclass(frozen=True, slots=True, eq=False)
class SumRecord:
    """The file of a sum: what the gradients of several batches add up to, or one of them as it is.

    The lists go with each other, in the order in which the batches were added.
    """

    base_version: int
    loss_scale: float
    numerics: str
    batches: tuple[str, ...]
    """Their ids."""
    digests: tuple[str, ...]
    """Of the requests that closed them."""
    num_samples: tuple[float, ...]
    num_updates: tuple[int, ...]
    """How many of the buffer updates are each one's."""
    buffers: Sequence[BufferUpdate]
    total: Mapping[str, Tensor]
    """Σ nᵢ·gᵢ by name, in float64 and as real numbers; of one batch g."""


def _leading(tensors: Sequence[Tensor], coding: Sequence[Coded | Delta] = ()) -> int:
    """The leading dimension of the first tensor; 0 if there is none."""
    shape = tuple(tensors[0].shape) if tensors else ()
    for coded in coding:
        if coded.place == 0:
            shape = coded.shape
    return shape[0] if shape else 0


def _decoded_bytes(tensors: Sequence[Tensor | None], coding: Sequence[Coded | Delta]) -> int:
    # numel() counts the elements of an expanded tensor, not those that were sent.
    sizes = [0 if t is None else t.numel() * t.itemsize for t in tensors]
    for coded in coding:
        if 0 <= coded.place < len(sizes):
            sizes[coded.place] = coded.num_bytes
    return sum(sizes)


def frozen_digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 of parameters that never train, as the file of a store that holds them; '' for none.

    So a server knows it from the commit's record, and nobody hashes them again.

    Args:
        parameters: Distinct ones by first name.
    """
    if not parameters or any(tensor.is_meta for tensor in parameters.values()):
        return ""
    hasher = hashlib.sha256()
    for part in checksum.sealed(safetensors.encode(parameters)):
        hasher.update(part)
    return hasher.hexdigest()


def content_digest(plain: object, tensors: Iterable[Tensor | None]) -> str:
    """SHA-256 of a request's content: a retry has the same, another request another.

    Args:
        plain: Its plain fields, housekeeping apart; anything whose `repr` tells them apart.
        tensors: What it carries.
    """
    contents = [("", b"") if tensor is None else safetensors.content(tensor) for tensor in tensors]
    hasher = hashlib.sha256(repr((plain, [text for text, _ in contents])).encode())
    for _, memory in contents:
        hasher.update(memory)
    return hasher.hexdigest()
