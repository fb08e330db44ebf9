"""Which attributes the code of a module reads, so that what it never reads needn't travel.

A tool or the half's own forward sets things on an object that the part that was cut out has too: a
Hugging Face model notes `problem_type` in its config at its first batch. What the part's code
never mentions can't change what it computes.

The trap: `setattr` and `getattr` with a computed name, and code outside of the module's classes and
of the functions that they call in their own file, aren't seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_BY_TEXT = frozenset(("getattr", "hasattr", "attrgetter"))


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
