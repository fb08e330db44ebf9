"""The charts of the page as SVG: curves over the rounds, stacked columns, commits over time.

A chart is drawn for a width of 480 and scaled to its card, so that one drawing serves a desk and a
phone; colours and the size of its text come from the page's CSS. The values under the pointer are
in the attribute `data-tip`, which the page's script shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitfed.quantities import plain, plural, span
from splitfed.tracking.report.markup import tag, text

WIDTH = 480
HEIGHT = 270
LEFT = 52
RIGHT = 14
TOP = 14
BOTTOM = 42

MOST_LINES = 40
"""With more clients than these a chart shows their range in place of their lines."""
RUN_COLOURS = 10
"""So many runs that share a page have colours of their own."""
STALENESS = ("0", "1–2", "3–5", "6 or more")
"""The classes of staleness, each with a colour of its own: see `staleness_class`."""

_STALENESS_BORDERS = (0.5, 2.5, 5.5)
_MOST_TICKS = 6
_MOST_STRIPS = 250
_MOST_POINT_MARKS = 60
_MOST_COLUMN_NAMES = 11
_MOST_COMMIT_MARKS = 400
_MOST_ROUND_ENDS = 60
_CLOCK_STEPS = (
    5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0,
    21600.0, 43200.0, 86400.0, 172800.0, 604800.0,
)  # fmt: skip
# What is a whole number of steps may differ from it in its last digits.
_ROUNDING = 1e-9

Format = Callable[[float], str]
Points = Sequence[tuple[float, float]]


# ------------------------------------------------------------------------------------- the frame


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map of values from `low` to `high` onto coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        share = self.end - self.start
        return self.start + share * (value - self.low) / ((self.high - self.low) or 1.0)


def horizontal(low: float, high: float) -> Scale:
    """A scale across a chart."""
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def vertical(low: float, high: float) -> Scale:
    """A scale up a chart."""
    return Scale(low, high, HEIGHT - BOTTOM, TOP)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers within `low` and `high`, in steps of 1, 2 or 5 times a power of ten.

    Args:
        low: The lower limit.
        high: The upper limit.
        most: How many there may be.
        whole: Whether only whole numbers make sense.
    """
    if _is_point(low, high):
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    if whole:
        step = max(step, 1.0)
    # 1, 2, 5, 10, 20, 50: a step that begins with a 2 grows by 2.5, all others double.
    while (high - low) / step > most - 1 + _ROUNDING:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    digits = max(12, 3 - math.floor(math.log10(step)))
    return [round(value, digits) for value in _multiples(step, low, high)]


def moments(low: float, high: float, most: int = _MOST_TICKS) -> list[float]:
    """Round points in time within `low` and `high`, in seconds: steps as on a clock."""
    fitting = [step for step in _CLOCK_STEPS if (high - low) / step <= most - 1]
    if not fitting or high - low <= _CLOCK_STEPS[0]:
        return ticks(low, high, most)
    return _multiples(fitting[0], low, high)


def rounded(low: float, high: float, most: int = _MOST_TICKS) -> tuple[float, float]:
    """The limits moved outwards to ticks; a single value gets room around it."""
    if _is_point(low, high):
        return low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    step = high - low
    found = ticks(low, high, most)
    if len(found) > 1:
        step = found[1] - found[0]
    first = math.floor(low / step + _ROUNDING)
    last = math.ceil(high / step - _ROUNDING)
    return first * step, last * step


def _multiples(step: float, low: float, high: float) -> list[float]:
    first = math.ceil(low / step - _ROUNDING)
    last = math.floor(high / step + _ROUNDING)
    return [step * number for number in range(first, last + 1)]


def _is_point(low: float, high: float) -> bool:
    """Whether the limits don't differ within ten digits: no readable ticks lie between them."""
    return not high - low > 1e-10 * max(abs(low), abs(high))


def frame(
    x: Scale, y: Scale, at: Sequence[float], x_title: str, x_format: Format, y_format: Format
) -> str:
    """Grid lines, the numbers on both axes, and the title of the horizontal one.

    Args:
        x: The scale across.
        y: The scale up.
        at: The values whose numbers stand below.
        x_title: The title below them.
        x_format: Writes the numbers below.
        y_format: Writes the numbers at the left.
    """
    right = WIDTH - RIGHT
    parts = []
    for value in ticks(y.low, y.high, _MOST_TICKS):
        parts.append(tag("line", class_="grid", x1=LEFT, x2=right, y1=y(value), y2=y(value)))
        parts.append(tag("text", text(y_format(value)), class_="y", x=LEFT - 8, y=y(value) + 4))
    for value in at:
        parts.append(
            tag("text", text(x_format(value)), class_="x", x=x(value), y=HEIGHT - BOTTOM + 18)
        )
    middle = (LEFT + right) / 2
    parts.append(tag("text", text(x_title), class_="x title", x=middle, y=HEIGHT - 5))
    return "".join(parts)


def chart(label: str, *content: str) -> str:
    """A whole drawing; a screen reader reads out its `label`."""
    box = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", *content, class_="chart", viewBox=box, role="img", aria_label=label)


# ---------------------------------------------------------------------------------------- curves


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Points
    client: bool = False
    """Whether it is one client's: drawn faintly, or as a part of the range if there are many."""
    dashed: bool = False
    run: int | None = None
    """The number of its run, where several share a chart: each has a colour of its own."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The horizontal axis of a chart of curves."""

    title: str
    format: Format
    at: Callable[[float, float], Sequence[float]]
    """The round values between two limits."""


def curves(
    label: str,
    lines: Sequence[Curve],
    axis: Axis,
    y_format: Format,
    *,
    ceiling: float | None = None,
) -> str:
    """Lines over one another: one for the run, a faint one for each client.

    Args:
        label: The chart's description for screen readers.
        lines: At least one, with a point at least.
        axis: The horizontal axis.
        y_format: Writes the values.
        ceiling: A value above which the chart doesn't extend, such as 1 for an accuracy; ignored
            if a line exceeds it.
    """
    x, y = _scales(lines, ceiling)
    own = [line for line in lines if not line.client]
    clients = [line for line in lines if line.client]
    body = [frame(x, y, axis.at(x.low, x.high), axis.title, axis.format, y_format)]
    if len(clients) > MOST_LINES:
        body.append(_band(clients, x, y))
    else:
        body += [_path(line, x, y) for line in clients]
    # After the clients' lines, so that the run's own lie on top; the strips cover them all, or
    # a line would take the pointer from them.
    body += [_path(line, x, y) + _point_marks(line, x, y) for line in own]
    # Of several runs the values would lie on one another: they are in the page's table.
    body += [_last_value(line, x, y, y_format) for line in own[:1] if line.run is None]
    return chart(label, *body, _strips(own, clients, x, axis, y_format))


def _scales(lines: Sequence[Curve], ceiling: float | None) -> tuple[Scale, Scale]:
    """The scales that all points fit in."""
    points = [point for line in lines for point in line.points]
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    left = min(xs)
    right = max(xs)
    # A single round has no width: with room on both sides its point lies in the middle.
    if left == right:
        left -= 1
        right += 1
    bottom, top = rounded(min(ys), max(ys))
    # Rounding outwards must not show values that can't be: negative losses, an accuracy of 1.2.
    if min(ys) >= 0:
        bottom = max(bottom, 0.0)
    if ceiling is not None and max(ys) <= ceiling:
        top = min(top, ceiling)
    return horizontal(left, right), vertical(bottom, top)


def _path(line: Curve, x: Scale, y: Scale) -> str:
    way = _way([(x(a), y(b)) for a, b in line.points])
    if line.client:
        return tag("path", class_="curve client", d=way, data_client=line.name)
    if line.run is not None:
        return tag("path", class_=f"curve {run_class(line.run)}", d=way, data_run=line.name)
    return tag("path", class_="curve dashed" if line.dashed else "curve main", d=way)


def run_class(number: int) -> str:
    """The CSS class of the colour of a run, where several share a page."""
    return f"r{number % RUN_COLOURS}"


def _way(points: Points) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _point_marks(line: Curve, x: Scale, y: Scale) -> str:
    """A circle at each point; none on a line that is dashed or would be covered by them."""
    if len(line.points) > _MOST_POINT_MARKS or line.dashed or line.run is not None:
        return ""
    return "".join(tag("circle", class_="dot", cx=x(a), cy=y(b), r=2.6) for a, b in line.points)


def _band(lines: Sequence[Curve], x: Scale, y: Scale) -> str:
    """The range from the lowest client to the highest."""
    ranges = sorted(_ranges(lines).items())
    upper = [(x(a), y(high)) for a, (_, high) in ranges]
    lower = [(x(a), y(low)) for a, (low, _) in reversed(ranges)]
    return tag("path", class_="band", d=_way(upper + lower) + "Z")


def _ranges(lines: Sequence[Curve]) -> dict[float, tuple[float, float]]:
    """At each place the lowest and the highest value of the lines."""
    found: dict[float, tuple[float, float]] = {}
    for line in lines:
        for a, b in line.points:
            low, high = found.get(a, (b, b))
            found[a] = (min(low, b), max(high, b))
    return found


def _last_value(line: Curve, x: Scale, y: Scale, y_format: Format) -> str:
    """The last value as text, above its point; below it where the chart ends above."""
    a, b = line.points[-1]
    above = y(b) - 10
    place = y(b) + 20 if above < TOP + 8 else above
    return tag("text", text(y_format(b)), class_="last", x=min(x(a), WIDTH - 8), y=place)


def _strips(
    own: Sequence[Curve], clients: Sequence[Curve], x: Scale, axis: Axis, y_format: Format
) -> str:
    """Invisible strips, one at each point, with the values there for the pointer."""
    places = sorted({a for line in own or clients for a, _ in line.points})
    # More strips than pixels can't be hit: with a thousand rounds every fourth has one.
    places = places[:: math.ceil(len(places) / _MOST_STRIPS)]
    middles = [(x(a) + x(b)) / 2 for a, b in itertools.pairwise(places)]
    # At the ends there is no middle to a neighbour: four units beyond the outermost points.
    edges = [x(places[0]) - 4, *middles, x(places[-1]) + 4]
    values = [(line.name, dict(line.points)) for line in own]
    ranges = _ranges(clients)
    parts = []
    for a, (left, right) in zip(places, itertools.pairwise(edges), strict=True):
        tip = [f"{axis.title} {axis.format(a)}"]
        tip += [f"{name} {y_format(points[a])}" for name, points in values if a in points]
        if a in ranges:
            low, high = ranges[a]
            tip.append(f"clients {y_format(low)} to {y_format(high)}")
        parts.append(
            tag(
                "rect",
                class_="strip",
                x=left,
                width=max(right - left, 1.0),
                y=TOP,
                height=HEIGHT - TOP - BOTTOM,
                data_tip="\n".join(tip),
            )
        )
    return "".join(parts)


# --------------------------------------------------------------------------------------- columns


def stacked(
    label: str,
    columns: Sequence[tuple[str, Mapping[str, float]]],
    kinds: Mapping[str, str],
    x_title: str,
) -> str:
    """A stacked column per entry.

    Args:
        label: The chart's description for screen readers.
        columns: The name of each, and how much it has of each kind.
        kinds: The kinds from the bottom up: a CSS class, and its name.
        x_title: The title of the horizontal axis.
    """
    highest = max((sum(held.values()) for _, held in columns), default=0) or 1
    x = horizontal(0.5, len(columns) + 0.5)
    y = vertical(0, rounded(0, highest)[1])
    named = _named_columns(len(columns))
    parts = [frame(x, y, named, x_title, lambda number: columns[int(number) - 1][0], plain)]
    for number, (name, held) in enumerate(columns, 1):
        there = {kind: held[kind] for kind in kinds if held.get(kind)}
        if there:
            tip = [f"{x_title} {name}"]
            tip += [f"{kinds[kind]}: {plain(amount)}" for kind, amount in there.items()]
            parts.append(tag("g", *_bars(number, there, x, y), data_tip="\n".join(tip)))
    return chart(label, *parts)


def _named_columns(count: int) -> list[float]:
    """The numbers of the columns with a name below: all of a few, else as many as an axis has."""
    most = _MOST_COLUMN_NAMES if count <= _MOST_COLUMN_NAMES else _MOST_TICKS
    found = ticks(0.5, count + 0.5, most + 1, whole=True)
    return [number for number in found if number >= 1]


def _bars(number: int, held: Mapping[str, float], x: Scale, y: Scale) -> list[str]:
    """The parts of one column, which stand on one another."""
    width = min(0.72 * (x(2) - x(1)), 34)
    left = x(number) - width / 2
    bottom = 0.0
    bars = []
    for kind, amount in held.items():
        top = bottom + amount
        place = {"x": left, "y": y(top), "width": width, "height": y(bottom) - y(top)}
        bars.append(tag("rect", class_=f"bar {kind}", rx=1.5, **place))
        bottom = top
    return bars


# -------------------------------------------------------------------------------------- timeline


@dataclass(frozen=True, slots=True)
class Dot:
    """A mark on the timeline: one commit, or several that lie close together."""

    time: float
    """In seconds since the run began."""
    delay: float | None
    """How long its batches were pending, in seconds on average."""
    staleness: float
    """In commits, on average."""
    num_batches: int
    lineage: str
    versions: tuple[int, int]
    """The first and the last."""


def staleness_class(staleness: float) -> str:
    """The CSS class of a staleness, a mean one too: `s0` to `s3`, in the order of `STALENESS`."""
    return f"s{sum(staleness > border for border in _STALENESS_BORDERS)}"


def timeline(label: str, dots: Sequence[Dot], boundaries: Sequence[float]) -> str:
    """Commits over time; the colour of a mark is its staleness, its area the number of batches.

    Args:
        label: The chart's description for screen readers.
        dots: The commits. The vertical axis is their delay, or the number of batches if a delay
            isn't known.
        boundaries: When rounds ended, in seconds.
    """
    dots = merged(dots)
    heights, y_format = _heights(dots)
    end = max([*boundaries, *(dot.time for dot in dots)])
    x = horizontal(0, end or 1)
    y = vertical(0, rounded(0, max(heights) or 1)[1])
    largest = max(dot.num_batches for dot in dots)
    parts = [frame(x, y, moments(0, x.high), "time since the start", span, y_format)]
    for at in boundaries[:_MOST_ROUND_ENDS]:
        parts.append(tag("line", class_="round", x1=x(at), x2=x(at), y1=y.start, y2=y.end))
    for dot, height in zip(dots, heights, strict=True):
        radius = 2.5 + 4.5 * math.sqrt(dot.num_batches / (largest or 1))
        parts.append(_commit_mark(dot, x(dot.time), y(height), radius))
    return chart(label, *parts)


def _heights(dots: Sequence[Dot]) -> tuple[list[float], Format]:
    """The height of each commit, and how heights are written."""
    delays = [dot.delay for dot in dots if dot.delay is not None]
    if len(delays) == len(dots):
        return delays, span
    return [float(dot.num_batches) for dot in dots], plain


def merged(dots: Sequence[Dot]) -> list[Dot]:
    """At most some hundred dots a lineage: those that follow one another are averaged."""
    found = []
    for lineage in dict.fromkeys(dot.lineage for dot in dots):
        own = [dot for dot in dots if dot.lineage == lineage]
        step = math.ceil(len(own) / _MOST_COMMIT_MARKS)
        found += [_average(own[first : first + step]) for first in range(0, len(own), step)]
    return found


def _average(dots: Sequence[Dot]) -> Dot:
    delays = [dot.delay for dot in dots if dot.delay is not None]
    return Dot(
        time=sum(dot.time for dot in dots) / len(dots),
        delay=sum(delays) / len(delays) if delays else None,
        staleness=sum(dot.staleness for dot in dots) / len(dots),
        num_batches=sum(dot.num_batches for dot in dots),
        lineage=dots[0].lineage,
        versions=(dots[0].versions[0], dots[-1].versions[1]),
    )


def _commit_mark(dot: Dot, a: float, b: float, radius: float) -> str:
    """A circle for a commit of the body, a diamond for one of client halves."""
    class_ = f"commit {staleness_class(dot.staleness)}"
    tip = "\n".join(_commit_tip(dot))
    if dot.lineage == "client":
        r = f"{radius:.1f}"
        way = f"M{a:.1f} {b - radius:.1f}l{r} {r}l-{r} {r}l-{r} -{r}Z"
        return tag("path", class_=class_, d=way, data_tip=tip)
    return tag("circle", class_=class_, cx=a, cy=b, r=radius, data_tip=tip)


def _commit_tip(dot: Dot) -> list[str]:
    first, last = dot.versions
    versions = f"version {first}" if first == last else f"versions {first} to {last}"
    tip = [
        f"{dot.lineage}, {versions}",
        f"at {span(dot.time)}",
        plural(dot.num_batches, "batch", "batches"),
    ]
    if dot.delay is not None:
        tip.append(f"waited {span(dot.delay)} on average")
    tip.append(f"staleness {dot.staleness:.3g} on average")
    return tip
