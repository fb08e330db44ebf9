"""Ids that may become keys, the id of a batch, and the numbers that go with it.

A client id is a path component of the store and part of a URL, so its pattern is strict and checked
before anything is built from it: no separator, no dot at the front, no wildcard, no query, ASCII
only, at most 64 characters. Incarnations and sequence numbers are plain integers, zero-padded in
keys so that a listing sorts as the numbers do.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from splitfed.errors import IdError

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LINEAGE = re.compile(r"body|client|body@[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_NUMBER = 10**12 - 1


class BatchId(NamedTuple):
    """The idempotency key of one backward pass: `client_id/incarnation/seq`.

    Ids sort in the canonical order.
    """

    client_id: str
    incarnation: int
    seq: int

    def __str__(self) -> str:
        return f"{self.client_id}/{self.incarnation}/{self.seq}"


def check_client_id(client_id: object) -> str:
    """Return `client_id` if it may become a key.

    Raises:
        IdError: it doesn't match `[A-Za-z0-9][A-Za-z0-9_.-]*` with at most 64 characters.
    """
    if not isinstance(client_id, str) or not _CLIENT_ID.fullmatch(client_id):
        raise IdError(
            f"client id {str(client_id)[:80]!r} isn't allowed: "
            "expected 1 to 64 of the characters A-Z a-z 0-9 _ . "
            "- beginning with a letter or digit, such as 'hospital-a'"
        )
    return client_id


def check_lineage(lineage: object) -> str:
    """Return `lineage` if it is `body`, `client` or `body@<id>`.

    Raises:
        IdError: it is none of these.
    """
    if not isinstance(lineage, str) or not _LINEAGE.fullmatch(lineage):
        raise IdError(
            f"lineage {str(lineage)[:80]!r} isn't allowed: expected 'body', "
            "'client' or 'body@<client id>'"
        )
    return lineage


def check_number(name: str, value: object) -> int:
    """Return `value` if it may be the number of a version, incarnation, batch or call.

    That is an integer from 0 to 10¹² − 1.

    Raises:
        IdError: it is not.
    """
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise IdError(
            f"{name} {str(value)[:40]!r} isn't allowed: expected an integer from 0 to {MAX_NUMBER}"
        )
    return value
