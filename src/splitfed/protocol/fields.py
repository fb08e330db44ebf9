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
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress, repeat
from operator import attrgetter, not_
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
    if not all(map(_HAS, tests.classes, map(type, tests.values(message)))):
        fits = map(_HAS, tests.classes, map(type, tests.values(message)))
        raise _of_another_kind(message, next(compress(tests.exact, map(not_, fits))))
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
    """... which are these ..."""
    values: Callable[[Any], Iterable[Any]]
    """... and what reads the values of a message."""
    functions: list[tuple[str, Callable[[Any], bool]]]
    """The tests of the others."""


@_by_class
def _tests(cls: Any) -> _Tests:
    """A test of each field's value, from the annotations of the class."""
    exact: list[str] = []
    classes: list[frozenset[type]] = []
    functions: list[tuple[str, Callable[[Any], bool]]] = []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        test = _test_of(hint)
        if isinstance(test, frozenset):
            exact.append(name)
            classes.append(test)
        elif test is not None:
            functions.append((name, test))
    # Of a single name an attrgetter makes no tuple.
    values = (
        attrgetter(*exact)
        if len(exact) > 1
        else lambda message: map(getattr, repeat(message), exact)
    )
    return _Tests(exact, classes, values, functions)


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
        keys = frozenset((args[0],))
        return lambda value: isinstance(value, dict) and keys.issuperset(map(type, value))
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
    functions = [_as_function(test) for test in tests if not isinstance(test, frozenset)]
    classes = frozenset[type]().union(*exact)

    def passes(value: Any) -> bool:
        if type(value) in classes:
            return True
        for is_right in functions:  # noqa: SIM110 -- a generator costs more than the test
            if is_right(value):
                return True
        return False

    return passes


def _all_of(kinds: tuple[type, ...], test: Test | None) -> Test:
    classes = test if isinstance(test, frozenset) else None
    is_right = _as_function(test)

    def passes(value: Any) -> bool:
        if not isinstance(value, kinds):
            return False
        items: Any = value
        if classes is not None:
            return classes.issuperset(map(type, items))
        return all(map(is_right, items))

    return passes


def _each_of(tests: Sequence[Test | None]) -> Test:
    functions = [_as_function(test) for test in tests]

    def passes(value: Any) -> bool:
        if not isinstance(value, tuple) or len(value) != len(functions):
            return False
        for item, is_right in zip(value, functions, strict=True):  # noqa: SIM110 -- as above
            if not is_right(item):
                return False
        return True

    return passes


def _mapping_of(key: type, kind: Any) -> Test:
    kind = object if kind is Any else kind

    def passes(value: Any) -> bool:
        if not isinstance(value, dict | Mapping):  # a dict is known as one much sooner
            return False
        for name, item in value.items():
            if type(name) is not key or not isinstance(item, kind):
                return False
        return True

    return passes


def _shown(value: Any) -> str:
    """A value for an error: plain ones as they are, others by class, since they may hold data."""
    if value is None or isinstance(value, int | float | str):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"
