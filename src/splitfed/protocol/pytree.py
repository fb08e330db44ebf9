"""Pytrees of tensors and plain values: flattened for the wire and the disk, and rebuilt from there.

Whatever the body takes and returns can cross a cut: tensors, `None`, bool, int, float and str in
dict, list, tuple and named tuple. A tree is flattened into its tensors and a *spec*, plain JSON
that says how to rebuild it. A spec names classes but never carries code: a named tuple's class is
used if this process has imported it already, and made from its field names if not; any other
container must be registered.

The trap is identity: an object that occurs twice is one tensor in the list, and one object again
afterwards. nn.MultiheadAttention computes along another path, with other bits, if query, key and
value are one object.
"""

from __future__ import annotations

import collections
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from splitfed.errors import ContainerError, FormatError, InputError

T = TypeVar("T")
Spec = Any
MAX_DEPTH = 64
_Path = tuple[Any, ...]
"""Place of a value: (path of its container, key in it), or () at the top. Only errors show it."""


@dataclass(frozen=True, slots=True)
class _Container:
    cls: type
    flatten: Callable[[Any], Any]
    unflatten: Callable[[Any], Any]


# Per process, like pickle's copyreg: which classes exist is a property of the process.
_containers: dict[str, _Container] = {}


def register_container(
    cls: type[T], flatten: Callable[[T], Any], unflatten: Callable[[Any], T]
) -> None:
    """Let instances of `cls` cross the cut.

    Both sides must register the class, since no code travels.

    Args:
        cls: The class; exactly this one, not its subclasses. A subclass of `torch.Tensor` may be
            one, to keep its class across the cut.
        flatten: Makes a tree of supported values from an instance.
        unflatten: Makes an instance from that tree.

    Raises:
        ContainerError: it is a cache of transformers. The body's attention writes to it, and what
            it writes would stay on the server.
        InputError: it is no class, or one that crosses as it is.
    """
    if not isinstance(cls, type) or not callable(flatten) or not callable(unflatten):
        raise InputError(
            "register_container() takes a class and two functions: "
            f"expected (cls, flatten, unflatten), got ({cls!r}, {flatten!r}, {unflatten!r})"
        )
    known: set[type] = {*_LEAVES, *_SEQUENCES, *_MAPPINGS, *_TENSORS}
    if cls in known:
        raise InputError(f"{cls.__qualname__} can't be registered: it crosses the cut as it is")
    if _is_cache(cls):
        raise ContainerError(
            f"{cls.__qualname__} can't be registered: it is a transformers cache, which the body "
            "changes in place, and the half's own wouldn't be changed. Pass use_cache=False"
        )
    _containers[_path(cls)] = _Container(cls, flatten, unflatten)


def flatten(tree: Any) -> tuple[Spec, list[Tensor]]:
    """Return a tree's JSON-able spec, and its distinct tensors in order of first occurrence.

    Raises:
        ContainerError: a value is of a kind that can't cross the cut; the message says where it is.
    """
    if type(tree) is Tensor:  # the ordinary case of an input or output
        return {"t": 0}, [tree]
    tensors: list[Tensor] = []
    return _flatten(tree, tensors, {}, (), 0), tensors


def place_of(tree: Any, tensor: Tensor) -> str:
    """Where a tensor of a tree is, for a message: `['args'][0]`; `the top` if it is the tree.

    Only the containers of Python are looked into.
    """
    found = () if tree is tensor else _find_tensor(tree, tensor, ())
    return "a place within another container" if found is None else _place(found)


def _find_tensor(value: Any, tensor: Tensor, where: _Path) -> _Path | None:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, child in items:
        if child is tensor:
            return (where, key)
        found = _find_tensor(child, tensor, (where, key))
        if found is not None:
            return found
    return None


def unflatten(spec: Spec, tensors: list[Tensor]) -> Any:
    """Rebuild a tree from its spec and tensors; the inverse of `flatten`.

    Raises:
        FormatError: the spec isn't one that `flatten` makes, or names a tensor that doesn't exist.
        ContainerError: it names a container that isn't registered in this process.
    """
    try:
        return _unflatten(spec, tensors, 0)
    except (FormatError, ContainerError):  # two of the next line's kinds
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        # A spec is foreign: what it lacks shows in whatever first needs it.
        raise FormatError(f"a tree's spec is malformed: {error}") from error


def _flatten(  # noqa: C901 -- one frame a level of the tree, see below
    value: Any, tensors: list[Tensor], indices: dict[int, int], where: _Path, depth: int
) -> Spec:
    """The spec of a value; its tensors are appended, `indices` has the place of each by its id."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor) and (kind in _TENSORS or _path(kind) not in _containers):
        index = indices.setdefault(id(value), len(tensors))
        if index == len(tensors):
            tensors.append(value)
        return {"t": index}
    if kind is float:
        # JSON has neither NaN nor infinity.
        return value if math.isfinite(value) else {"f": str(value)}
    if depth >= MAX_DEPTH:
        raise ContainerError(f"the value at {_place(where)} is nested more than {MAX_DEPTH} deep")
    depth += 1
    # The two containers that nearly all values are made of are walked in this very frame: a message
    # is mostly nested tuples, and a helper would be one more call at each level.
    if kind in _SEQUENCES:
        children: list[Spec] = []
        for i, child in enumerate(value):
            if type(child) not in _PLAIN:
                child = _flatten(child, tensors, indices, (where, i), depth)
            children.append(child)
        return {_SEQUENCES[kind]: children}
    if kind in _MAPPINGS:
        # As a list of pairs: keys of JSON objects can only be strings.
        items: list[Spec] = []
        for key, child in value.items():
            if type(child) not in _PLAIN:
                child = _flatten(child, tensors, indices, (where, key), depth)
            items.append([key if type(key) is str else _key(key, where), child])
        return {_MAPPINGS[kind]: items}
    return _flatten_container(value, kind, tensors, indices, where, depth)


def _flatten_container(
    value: Any,
    kind: type,
    tensors: list[Tensor],
    indices: dict[int, int],
    where: _Path,
    depth: int,
) -> Spec:
    """A container that is neither a sequence nor a mapping of Python's own."""
    path = _path(kind)
    # Before named tuples: a registered class may be one, and the user's functions count.
    if path in _containers:
        tree = _containers[path].flatten(value)
        return {"c": [path, _flatten(tree, tensors, indices, (where, kind.__name__), depth)]}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        fields = list(kind._fields)
        children = [
            _flatten(child, tensors, indices, (where, field), depth)
            for field, child in zip(fields, value, strict=True)
        ]
        return {"n": [path, fields, children]}
    if _is_transformers(kind, "ModelOutput"):
        items: list[Spec] = []
        for key, child in value.items():
            inner = _flatten(child, tensors, indices, (where, key), depth)
            items.append([_key(key, where), inner])
        return {"h": [path, items]}
    raise ContainerError(_refusal(kind, where))


def _unflatten(spec: Spec, tensors: list[Tensor], depth: int) -> Any:
    if type(spec) in _LEAVES:
        return spec
    if depth > MAX_DEPTH or type(spec) is not dict or len(spec) != 1:
        raise FormatError(
            f"a tree's spec is malformed: a {type(spec).__name__} that is no spec, at depth {depth}"
        )
    ((kind, body),) = spec.items()
    if kind == "t":
        return _tensor(body, tensors)
    if kind == "f":
        return float(body)
    depth += 1
    if kind in _SEQUENCE_OF:
        children = []
        for child in body:  # in this frame, as in `_flatten`
            children.append(_unflatten(child, tensors, depth))
        return _SEQUENCE_OF[kind](children)
    if kind in _MAPPING_OF:
        return _MAPPING_OF[kind](_pairs(body, tensors, depth))
    return _unflatten_class(kind, body, tensors, depth)


def _tensor(index: Any, tensors: list[Tensor]) -> Tensor:
    if not isinstance(index, int) or not 0 <= index < len(tensors):
        raise FormatError(f"a tree names tensor {index!r} of {len(tensors)}")
    return tensors[index]


def _unflatten_class(kind: str, body: Spec, tensors: list[Tensor], depth: int) -> Any:
    """Put a container together whose spec names its class.

    The name is foreign, so a class is never called because it was named: only if it was registered,
    is a named tuple of just these fields, or is a ModelOutput.
    """
    if kind == "c":
        if body[0] not in _containers:
            raise ContainerError(
                f"container {body[0]!r} isn't registered in this process: call register_container()"
            )
        return _containers[body[0]].unflatten(_unflatten(body[1], tensors, depth))
    if kind == "n":
        children = [_unflatten(child, tensors, depth) for child in body[2]]
        return _named_tuple(body[0], body[1])(*children)
    if kind == "h":
        cls = _find(body[0])
        if cls is None or not _is_transformers(cls, "ModelOutput"):
            raise ContainerError(
                f"{body[0]!r} isn't an imported transformers ModelOutput: "
                "import its module here first"
            )
        return cls(**_pairs(body[1], tensors, depth))
    raise FormatError(f"a tree's spec has an unknown kind {kind!r}")


def _pairs(children: Spec, tensors: list[Tensor], depth: int) -> dict[Any, Any]:
    found = {}
    for key, child in children:
        if type(key) not in _LEAVES:
            key = _unflatten(key, tensors, depth)
        if type(child) not in _LEAVES:
            child = _unflatten(child, tensors, depth)
        found[key] = child
    return found


def _counter(items: dict[Any, int]) -> collections.Counter[Any]:
    return collections.Counter(items)


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = frozenset((type(None), bool, int, str))
_LEAVES = _PLAIN | {float}
_SEQUENCES: dict[type, str] = {list: "l", tuple: "u", torch.Size: "z"}
_SEQUENCE_OF: dict[str, Callable[[list[Any]], Any]] = {"l": list, "u": tuple, "z": torch.Size}
_MAPPINGS: dict[type, str] = {dict: "d", collections.OrderedDict: "o", collections.Counter: "k"}
_MAPPING_OF: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "d": dict,
    "o": collections.OrderedDict,
    "k": _counter,
}


def _place(where: _Path) -> str:
    steps = []
    while where:
        where, step = where
        steps.append(f"[{step!r}]")
    return "".join(reversed(steps)) or "the top"


def _key(key: Any, where: _Path) -> Spec:
    if type(key) in _PLAIN or (type(key) is float and math.isfinite(key)):
        return key
    raise ContainerError(
        f"a key of the dict at {_place(where)} is {type(key).__name__}: expected str, int or bool"
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _find(path: str) -> Any:
    """The class at `module:qualname`, if its module is imported.

    Foreign data never cause an import: importing a module runs its code.
    """
    module, _, qualname = path.partition(":")
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, type) else None


def _named_tuple(path: str, fields: list[str]) -> Callable[..., Any]:
    cls = _find(path)
    if cls is not None and issubclass(cls, tuple) and list(getattr(cls, "_fields", ())) == fields:
        named: Callable[..., Any] = cls
        return named
    return _stand_in(path.rpartition(":")[2].rpartition(".")[2], tuple(fields))


@functools.lru_cache(256)
def _stand_in(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    """A named tuple in place of a class that this process doesn't have.

    Each is made once, since making one costs as much as reading 10 KB. Passed on, its name is
    `splitfed.trees:...`, whatever this module is called: names are the format.
    """
    return collections.namedtuple(name, fields, module="splitfed.trees")


def _is_transformers(cls: type, name: str) -> bool:
    # By name: the library must not be imported for this.
    return any(
        base.__name__ == name and base.__module__.partition(".")[0] == "transformers"
        for base in cls.__mro__
    )


def _is_cache(cls: type) -> bool:
    """Whether a class is a cache of transformers, one of its layers, or made from one."""
    # By name: those of some models have no base in common.
    return any(
        "Cache" in base.__name__ or base.__module__ == "transformers.cache_utils"
        for base in cls.__mro__
        if base.__module__.partition(".")[0] == "transformers"
    )


def _refusal(kind: type, where: _Path) -> str:
    place = _place(where)
    if _is_cache(kind):
        return (
            f"the value at {place} is a transformers {kind.__name__}, which holds state: "
            "pass use_cache=False"
        )
    if kind.__module__.partition(".")[0] == "numpy":
        return (
            f"the value at {place} is {kind.__module__}.{kind.__qualname__}, "
            "which can't cross the cut: expected a tensor, as torch.from_numpy(x) makes of an "
            "array, or a Python number, as x.item() does of a scalar"
        )
    return (
        f"the value at {place} is {kind.__module__}.{kind.__qualname__}, "
        "which can't cross the cut: "
        "expected tensors, None, bool, int, float or str in dict, list, tuple or named tuple; "
        "other containers by register_container()"
    )
