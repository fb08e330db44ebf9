"""Curves over the rounds: one for the run, a faint one for each client, and what they say where the pointer is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitfed.tracking.report.axes import (
    BOTTOM,
    HEIGHT,
    TOP,
    WIDTH,
    Format,
    Scale,
    chart,
    frame,
    horizontal,
    rounded,
    vertical,
)
from splitfed.tracking.report.markup import tag, text

Points = Sequence[tuple[float, float]]
MOST_LINES = 40
_MOST_STRIPS = 250


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Points
    client: bool = False
    """Whether it is one client's: drawn faintly, or as a part of the range if there are many."""
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What lies below a chart."""

    title: str
    format: Format
    at: Callable[[float, float], Sequence[float]]
    """The round values between two limits."""


def curves(label: str, lines: Sequence[Curve], axis: Axis, y_format: Format, *, ceiling: float | None = None) -> str:
    """Draw lines over one another.

    Args:
        label: What the chart shows, for who can't see it.
        lines: At least one, with a point at least.
        axis: What lies below.
        y_format: Writes the values.
        ceiling: What no value should exceed, such as 1 for an accuracy; none if one does.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = rounded(min(ys), max(ys))
    x = horizontal(min(xs) - (len(set(xs)) == 1), max(xs) + (len(set(xs)) == 1))
    top = high if ceiling is None or max(ys) > ceiling else min(high, ceiling)
    y = vertical(low if min(ys) < 0 else max(low, 0.0), top)
    clients, own = [line for line in lines if line.client], [line for line in lines if not line.client]
    body = [frame(x, y, axis.at(x.low, x.high), axis.title, axis.format, y_format)]
    if len(clients) > MOST_LINES:
        body.append(_band(clients, x, y))
    else:
        body += [_path(line, x, y) for line in clients]
    body += [_path(line, x, y) + _dots(line, x, y) for line in own]
    body += [_last(line, x, y, y_format) for line in own[:1]]
    return chart(label, *body, _strips(own, clients, x, axis, y_format))


def _path(line: Curve, x: Scale, y: Scale) -> str:
    kind = "client" if line.client else "dashed" if line.dashed else "main"
    way = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line.points)
    return tag("path", class_=f"curve {kind}", d=way, data_client=line.name if line.client else None)


def _dots(line: Curve, x: Scale, y: Scale) -> str:
    if len(line.points) > 60 or line.dashed:
        return ""
    return "".join(tag("circle", class_="dot", cx=x(a), cy=y(b), r=2.6) for a, b in line.points)


def _band(lines: Sequence[Curve], x: Scale, y: Scale) -> str:
    """The range from the lowest client to the highest."""
    ranges = sorted(_ranges(lines).items())
    way = [f"{x(a):.1f} {y(high):.1f}" for a, (_, high) in ranges]
    way += [f"{x(a):.1f} {y(low):.1f}" for a, (low, _) in reversed(ranges)]
    return tag("path", class_="band", d="M" + "L".join(way) + "Z")


def _ranges(lines: Sequence[Curve]) -> dict[float, tuple[float, float]]:
    found: dict[float, tuple[float, float]] = {}
    for line in lines:
        for a, b in line.points:
            low, high = found.get(a, (b, b))
            found[a] = (min(low, b), max(high, b))
    return found


def _last(line: Curve, x: Scale, y: Scale, y_format: Format) -> str:
    a, b = line.points[-1]
    below = y(b) - 10 < TOP + 8
    return tag("text", text(y_format(b)), class_="last", x=min(x(a), WIDTH - 8), y=y(b) + (20 if below else -10))


def _strips(own: Sequence[Curve], clients: Sequence[Curve], x: Scale, axis: Axis, y_format: Format) -> str:
    """Invisible strips, one at each point, that tell the values there."""
    at = sorted({a for line in own or clients for a, _ in line.points})
    at = at[:: -(-len(at) // _MOST_STRIPS)]
    values = [(line.name, dict(line.points)) for line in own]
    ranges = _ranges(clients)
    edges = [x(at[0]), *((x(a) + x(b)) / 2 for a, b in itertools.pairwise(at)), x(at[-1])]
    parts = []
    for number, a in enumerate(at):
        lines = [f"{axis.title} {axis.format(a)}"]
        lines += [f"{name} {y_format(points[a])}" for name, points in values if a in points]
        if a in ranges:
            low, high = ranges[a]
            lines.append(f"clients {y_format(low)} to {y_format(high)}")
        left, right = edges[number] - 4 * (number == 0), edges[number + 1] + 4 * (number == len(at) - 1)
        parts.append(
            tag("rect", class_="strip", x=left, width=max(right - left, 1.0), y=TOP, height=HEIGHT - TOP - BOTTOM,
                data_tip="\n".join(lines))
        )  # fmt: skip
    return "".join(parts)
