"""The error tree: drawn as it is, each error also the builtin that a caller would catch, each with its HTTP status."""

from __future__ import annotations

import builtins
import inspect
import pickle
import re

import pytest

import splitfed
from splitfed import errors
from splitfed.errors import SplitFedError

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]
_LINE = re.compile(r"    ((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w*)(?:\((\w+)\))?")


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """The tree in the module's docstring: (parent, builtin) by name."""
    found: dict[str, tuple[str | None, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.match(line)
        if match is None or not match[2].endswith("Error"):
            continue
        depth = len(match[1]) // 4
        path = [*path[:depth], match[2]]
        found[match[2]] = (path[depth - 1] if depth else None, match[3])
    return found


def test_the_drawing_has_every_error_and_no_other() -> None:
    """Who reads the top of the file has seen them all."""
    assert sorted(drawn()) == sorted(cls.__name__ for cls in CLASSES)
    assert len(CLASSES) > 20


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_stands_where_it_is_drawn(cls: type[SplitFedError]) -> None:
    """Its parent is the one above it, and it is the builtin in its brackets."""
    parent, builtin = drawn()[cls.__name__]
    ours = [base.__name__ for base in cls.__bases__ if base in CLASSES]
    others = [base.__name__ for base in cls.__bases__ if base not in CLASSES]
    assert ours == ([] if parent is None else [parent])
    assert others == (["Exception"] if parent is None else [builtin] if builtin else [])
    assert issubclass(cls, SplitFedError)
    assert builtin is None or issubclass(cls, getattr(builtins, builtin))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_has_a_status_a_docstring_and_a_public_name(cls: type[SplitFedError]) -> None:
    """A service can answer with it, and a user can import it from the package."""
    assert isinstance(cls.status, int)
    assert 400 <= cls.status <= 599
    assert inspect.getdoc(cls)
    assert getattr(splitfed, cls.__name__) is cls


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_crosses_a_process_as_itself(cls: type[SplitFedError]) -> None:
    """Made from its message alone: that is all that a wire carries."""
    again = pickle.loads(pickle.dumps(cls("what, and how to mend it")))
    assert type(again) is cls
    assert str(again) == "what, and how to mend it"


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (errors.ExpiredError, 410),
        (errors.MissingError, 404),
        (errors.ArchitectureError, 409),
        (errors.SupersededError, 409),
        (errors.DigestError, 422),
        (errors.BusyError, 429),
        (errors.IdError, 400),
        (errors.StoreError, 503),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_statuses_that_clients_act_upon(cls: type[SplitFedError], status: int) -> None:
    """A retry, a lost batch and a wrong request must be told apart by the number alone."""
    assert cls.status == status
