"""The client: a module that disappears into the user's own training loop.

In an optimizer, a loop, a print or a checkpoint it is its client half (`standin`). What is here
besides is the way to the server. Where a call goes is decided by the call, not by the half: one
half may serve many clients.

The trap: trainers look at the class too. Hugging Face's Trainer reads the signature of
`type(model).forward`, so the class of a client is one that looks like its half's (`likeness`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from splitfed.checks import warn_once
from splitfed.client.backward import Passes
from splitfed.client.blocks import Scope
from splitfed.client.calls import Session
from splitfed.client.connection import Connection, LossScale
from splitfed.client.half import HalfSync, take_part
from splitfed.client.likeness import class_like, forward_with, shown
from splitfed.client.loss import LossSession
from splitfed.client.pipeline import BatchResult, Pipeline, Training
from splitfed.client.position import Position
from splitfed.client.samples import weigh
from splitfed.client.sharing import Sharing
from splitfed.client.standin import SHARED, StandIn
from splitfed.client.transports import as_transport
from splitfed.client.watch import Watch
from splitfed.errors import CutError, InputError, SplitFedError, UnsupportedError
from splitfed.model.arguments import explanation
from splitfed.model.cutpoint import CutPoint, names_of_parts
from splitfed.model.promise import settled
from splitfed.model.tracing import no_whole_model, refuse_script, refuse_tracing
from splitfed.protocol.compression import Codecs, Compression, compression_of
from splitfed.protocol.ids import check_client_id, check_number
from splitfed.protocol.messages import RoundInfo
from splitfed.protocol.transport import Transport

Self = TypeVar("Self", bound="SplitClient")
_COPIED = (
    "a copy of it copies the half alone. Its body is the server's, at the newest version: an "
    "average (EMA, SWA) is of the half, and a frozen teacher's body goes on learning. For one "
    "version of the body call within copy.at(version); for an average of the whole model average "
    "splitfed.join(client, store.load_weights(version)) over the versions"
)
_PRIVATE = (
    "per-sample gradients (as of Opacus) are taken in the half alone: clipping, noise and epsilon "
    "cover what the half learns. They cover neither the body's gradient, which the server makes "
    "and stores as it is, nor what crosses the cut"
)
_ADAPTERS = (
    "adapters (of PEFT) are put on the half alone, and none on the part that was cut out. "
    "To adapt the whole model call get_peft_model(model, ...) before split()"
)
_SET_BY = {
    "autograd_grad_sample_hooks": ("private", _PRIVATE),  # Opacus
    "peft_config": ("adapters", _ADAPTERS),  # PEFT
}
"""What a tool that takes the client for the model sets on it, and what it has to be told."""


class CutMethod:
    """A method of the half (forward, `encode`, ...) as one call of the client."""

    def __init__(
        self, client: SplitClient, run: Callable[..., Any], method: Callable[..., Any]
    ) -> None:
        self._client = client
        self._run = run
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it across the cut."""
        client = self._client
        refuse_tracing()
        client._refuse_replica()
        client._notice_privacy()
        connection, passes = client._line()
        weight, counts = weigh(args, kwargs), passes.watch.trains()
        passes.has_trainer = "_is_accelerate_prepared" in client.__dict__
        training = client.client_half.training
        version = client._version_of_calls()
        with Session(connection, passes, weight, version, training, counts) as session:
            try:
                outputs = self._run(*args, **kwargs)
                # What layers of a run return, and nobody has asked for so far.
                return settled(outputs) if session.passed else outputs
            except (TypeError, RuntimeError, AttributeError) as error:
                if isinstance(error, SplitFedError):
                    raise
                # Nothing else of the half's own errors is touched: they are the unsplit model's.
                ours = explanation(error, client.client_half, args, kwargs)
                if ours is None:
                    raise
                raise ours from error

    @property
    def __code__(self) -> Any:
        """The method's own, for tools that look where it comes from."""
        return getattr(self._method, "__code__", None)

    @property
    def __signature__(self) -> inspect.Signature:
        run = self._run
        method = shown(run).forward if isinstance(run, nn.Module) else self._method
        return inspect.signature(method)


class ClientForward:
    """`client.forward`: runs the half, with its signature; may be replaced, as Accelerate does."""

    def __get__(self, client: Any, owner: type | None = None) -> Callable[..., Any]:
        if client is None:
            kind: Any = owner
            of_the_class: Callable[..., Any] = kind._forward_of_the_class
            return of_the_class
        replaced: Callable[..., Any] | None = client.__dict__.get("_replaced_forward")
        if replaced is not None:
            return replaced
        half = client.client_half
        return CutMethod(client, half, half.forward)

    def __set__(self, client: Any, value: Callable[..., Any]) -> None:
        client.__dict__["_replaced_forward"] = value


class SplitClient(StandIn):
    """Connects the cut points of a client half to a server.

    Args:
        client_half: The half that `split` returned, or a model with `CutPoint`s placed by hand. It
            isn't copied.
        server: A `SplitServer` in this process, the URL of a service ("https://host") or of the
            store that its workers share ("s3://bucket/run"), or anything with the methods of
            `Transport`.
        client_id: 1 to 64 of the characters A-Z a-z 0-9 _ . -, beginning with a letter or digit.
            One `SplitClient` at a time may train under an id: a newer one supersedes it.
        loss_scale: What the loss is multiplied by before `backward()`, as a number or a function:
            `scaler.get_scale`, `1 / k` under gradient accumulation, the batch size for a summed
            loss. Stored parameter gradients are divided by it.
        personal: Patterns (`fnmatch`) of parameters and buffers that this client neither pushes nor
            pulls, such as `("head.*",)`. Whoever averages the halves names the same.
        token: What the service at the URL asks for; the environment variable SPLITFED_TOKEN if not
            given.
        compression: What crosses the cuts travels in fewer bytes: a codec of all, such as "int8" or
            "bfloat16", or a dict by flow (`protocol.compression`). Exact if it isn't given.
        options: Of the way to that URL, such as `timeout` in seconds (`transports`).

    Raises:
        IdError: the id may not become a key.
        CutError: the half has no cut point.
        InputError: `server` is neither a transport nor a URL, a personal pattern fits nothing, or
            no codec has that name.
    """

    _connection: Connection
    _passes: Passes
    _sync: HalfSync
    _pinned: int | None
    _original: SplitClient | None
    """What this is a deep copy of."""
    _said: set[str]
    """What was warned of, by this client or a copy."""
    _trains: bool
    """Whether a call in grad mode was made."""

    def __init__(
        self,
        client_half: nn.Module,
        server: Transport | str,
        client_id: str,
        *,
        loss_scale: LossScale = 1.0,
        personal: Iterable[str] = (),
        token: str | None = None,
        compression: Codecs | Mapping[str, str] | str | None = None,
        **options: Any,
    ) -> None:
        check_client_id(client_id)
        if not isinstance(client_half, nn.Module):
            raise InputError(
                f"client_half is a {type(client_half).__name__}: expected an nn.Module, "
                "the half of split()"
            )
        if isinstance(client_half, SplitClient):
            raise InputError(
                "client_half is a SplitClient already: pass the half that it wraps, "
                "client.client_half"
            )
        if not any(isinstance(module, CutPoint) for module in client_half.modules()):
            raise CutError(
                f"{type(client_half).__name__} has no CutPoint: take the first of split(model, "
                "at), or put CutPoint() where the body belongs"
            )
        super().__init__(client_half)
        transport = as_transport(server, client_id, token, options)
        if compression is not None:
            transport = Compression(transport, compression)
        # Past __setattr__: an attribute that is set on a client goes to its half.
        self.__dict__["_connection"] = Connection(transport, client_id, loss_scale)
        self._connection.sharing = Sharing.of(client_half, client_id)
        sync = self.__dict__["_sync"] = HalfSync(client_half, self._connection, personal)
        # In rounds many batches of one version wait, and their coordinator commits them.
        watch = Watch(
            client_half,
            client_id,
            lambda: sync.version is None and getattr(transport, "unattended", False),
        )
        self.__dict__["_passes"] = Passes(self._connection, watch)
        self.__dict__["_pinned"] = None
        self.__dict__["_original"] = None
        self.__dict__["_said"] = set()
        self.__dict__["_trains"] = False
        self.__class__ = class_like(type(self), client_half)

    @property
    def client_id(self) -> str:
        """Whose client this is."""
        return self._connection.client_id

    @property
    def version(self) -> int | None:
        """The version of the client half that was last pulled; `None` before."""
        return self._sync.version

    @property
    def round(self) -> RoundInfo | None:
        """The round under way by the last pull; `None` before, and where nobody runs rounds."""
        return self._sync.round

    @property
    def compression(self) -> Compression | None:
        """The compression of what crosses the cuts, and what it did; `None` if all is exact."""
        return compression_of(self._connection.transport)

    forward = ClientForward()
    _forward_of_the_class = staticmethod(forward_with(None))
    __prepare_scriptable__ = refuse_script

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Loss of `(*inputs, target)`, computed by the server in one trip; has a `.backward()`.

        The last positional argument is the target. The server needs a `loss_fn`, and the half must
        end at its cut.

        Raises:
            CutError: something comes after the cut.
            InputError: the server has no `loss_fn`.
        """
        if len(args) < 2:
            raise InputError(
                "client.loss() takes the inputs and then the target: "
                f"expected at least 2 arguments, got {len(args)}"
            )
        *inputs, target = args
        counts = self._passes.watch.trains(since_made=False)
        weight = weigh(tuple(inputs), kwargs)
        session = LossSession(
            self._connection,
            self._passes,
            weight,
            self._version_of_calls(),
            self.training,
            counts,
        )
        session.target = target
        self._refuse_replica()
        return session.finish(self.client_half, tuple(inputs), kwargs)

    def pipeline(
        self,
        loader: Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: Any = None,
        in_flight: int = 2,
        *,
        backward: Callable[[Tensor], None] | None = None,
        step: Callable[[BatchResult], None] | None = None,
        num_samples: Callable[[Any], float] | None = None,
    ) -> Pipeline:
        """Train on a loader's batches: `for batch in client.pipeline(loader, loss_fn, optimizer):`.

        With `in_flight=1` it is the plain loop. With 2 the forward of a batch is under way while
        the one before it is in its backward, so that a client which waits for its server waits for
        half as long. The half that a forward sees is then `in_flight - 1` steps older than in the
        plain loop. All bits are the plain loop's where no step comes in between: a half that is
        frozen, or steps once a round. More than 2 make the half older, and nothing faster.

        Between two results nothing is under way: the loop may evaluate, step a scheduler or stop.
        A loop that breaks off has made `in_flight - 1` forwards more, which are given up; bound it
        by the loader (`itertools.islice`) to end as the plain loop does.

        Args:
            loader: Gives batches: `(x, y)`, or `(x, ..., y)`, for which `client(x, ...)` is called
                and `loss_fn(outputs, y)`; or dicts, of which the client gets what the half's
                `forward` names, and `loss_fn` all.
            loss_fn: Returns the loss of `(outputs, target)`, a tensor with one element.
            optimizer: Zeroes gradients before each batch, and steps after it. `None`, the default,
                for a half that is frozen, or whose gradients are to add up.
            in_flight: The most batches between the begin of their forward and the end of their
                step.
            backward: Called in place of `loss.backward()`, in another thread, as
                `lambda loss: scaler.scale(loss).backward()` for a GradScaler.
            step: Called with each result in place of the optimizer, which then isn't given: to
                clip gradients, to step every few batches, to zero gradients.
            num_samples: What a batch counts, of each item of the loader; as in `batch`.

        Returns:
            An iterator of results, each with `number`, `batch`, `outputs` and `loss`.

        Raises:
            InputError: an argument isn't what it should be, or another pipeline is ahead.
            UnsupportedError: a checkpoint in the half, which can't run again on its old weights.
        """
        self._refuse_replica()
        training = Training(loss_fn, optimizer, backward, step, num_samples)
        return Pipeline(self, self._connection, self._passes, loader, training, in_flight)

    @contextmanager
    def at(self, version: int) -> Iterator[SplitClient]:
        """Run calls within at one version of the body, for evaluation."""
        before = self._pinned
        self.__dict__["_pinned"] = check_number("version", version)
        try:
            yield self
        finally:
            self.__dict__["_pinned"] = before

    @contextmanager
    def batch(
        self,
        num_samples: float | None = None,
        *,
        loss_scale: float | None = None,
        count: bool | None = None,
    ) -> Iterator[SplitClient]:
        """Make one batch of the passes within, or say what the calls within count.

        Without a weight and a scale, all backward passes that end within the block make one batch,
        whose gradient is their sum, as torch accumulates. It is sealed at the end of the block. If
        an exception ends the block, nothing of it counts.

        With them, they are set for the calls within: for tokens, nodes, or sequence-first tensors.

        Args:
            num_samples: Weight of the batch, in whatever unit all clients use; by default the
                leading dimension of the first tensor given to `client(...)`, or the length of a
                list of tensors, summed over the calls.
            loss_scale: Overrides the client's own.
            count: Whether the passes count, of the calls within and of those that end within.
                By default `loss.backward()` does, and `torch.autograd.grad`, `backward(inputs=...)`
                and passes over a frozen half don't. In eval mode none does.
        """
        passes = self._passes
        before = passes.scope
        plain = num_samples is None and loss_scale is None and count is not False
        summed = passes.open_sum() if plain else None
        passes.scope = Scope(num_samples, loss_scale, count, before)
        try:
            yield self
        except BaseException as error:
            passes.scope = before
            if summed is not None:
                passes.drop_sum(summed, error)
            raise
        passes.scope = before
        if summed is not None:
            passes.close_sum(summed)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load into the half.

        Raises:
            UnsupportedError: some of it belongs to the part that was cut out.
        """
        strict = kwargs.get("strict", args[0] if args else True)
        foreign = [name for name in names_of_parts(self.client_half) if name in state_dict]
        if foreign:
            said = (
                f"{foreign[0]!r} and {len(foreign) - 1} more of this state_dict belong to the part "
                "that was cut out, whose weights are in the store: load a whole model before "
                "split() and begin a new store with its body"
            )
            if strict:
                raise UnsupportedError(f"{said}; strict=False loads the others")
            self._say("foreign", said)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Freeze the half, or train it again: passes over a frozen one count nothing."""
        self.client_half.requires_grad_(requires_grad)
        self._passes.watch.is_frozen = not requires_grad
        return self

    def position(self) -> dict[str, Any]:
        """Where this client stands, for a checkpoint: plain JSON, of a few hundred bytes.

        Save it with the half's `state_dict`, the optimizer, torch's generator and the place in your
        data, between two steps of the optimizer. A process that is started in place of a killed one
        loads them and calls `resume`.

        Raises:
            InputError: a batch is under way: within a backward pass, or a `client.batch()` that
                sums.
        """
        self._passes.check_between()
        return self._sync.position().to_json()

    def resume(self, position: Mapping[str, Any]) -> None:
        """Go on where a process of this client was when it took its `position`.

        The loop repeats what came after, under the same numbers. A batch or push that the store has
        by then doesn't count again, and runs at its old version for as long as that is kept, so
        that the half gets its old bits; all others count as usual. The trap: a number is a place in
        the loop. Restore the generator and the place in the data too, or other data comes under
        the old numbers and counts nowhere.

        Nothing is sent, unless the half had pulled: what its next push is the change from is asked
        for.

        Args:
            position: What `position()` returned.

        Raises:
            InputError: it is another client's, or none, or this client was used already.
            ProtocolError: it is of another run; here, or at the first request that trains.
            SupersededError: at the first request that trains: a newer `SplitClient` of that id has
                trained since, by itself.
        """
        found = Position.from_json(position, self.client_id)
        if self._connection.is_used or self._sync.version is not None:
            raise InputError(
                f"client {self.client_id!r} has made calls already, under numbers of its own: "
                "resume() comes first, on a new SplitClient"
            )
        self._sync.resume(found)
        if self._sync.version is not None:
            self._passes.watch.note_pull()

    def pull(self) -> int:
        """Copy the newest client half into this one, in place; the user's optimizer isn't touched.

        The first pull of all publishes this half as version 0.

        Returns:
            The version.
        """
        self._passes.settle()
        version = self._sync.pull()
        self._passes.watch.note_pull()
        return version

    def push(self, num_samples: float | None = None, *, gradient: bool = False) -> None:
        """Publish what this half has learned since the last pull or push.

        Args:
            num_samples: Its weight, in examples; by default what the batches since then counted, or
                would have counted if all of them were rejected.
            gradient: Publish the parameters' `.grad` in place of the change, for the lineage's
                optimizer to step on (synchronous mode). Take no local step then, and zero the
                gradients for the next one.

        Raises:
            InputError: nothing was pulled, there are no samples, or no gradient or one of a half
                that has moved.
        """
        self._passes.settle()
        self._sync.push(num_samples, gradient=gradient)

    def rounds(
        self, poll: float = 1.0, *, num_samples: float | None = None, gradient: bool = False
    ) -> Iterator[RoundInfo]:
        """Take part in a federation: `for round in client.rounds(): <train as usual>`.

        Pulls before and pushes after each round in which this client is sampled; ends when the
        federation is finished.

        Args:
            poll: How often to ask whether it is this client's turn, in seconds.
            num_samples: As for `push`.
            gradient: As for `push`.
        """
        self._passes.watch.note_pull()
        return take_part(self._sync, poll, num_samples, gradient)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if inspect.ismethod(found) and found.__self__ is self.__dict__.get("client_half"):
            return CutMethod(self, found, found)
        return found

    def _version_of_calls(self) -> int | None:
        """The version of the body at which a call runs; `None` for the newest."""
        return self._sync.body_version if self._pinned is None else self._pinned

    def _notice_privacy(self) -> None:
        """Look, at the first call that trains, whether a tool takes per-sample gradients."""
        if not self._trains and torch.is_grad_enabled():
            self.__dict__["_trains"] = True
            if any(
                hasattr(parameter, "grad_sample") for parameter in self.client_half.parameters()
            ):
                self._say("private", _PRIVATE)

    def _refuse_replica(self) -> None:
        if "_is_replica" in self.__dict__:
            raise UnsupportedError(
                "nn.DataParallel can't replicate a SplitClient: call it directly; "
                "the server scales by replicas"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            raise no_whole_model(
                "torch.ao.quantization", "; to train quantization-aware, prepare before split()"
            )
        if name in _SET_BY:
            self._say(*_SET_BY[name])
        super().__setattr__(name, value)

    def _get_name(self) -> str:
        name: str = shown(self.client_half)._get_name()
        return name

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    def _say(self, subject: str, text: str) -> None:
        """Warn of something that this client, or a copy of it, hasn't warned of yet."""
        warn_once(self._said, subject, f"client {self.client_id!r}: {text}", 3)

    def _line(self) -> tuple[Connection, Passes]:
        """Whose calls these are: in eval mode a copy's are those of its original.

        An average that is evaluated, in whatever grad mode, is no newer process that would
        supersede the one that trains.
        """
        client = self
        while client._original is not None and not self.training:
            client = client._original
        return client._connection, client._passes

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitClient:
        self._say("copied", _COPIED)
        twin = object.__new__(type(self))
        # Before the half: its hooks may hold this client, as those of Opacus do.
        memo[id(self)] = twin
        connection = self._connection
        SplitClient.__init__(
            twin,
            copy.deepcopy(self.client_half, memo),
            connection.transport,
            connection.client_id,
            loss_scale=connection.loss_scale,
            personal=self._sync.patterns,
        )
        twin.__dict__["_original"] = self
        twin.__dict__["_said"] = self._said
        # Hooks on the client itself, and a forward that was replaced (as Accelerate does).
        on_itself = vars(nn.Module()).keys() - {"training", *SHARED}
        for name, value in self.__dict__.items():
            if name in on_itself or name not in twin.__dict__:
                twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def __copy__(self) -> SplitClient:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a SplitClient can't be pickled, as it is one process's line to its server: "
            "save client.state_dict(), or pickle client.client_half and make a SplitClient of it "
            "there"
        )
