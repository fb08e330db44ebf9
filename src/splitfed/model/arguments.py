"""What a cut call is given, and what it does with it: checked where an error can still name it.

A tensor that no file has a place for (sparse, quantized, a DTensor) is refused by its place among
the arguments, before anything is sent. One of a subclass without values of its own, as image
libraries have them, enters the body as a plain tensor, wherever the body runs.

The trap is a list, a dict or a registered container that the body *changes*. The unsplit model's
caller would see that; here the body has one of its own, and the caller's stays as it was. So what
the body has added to an argument has to be in what it returns, or the call is refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import ContainerError, InputError, SplitFedError, UnsupportedError
from splitfed.model.numerics import same_bits
from splitfed.model.promise import Promise, settled
from splitfed.model.tracing import no_whole_model
from splitfed.protocol import kinds, pytree

_PLAIN = frozenset((Tensor, nn.Parameter))
_LEAVES = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))
# What torch says of operands whose dtypes differ, in the words of its several operations.
_DTYPES_DIFFER = re.compile(r"dtype|scalar type|input type", re.IGNORECASE)


def carried(
    args: tuple[Any, ...], kwargs: dict[str, Any], note: Callable[[str, str], None]
) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """The arguments of a cut call as they cross, and their distinct tensors.

    Args:
        args: The positional ones.
        kwargs: The others.
        note: Is given what is worth a warning, and under which name it is worth one only once.

    Raises:
        ContainerError: one can't cross; the message names its place.
        UnsupportedError: all are on the meta device: a tool runs the model without values.
    """
    spec, tensors = pytree.flatten((args, kwargs))
    if all(type(tensor) in _PLAIN and kinds.fits(tensor) for tensor in tensors):
        return args, kwargs, tensors
    if any(type(tensor) is Promise for tensor in tensors):
        args, kwargs = pytree.unflatten(spec, list(map(settled, tensors)))
        return carried(args, kwargs, note)
    if all(tensor.is_meta for tensor in tensors):
        raise no_whole_model("a run on the meta device")
    check_fit("an argument", {"args": args, "kwargs": kwargs}, tensors)
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            kind = type(tensor).__qualname__
            note(
                f"class {kind}",
                f"an argument of the cut part is a {kind}: across the cut it is a plain tensor, "
                "so a body that tells it by its class doesn't. "
                "Pass .as_subclass(torch.Tensor) to say that this is meant, "
                "or keep its class by register_container()",
            )
    tensors = list(map(_plain, tensors))
    args, kwargs = pytree.unflatten(spec, tensors)
    return args, kwargs, tensors


def _plain(tensor: Tensor) -> Tensor:
    # Not another object, where it needn't be: what the body changes in place is looked for in it.
    return tensor if type(tensor) in _PLAIN else tensor.as_subclass(Tensor)


def check_fit(what: str, tree: Any, tensors: Sequence[Tensor]) -> None:
    """Refuse a tensor of a tree that the format has no place for.

    Raises:
        ContainerError: there is one; the message names its place in the tree.
    """
    for tensor in tensors:
        if not kinds.fits(tensor):
            raise kinds.unfit(tensor, f"{what} at {pytree.place_of(tree, tensor)}")


def check_gradients(gradients: Sequence[Tensor | None]) -> None:
    """Refuse the gradient of an output that the format has no place for.

    Raises:
        UnsupportedError: there is one.
    """
    for index, gradient in enumerate(gradients):
        if gradient is not None and not kinds.fits(gradient):
            kind = gradient.layout if gradient.layout is not torch.strided else gradient.dtype
            raise UnsupportedError(
                f"the gradient of output {index} of the cut part is of the kind {kind}: expected a "
                "dense one; use what comes after the cut with sparse=False (sparse_grad=False)"
            )


def may_change(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether some argument is a container, which a body may change."""
    return not (
        _LEAVES.issuperset(map(type, args)) and _LEAVES.issuperset(map(type, kwargs.values()))
    )


def check_unchanged(spec: Any, entered: list[Tensor], given: Any, outputs: Any) -> None:
    """Refuse a run that put something into a container among its arguments, and didn't return it.

    Args:
        spec: Of the arguments before the run.
        entered: Their distinct tensors.
        given: The arguments (args, kwargs) themselves, after the run.
        outputs: What the run returned.

    Raises:
        ContainerError: there is such a container; the message names its place.
    """
    # What the body has put in may be something that can't cross.
    with contextlib.suppress(SplitFedError):
        found, tensors = pytree.flatten(given)
        if found == spec and list(map(id, tensors)) == list(map(id, entered)):
            return
    returned = {id(value) for value in _containers(outputs)}
    trees = (pytree.unflatten(spec, entered), given)
    one, other = ({"args": args, "kwargs": kwargs} for args, kwargs in trees)
    for place, before, after in _pairs(one, other, ""):
        if id(after) not in returned and _has_more(before, after):
            raise ContainerError(
                f"the body changes the {type(after).__name__} at {place} that it is given: the "
                "unsplit model's caller would see that, across the cut nobody does. "
                "Return what it adds, or give it a container of its own"
            )


def _containers(tree: Any) -> Iterator[Any]:
    """The containers of a tree, itself included."""
    if isinstance(tree, Mapping):
        yield tree
        for child in tree.values():
            yield from _containers(child)
    elif isinstance(tree, list | tuple):
        yield tree
        for child in tree:
            yield from _containers(child)
    elif type(tree) not in _LEAVES:
        yield tree


def _pairs(before: Any, after: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """The containers at the same places of two trees: (place, the one, the other)."""
    if type(before) is not type(after) or type(before) in _LEAVES:
        return
    yield place, before, after
    children: list[tuple[Any, Any, Any]] = []
    if isinstance(before, Mapping):
        children = [(key, before[key], after[key]) for key in before if key in after]
    elif isinstance(before, list | tuple):
        shared = zip(before, after, strict=False)
        children = [(i, one, other) for i, (one, other) in enumerate(shared)]
    for key, one, other in children:
        yield from _pairs(one, other, f"{place}[{key!r}]")


def _has_more(before: Any, after: Any) -> bool:
    """Whether something in a container itself is new, or another than it was."""
    if isinstance(before, Mapping):
        return any(
            key not in before or _is_other(before[key], value) for key, value in after.items()
        )
    if isinstance(before, tuple):
        return False
    if isinstance(before, list):
        # One that only got shorter, at either end, was consumed: nothing in it is new.
        shorter = len(before) - len(after)
        kept = [before[start : start + len(after)] for start in {0, max(0, shorter)}]
        return shorter < 0 or all(any(map(_is_other, part, after)) for part in kept)
    try:
        mine, theirs = pytree.flatten(before), pytree.flatten(after)
    except SplitFedError:
        return True
    if mine[0] != theirs[0] or len(mine[1]) != len(theirs[1]):
        return True
    return any(map(_is_other, mine[1], theirs[1]))


def _is_other(before: Any, after: Any) -> bool:
    """Whether a leaf is another than before; containers are compared as such."""
    if type(before) is not type(after):
        return True
    if isinstance(before, Tensor):
        # A container may make its tensors anew whenever it is flattened: then the values count.
        return before is not after and not same_bits(before, after)
    # NaN differs from itself.
    return type(before) in _LEAVES and before != after and before == before


# ------------------------------------------------------------------------ what an error was about


def description(parts: Sequence[nn.Module], tensors: Sequence[Tensor]) -> str:
    """What parts of a model were given, and what their first weights are, for a message."""
    given = ", ".join(map(_shape, tensors)) or "no tensor"
    named = (found for part in parts for found in part.named_parameters())
    name, weight = next(named, ("", None))
    own = "it has no weights"
    if weight is not None:
        own = f"its first weights are {name!r}, {_shape(weight)}"
    return f"the part was given {given}; {own}"


def explanation(
    error: Exception, half: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> InputError | None:
    """The error to raise in place of one of the half's own code, if an argument is the reason."""
    text = str(error)
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for place, value in given.items():
        kind = type(value)
        if kind.__module__.partition(".")[0] == "numpy" and re.search(r"numpy|ndarray", text):
            return ContainerError(
                f"argument {place!r} is a {kind.__module__}.{kind.__qualname__}: expected a "
                f"tensor, as torch.from_numpy(x) makes of an array ({type(error).__name__}: {text})"
            )
    first = next((p for p in half.parameters() if p.is_floating_point()), None)
    if first is None or not _DTYPES_DIFFER.search(text):
        return None
    for place, value in given.items():
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        if is_floating and value.dtype != first.dtype:
            name = str(first.dtype).removeprefix("torch.")
            return InputError(
                f"argument {place!r} is {_shape(value)}: expected {name}, as the half's weights "
                f"are; convert it by .to(torch.{name}) ({type(error).__name__}: {text})"
            )
    return None


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
