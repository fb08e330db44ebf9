"""The attributes of a stand-in: what is kept, what travels with a call, and what is refused.

What is assigned is kept if it is a plain value of an attribute that the part has: it travels with
each call from then on. A tool's mark stays here, as does what the part's code never reads.

The half's own forward and tools set things on a config that the part has too: a Hugging Face model
notes `problem_type` in it at its first batch. What the part's code never mentions can't change what
it computes. (Computed names, and functions of other files, aren't seen.)

The trap: what the part's own forward sets is on the server, and what was here before it is stale
from the first call on. Its class may have a value for it, too, which must be in nobody's way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from splitfed.errors import AbsentError
from splitfed.model.standin.tensors import MISSING, Absent, Place, is_plain, set_error, shell_of

OF_TORCH = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
"""What every module has in its `__dict__`."""
_SERVERS_OWN = frozenset(("gradient_checkpointing",))
"""How the server saves memory is its own affair: it changes no value."""
_BY_TEXT = frozenset(("getattr", "hasattr", "attrgetter"))


def place_of(module: nn.Module) -> Place | None:
    """What a stand-in knows of its module; `None` for a cut point that was placed by hand."""
    return vars(module).get("_absent_place")


def class_of(module: nn.Module) -> Any:
    """The class of the module that a stand-in stands for."""
    return getattr(type(module), "_absent_class", nn.Module)


def computed(module: nn.Module, place: Place, name: str, found: Any) -> Any:
    """A property again, whose error was an AttributeError, which Python has dropped."""
    try:
        return found.__get__(module, type(module))
    except AbsentError:
        value = None
        with suppress(Exception):  # a property of the user's may raise anything
            value = getattr(place.ledger.template.blueprint.get_submodule(place.name), name)
        # One that computes a tensor, such as a parametrization: that has a shape, too.
        if not isinstance(value, Tensor):
            raise
        return Absent(shell_of(value), place.at(name), place)


def is_local(module: nn.Module, place: Place, name: str) -> bool:
    """Whether an attribute is a tool's mark, or else nothing that the part looks at."""
    if name in OF_TORCH or name in place.local or name in _SERVERS_OWN:
        return True
    # The half's own call of the part may be wrapped: that is where it is made.
    if name == "forward" and not place.path:
        return True
    known = (vars(module), vars(module)["_modules"], place.parameters, place.buffers)
    if name in place.originals or any(name in names for names in known):
        return False
    if name.startswith("_"):
        return not name.startswith("__")
    return not hasattr(type(module), name) and not is_read(name, [class_of(module)])


def assign(module: nn.Module, place: Place, name: str, value: Any) -> None:
    """Keep a plain value, to travel with each call."""
    known = place.originals.get(name, MISSING)
    current = getattr(module, name, known)
    if isinstance(value, float):
        value = float(value)  # NumPy's is a subclass
    elif value is current:
        return
    fits = current is not MISSING and not callable(current) and not isinstance(current, Absent)
    if not fits or not is_plain(value):
        raise set_error(place.at(name), value)
    place.originals.setdefault(name, current)
    vars(module)[name] = value
    place.hold(name, value)
    place.ledger.moves += 1


def give_up(member: nn.Module, name: str) -> None:
    """Forget the value of an attribute that the part's forward has set."""
    place: Place = vars(member)["_absent_place"]
    if name in vars(member):
        if id(vars(member)[name]) in place.ledger.shared:
            place.ledger.tell_once(
                f"the forward of the part that was cut out changes what is in {place.at(name)!r}, "
                "which the client half holds too: what it puts there stays on the server. "
                "Return it from that forward"
            )
        place.originals.setdefault(name, vars(member).pop(name))
        vars(member).pop(name, None)
        place.hold(name, None)
        place.ledger.moves += 1
    if name not in place.written:
        place.written.add(name)
        cls = type(member)
        if "_absent_class" in vars(cls) and hasattr(cls, name):
            setattr(cls, name, _Written(name))


class _Written:
    """In front of a class's own value for an attribute that the part's forward sets."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: Any) -> Any:
        part = owner._absent_class
        if module is None:
            return getattr(part, self.name)
        place: Place = vars(module)["_absent_place"]
        if self.name in place.written:
            raise written_error(place, self.name)
        found = class_attribute(part, self.name)
        return found.__get__(module, owner) if hasattr(type(found), "__get__") else found


def class_attribute(cls: type, name: str) -> Any:
    """What a class has under a name, as it is."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return None


def written_error(place: Place, name: str) -> AbsentError:
    """The error for a value that the part's forward sets.

    It is an AttributeError, as `hasattr` and `getattr` with a default want it: those answer without
    a word, so the same is said by a warning, once.
    """
    said = (
        f"{place.at(name)!r} is set by the forward of the part that was cut out, so its value is "
        "the server's: return it from that forward, beside the outputs"
    )
    place.ledger.tell_once(said)
    return AbsentError(said)


# ----------------------------------------------------------------------- what the part's code reads


def is_read(name: str, classes: Iterable[type]) -> bool:
    """Whether the code of one of these classes mentions an attribute."""
    # A config of Hugging Face keeps some under a longer name, behind a property.
    names = {name, name.removesuffix("_internal")}
    return any(not names.isdisjoint(_mentioned(cls)) for cls in classes)


@lru_cache(maxsize=1024)
def _mentioned(cls: type) -> frozenset[str]:
    """All attributes in the methods of a class, and in the functions that they call."""
    bases = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
    waiting = [value for base in bases for value in vars(base).values()]
    found: set[str] = set()
    seen: set[int] = set()
    while waiting:
        function = _function(waiting.pop())
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        names = set(_names(function.__code__))
        found |= names
        beside = (function.__globals__.get(name) for name in names)
        waiting += [
            other
            for other in beside
            if isinstance(other, FunctionType) and other.__module__ == function.__module__
        ]
    return frozenset(found)


def _function(value: Any) -> FunctionType | None:
    """The Python function in a method, property or decorated function."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    if isinstance(value, FunctionType):
        value = inspect.unwrap(value)
    return value if isinstance(value, FunctionType) else None


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    by_text = not _BY_TEXT.isdisjoint(code.co_names)
    for constant in code.co_consts:
        if by_text and isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)
