"""What a module reaches: its members, its attributes, and what functions and objects hold there.

It is looked through as far as it is Python's own values, functions and plain objects: into no
class, optimizer or generator, and no further than what a user may have hung on a model.

The trap: much of what may be reached answers attributes with code of its own, or stands for another
object. So types are asked for, never `isinstance`, and attributes are read past `__getattr__`.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOST_OBJECTS = 200_000
"""So many values are looked at: a data set that hangs on a model is no part of it."""

_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.CodeType),
    *(torch.dtype, torch.device, torch.Size, torch.Generator, torch.optim.Optimizer),
    torch.optim.lr_scheduler.LRScheduler,
)
_KEEPERS = (list, dict, set, deque, defaultdict, OrderedDict)
_PUTS = frozenset("append extend insert add update setdefault __setitem__ appendleft".split())
_REGISTRIES = ("_modules", "_parameters", "_buffers")

Found = tuple[str, Any]
"""A value, and the place that it is reached at."""


def reached(module: nn.Module, without: tuple[type, ...] = ()) -> Iterator[Found]:
    """All tensors and modules that a module's members and attributes lead to, each once.

    Args:
        module: Where to begin.
        without: Kinds of values that aren't looked into.
    """
    leaves = (*_LEAVES, *without)
    members = dict(_named_members("", module, without))
    own = {id(member) for member in members.values()}
    waiting: deque[Found] = deque()
    for prefix, member in members.items():
        waiting.extend(_module_contents(prefix, member))
    # Kept, not only their ids: some are made on the way, and an id may come again.
    seen: dict[int, Any] = {}
    while waiting and len(seen) < MOST_OBJECTS:
        place, value = waiting.popleft()
        if issubclass(type(value), leaves) or id(value) in seen:
            continue
        seen[id(value)] = value
        if issubclass(type(value), Tensor | nn.Module):
            yield place, value
        # The contents of its own members are on the list already.
        if id(value) not in own:
            waiting.extend(_contents(place, value))


def keeps_in(function: Any) -> str | None:
    """The name of a list, dict or set outside of a function that it puts something in, if any."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, types.BuiltinMethodType) and type(function.__self__) in _KEEPERS:
        return f"{type(function.__self__).__name__}.{function.__name__}"
    if not isinstance(function, types.FunctionType):
        return None
    code = function.__code__
    puts = any(step.opname == "STORE_SUBSCR" for step in dis.get_instructions(code))
    if not puts and _PUTS.isdisjoint(code.co_names):
        return None
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    outside = {name: _content_of(cell) for name, cell in cells}
    outside |= {n: function.__globals__[n] for n in code.co_names if n in function.__globals__}
    return next((name for name, value in outside.items() if type(value) in _KEEPERS), None)


def _content_of(cell: types.CellType) -> Any:
    with contextlib.suppress(ValueError):  # not assigned yet
        return cell.cell_contents
    return None


def _named_members(
    prefix: str, module: nn.Module, without: tuple[type, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules by name, but for those of some kinds and what is beneath."""
    seen: set[int] = set()
    waiting = [(prefix, module)]
    while waiting:
        name, member = waiting.pop()
        if isinstance(member, without) or id(member) in seen:
            continue
        seen.add(id(member))
        yield name, member
        inner = [(f"{name}.{leaf}".lstrip("."), child) for leaf, child in member._modules.items()]
        waiting += [(leaf, child) for leaf, child in reversed(inner) if child is not None]


def _contents(place: str, value: Any) -> Iterator[Found]:
    """What a value leads to."""
    for kinds, look in _LOOKS:
        if issubclass(type(value), kinds):
            return look(place, value)
    return _object_contents(place, value)


def _nothing(place: str, value: Any) -> Iterator[Found]:
    return iter(())


def _module_contents(place: str, module: nn.Module) -> Iterator[Found]:
    plain = {name: value for name, value in vars(module).items() if name not in _REGISTRIES}
    if "client_half" in plain:  # a client: its line to a server is no part of a model
        plain = {}
    for name, value in {
        **module._parameters,
        **module._buffers,
        **module._modules,
        **plain,
    }.items():
        yield f"{place}.{name}".lstrip("."), value
    forward = type(module).forward
    # A class that was made in a function, or in a notebook, may use the model by its name there.
    is_torchs = str(getattr(forward, "__module__", "")).startswith("torch.")
    if isinstance(forward, types.FunctionType) and not is_torchs:
        yield from _function_values(f"{place}.forward".lstrip("."), forward)


def _mapping_contents(place: str, value: Mapping[Any, Any]) -> Iterator[Found]:
    for key, item in value.items():
        yield f"{place}.{key}", item
        if not isinstance(key, str | int):
            yield f"{place} (a key of it)", key


def _sequence_contents(place: str, value: Any) -> Iterator[Found]:
    return ((f"{place}.{number}", item) for number, item in enumerate(value))


def _function_contents(place: str, function: types.FunctionType) -> Iterator[Found]:
    yield from _function_values(place, function)
    yield from ((f"{place}.{name}", value) for name, value in vars(function).items())
    # What it calls of its own file may use the model in its place.
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
            yield f"{place} (by its {name!r})", value


def _function_values(place: str, function: types.FunctionType) -> Iterator[Found]:
    """The values that a function holds: closure, defaults, and modules and tensors by name."""
    values = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    for name, cell in values.items():
        try:
            yield f"{place} (by its {name!r})", cell.cell_contents
        except ValueError:  # not set yet
            continue
    yield f"{place} (by its defaults)", (function.__defaults__, function.__kwdefaults__)
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module | Tensor):
            yield f"{place} (by its {name!r})", value


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function reads, and those within it."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _global_names(constant)
    return tuple(dict.fromkeys(names))


def _method_contents(place: str, method: Any) -> Iterator[Found]:
    yield f"{place}.__self__", method.__self__
    yield place, getattr(method, "__func__", None)


def _partial_contents(place: str, partial: functools.partial[Any]) -> Iterator[Found]:
    yield place, partial.func
    yield f"{place}.args", partial.args
    yield f"{place}.keywords", partial.keywords
    yield from ((f"{place}.{name}", value) for name, value in vars(partial).items())


def _reference_contents(place: str, reference: weakref.ref[Any]) -> Iterator[Found]:
    referent = reference()
    # An nn.RNN has such to its weights, which it renews itself.
    if isinstance(referent, nn.Module):
        yield place, referent


def _object_contents(place: str, value: Any) -> Iterator[Found]:
    """The attributes of a plain object, and what its `__call__` holds."""
    # A client within a model leads to its server, and that to a store: neither is the model's.
    if str(type(value).__module__).startswith("splitfed."):
        return
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    # Past __getattr__, which may be the user's own.
    for name in ("__dict__", *names):
        with contextlib.suppress(AttributeError):
            item = object.__getattribute__(value, name)
            if name != "__dict__":
                yield f"{place}.{name}", item
            else:
                yield from ((f"{place}.{leaf}", held) for leaf, held in item.items())
    for kind in type(value).__mro__:
        call = vars(kind).get("__call__")
        if isinstance(call, types.FunctionType):
            yield from _function_contents(place, call)


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else slots
    return [name for name in names if name != "__dict__"]


_LOOKS: Sequence[tuple[Any, Callable[[str, Any], Iterator[Found]]]] = (
    (Tensor, _nothing),
    (nn.Module, _module_contents),
    (dict | types.MappingProxyType, _mapping_contents),
    (list | tuple | set | frozenset | deque, _sequence_contents),
    (types.FunctionType, _function_contents),
    (types.MethodType | types.BuiltinMethodType, _method_contents),
    (functools.partial, _partial_contents),
    (weakref.ref, _reference_contents),
)
