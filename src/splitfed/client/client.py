"""The client: a module that disappears into the user's own training loop.

It stands in for a client half (`standin`); what is here besides is the way to the server. Where a call goes is decided
by the call, not by the half: one half may serve many clients.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from splitfed.client.backward import Passes, Scope, count_samples
from splitfed.client.calls import Session
from splitfed.client.connection import Connection, LossScale
from splitfed.client.half import HalfSync
from splitfed.client.loss import LossSession
from splitfed.client.methods import Forward, Within
from splitfed.client.participating import take_part
from splitfed.client.standin import StandIn
from splitfed.client.transports import as_transport
from splitfed.errors import CutError, InputError, UnsupportedError
from splitfed.model.cutpoint import CutPoint, active_caller
from splitfed.protocol.ids import check_client_id, check_number
from splitfed.protocol.messages import RoundInfo
from splitfed.protocol.transport import Transport


class SplitClient(StandIn):
    """Connects the cut points of a client half to a server.

    Args:
        client_half: The half that `split` returned, or a model with `CutPoint`s placed by hand. It isn't copied.
        server: A `SplitServer` in this process, the URL of a service ("https://host") or of the store that its workers
            share ("s3://bucket/run"), or anything with the methods of `Transport`.
        client_id: 1 to 64 of the characters A-Z a-z 0-9 _ . -, beginning with a letter or digit. One `SplitClient`
            at a time may train under an id: a newer one supersedes it.
        loss_scale: What the loss is multiplied by before `backward()`, as a number or a function:
            `scaler.get_scale`, `1 / k` under gradient accumulation, the batch size for a summed loss. Stored
            parameter gradients are divided by it.
        personal: Patterns (`fnmatch`) of parameters and buffers that never leave this client: what it neither pushes
            nor pulls, such as `("head.*",)`. Whoever averages the halves names the same.
        token: What the service at the URL asks for; the environment variable SPLITFED_TOKEN if not given.
        options: Of the way to that URL, such as `timeout` in seconds (`transports`).

    Raises:
        IdError: the id may not become a key.
        CutError: the half has no cut point.
        InputError: `server` is neither a transport nor a URL, or a personal pattern fits nothing.
    """

    _connection: Connection
    _passes: Passes
    _sync: HalfSync
    _scope: Scope | None
    _pinned: int | None

    def __init__(
        self,
        client_half: nn.Module,
        server: Transport | str,
        client_id: str,
        *,
        loss_scale: LossScale = 1.0,
        personal: Iterable[str] = (),
        token: str | None = None,
        **options: Any,
    ) -> None:
        check_client_id(client_id)
        if not isinstance(client_half, nn.Module):
            raise InputError(
                f"client_half is a {type(client_half).__name__}: expected an nn.Module, the half of split()"
            )
        if isinstance(client_half, SplitClient):
            raise InputError("client_half is a SplitClient already: pass the half that it wraps, client.client_half")
        if not any(isinstance(module, CutPoint) for module in client_half.modules()):
            raise CutError(
                f"{type(client_half).__name__} has no CutPoint: take the first of split(model, at), or put "
                "CutPoint() where the "
                "body belongs"
            )
        super().__init__(client_half)
        self.__dict__["_connection"] = Connection(
            as_transport(server, client_id, token, options), client_id, loss_scale
        )
        self.__dict__["_passes"] = Passes(self._connection)
        self.__dict__["_sync"] = HalfSync(client_half, self._connection, personal)
        self.__dict__["_scope"] = None
        self.__dict__["_pinned"] = None

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
        """The round under way, as the last pull had it; `None` before, and where nobody runs rounds."""
        return self._sync.round

    forward = Forward()

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Loss of `(*inputs, target)`, computed by the server in one trip; call `.backward()` on it.

        The last positional argument is the target. The server needs a `loss_fn`, and the half must end at its cut.

        Raises:
            CutError: something comes after the cut.
            InputError: the server has no `loss_fn`.
        """
        if len(args) < 2:
            raise InputError(
                f"client.loss() takes the inputs and then the target: expected at least 2 arguments, got {len(args)}"
            )
        *inputs, target = args
        session = LossSession(self._connection, self._passes, count_samples(inputs, kwargs), self._scope, self._pinned)
        session.target = target
        return session.finish(lambda: self._run(session, self.client_half, tuple(inputs), kwargs))

    @contextmanager
    def at(self, version: int) -> Iterator[SplitClient]:
        """Run calls within at one version of the body, for evaluation."""
        before, self.__dict__["_pinned"] = self._pinned, check_number("version", version)
        try:
            yield self
        finally:
            self.__dict__["_pinned"] = before

    @contextmanager
    def batch(self, num_samples: float | None = None, *, loss_scale: float | None = None) -> Iterator[SplitClient]:
        """Say what the calls within count: for tokens, nodes, or tensors whose first dimension isn't the batch.

        Args:
            num_samples: Weight of the batch, in whatever unit all clients use; by default the leading dimension of
                the first tensor given to `client(...)`, summed over the calls.
            loss_scale: Overrides the client's own.
        """
        before, self.__dict__["_scope"] = self._scope, Scope(num_samples, loss_scale)
        try:
            yield self
        finally:
            self.__dict__["_scope"] = before

    def pull(self) -> int:
        """Copy the newest client half into this one, in place; the user's optimizer isn't touched.

        The first pull of all publishes this half as version 0.

        Returns:
            The version.
        """
        return self._sync.pull()

    def push(self, num_samples: float | None = None, *, gradient: bool = False) -> None:
        """Publish what this half has learned since the last pull or push.

        Args:
            num_samples: Its weight, in examples; by default what the batches since then counted, or would have
                counted if all of them were rejected.
            gradient: Publish the parameters' `.grad` in place of the change, for the lineage's optimizer to step on
                (synchronous mode). Take no local step then, and zero the gradients for the next one.

        Raises:
            InputError: nothing was pulled, there are no samples, or no gradient or one of a half that has moved.
        """
        self._sync.push(num_samples, gradient=gradient)

    def rounds(
        self, poll: float = 1.0, *, num_samples: float | None = None, gradient: bool = False
    ) -> Iterator[RoundInfo]:
        """Take part in a federation: `for round in client.rounds(): <train as usual>`.

        Pulls before and pushes after each round in which this client is sampled; ends when the federation is finished.

        Args:
            poll: How often to ask whether it is this client's turn, in seconds.
            num_samples: As for `push`.
            gradient: As for `push`.
        """
        return take_part(self._sync, poll, num_samples, gradient)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if inspect.ismethod(found) and found.__self__ is self.__dict__.get("client_half"):
            return Within(self, found, found)
        return found

    def _run(self, session: Session, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "_is_replica" in self.__dict__:
            raise UnsupportedError(
                "nn.DataParallel can't replicate a SplitClient: call it directly; the server scales by replicas"
            )
        token = active_caller.set(session)
        try:
            return run(*args, **kwargs)
        finally:
            active_caller.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitClient:
        connection = self._connection
        half = copy.deepcopy(self.client_half, memo)
        settings: dict[str, Any] = {"loss_scale": connection.loss_scale, "personal": self._sync.patterns}
        return SplitClient(half, connection.transport, connection.client_id, **settings)

    def __copy__(self) -> SplitClient:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a SplitClient can't be pickled, as it is one process's line to its server: save client.state_dict(), or "
            "pickle client.client_half and make a SplitClient of it there"
        )
