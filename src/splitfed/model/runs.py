"""Calls of the layers of a run: which are put off, which continue which, and which are refused.

A call is put off if it is known what it will return, and if somebody takes a promise for what it
is; then it continues the calls whose promises it is given.

The trap: a checkpoint makes calls again inside of the backward pass, and gives them the promises
that it was given in the forward.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import CutError
from splitfed.model.layers import Member, Output
from splitfed.model.promise import Calls, Mode, Noted, Promise, settled, versions_of
from splitfed.model.recompute import checkpoint_frames, in_backward
from splitfed.model.slices import watched
from splitfed.model.trial import try_call
from splitfed.protocol import pytree


def call_layer(member: Member, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer the call of a layer of a run: with promises, or with what all calls so far return.

    Raises:
        CutError: it isn't given what an earlier layer of the run has returned.
    """
    found: Any = pytree.flatten((args, kwargs))
    spec, given = found
    calls = _continued(member, given)
    if calls is not None and calls.is_sent:
        places = [leaf.place for leaf in given if _is_of(leaf, calls)]
        found = calls.again(member.layer, max(places))
        if found is not NotImplemented:
            return found
    _check_order(member, given)
    is_alone = _is_at_once(member)
    if is_alone or (calls is None and member.layer.is_last):
        return _call_alone(member, spec, given)
    if calls is None:
        calls = Calls(member.caller(), given)
    leaves = [leaf.place if _is_of(leaf, calls) else settled(leaf) for leaf in given]
    returns = None
    if not member.layer.is_last:
        returns = _structure(member, spec, leaves, calls)
        if returns is None and not calls.noted:
            return _call_alone(member, spec, leaves)
    versions = versions_of(leaves)
    outputs = calls.note(Noted(member, spec, leaves, versions, member.settings(), returns))
    _remember(member, calls)
    return calls.finish() if returns is None else outputs


def _call_alone(member: Member, spec: Any, given: Sequence[Tensor]) -> Any:
    """Answer a call by itself."""
    _remember(member, None)
    args, kwargs = pytree.unflatten(spec, list(map(settled, given)))
    return member.send([member], args, kwargs, member.caller())


def _is_of(leaf: Any, calls: Calls) -> bool:
    """Whether a leaf is a promise of these calls whose tensor isn't here yet."""
    return type(leaf) is Promise and leaf.calls is calls and not calls.knows(leaf.place)


def _continued(member: Member, given: Sequence[Tensor]) -> Calls | None:
    """The calls that a call of a layer continues, by the promises that it is given."""
    found = {
        id(leaf.calls): leaf.calls
        for leaf in given
        if type(leaf) is Promise and not leaf.calls.knows(leaf.place)
    }
    if len(found) != 1:
        return None
    (calls,) = found.values()
    if calls.noted[0].member.layer.run != member.layer.run:
        return None
    if in_backward():
        return calls
    is_fit = calls.mode.fits(Mode.now(given)) and calls.caller is member.caller()
    return calls if is_fit and not calls.is_sent else None


def _is_at_once(member: Member) -> bool:
    """Whether a call is to be answered at once.

    Hooks see what goes in and what comes out; a compiled model, and autograd behind a reentrant
    checkpoint, would take a promise for a tensor. Such a checkpoint runs without grad, and again in
    a backward of its own.
    """
    if member.is_compiled or watched(member.module):
        return True
    frames = checkpoint_frames()
    return bool(frames) and (not torch.is_grad_enabled() or "backward" in frames)


def _check_order(member: Member, given: Sequence[Tensor]) -> None:
    """Refuse a layer that isn't given what an earlier one of its run has returned."""
    passed = getattr(member.caller(), "passed", {}).get(member.layer.run)
    if passed is None:
        return
    before, came = passed
    if before.index >= member.layer.index:  # the model begins anew
        return
    known = {id(reference()) for reference in came}
    for leaf in given:
        if type(leaf) is Promise and leaf.calls.noted[0].member.layer.run == member.layer.run:
            return
        if id(leaf) in known:
            return
    raise CutError(
        f"{member.layer.name!r} isn't given what {before.name!r} returned: {member.layer.run!r} is "
        "one cut if each of its layers takes the outputs of those before as they are. This model "
        "computes something between them, or gives them other inputs: cut them one by one or in "
        f"shorter runs, by a list of cuts, [{before.name!r}, {member.layer.name!r}, ...], or cut "
        "the module that holds them"
    )


def _remember(member: Member, calls: Calls | None) -> None:
    """Note who was called last of a run, and which tensors its outputs become.

    Args:
        member: It.
        calls: Among which its call was put off; `None` if it was answered.
    """
    passed = getattr(member.caller(), "passed", None)
    if passed is not None:
        passed[member.layer.run] = None if calls is None else (member.layer, calls.came)


def _structure(
    member: Member, spec: Any, leaves: Sequence[Tensor | Output], calls: Calls
) -> str | None:
    """The spec of what a layer returns, as JSON; `None` if that can't be known."""
    kinds = tuple(
        (leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else leaf.leaf for leaf in leaves
    )
    key = (json.dumps(spec), kinds, repr(member.settings()), member.module.training)

    def find() -> str | None:
        try:
            outputs = try_call(member, spec, calls.with_trials(leaves))
        except Exception as error:  # noqa: BLE001 -- whatever the user's code makes of such tensors
            warnings.warn(
                f"the layers of the run {member.layer.run!r} can't be run without their weights "
                f"({type(error).__name__}: {error!s:.120}), so it isn't known what they return: "
                "each is a request of its own",
                stacklevel=2,
            )
            return None
        return json.dumps(pytree.flatten(outputs)[0])

    return member.structures.get(key, find)
