"""The cut point: the hole in a client half, where the part was that is the server's now.

A cut point knows no server. The binding lives in the call: whoever calls the half (a `SplitClient`)
is the active caller of that context, and the cut point passes its arguments to that caller. So one
half may serve many clients. Only a recompute, as `torch.utils.checkpoint` does one inside of a
backward pass, comes without a caller; for it the last few callers are remembered.

It is a stand-in for its part, of whose class it is too (`standin`), and holds the part's skeleton
(`mirror`). So the half may ask of it what it may ask of the unsplit model. One that was placed by
hand knows no part, and is a plain module.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from splitfed.errors import AbsentError, NotConnectedError, UnsupportedError
from splitfed.model.copying import deep_copy
from splitfed.model.layers import Layer, Structures
from splitfed.model.runs import call_layer
from splitfed.model.skeleton import Template
from splitfed.model.slices import Slice, join_names, split_names, watched
from splitfed.model.standin.assigning import class_of
from splitfed.model.standin.mirror import Mirror
from splitfed.model.standin.modules import AbsentModule
from splitfed.model.tracing import UNBROKEN, refuse_script, refuse_tracing

REMEMBERED_CALLERS = 32
"""So many `client(...)` calls may be recomputed at a time; for an older one nobody answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Called:
    """Whose call it is: that of a cut point, or of several as one."""

    points: tuple[CutPoint, ...]
    """Those whose parts are run, one after another."""
    name: str
    """What they are of the body; a name for the wire."""
    training: bool

    @property
    def part(self) -> str | None:
        """The stamp of their cut; `None` if they were placed by hand."""
        return hole_of(self.points[0]).part

    def mode_in(self, training: bool) -> bool:
        """The mode to run in, within a client of this mode.

        It is the client's, which decides what counts; a part that is in the other one, as a frozen
        backbone may be, says so in its settings. One that was placed by hand can't.
        """
        return training if hole_of(self.points[0]).mirror is not None else self.training

    def settings(self, training: bool) -> Mapping[str, Any]:
        """What the half has changed of their parts.

        Args:
            training: The mode that the server sets the body to.

        Raises:
            AbsentError: what is changed can't travel with a call.
        """
        found: Mapping[str, Any] = {}
        for point in self.points:
            mirror = hole_of(point).mirror
            changed = {} if mirror is None else mirror.settings(training)
            found = {**found, **changed} if found and changed else changed or found
        return found

    def note(self, written: Sequence[str]) -> None:
        """Take note of the attributes that the parts' forward sets."""
        for point in self.points if written else ():
            mirror = hole_of(point).mirror
            if mirror is not None:
                mirror.note_written(written)


class Caller(Protocol):
    """One `client(...)` call under way."""

    def call(self, point: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the cut point."""
        ...

    def recompute(
        self,
        point: Called,
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
    name: str
    """The part's name in the body."""
    training: bool
    """The mode that the cut was in; in that mode its parts keep modes of their own."""

    @property
    def part(self) -> nn.Module:
        """The part, without its weights."""
        return self.template.blueprint.get_submodule(self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


@dataclass(slots=True, eq=False)
class Hole:
    """What a cut point keeps of its own."""

    name: str
    part: str | None = None
    """The stamp of its cut, which travels with each call; `None` if it was placed by hand."""
    origin: Origin | None = None
    mirror: Mirror | None = None
    layer: Layer | None = None
    """Its place in a run of layers, if it is of one."""
    callers: deque[Caller] = field(default_factory=lambda: deque(maxlen=REMEMBERED_CALLERS))
    structures: Structures = field(default_factory=Structures)

    def __getstate__(self) -> list[Any]:
        """Without the callers: a copy has made no calls."""
        return [self.name, self.part, self.origin, self.mirror, self.layer]

    def __setstate__(self, state: list[Any]) -> None:
        # A half that was pickled before there were runs has four.
        self.name, self.part, self.origin, self.mirror, *rest = state
        self.layer = rest[0] if rest else None
        self.callers = deque(maxlen=REMEMBERED_CALLERS)
        self.structures = Structures()


class CutPoint(AbsentModule):
    """Stands in the client half where the body was; calling it sends the call to the server.

    Args:
        name: Which part of the body belongs here: '' for the body itself, else the name of a
            submodule of it.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        # Under a name that no part has, and past the assignments of a part.
        vars(self)["_absent_hole"] = Hole(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the body returns for this call.

        Raises:
            NotConnectedError: the half wasn't called through a `SplitClient`.
            UnsupportedError: called inside of a functorch transform.
        """
        layer = hole_of(self).layer
        if layer is not None:
            return call_layer_for(self, layer, args, kwargs)
        return call_for(Called((self,), hole_of(self).name, self.training), args, kwargs)

    forward._torchdynamo_disable = True  # type: ignore[attr-defined]
    forward._torchdynamo_disable_msg = UNBROKEN  # type: ignore[attr-defined]
    __prepare_scriptable__ = refuse_script

    # As torch has them, whatever the part's class makes of being called: that is for the server.
    __call__ = nn.Module.__call__
    _wrapped_call_impl = nn.Module._wrapped_call_impl
    _call_impl = nn.Module._call_impl

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AbsentError:
            raise
        except AttributeError as error:
            if name.startswith("_") or "_absent_place" in vars(self):
                raise AttributeError(f"'CutPoint' object has no attribute {name!r}") from error
            raise AbsentError(
                f"the client half asks its cut point for {name!r}, "
                "and this one was placed by hand: set that attribute on it, as the body has it"
            ) from error

    def __repr__(self) -> str:
        name = hole_of(self).name
        kind = class_of(self)
        what = [] if kind is nn.Module else [kind.__name__]
        return f"CutPoint({', '.join([repr(name)] * bool(name) + what)})"


def hole_of(point: CutPoint) -> Hole:
    """What a cut point keeps of its own."""
    hole: Hole = vars(point)["_absent_hole"]
    return hole


def names_of_parts(half: nn.Module) -> list[str]:
    """The names that tensors of the parts cut out would have in the half's `state_dict()`."""
    found = []
    for prefix, module in half.named_modules():
        origin = hole_of(module).origin if isinstance(module, CutPoint) else None
        if origin is not None:
            found += [f"{prefix}.{name}".lstrip(".") for name in origin.part.state_dict()]
    return found


_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Functions as torch.compile leaves them alone: to wrap one takes as long as to read a file."""


def call_for(called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the body returns for a call of a cut point, or of several."""
    # The mark below breaks the graph of torch.compile here. All beneath must not be traced
    # either, for which its module is asked where it is loaded: importing it takes seconds.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return _call(called, args, kwargs)
    call = _untraced.get(_call)
    if call is None:
        call = _untraced[_call] = dynamo.disable(_call)
    return call(called, args, kwargs)


call_for._torchdynamo_disable = True  # type: ignore[attr-defined]
call_for._torchdynamo_disable_msg = UNBROKEN  # type: ignore[attr-defined]


def call_layer_for(
    point: CutPoint, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a layer of a run returns for a call of its cut point, or promises of it."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return call_layer(_Member(point, layer), args, kwargs)
    # True as the compiler reads it here, where it is about to break its graph.
    is_compiled = torch.compiler.is_dynamo_compiling()
    return dynamo.disable(call_layer)(_Member(point, layer, is_compiled), args, kwargs)


call_layer_for._torchdynamo_disable = True  # type: ignore[attr-defined]
call_layer_for._torchdynamo_disable_msg = UNBROKEN  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A layer of a run, by its cut point."""

    module: CutPoint
    layer: Layer
    is_compiled: bool = False

    @property
    def structures(self) -> Structures:
        """What it is known to return."""
        return hole_of(self.module).structures

    def settings(self) -> Mapping[str, Any]:
        """What the half has changed of it."""
        return Called((self.module,), "", self.module.training).settings(self.module.training)

    def trial(self) -> tuple[nn.Module, Any]:
        """A copy of its skeleton, and what calls that."""
        hole: Any = hole_of(self.module)  # split() has made it, so all is there
        part = deep_copy(hole.origin.part)
        hole.mirror.restore(part)
        return part, type(part).__call__

    def caller(self) -> Caller | None:
        """Whose call is under way."""
        return active_caller.get()

    def send(self, members: Sequence[_Member], args: Any, kwargs: Any, caller: Any) -> Any:
        """The answer of the server to the calls of some layers."""
        points = tuple(member.module for member in members)
        name = join_names([split_names(hole_of(point).name)[0] for point in points])
        token = None if caller is None else active_caller.set(caller)
        try:
            return call_for(Called(points, name, self.module.training), args, kwargs)
        finally:
            if token is not None:
                active_caller.reset(token)


def call_as_one(piece: Slice, value: Any, training: bool) -> Any:
    """Call the cut points of a slice as one; with hooks on them, which see each, one by one."""
    points: tuple[Any, ...] = piece.members
    if any(map(watched, points)):
        for point in points:
            value = point(value)
        return value
    return call_for(Called(points, piece.name, training), (value,), {})


def _call(called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand a call over to whoever has called the half."""
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            "a cut point can't run inside of torch.func transforms (vmap, grad, jvp ...): "
            "its gradients cross a file. Use loss.backward() or torch.autograd.grad"
        )
    caller = active_caller.get()
    callers = hole_of(called.points[0]).callers
    # Inside of a backward pass a call may be a checkpoint's recompute, with a caller around it
    # or without, and only the callers so far can tell it from a new call.
    if torch._C._current_graph_task_id() != -1 and callers:
        newest_first = list(reversed(callers))
        found = newest_first[0].recompute(called, args, kwargs, newest_first, caller is None)
        if found is not NotImplemented:
            return found
    if caller is not None:
        if caller not in callers:
            callers.append(caller)
        return caller.call(called, args, kwargs)
    refuse_tracing()
    raise NotConnectedError(
        "this client half was called by itself, so its cut point has no server: wrap it, "
        "client = SplitClient(client_half, server, client_id=...), and call client(...), or a "
        "method of the model through it, not a module of it by itself; "
        "under nn.DataParallel, or in a thread of the model's own, it can't be reached"
    )
