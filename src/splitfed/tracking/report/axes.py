"""The frame of a chart: scales, round ticks, grid lines, titles.

A chart is drawn for a width of 480 and scaled to its card, so that one drawing serves a desk and a phone; colours and
the size of its text come from the page's CSS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitfed.tracking.report.markup import tag, text

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 42

_CLOCK = (
    5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 21600.0, 43200.0, 86400.0,
    172800.0, 604800.0,
)  # fmt: skip

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` onto coordinates from `start` to `end`, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        return self.start + (self.end - self.start) * (value - self.low) / ((self.high - self.low) or 1.0)


def horizontal(low: float, high: float) -> Scale:
    """A scale across a chart."""
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def vertical(low: float, high: float) -> Scale:
    """A scale up a chart."""
    return Scale(low, high, HEIGHT - BOTTOM, TOP)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers within `low` and `high`, in steps of 1, 2 or 5 times a power of ten.

    Args:
        low: Where they may begin.
        high: Where they may end.
        most: How many there may be.
        whole: Whether only whole numbers make sense.
    """
    if _is_point(low, high):
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    if whole:
        step = max(step, 1.0)
    while (high - low) / step > most - 1 + 1e-9:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(12, 3 - math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]


def _is_point(low: float, high: float) -> bool:
    """Whether there are no ten digits in which these differ: then no ticks that one could read lie between them."""
    return not high - low > 1e-10 * max(abs(low), abs(high))


def rounded(low: float, high: float, most: int = 6) -> tuple[float, float]:
    """The limits moved outwards to ticks."""
    if _is_point(low, high):
        return (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    step = (found := ticks(low, high, most))[1] - found[0] if len(ticks(low, high, most)) > 1 else high - low
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def moments(low: float, high: float, most: int = 6) -> list[float]:
    """Round points in time within `low` and `high`, in seconds: steps as on a clock."""
    step = next((step for step in _CLOCK if (high - low) / step <= most - 1), 0.0)
    if not step or high - low <= _CLOCK[0]:
        return ticks(low, high, most)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def frame(x: Scale, y: Scale, at: Sequence[float], x_title: str, x_format: Format, y_format: Format) -> str:
    """Grid lines, the numbers on both axes, and what the horizontal one is.

    Args:
        x: The scale across.
        y: The scale up.
        at: Where numbers stand below.
        x_title: What stands below them.
        x_format: Writes the numbers below.
        y_format: Writes the numbers at the left.
    """
    parts = []
    for value in ticks(y.low, y.high, 6):
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value)))
        parts.append(tag("text", text(y_format(value)), class_="y", x=LEFT - 8, y=y(value) + 4))
    for value in at:
        parts.append(tag("text", text(x_format(value)), class_="x", x=x(value), y=HEIGHT - BOTTOM + 18))
    parts.append(tag("text", text(x_title), class_="x title", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5))
    return "".join(parts)


def chart(label: str, *content: str, class_: str = "") -> str:
    """A whole drawing; `label` is what a screen reader says of it."""
    return tag(
        "svg", *content, class_=f"chart {class_}".strip(), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label
    )
