"""Keeping credentials out of messages: they end up in logs, tickets and, from a server, in a client's hands.

A store's URL and its options may hold passwords and tokens, and client libraries like to quote both in their errors. So
what is shown of either passes through here first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OPTION = re.compile(r"secret|token|key|passw|cred|sas|connection_string|auth", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s'\"]*@|(?<=\?)[^\s'\"]+")  # the user part, and a query such as a signature
_VALUE = re.compile(r"[:=]([^&@]{4,})")  # a password or a query's value, when it is quoted alone


class Redactor:
    """Replaces by `***` the secrets of `url` and `options`, and the user part and query of any URL."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        parts = _IN_URL.findall(url)
        secrets = {value for part in parts for value in (part, *_VALUE.findall(part))} | {*_values(options)} - {""}
        self._secrets = sorted(secrets, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return `text` without secrets."""
        text = _IN_URL.sub("***", text)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _values(options: Mapping[str, Any]) -> list[str]:
    """Return the options whose names tell of credentials, nested ones included."""
    found = [value for name, value in options.items() if isinstance(value, str) and _OPTION.search(name)]
    for value in options.values():
        found += _values(value) if isinstance(value, Mapping) else []
    return found
