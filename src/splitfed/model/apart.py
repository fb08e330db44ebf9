"""Whether the two sides of a cut are apart: whatever one reaches must be its own.

Whatever a module's code can get at, it can compute with. What a list or an object holds was copied
with the model, so it belongs to one of the sides; if to the other, each would train a copy of its
own. What a function holds (in its closure, its defaults, a global name) wasn't copied, as a copy of
a function is the function itself: it belongs to the model that was given to `split`, and would be
computed with, or trained, beside the one that counts.

The trap: a tensor or module under two names is no second one, and what both the model and its copy
have, since its class says so, is nobody's.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

from torch import nn

from splitfed.errors import SharedParameterError, UnsupportedError
from splitfed.model.cutpoint import CutPoint
from splitfed.model.reach import keeps_in, reached
from splitfed.model.slices import SlicedForward

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Originals:
    """The modules and tensors of the model that was given, which no side may reach.

    Args:
        model: It.
        copy: The copy of which the two sides are made: what both have in common may stay.
        parts: The qualified names of what is cut out.
    """

    def __init__(self, model: nn.Module, copy: nn.Module, parts: Sequence[str]) -> None:
        common = _members(copy)
        self.names = {key: name for key, name in _members(model).items() if key not in common}
        self._parts = parts

    def is_across(self, key: int, *, of_body: bool) -> bool:
        """Whether an object, by its id, or a part of it, belongs to the other side."""
        name = f"{self.names[key]}."
        if any(name.startswith(f"{part}.") or not part for part in self._parts):
            return not of_body
        return of_body or any(f"{part}.".startswith(name) or name == "." for part in self._parts)

    def told(self, place: str, side_name: str, key: int) -> str:
        """What a message says of an object that a side reaches."""
        what = repr(self.names[key]) if self.names[key] else "the whole"
        return (
            f"{place!r} of {side_name} leads to {what} of the model given to split(): "
            "functions, and what else a copy shares with its original, still have that one's parts"
        )


def check_apart(half: nn.Module, body: nn.Module, originals: Originals) -> None:
    """Refuse tensors and modules that both sides reach, and those of the model itself.

    Raises:
        SharedParameterError: something lies on the other side.
        UnsupportedError: a function holds something of the original.
    """
    _check_side(half, "the client half", body, originals, of_body=False)
    _check_side(body, "the body", half, originals, of_body=True)
    _warn_of_keepers(body)


def _check_side(
    side: nn.Module, side_name: str, other: nn.Module, originals: Originals, *, of_body: bool
) -> None:
    held = _members(other)
    outside: tuple[str, int] | None = None
    for place, value in reached(side, without=(CutPoint, SlicedForward)):
        key = id(value)
        if key in held:
            raise SharedParameterError(
                f"{held[key] or 'it all'!r} of the other side of the cut is also reached from "
                f"{side_name} as {place!r}: "
                "move the cut so that both uses are on one side, or untie them"
            )
        if key in originals.names and originals.is_across(key, of_body=of_body):
            raise SharedParameterError(
                f"{originals.told(place, side_name, key)}. What of it lies on the other side of "
                "the cut would never train nor change with the halves: do it in the forward of a "
                "module on one side, or move the cut"
            )
        if key in originals.names and outside is None:
            outside = place, key
    # At last: what leads across the cut says more.
    if outside is not None:
        place, key = outside
        raise UnsupportedError(
            f"{originals.told(place, side_name, key)}. Use the module that a hook is given as an "
            "argument, make the function a method, or register it on the halves after split()"
        )


def _warn_of_keepers(body: nn.Module) -> None:
    """Warn of hooks in the body that keep what they see outside of the model.

    On the server that is seen by nobody, and a tensor that is used from there has no way back.
    """
    for place, module in body.named_modules():
        for table in _HOOKS:
            for hook in vars(module).get(table, {}).values():
                kept = keeps_in(hook)
                if kept is not None:
                    warnings.warn(
                        f"a hook on {place or 'the part'!r}, which is cut out, keeps what it sees "
                        f"in {kept!r}, outside of the model: it runs on the server, so that is "
                        "there, and no gradient comes back from it. Return it from the forward, "
                        "or register the hook on the client half after split()",
                        stacklevel=4,
                    )


def _members(module: nn.Module) -> dict[int, str]:
    """The names of a module's tensors and submodules, by id; those of cut points are none."""
    found: dict[int, str] = {}
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    modules = (pair for pair in module.named_modules() if not isinstance(pair[1], CutPoint))
    for name, member in itertools.chain(tensors, modules):
        found[id(member)] = name
    return found
