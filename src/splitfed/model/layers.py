"""A run of layers as one call: what each was called with, and where it takes what another returned.

A decoder calls its layers one by one, each with arguments of its own. Cut out as a run, they are
one request: a `LayerCall` for each, in the order of the calls. In place of a tensor that only the
server has, since an earlier layer of the run returns it, stands an `Output` that names it. A tensor
that several layers are given, such as a mask, is one object in all of them, and travels once.

The trap: the client went on with a stand-in for each output, so it had to know whether a layer
returns a tensor or a tuple. What it took for granted travels along, and a layer that returns
something else is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

_KINDS = 64
"""For so many kinds of arguments a layer remembers what it returns."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The place of a layer in its run."""

    run: str
    """The run's name in the model: `model.layers.4:28`."""
    name: str
    """Its own: `model.layers.5`."""
    index: int
    is_last: bool


class Structures:
    """What a layer returns, by the kind of its arguments; bounded."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, str | None] = OrderedDict()

    def get(self, key: Any, find: Callable[[], str | None]) -> str | None:
        """The spec for these arguments as JSON; `None` if it can't be known before a call."""
        if key not in self._known:
            self._known[key] = find()
            while len(self._known) > _KINDS:
                self._known.popitem(last=False)
        return self._known[key]


class Output(NamedTuple):
    """A tensor that an earlier layer of the run returns."""

    call: int
    """Which call of the run, from 0."""
    leaf: int
    """Which of the distinct tensors that it returns."""


class LayerCall(NamedTuple):
    """One call of a run: its arguments, flattened."""

    spec: str
    """Of (args, kwargs), as JSON."""
    leaves: list[Tensor | Output]
    """Their distinct tensors."""
    returns: str | None
    """The spec of what it returns, as JSON; `None` if the client has taken nothing for granted."""


class Kept(NamedTuple):
    """What a run returns if more than the outputs of its last layer is asked for."""

    outputs: Any
    """Those of the last layer."""
    kept: list[Tensor]


class Member(Protocol):
    """A layer of a run, by whatever stands in its place: a cut point, or itself in a reference."""

    @property
    def layer(self) -> Layer:
        """Its place."""
        ...

    @property
    def module(self) -> nn.Module:
        """What the model calls."""
        ...

    @property
    def structures(self) -> Structures:
        """What it is known to return."""
        ...

    @property
    def is_compiled(self) -> bool:
        """Whether it is called in a compiled model, which would take a promise for a tensor."""
        ...

    def settings(self) -> Any:
        """What was changed of it since it was cut."""
        ...

    def trial(self) -> tuple[nn.Module, Callable[..., Any]]:
        """A copy of it for trials, and what calls that."""
        ...

    def caller(self) -> Any:
        """Whose call is under way."""
        ...

    def send(self, members: Sequence[Any], args: Any, kwargs: Any, caller: Any) -> Any:
        """The answer to the calls of some layers as one.

        Args:
            members: Of them, the first of which is this one.
            args: A `LayerCall` for each; or the arguments, if it is called alone.
            kwargs: By keyword.
            caller: Who made the first of the calls.
        """
        ...
