"""Trying again: what may pass, and what a server asks for."""

from __future__ import annotations

import pytest
from urllib3.exceptions import NewConnectionError, ProtocolError, SSLError

from splitfed.service.http.retry import asked_for, passes, reason

NOBODY = NewConnectionError(None, "refused")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "first", "later"),
    [
        (NOBODY, False, True),
        (SSLError("expired"), False, False),
        (ProtocolError("broken"), True, True),
        (ConnectionResetError(), True, True),
    ],
)
def test_what_may_pass(error: Exception, first: bool, later: bool) -> None:
    """A server that nobody has met may be a wrong URL; no pause mends a certificate."""
    assert passes(error, met=False) == first
    assert passes(error, met=True) == later


def test_a_retry_after_that_can_t_be_read_asks_for_nothing() -> None:
    """A number, a date that is over, nonsense, nothing."""
    assert asked_for("7") == 7.0
    assert asked_for("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0
    assert asked_for("soon") is None
    assert asked_for("Thu, 01 Jan 99999 00:00:00 GMT") is None
    assert asked_for("9" * 5000) is None
    assert asked_for(None) is None


def test_a_reason_has_its_class_and_what_urllib3_wraps() -> None:
    """One line for a message."""
    assert reason(ProtocolError("broken")) == "ProtocolError: broken"
    wrapped = ProtocolError("outer")
    wrapped.reason = OSError("inner")  # type: ignore[attr-defined]
    assert reason(wrapped) == "ProtocolError: inner"
