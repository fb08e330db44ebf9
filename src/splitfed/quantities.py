"""Bytes, times, counts and shares as people read them: in one place, so that all pages agree.

Three significant digits are what an eye compares; a number never gets a fourth by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

_BYTES = ("B", "kB", "MB", "GB", "TB")


def size(num_bytes: float) -> str:
    """A number of bytes, in steps of a thousand: 999 B, 1.5 kB, 12.3 MB."""
    step = 0
    # From 999.5 on, three digits would be rounded to 1e+03.
    while abs(num_bytes) >= 999.5 and step < len(_BYTES) - 1:
        num_bytes /= 1000
        step += 1
    return f"{digits(num_bytes)} {_BYTES[step]}"


def digits(value: float) -> str:
    """A number with three significant digits, and never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def span(seconds: float) -> str:
    """A time span, given in seconds, in the largest unit of which there are two."""
    for name, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{digits(seconds / length)} {name}"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms"


def age(seconds: float) -> str:
    """How long ago something was, roughly: 59 s, 2 min, 3 h, 4 days."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def percent(share: float) -> str:
    """A share of one as per cent."""
    return f"{100 * share:.3g} %"


def plain(value: float) -> str:
    """A number with three significant digits, or a whole one with its thousands separated."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun."""
    if count == 1:
        return f"{count:,} {one}"
    return f"{count:,} {many or one + 's'}"


def counts(numbers: Mapping[int, int]) -> str:
    """How many of each: '0: 12, 1: 3'; '-' for none."""
    return ", ".join(f"{key}: {count}" for key, count in sorted(numbers.items())) or "-"
