"""What a stand-in knows of the module that it stands for, and what of it has changed since.

Plain values are noticed as they are assigned. A list, a dict or an object such as a config can
change without that, so it is compared before each call with a copy of what it had. An object that
the half holds too is the same object in both, as in the unsplit model: whoever changes it, changes
it for the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import AbsentError
from splitfed.model.absent import Absent
from splitfed.model.skeleton import Template

MISSING = object()
_ATOMS = (type(None), bool, int, float, str)


class Ledger:
    """What the stand-ins of one half share."""

    __slots__ = ("moves", "recorded", "template", "visited")

    def __init__(self, template: Template) -> None:
        self.template = template
        self.moves = 0
        """Counts what is set on any of them: what was found holds for as long as it stays."""
        self.visited: nn.Module | None = None
        """The one at which a loop over the half's modules is."""
        self.recorded: dict[str, str] = {}
        """Flags that ask for what a module within a part gives, with the name of that."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        twin = Ledger(self.template)
        twin.recorded = dict(self.recorded)
        return twin


@dataclass(slots=True, eq=False)
class Holding:
    """Something that changes without being assigned: a list, a dict, a config."""

    name: str
    """The attributes that lead to it."""
    value: Any
    before: Any
    """A copy of what it has."""

    def has_changed(self) -> bool:
        """Whether it isn't as it was."""
        value = self.value
        now = value if isinstance(value, list | dict | set) else vars(value)
        try:
            return bool(now != self.before)
        except Exception:  # noqa: BLE001 -- whatever an array or another class makes of `!=`
            return True

    def changes(self) -> Iterator[tuple[str, Any]]:
        """What has changed, by the attributes that lead to it."""
        if isinstance(self.value, list | dict | set):
            yield self.name, self.value
            return
        now = vars(self.value)
        for leaf in {**self.before, **now}:
            value = now.get(leaf, MISSING)
            if value is not self.before.get(leaf, MISSING):
                yield f"{self.name}.{leaf}", value


@dataclass(slots=True, eq=False)
class Place:
    """Where the module of a stand-in is, and what that has."""

    name: str
    """Its name in the body."""
    path: str
    """Its name in the part that was cut out, for messages; '' for the part itself."""
    index: int
    """Its number among the body's modules."""
    ledger: Ledger
    is_half: bool = False
    """Whether all of the model was cut out: then the cut point is the half, too."""
    parameters: dict[str, Absent | None] = field(default_factory=dict)
    buffers: dict[str, Absent | None] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtypes: dict[torch.dtype, torch.dtype] = field(default_factory=dict)
    """Those that `to()` has given to tensors of a dtype."""
    originals: dict[str, Any] = field(default_factory=dict)
    """By name, what an attribute was before it was set."""
    held: list[Holding] = field(default_factory=list)
    local: set[str] = field(default_factory=set)
    """Attributes that are a tool's own."""
    written: set[str] = field(default_factory=set)
    """Attributes that the part's forward sets."""

    def at(self, name: str) -> str:
        """The name of an attribute, for messages."""
        return f"{self.path}.{name}".lstrip(".")

    def key(self, name: str) -> str:
        """The name of an attribute, for the server."""
        return f"{self.name}.{name}".lstrip(".")

    def hold(self, name: str, value: Any) -> None:
        """Watch what an attribute has now, if that can change without being assigned."""
        self.held = [held for held in self.held if held.name.partition(".")[0] != name]
        self.held += _holdings(name, value)

    def move(self, fn: Any) -> None:
        """Follow the half to another device or dtype."""
        dtypes = {absent.like.dtype for absent in self._tensors()}
        for dtype in dtypes or {torch.get_default_dtype()}:
            now = self.dtypes.get(dtype, dtype)
            moved = fn(torch.empty(0, dtype=now, device=self.device))
            if dtypes:
                self.dtypes[dtype] = moved.dtype
            # Nothing is ever on the meta device: what has no values there has none anywhere.
            if moved.device.type != "meta":
                self.device = moved.device

    def _tensors(self) -> list[Absent]:
        found = [*self.parameters.values(), *self.buffers.values()]
        return [absent for absent in found if absent is not None]


def is_plain(value: Any) -> bool:
    """Whether a value can travel with a call."""
    if type(value) is dict:
        return all(type(key) is str for key in value) and is_plain(list(value.values()))
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    return type(value) in _ATOMS


def set_error(name: str, value: Any) -> AbsentError:
    """The error for an assignment that can't travel."""
    return AbsentError(
        f"the client half sets {name!r} of the part that was cut out to a {type(value).__name__}: "
        "a call carries only attributes that the part has, as plain values (None, bool, int, "
        "float, str, and tuples, lists and dicts of them). "
        "Make this change before split(), or in the server's body"
    )


def _holdings(name: str, value: Any, depth: int = 2) -> Iterator[Holding]:
    """A value, and what it holds, as far as it can be changed."""
    if isinstance(value, list | dict | set):
        yield Holding(name, value, value.copy())
    elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor):
        before = dict(vars(value))
        yield Holding(name, value, before)
        for leaf, held in before.items() if depth else ():
            yield from _holdings(f"{name}.{leaf}", held, depth - 1)
