"""Trying again: after what, how long, and how often.

What may pass is a connection that breaks, a server that is away for a while or busy. What doesn't is a certificate that
isn't trusted, and a first contact that finds nobody: that is a wrong URL, and nobody should wait a minute to hear so.

The jitter comes from the system, not from `random`: a user's seeded program draws the same numbers whether or not a
request had to be repeated. What a server asks for by Retry-After is waited for, but not for ever.
"""

from __future__ import annotations

import random
import time

from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError
from urllib3.util import Retry

_FIRST_PAUSE, _LAST_PAUSE = 0.05, 5.0
_JITTER = random.SystemRandom()


class Tries:
    """The tries of one request, with longer and longer pauses between them.

    Args:
        patience: How long to go on, in seconds.
    """

    def __init__(self, patience: float) -> None:
        self._deadline = time.monotonic() + patience
        self._pause = _FIRST_PAUSE

    def wait(self, asked: float | None) -> bool:
        """Wait for the next try; false, at once, if there is none.

        Args:
            asked: What the server asks for, in seconds.
        """
        wait = max(self._pause, min(asked or 0.0, _LAST_PAUSE)) * _JITTER.uniform(0.5, 1.5)
        if time.monotonic() + wait > self._deadline:
            return False
        time.sleep(wait)
        self._pause = min(2 * self._pause, _LAST_PAUSE)
        return True


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
