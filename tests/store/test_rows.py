"""A row in memory is what a reader of its JSON gets, and only rows are rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from splitfed.errors import FormatError, InputError
from splitfed.store.rows import from_lines, plain, to_lines


def test_a_row_is_the_one_that_its_file_gives() -> None:
    """Integer keys become strings, tuples lists, and numbers that aren't finite `None`, at any depth."""
    row = {"kind": "commit", "staleness": {0: 3, 2: 1}, "ids": ("a", "b"), "loss": math.nan, "at": [{"x": math.inf}]}
    expected = {"kind": "commit", "staleness": {"0": 3, "2": 1}, "ids": ["a", "b"], "loss": None, "at": [{"x": None}]}
    assert plain(row) == expected
    assert from_lines(to_lines([plain(row), plain(row)]), "f") == [expected, expected]


def test_a_row_is_a_copy() -> None:
    """What the caller does to its dict afterwards changes no row."""
    row: dict[str, Any] = {"kind": "round", "sampled": ["a"]}
    kept = plain(row)
    row["sampled"].append("b")
    assert kept["sampled"] == ["a"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"round": 1}, "a dict with a 'kind'"),
        ({"kind": 3}, "a dict with a 'kind'"),
        ([1], "a dict with a 'kind'"),
        ({"kind": "round", "loss": torch.ones(())}, "of kind 'round' can't be JSON .*Tensor.*expected plain values"),
    ],
)
def test_what_cant_be_a_row_is_refused(row: Any, message: str) -> None:
    """The message says what a row is."""
    with pytest.raises(InputError, match=message):
        plain(row)


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"round": 1}', b"[" * 100_000])
def test_foreign_lines_are_our_own_errors(line: bytes) -> None:
    """A line that isn't a row is named by its number and file."""
    with pytest.raises(FormatError, match=r"line 2 of runs/h\.jsonl isn't a row"):
        from_lines(b'{"kind": "round"}\n' + line + b"\n", "runs/h.jsonl")
