"""The fields of messages: what every request says of its size, and a test of each field's type.

A request or a record may come from anywhere, and nothing enforces annotations at run time. So each
field is tested against its own annotation at the two borders: where bytes become a message, and
where a request enters a server, whose caller may be in the same process. Only the type is tested
here: whether a number is in its range, or an id may become a key, is checked where it is used.

The trap: types are compared exactly. As an instance a bool would pass for an int, and a class of
one's own for a dict.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from itertools import compress, repeat
from operator import not_
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from torch import Tensor

from splitfed.errors import FormatError

M = TypeVar("M")
R = TypeVar("R")
CHECKED_AS_KEY = "checked as a key"
"""A note on a field that becomes part of a key: it is checked there, and what is wrong with it is
an `IdError`."""
ADDED = types.MappingProxyType({"added": True})
"""Metadata of a field that came to a message later: it is left out of the bytes while it has its
default. So what was written before is read, and what doesn't use it is written as before."""
Test = frozenset[type] | Callable[[Any], bool]
"""The exact classes that a value may have, or a function of it."""
_HAS = frozenset.__contains__


def _by_class(function: Callable[[Any], R]) -> Callable[[Any], R]:
    """A function that computes once for each class, at its first use: nothing happens at import."""
    return functools.cache(function)


class Request:
    """A message that asks for something: what it says of its own size, for whoever limits that."""

    __slots__ = ()
    samples_limit = "samples"
    """The limit that its `samples` have to keep to, by name."""

    def tensors(self) -> list[Tensor]:
        """The tensors that it carries."""
        return []

    def num_bytes(self) -> int:
        """Bytes of its tensors once they are expanded."""
        # numel() counts the elements of an expanded tensor, not those that were sent.
        return sum([tensor.numel() * tensor.itemsize for tensor in self.tensors()])

    def samples(self) -> list[float]:
        """The numbers of examples that it names, each of which is limited."""
        return []

    def counts(self) -> list[tuple[str, int]]:
        """How many numbers of each kind ride along, and of what: each is work for the server."""
        return []


def check_types(message: M) -> M:
    """Return a message if each of its fields has the type of its annotation.

    Messages within it are checked likewise.

    Raises:
        FormatError: one hasn't; the message names it.
    """
    tests = _tests(type(message))
    # Most fields are of a few exact classes: a look into a set for each, without a loop in Python.
    kinds = map(type, map(getattr, repeat(message), tests.exact))
    for name in compress(tests.exact, map(not_, map(_HAS, tests.classes, kinds))):
        raise _of_another_kind(message, name)
    for name, is_right in tests.functions:
        if not is_right(getattr(message, name)):
            raise _of_another_kind(message, name)
    return message


def _of_another_kind(message: object, name: str) -> FormatError:
    return FormatError(
        f"{type(message).__name__}.{name} is {_shown(getattr(message, name))}: "
        "not of the kind that it must be"
    )


@_by_class
def added_fields(cls: Any) -> Mapping[str, Any]:
    """The fields of a message class that came later, with their defaults."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if "added" in field.metadata:
            factory = field.default_factory
            found[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return found


@_by_class
def nested_messages(cls: Any) -> Mapping[str, type]:
    """The fields of a message class that hold a message, or several, with its class."""
    found: dict[str, type] = {}
    for name, hint in get_type_hints(cls).items():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found[name] = kind
    return found


class _Tests(NamedTuple):
    exact: list[str]
    """The fields whose values are of a few exact classes ..."""
    classes: list[frozenset[type]]
    """... which are these."""
    functions: list[tuple[str, Callable[[Any], bool]]]
    """The tests of the others."""


@_by_class
def _tests(cls: Any) -> _Tests:
    """A test of each field's value, from the annotations of the class."""
    found = _Tests([], [], [])
    for name, hint in get_type_hints(cls, include_extras=True).items():
        test = _test_of(hint)
        if isinstance(test, frozenset):
            found.exact.append(name)
            found.classes.append(test)
        elif test is not None:
            found.functions.append((name, test))
    return found


def _as_function(test: Test | None) -> Callable[[Any], bool]:
    if test is None:
        return lambda value: True
    if isinstance(test, frozenset):
        return lambda value: type(value) in test
    return test


def _test_of(hint: Any) -> Test | None:
    """The test of one annotation, or `None` if any value will do."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _test_of_annotated(*args)
    if origin in (Union, types.UnionType):
        return _any_of([_test_of(arg) for arg in args])
    if origin is tuple and args[-1] is Ellipsis:
        return _all_of((tuple,), _test_of(args[0]))
    if origin is tuple:
        return _each_of([_test_of(arg) for arg in args])
    if origin is Sequence:
        return _all_of((list, tuple), _test_of(args[0]))
    if origin is Mapping:
        return _mapping_of(args[0], args[1])
    if origin is dict:
        return lambda value: isinstance(value, dict) and all(type(key) is args[0] for key in value)
    return _test_of_class(hint)


def _test_of_annotated(hint: Any, note: object) -> Test | None:
    if note == CHECKED_AS_KEY:
        return None
    allowed: Any = note
    return lambda value: type(value) is hint and value in allowed


def _test_of_class(hint: Any) -> Test | None:
    if hint is Any:
        return None
    if hint is float:
        # An int will do, if a float can hold it in any case: JSON has one kind of number.
        return lambda value: type(value) is float or (type(value) is int and abs(value) < 2**63)
    if hint is Tensor:
        return lambda value: isinstance(value, Tensor)
    if dataclasses.is_dataclass(hint):
        return lambda value: type(value) is hint and check_types(value) is value
    return frozenset((hint,))


def _any_of(tests: Sequence[Test | None]) -> Test:
    exact = [test for test in tests if isinstance(test, frozenset)]
    if len(exact) == len(tests):
        return frozenset().union(*exact)
    functions = [_as_function(test) for test in tests]
    return lambda value: any(is_right(value) for is_right in functions)


def _all_of(kinds: tuple[type, ...], test: Test | None) -> Test:
    is_right = _as_function(test)

    def passes(value: Any) -> bool:
        if not isinstance(value, kinds):
            return False
        items: Any = value
        return all(map(is_right, items))

    return passes


def _each_of(tests: Sequence[Test | None]) -> Test:
    functions = [_as_function(test) for test in tests]

    def passes(value: Any) -> bool:
        if not isinstance(value, tuple) or len(value) != len(functions):
            return False
        return all(is_right(item) for item, is_right in zip(value, functions, strict=True))

    return passes


def _mapping_of(key: type, kind: Any) -> Test:
    kind = object if kind is Any else kind

    def passes(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        return all(type(name) is key and isinstance(item, kind) for name, item in value.items())

    return passes


def _shown(value: Any) -> str:
    """A value for an error: plain ones as they are, others by class, since they may hold data."""
    if value is None or isinstance(value, int | float | str):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"
