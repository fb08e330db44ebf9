"""Deep copies of modules, made for each version that a server loads.

`copy.deepcopy` takes some 0.2 ms per submodule, most of it for flags and empty tables of hooks: 10 ms for a ResNet-18,
at each new version. A submodule that has no say in how it is copied is copied by hand here, with the same result; what
does have one, and every attribute that is more than a flag, is left to `copy.deepcopy` under the same memo.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import Any

from torch import nn

from splitfed.errors import UnsupportedError

_SAYS = (
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
        copied: nn.Module = _copied(module, {} if memo is None else memo)
        return copied
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__} can't be copied ({error}): keep what can't be deep-copied out of the module, "
            "and tensors as parameters or buffers"
        ) from error


def check_hooks(module: nn.Module) -> None:
    """Refuse what a copy would lose without a word: hooks on parameters, such as one that masks a gradient.

    Raises:
        UnsupportedError: a parameter has one.
    """
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnsupportedError(
                f"parameter {name!r} has a hook of its own, which no copy of it has: remove it, and register it again "
                "on the client half; in the body use a hook on the module, a parametrization, or a mask in forward"
            )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(value, nn.Module) or _has_a_say(type(value)):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    twin = memo[id(value)] = object.__new__(type(value))
    state = twin.__dict__
    for name, held in value.__dict__.items():
        if type(held) in _ATOMS or (type(held) is tuple and _ATOMS.issuperset(map(type, held))):
            state[name] = held
        elif type(held) in _TABLES and id(held) not in memo and (name in _MEMBERS or not held):
            table = state[name] = memo[id(held)] = type(held)()
            for key, member in held.items():
                table[key] = _copied(member, memo)
        else:
            state[name] = copy.deepcopy(held, memo)
    return twin


def _has_a_say(cls: type) -> bool:
    own = any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in _SAYS)
    return (
        own
        or cls in copyreg.dispatch_table
        or any("__slots__" in base.__dict__ for base in cls.__mro__)
    )
