"""Copying of modules, as it is done for each version that a server loads.

`copy.deepcopy` takes some 0.2 ms per submodule, most of it for flags and empty tables of hooks:
10 ms for a ResNet-18, at each new version. A submodule whose class doesn't customise its copies is
copied by hand here, with the same result. One whose class does, and every attribute that is more
than a flag, is left to `copy.deepcopy` under the same memo.

The trap: torch refuses to copy a tensor that has a graph. Where a forward or a hook makes it anew
(the weight of weight_norm, spectral_norm and pruning; a cached attention map) the copy has its
values alone; one that was made once can't be trained twice, and is refused.
"""

from __future__ import annotations

import copy
import copyreg
import dis
import itertools
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from splitfed.errors import UnsupportedError

_COPY_METHODS = (
    "__deepcopy__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__new__",
)
_ATOMS = frozenset((type(None), bool, int, float, str, type))
_TABLES = (dict, OrderedDict)
_MEMBERS = ("_parameters", "_buffers", "_modules")


def deep_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; what `memo` holds by id is put in place of the original.

    Tensors with a graph that the module's code makes anew are copied without it.

    Raises:
        UnsupportedError: something in the module can't be copied.
    """
    given = {} if memo is None else memo
    try:
        copied: nn.Module = _copy(module, dict(given))
        return copied
    except Exception as error:
        values = _values_of_graphs(module, given)
        if values:
            return deep_copy(module, {**given, **values})
        place, cause = _uncopyable(module, given) or ("something in it", error)
        raise UnsupportedError(
            f"{type(module).__name__} can't be copied for {place} ({cause!s:.120}): keep what "
            "can't be deep-copied out of the module, and tensors as parameters or buffers. "
            "What a forward makes anew may be set to None before"
        ) from error


def _values_of_graphs(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Tensor]:
    """Copies of tensors that have a graph and are made anew, by the ids of those."""
    found: dict[int, Tensor] = {}
    made = set(_names_made(module))
    for owner in module.modules():
        for name, held in vars(owner).items():
            values = {name: held} if name not in _MEMBERS else held
            for leaf, value in values.items():
                tensors = _tensors_in(value) if leaf in made else ()
                found.update((id(tensor), tensor) for tensor in tensors if not tensor.is_leaf)
    return {key: t.detach().clone() for key, t in found.items() if key not in memo}


def _tensors_in(value: Any) -> list[Tensor]:
    """A tensor, or those of a container."""
    if isinstance(value, Tensor):
        return [value]
    items: Any = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list | tuple | set):
        items = value
    return [tensor for item in items for tensor in _tensors_in(item)]


def _names_made(module: nn.Module) -> Iterator[str]:
    """Names of attributes that the code of a module sets, but for that which makes it."""
    for owner in module.modules():
        for kind in type(owner).__mro__:
            functions = vars(kind).values() if kind is not nn.Module else ()
            for function in functions:
                if isinstance(function, types.FunctionType) and function.__name__ != "__init__":
                    yield from _stored_names(function.__code__)
        for name, value in vars(owner).items():
            is_table = name.endswith("_hooks") and isinstance(value, dict)
            for hook in value.values() if is_table else (value,):
                yield from _names_made_by(hook)


def _names_made_by(hook: Any) -> Iterator[str]:
    """As `_names_made`, of a hook, which may be an object that knows the name."""
    function = getattr(hook, "__func__", hook)
    if isinstance(function, types.FunctionType):
        yield from _stored_names(function.__code__)
    elif not isinstance(hook, nn.Module):
        knows = getattr(getattr(hook, "__self__", hook), "__dict__", {})
        yield from (value for value in knows.values() if isinstance(value, str))


def _stored_names(code: types.CodeType) -> Iterator[str]:
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _stored_names(constant)
        elif isinstance(constant, str) and "setattr" in code.co_names:
            yield constant


def _uncopyable(module: nn.Module, memo: Mapping[int, Any]) -> tuple[str, Exception] | None:
    """The first attribute that can't be copied by itself, as a message names it, and why."""
    # Each member stands for itself, so that none is copied for the sake of another's attribute.
    kept: dict[int, Any] = {id(member): member for member in module.modules()}
    kept |= {id(member): member for member in itertools.chain(*_leaves(module))}
    for prefix, owner in module.named_modules():
        for name, value in vars(owner).items():
            try:
                _copy(value, {**kept, **memo})
            except Exception as error:  # noqa: BLE001 -- that of the user's own code
                return f"the attribute {name!r} of {prefix or 'the module itself'!r}", error
    return None


def _leaves(module: nn.Module) -> Iterator[Iterator[Tensor]]:
    for tensors in (module.parameters(), module.buffers()):
        yield (tensor for tensor in tensors if tensor.is_leaf)


def check_hooks(module: nn.Module) -> None:
    """Refuse what a copy would lose without a word: hooks on parameters, which may mask gradients.

    Raises:
        UnsupportedError: a parameter has one.
    """
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnsupportedError(
                f"parameter {name!r} has a hook of its own, which no copy of it has: "
                "remove it, and register it again on the client half; "
                "in the body use a hook on the module, a parametrization, or a mask in forward"
            )


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(value, nn.Module) or _customises_copies(type(value)):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    # Noted before its attributes are copied, as deepcopy does: they may lead back to the module.
    twin = memo[id(value)] = object.__new__(type(value))
    state = twin.__dict__
    for name, held in value.__dict__.items():
        # What torch.compile made of the original's call; torch leaves it out of copies, too.
        if name == "_compiled_call_impl":
            continue
        if _is_atomic(held):
            state[name] = held
        elif _is_plain_table(name, held) and id(held) not in memo:
            # In the memo too: another attribute may be the same table.
            table = state[name] = memo[id(held)] = type(held)()
            for key, member in held.items():
                table[key] = _copy(member, memo)
        else:
            state[name] = copy.deepcopy(held, memo)
    return twin


def _is_atomic(value: Any) -> bool:
    """Whether a copy of it is the value itself: a flag, a number, a name, or a tuple of such."""
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value)))


def _is_plain_table(name: str, value: Any) -> bool:
    """Whether it is a module's table of members, or one with nothing in it."""
    return type(value) in _TABLES and (name in _MEMBERS or not value)


def _customises_copies(cls: type) -> bool:
    """Whether a class has a say in how it is copied, or keeps state outside of `__dict__`."""
    for name in _COPY_METHODS:
        if getattr(cls, name, None) is not getattr(nn.Module, name, None):
            return True
    has_slots = any("__slots__" in base.__dict__ for base in cls.__mro__)
    return has_slots or cls in copyreg.dispatch_table
