"""Columns and dots: how many of what by round, how stale gradients were, when commits came and how long they waited."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitfed.tracking.report.axes import Format, Scale, chart, frame, horizontal, moments, rounded, ticks, vertical
from splitfed.tracking.report.markup import plain, plural, span, tag

STALENESS = ("0", "1–2", "3–5", "6 or more")
_LOWEST = (0.5, 2.5, 5.5)  # of the mean staleness: the borders of the classes above
_MOST_DOTS = 400
_MOST_NAMES = 11


@dataclass(frozen=True, slots=True)
class Dot:
    """One commit, or several that lie close together, on the timeline."""

    time: float
    """In seconds since the run began."""
    delay: float | None
    """How long its batches waited, in seconds on average."""
    staleness: float
    """In commits, on average."""
    num_batches: int
    lineage: str
    versions: tuple[int, int]
    """The first and the last."""


def stacked(
    label: str, columns: Sequence[tuple[str, Mapping[str, float]]], kinds: Mapping[str, str], x_title: str
) -> str:
    """Draw a stacked column per entry.

    Args:
        label: What the chart shows, for who can't see it.
        columns: What each is called, and how much it has of each kind.
        kinds: The kinds from the bottom up: a CSS class, and what it is called.
        x_title: What lies below.
    """
    high = max((sum(held.values()) for _, held in columns), default=0) or 1
    x, y = horizontal(0.5, len(columns) + 0.5), vertical(0, rounded(0, high)[1])
    most = _MOST_NAMES if len(columns) <= _MOST_NAMES else 6
    at = [value for value in ticks(0.5, len(columns) + 0.5, most + 1, whole=True) if value >= 1]
    parts = [frame(x, y, at, x_title, lambda value: columns[int(value) - 1][0], plain)]
    for number, (title, held) in enumerate(columns, 1):
        there = [kind for kind in kinds if held.get(kind)]
        tip = [f"{x_title} {title}", *(f"{kinds[kind]}: {plain(held[kind])}" for kind in there)]
        parts.append(tag("g", *_column(number, held, there, x, y), data_tip="\n".join(tip)) if there else "")
    return chart(label, *parts)


def _column(number: int, held: Mapping[str, float], kinds: Sequence[str], x: Scale, y: Scale) -> list[str]:
    width = min(0.72 * (x(2) - x(1)), 34)
    bottom, bars = 0.0, []
    for kind in kinds:
        top = bottom + held[kind]
        place = {"x": x(number) - width / 2, "y": y(top), "width": width, "height": y(bottom) - y(top)}
        bars.append(tag("rect", class_=f"bar {kind}", rx=1.5, **place))
        bottom = top
    return bars


def timeline(label: str, dots: Sequence[Dot], boundaries: Sequence[float]) -> str:
    """Draw each commit where it came about: across, when; up, how long its batches had waited; colour, staleness.

    Args:
        label: What the chart shows, for who can't see it.
        dots: The commits; without their delays, the number of batches is what goes up.
        boundaries: When rounds ended, in seconds.
    """
    dots = merged(dots)
    known = all(dot.delay is not None for dot in dots)
    end = max([dot.time for dot in dots] + list(boundaries))
    heights = [dot.delay if known and dot.delay is not None else float(dot.num_batches) for dot in dots]
    x, y = horizontal(0, end or 1), vertical(0, rounded(0, max(heights) or 1)[1])
    y_format: Format = span if known else plain
    largest = max(dot.num_batches for dot in dots)
    parts = [frame(x, y, moments(0, x.high), "time since the start", span, y_format)]
    parts += [tag("line", class_="round", x1=x(at), x2=x(at), y1=y.start, y2=y.end) for at in boundaries[:60]]
    parts += [_dot(dot, height, x, y, largest) for dot, height in zip(dots, heights, strict=True)]
    return chart(label, *parts)


def merged(dots: Sequence[Dot]) -> list[Dot]:
    """At most some hundred dots a lineage: those that follow one another are averaged."""
    found = []
    for lineage in dict.fromkeys(dot.lineage for dot in dots):
        own = [dot for dot in dots if dot.lineage == lineage]
        step = -(-len(own) // _MOST_DOTS)
        found += [_merge(own[first : first + step]) for first in range(0, len(own), step)]
    return found


def _merge(dots: Sequence[Dot]) -> Dot:
    delays = [dot.delay for dot in dots if dot.delay is not None]
    return Dot(
        time=sum(dot.time for dot in dots) / len(dots),
        delay=sum(delays) / len(delays) if delays else None,
        staleness=sum(dot.staleness for dot in dots) / len(dots),
        num_batches=sum(dot.num_batches for dot in dots),
        lineage=dots[0].lineage,
        versions=(dots[0].versions[0], dots[-1].versions[1]),
    )


def _dot(dot: Dot, height: float, x: Scale, y: Scale, largest: int) -> str:
    first, last = dot.versions
    tip = [
        f"{dot.lineage}, version {first}" if first == last else f"{dot.lineage}, versions {first} to {last}",
        f"at {span(dot.time)}",
        plural(dot.num_batches, "batch", "batches"),
        *([] if dot.delay is None else [f"waited {span(dot.delay)} on average"]),
        f"staleness {dot.staleness:.3g} on average",
    ]
    kind = f"s{sum(dot.staleness > border for border in _LOWEST)}"
    radius = 2.5 + 4.5 * math.sqrt(dot.num_batches / (largest or 1))
    a, b = x(dot.time), y(height)
    if dot.lineage == "client":
        r = f"{radius:.1f}"
        way = f"M{a:.1f} {b - radius:.1f}l{r} {r}l-{r} {r}l-{r} -{r}Z"
        return tag("path", class_=f"commit {kind}", d=way, data_tip="\n".join(tip))
    return tag("circle", class_=f"commit {kind}", cx=a, cy=b, r=radius, data_tip="\n".join(tip))
