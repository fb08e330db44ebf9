"""The cut point: the hole in a client half, and what the half may still ask of the part cut out.

A cut point knows no server. The binding lives in the call: whoever calls the half (a `SplitClient`)
is the active caller of that context, and the cut point passes its arguments to that caller. So one
half may serve many clients. Only a recompute, as `torch.utils.checkpoint` does one inside of a
backward pass, comes without a caller; for it the last few callers are remembered.

Models read settings of their parts: `layers[0].self_attn.batch_first` in nn.TransformerEncoder,
`layer.attention_type`, `projection.weight.dtype`. Those are structure, which the body's template
has, so the cut point answers them. Values and computation are the server's: asking for them raises
an error that names what was asked for.

The trap: the template's tensors are on the meta device, and torch computes garbage with some of
those instead of raising. So none is ever handed out: an `Absent` in its place has the dtype and
shape, and raises for all else.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from splitfed.errors import AbsentError, NotConnectedError, UnsupportedError
from splitfed.model.skeleton import Template
from splitfed.model.tracing import UNBROKEN, refuse_script, refuse_tracing

REMEMBERED_CALLERS = 32
"""So many `client(...)` calls may be recomputed at a time; for an older one nobody answers."""

_TENSOR_SETTINGS = frozenset(
    "dtype shape ndim layout requires_grad size dim numel is_floating_point is_complex".split()
)


class Caller(Protocol):
    """One `client(...)` call under way."""

    def call(self, point: CutPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the cut point."""
        ...

    def recompute(
        self,
        point: CutPoint,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        earlier: Sequence[Caller],
        alone: bool,
    ) -> Any:
        """Answer a call made again inside of a backward pass, for whichever caller made it first.

        `NotImplemented` if nobody did, and it isn't `alone` but has a caller of its own.
        """
        ...


active_caller: ContextVar[Caller | None] = ContextVar("splitfed_active_caller", default=None)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a cut point's body came from, so that `join` can put it back."""

    template: Template
    places: tuple[tuple[str, str], ...]
    """(position in the `nn.Sequential`, or '' for the cut point's own place; part of the body)."""
    training: bool
    """The mode that the cut was in; in that mode its parts keep modes of their own."""


class CutPoint(nn.Module):
    """Stands in the client half where the body was; calling it sends the call to the server.

    Args:
        name: Which part of the body belongs here: '' for the body itself, else the name of a
            submodule of it.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.origin: Origin | None = None
        self._callers: deque[Caller] = deque(maxlen=REMEMBERED_CALLERS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the body returns for this call.

        Raises:
            NotConnectedError: the half wasn't called through a `SplitClient`.
            UnsupportedError: called inside of a functorch transform.
        """
        # The mark below breaks the graph of torch.compile here. All beneath must not be traced
        # either, for which its module is asked where it is loaded: importing it takes seconds.
        dynamo = sys.modules.get("torch._dynamo")
        call = CutPoint._call if dynamo is None else dynamo.disable(CutPoint._call)
        return call(self, args, kwargs)

    forward._torchdynamo_disable = True  # type: ignore[attr-defined]
    forward._torchdynamo_disable_msg = UNBROKEN  # type: ignore[attr-defined]
    __prepare_scriptable__ = refuse_script

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            # By way of __dict__: an attribute access would come back here before __init__ has run.
            origin: Origin | None = self.__dict__.get("origin")
            if origin is None:
                raise AbsentError(
                    f"the client half asks its cut point for {name!r}, "
                    "and this one was placed by hand: set that attribute on it, as the body has it"
                ) from error
        part = origin.template.blueprint.get_submodule(origin.places[0][1])
        return _setting(part, name)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(
                "a cut point can't run inside of torch.func transforms (vmap, grad, jvp ...): "
                "its gradients cross a file. Use loss.backward() or torch.autograd.grad"
            )
        caller = active_caller.get()
        # Inside of a backward pass a call may be a checkpoint's recompute, with a caller around it
        # or without, and only the callers so far can tell it from a new call.
        if torch._C._current_graph_task_id() != -1 and self._callers:
            newest_first = list(reversed(self._callers))
            found = newest_first[0].recompute(self, args, kwargs, newest_first, caller is None)
            if found is not NotImplemented:
                return found
        if caller is not None:
            if caller not in self._callers:
                self._callers.append(caller)
            return caller.call(self, args, kwargs)
        refuse_tracing()
        raise NotConnectedError(
            "this client half was called by itself, so its cut point has no server: wrap it, "
            "client = SplitClient(client_half, server, client_id=...), and call client(...); "
            "under nn.DataParallel, or in a thread of the model's own, it can't be reached"
        )

    def extra_repr(self) -> str:
        """The name of the part, if it has one."""
        return repr(self.name) if self.name else ""

    def __getstate__(self) -> dict[str, Any]:
        """Without the callers: a copy has made no calls."""
        return {**self.__dict__, "_callers": deque(maxlen=REMEMBERED_CALLERS)}


class Absent:
    """Stands for a submodule or tensor on the other side of the cut: has its settings, no values.

    Args:
        part: The submodule or tensor as the template has it, or a container with some.
        place: Where it is in the part that was cut out, for messages.
    """

    __slots__ = ("_part", "_place")

    def __init__(self, part: Any, place: str) -> None:
        self._part = part
        self._place = place

    def __getattr__(self, name: str) -> Any:
        # Python looks such names up itself, and torch.compile traces an instance of its own, in
        # which the slots are still empty: answered by a setting, they would come here for ever.
        if name.startswith("_"):
            raise AttributeError(name)
        return _setting(self._part, name, self._place)

    def __getitem__(self, key: Any) -> Any:
        return _without_values(self._part[key], f"{self._place}[{key!r}]")

    def __len__(self) -> int:
        return len(self._part)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: it runs on the server, as a part of what was cut out."""
        raise _absent_error(self._place)

    def __repr__(self) -> str:
        return f"<{self._place}, {type(self._part).__name__} on the other side of the cut>"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse to be computed with."""
        places = [value._place for value in args if isinstance(value, Absent)]
        raise _absent_error(places[0] if places else "a tensor of it")


def _setting(part: Any, name: str, place: str = "") -> Any:
    """What a part that was cut out has under `name`.

    Raises:
        AbsentError: it has no such attribute, or one that only the server has.
    """
    place = f"{place}.{name}".lstrip(".")
    if isinstance(part, Tensor) and name not in _TENSOR_SETTINGS:
        raise _absent_error(place)
    try:
        value = getattr(part, name)
    except Exception as error:  # a property of the user's may raise anything
        raise AbsentError(f"the part that was cut out here has no {place!r}: {error}") from error
    if inspect.ismethod(value) and isinstance(value.__self__, nn.Module):
        raise _absent_error(place)
    return _without_values(value, place)


def _without_values(value: Any, place: str) -> Any:
    """A setting itself, but an `Absent` for what is a tensor or module, or holds one."""
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    if any(isinstance(held, Tensor | nn.Module) for held in (value, *inner)):
        return Absent(value, place)
    return value


def _absent_error(place: str) -> AbsentError:
    return AbsentError(
        f"the client half uses {place!r} of the part that was cut out: only its settings, dtypes "
        "and shapes are here, its values and methods are the server's. "
        "Cut at a module that has this use within, or beside this part"
    )
