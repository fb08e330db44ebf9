"""Slices of an `nn.Sequential`: their names, and what runs them as one call.

A model may call the positions of its Sequential itself, and keep what is between them: feature
pyramids and perceptual losses do. So each position that is cut out has a stand-in of its own, which
can be called by itself. That would be a call across the cut for each; where the Sequential's own
forward runs, one position after another, the whole slice is run as one. For that its forward is
exchanged, on the one instance: a loop over its positions, an index or a slice of it never comes by.

The trap: the half may be changed after the cut. A slice is one call only as long as its stand-ins
are in its positions, one after another; else each is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from splitfed.model.layers import LayerCall
from splitfed.model.parts import run_layers

Run = Callable[["Slice", Any, bool], Any]
"""Runs a slice on a value, in train mode or not."""


@dataclass(slots=True, eq=False)
class Slice:
    """Positions of one Sequential that are cut out."""

    positions: tuple[str, ...]
    members: tuple[nn.Module, ...]
    """What stands in them."""
    name: str
    """Which part of the body they are as one; a name for the wire."""

    def place_in(self, names: Sequence[str], modules: Sequence[nn.Module | None]) -> int:
        """Where it begins in a Sequential; -1 if it isn't there in one piece."""
        count = len(self.positions)
        start = names.index(self.positions[0]) if self.positions[0] in names else len(names)
        is_whole = tuple(names[start : start + count]) == self.positions
        found = zip(modules[start : start + count], self.members, strict=False)
        return start if is_whole and all(a is b for a, b in found) else -1


class SlicedForward:
    """The forward of a Sequential of which slices are cut out: in it each is one call.

    Args:
        owner: The Sequential.
        run: Runs a slice.
    """

    def __init__(self, owner: nn.Module, run: Run) -> None:
        self.owner = owner
        self.run = run
        self.slices: list[Slice] = []

    def __call__(self, input: Any) -> Any:
        """The output of the last position."""
        names = list(self.owner._modules)
        modules: list[Any] = list(self.owner._modules.values())
        starts = {piece.place_in(names, modules): piece for piece in self.slices}
        index = 0
        while index < len(modules):
            piece = starts.get(index)
            if piece is None:
                input = modules[index](input)
                index += 1
            else:
                input = self.run(piece, input, self.owner.training)
                index += len(piece.positions)
        return input


def run_as_one(owner: nn.Module, piece: Slice, run: Run) -> None:
    """Have `owner` run a slice of it as one call, unless its forward is the user's own."""
    forward = vars(owner).setdefault("forward", SlicedForward(owner, run))
    if isinstance(forward, SlicedForward):
        forward.slices.append(piece)


def restore_forward(module: nn.Module) -> None:
    """Give all Sequentials their own forward back."""
    for owner in module.modules():
        if isinstance(vars(owner).get("forward"), SlicedForward):
            del owner.__dict__["forward"]


def run_parts(
    parts: Sequence[Callable[..., Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run parts one after another, as a cut call asks for.

    Args:
        parts: The parts; each gets what the one before returned, unless this is a run of layers.
        args: The arguments of the first part; or a `LayerCall` for each.
        kwargs: By keyword; of a run, which outputs are `kept` besides the last layer's.

    Raises:
        SplitFedError: the calls of a run don't fit; see `run_layers`.
    """
    if any(isinstance(arg, LayerCall) for arg in args):
        return run_layers(parts, args, kwargs.get("kept", ()))
    value = parts[0](*args, **kwargs)
    for part in parts[1:]:
        value = part(value)
    return value


def watched(module: nn.Module) -> bool:
    """Whether calls of a module run hooks, which see what goes in and what comes out."""
    if nn.modules.module._has_any_global_hook():
        return True
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def join_names(names: Iterable[str]) -> str:
    """Names of parts as one, for the wire: the parts are run one after another."""
    return ",".join(name.replace("%", "%25").replace(",", "%2C") for name in names)


def split_names(joined: str) -> list[str]:
    """The names that `join_names` has joined."""
    names = joined.split(",")
    if "%" not in joined:
        return names
    return [name.replace("%2C", ",").replace("%25", "%") for name in names]
