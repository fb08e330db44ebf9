"""Trying again: after which failures, and what a server asks for.

What may pass is a connection that breaks, a server that is away for a while or busy. What doesn't is a certificate that
isn't trusted, and a first contact that finds nobody: that is a wrong URL, and nobody should wait a minute to hear so.

What a server asks for by Retry-After is waited for, but not for ever.
"""

from __future__ import annotations

from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError
from urllib3.util import Retry


def passes(error: BaseException, *, met: bool) -> bool:
    """Whether a failure to reach a server may be over at the next try.

    Args:
        error: The failure.
        met: Whether the server has answered before.
    """
    nobody = isinstance(error, NewConnectionError | ConnectTimeoutError)
    return not isinstance(error, SSLError) and (met or not nobody)


def reason(error: BaseException) -> str:
    """A failure in words, without urllib3's wrapping."""
    inner = getattr(error, "reason", None)
    return f"{type(error).__name__}: {inner if isinstance(inner, Exception) else error}"


def asked_for(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header, a number or a date; `None` without one that can be read."""
    if retry_after is None:
        return None
    try:
        return max(0.0, Retry().parse_retry_after(retry_after))
    except (HTTPError, ValueError, OverflowError):  # the last two: a year or a number that Python can't have
        return None
