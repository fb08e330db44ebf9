"""Copying of modules, as it is done for each version that a server loads.

`copy.deepcopy` takes some 0.2 ms per submodule, most of it for flags and empty tables of hooks:
10 ms for a ResNet-18, at each new version. A submodule whose class doesn't customise its copies is
copied by hand here, with the same result. One whose class does, and every attribute that is more
than a flag, is left to `copy.deepcopy` under the same memo.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import Any

from torch import nn

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

    Raises:
        UnsupportedError: something in the module can't be copied.
    """
    try:
        copied: nn.Module = _copy(module, {} if memo is None else memo)
        return copied
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__} can't be copied ({error}): keep what can't be deep-copied "
            "out of the module, and tensors as parameters or buffers"
        ) from error


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
