"""The stamp of a cut: which part of which model the two sides were made for.

Layers of one shape are many, and a half that was made for another one would train on wrong outputs
without a word. So `split` marks both sides: `3:5/9f2c01ab` is the cut as it was asked for, for
people, and a hash of where the part was and of the shapes of its parameters. The half's cut points
send theirs, the body has one as a plain attribute, and a store keeps that of its first version.
A side without a stamp, made by hand or before there were any, is taken as it is.

The trap: a body needn't be the very same to belong to a half. Its dtype, what is frozen, its
buffers and layers without parameters (a dropout on one side only, which moves the names of the
others) may differ, so they aren't in the hash; and what is wrapped around it, such as an adapter,
has the stamp further in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch import nn

from splitfed.errors import ArchitectureError
from splitfed.model.skeleton import Template

_ATTRIBUTE = "_splitfed_part"
_MOST_SHOWN = 60


def make_stamp(at: str | Sequence[str], parts: Sequence[str], template: Template) -> str:
    """The stamp of a cut.

    Args:
        at: As it was asked for.
        parts: The qualified names of what is cut out.
        template: The body.
    """
    shapes = [list(tensor.shape) for tensor in template.parameters.values()]
    places = [part.replace("_orig_mod.", "") for part in parts]
    if not isinstance(at, str):  # in whichever order they were listed
        places, shapes = sorted(places), sorted(shapes)
    content = [places, shapes]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    asked = at if isinstance(at, str) else ",".join(at)
    shown = asked if len(asked) <= _MOST_SHOWN else f"{asked[:_MOST_SHOWN]}..."
    return f"{shown}/{digest[:8]}"


def put_stamp(body: nn.Module, stamp: str) -> None:
    """Mark a body."""
    # Past __setattr__, which may be the user's own.
    body.__dict__[_ATTRIBUTE] = stamp


def stamp_of(body: nn.Module) -> str | None:
    """The stamp of a body, or of the one body within it; `None` if there is no such one."""
    stamps: list[str | None] = [vars(module).get(_ATTRIBUTE) for module in body.modules()]
    if stamps[0] is not None:
        return stamps[0]
    found = {stamp for stamp in stamps if stamp is not None}
    return found.pop() if len(found) == 1 else None


def remove_stamps(module: nn.Module) -> None:
    """Take the marks away: what is whole again was cut nowhere."""
    for part in module.modules():
        part.__dict__.pop(_ATTRIBUTE, None)


def check_stamp(expected: str | None, got: str | None, who: str, whose: str) -> None:
    """Refuse a side of another cut.

    Args:
        expected: The stamp of whoever asks; `None` fits any.
        got: The stamp of the other side, likewise.
        who: What comes, for the message.
        whose: What it comes to.

    Raises:
        ArchitectureError: they aren't of one cut.
    """
    if expected is None or got is None or expected == got:
        return
    # As it was asked for, one cut has several names: '2:' and '2:5' may be the same.
    cut, _, digest = got.rpartition("/")
    expected_cut, _, expected_digest = expected.rpartition("/")
    if digest == expected_digest:
        return
    how = f"at {expected_cut!r}"
    if cut == expected_cut:
        how += " too, but of a model whose parameters there have other shapes, or other places"
    raise ArchitectureError(
        f"{who} was cut at {cut!r} and {whose} {how} ({got} and {expected}). "
        "Make both by the same split(model, at) of one model, or, if they do belong together, "
        "put CutPoint() into a client half by hand: that one isn't checked"
    )
