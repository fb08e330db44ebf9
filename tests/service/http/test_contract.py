"""Errors as JSON: each arrives as its class, and what isn't ours is told from what is."""

from __future__ import annotations

import inspect

import pytest

from splitfed import errors
from splitfed.errors import SplitFedError
from splitfed.service.http.contract import decode_error, encode_error

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_arrives_as_its_class_with_its_message(kind: type[SplitFedError]) -> None:
    """Every class of the tree, in any script."""
    found = decode_error(encode_error(kind("expected ḡ, got g")))
    assert type(found) is kind
    assert str(found) == "expected ḡ, got g"


def test_an_unforeseen_exception_tells_its_class_only() -> None:
    """Its text may quote a path or a secret."""
    found = decode_error(encode_error(KeyError("secret")))
    assert type(found) is SplitFedError
    assert "KeyError" in str(found)
    assert "secret" not in str(found)


def test_names_from_outside_the_tree_are_only_text() -> None:
    """A hostile server can't choose what is raised, beyond our own errors."""
    found = decode_error(b'{"error": "KeyboardInterrupt", "message": "x"}')
    assert type(found) is SplitFedError
    assert "KeyboardInterrupt" in str(found)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"[]", b"3", b'{"error": "IdError"}', b"\xff", b"[" * 100_000], ids=lambda data: data[:8]
)
def test_what_isn_t_an_error_of_ours_is_none(data: bytes) -> None:
    """A proxy's page, for one."""
    assert decode_error(data) is None
