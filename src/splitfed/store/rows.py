"""Rows: what a run tells of itself, as plain dicts that are one line of JSON each.

A row says what it is about by its `kind`: `run` (who takes part, with which settings), `commit`
(one version of one lineage), `round` (one round's report). A key that its source couldn't know is
absent, never invented. A row in memory is what a reader of the file would get: keys are strings,
and a number that isn't finite is `None`, for JSON has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from splitfed.errors import FormatError, InputError
from splitfed.protocol import checksum

Row: TypeAlias = dict[str, Any]


def plain(row: Mapping[str, Any]) -> Row:
    """A copy of the row as a reader of its JSON would get it.

    Raises:
        InputError: it has no `kind`, or holds what JSON can't.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("kind"), str):
        raise InputError(
            "a row of a history is a dict with a 'kind' such as 'round', "
            f"but this is {str(row)[:80]!r}"
        )
    try:
        try:
            written = json.dumps(row, allow_nan=False)
        except (TypeError, ValueError):
            written = json.dumps(_finite(row))
        return dict(json.loads(written))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"a row of kind {row['kind']!r} can't be JSON ({error}): expected plain values"
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_lines(rows: Iterable[Row]) -> bytes:
    """The rows as lines of JSON."""
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)


def is_file_of(data: memoryview | None, lines: bytes) -> bool:
    """Whether a file holds these lines."""
    return data is not None and checksum.text_of(data) == lines


def from_lines(data: bytes, name: str) -> list[Row]:
    """The rows in lines of JSON.

    Args:
        data: The lines.
        name: Where they were read, for the message.

    Raises:
        FormatError: a line isn't a row.
    """
    rows = []
    for number, line in enumerate(checksum.text_of(data).splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise FormatError(
                f"line {number} of {name} isn't a row of a history: "
                "expected a JSON object with a 'kind'"
            )
        rows.append(row)
    return rows
