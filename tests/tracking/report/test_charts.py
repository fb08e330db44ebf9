"""The report's charts: round ticks, coordinates that follow the values, and no markup from outside."""

from __future__ import annotations

import functools
import re
from xml.etree import ElementTree

import pytest

from splitfed.quantities import percent, plain, plural, size, span
from splitfed.tracking.report.charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    Curve,
    Dot,
    curves,
    horizontal,
    merged,
    moments,
    rounded,
    stacked,
    ticks,
    timeline,
    vertical,
)
from splitfed.tracking.report.markup import number, tag, text

ROUNDS = Axis("round", plain, functools.partial(ticks, most=6, whole=True))


def parsed(drawing: str) -> ElementTree.Element:
    """A drawing, which must be well-formed."""
    return ElementTree.fromstring(drawing)


def of_class(drawing: str, kind: str) -> list[ElementTree.Element]:
    """The elements of a CSS class."""
    return [element for element in parsed(drawing).iter() if kind in element.get("class", "").split()]


def tips(drawing: str) -> list[str]:
    """What the pointer is told, from left to right."""
    return [element.get("data-tip", "") for element in parsed(drawing).iter() if element.get("data-tip")]


def test_text_from_outside_never_becomes_markup() -> None:
    """Names and reasons are escaped in attributes and in text."""
    hostile = '"><script>alert(1)</script>&'
    written = tag("p", text(hostile), data_client=hostile, class_="name", title=None)
    assert "<script" not in written
    (element,) = [parsed(written)]
    assert (element.text, element.get("data-client"), element.get("class")) == (hostile, hostile, "name")
    assert "title" not in element.attrib


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(1.0), "1"),
        (number(1 / 3), "0.33"),
        (number(100.0), "100"),
        (percent(0.9512), "95.1 %"),
        (percent(1.0), "100 %"),
        (plain(1234.5), "1,234"),
        (plain(0.12345), "0.123"),
        (plain(7), "7"),
        (size(999), "999 B"),
        (size(1000), "1 kB"),
        (size(86_700_000), "86.7 MB"),
        (size(999_600), "1 MB"),
        (size(5e15), "5,000 TB"),
        (span(0), "0 s"),
        (span(0.0264), "26.4 ms"),
        (span(90), "90 s"),
        (span(150), "2.5 min"),
        (span(4 * 3600), "4 h"),
        (span(5 * 86400), "5 d"),
        (plural(1, "batch", "batches"), "1 batch"),
        (plural(1200, "client"), "1,200 clients"),
    ],
)
def test_numbers_read_as_people_write_them(written: str, expected: str) -> None:
    """Three digits that matter, and a unit of a fitting size."""
    assert written == expected


def test_ticks_are_round() -> None:
    """Steps are 1, 2 or 5 times a power of ten, or those of a clock; whole numbers where only these make sense."""
    assert ticks(0, 1, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.31, 0.87, 6) == [0.4, 0.6, 0.8]
    assert ticks(1, 20, 6, whole=True) == [5, 10, 15, 20]
    assert ticks(1, 3, 6, whole=True) == [1, 2, 3]
    assert ticks(0, 137_000, 6) == [0, 50_000, 100_000]
    assert ticks(4, 4, 6) == [4]
    assert moments(0, 400) == [0, 120, 240, 360]
    assert moments(10, 130) == [30, 60, 90, 120]
    assert moments(0, 3) == [0, 1, 2, 3]
    assert moments(0, 9e7) == [0, 2e7, 4e7, 6e7, 8e7]


def test_limits_move_outwards_to_ticks() -> None:
    """Values never touch the frame by chance, and a single value gets room around it."""
    assert rounded(0.12, 0.97) == pytest.approx((0, 1))
    assert rounded(3, 3) == (1.5, 4.5)
    assert rounded(0, 0) == (-0.5, 0.5)


@pytest.mark.parametrize("low", [0.0, 3e-16, 0.693147180559945])
def test_values_that_hardly_differ_are_drawn(low: float) -> None:
    """A loss of 1e-16, or one that moves in its last digit: the ticks are two or more, or room around one value."""
    high = low + max(1e-13 * low, 1e-45)
    bottom, top = rounded(low, high)
    assert bottom <= low < high <= top
    at = ticks(bottom, top, 6)
    assert len(at) == len(set(at)) > 1
    assert rounded(1.0, 1.0 + 1e-15) == pytest.approx((0.5, 1.5))


def test_a_ceiling_that_is_broken_is_none() -> None:
    """An accuracy of one's own in per cent doesn't turn the chart upside down."""
    drawing = curves("Accuracy", [Curve("accuracy", [(1, 20.0), (2, 90.0)])], ROUNDS, percent, ceiling=1.0)
    heights = [float(dot.get("cy", "")) for dot in of_class(drawing, "dot")]
    assert HEIGHT > heights[0] > heights[1] > 0


def test_scales_map_the_ends_to_the_ends() -> None:
    """The lowest value lies at the left and at the bottom."""
    x, y = horizontal(1, 5), vertical(0, 2)
    assert (x(1), x(3), x(5)) == (LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT)
    assert y(0) > y(1) > y(2) > 0
    assert y(0) < HEIGHT
    assert horizontal(1, 1)(1) == LEFT


def test_curves_follow_their_points() -> None:
    """One path per line; strips tell the value of each line at each round, and the range of the clients."""
    lines = [
        Curve("accuracy", [(1, 0.2), (2, 0.6), (3, 0.9)]),
        Curve("in training", [(1, 0.3), (3, 0.8)], dashed=True),
        Curve("a<b", [(1, 0.1), (2, 0.5)], client=True),
        Curve("c", [(2, 0.7)], client=True),
    ]
    drawing = curves("Accuracy", lines, ROUNDS, percent, ceiling=1.0)
    (main,) = of_class(drawing, "main")
    points = [tuple(map(float, pair.split())) for pair in main.get("d", "")[1:].split("L")]
    assert [x for x, _ in points] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert points[0][1] > points[1][1] > points[2][1]
    assert [line.get("data-client") for line in of_class(drawing, "client")] == ["a<b", "c"]
    assert [label.text for label in of_class(drawing, "last")] == ["90 %"]
    assert tips(drawing) == [
        "round 1\naccuracy 20 %\nin training 30 %\nclients 10 % to 10 %",
        "round 2\naccuracy 60 %\nclients 50 % to 70 %",
        "round 3\naccuracy 90 %\nin training 80 %",
    ]


def test_many_clients_are_a_range() -> None:
    """Fifty lines would be a smear: the lowest and the highest at each round bound a band."""
    lines = [Curve(str(n), [(1, n / 100), (2, n / 50)], client=True) for n in range(1, 51)]
    drawing = curves("Accuracy", lines, ROUNDS, percent)
    assert len(of_class(drawing, "band")) == 1
    assert of_class(drawing, "client") == []
    assert tips(drawing)[1] == "round 2\nclients 2 % to 100 %"


def test_a_single_round_and_a_thousand_are_drawn() -> None:
    """One point lies in the middle; a thousand have no dots, and no more strips than can be hit."""
    one = curves("Loss", [Curve("loss", [(1, 0.5)])], ROUNDS, plain)
    (dot,) = of_class(one, "dot")
    assert float(dot.get("cx", "")) == (LEFT + WIDTH - RIGHT) / 2
    many = curves("Loss", [Curve("loss", [(n, 1 / n) for n in range(1, 1001)])], ROUNDS, plain)
    assert of_class(many, "dot") == []
    assert len(tips(many)) == 250
    assert "nan" not in many


def test_columns_are_as_high_as_their_counts() -> None:
    """Parts stand on one another; the tip has the counts; an empty column has neither."""
    columns = [("1", {"in": 3, "late": 1}), ("2", {}), ("3", {"in": 4})]
    drawing = stacked("Clients", columns, {"in": "took part", "late": "late"}, "round")
    bars = of_class(drawing, "bar")
    heights = [float(bar.get("height", "")) for bar in bars]
    assert [bar.get("class") for bar in bars] == ["bar in", "bar late", "bar in"]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.05)
    assert heights[0] + heights[1] == pytest.approx(heights[2], abs=0.05)
    assert tips(drawing) == ["round 1\ntook part: 3\nlate: 1", "round 3\ntook part: 4"]
    assert [label.text for label in of_class(drawing, "x")] == ["1", "2", "3", "round"]
    assert of_class(stacked("Nothing", [("1", {})], {"in": "there"}, "round"), "bar") == []


def dot(time: float, **more: object) -> Dot:
    """A commit of the body."""
    values = {"delay": 0.5, "staleness": 0.0, "num_batches": 2, "lineage": "body", "versions": (1, 1)} | more
    return Dot(time=time, **values)  # type: ignore[arg-type]


def test_the_timeline_has_a_mark_per_commit() -> None:
    """Circles for the body, diamonds for client halves; colours by staleness, a line ends a round."""
    dots = [dot(1.0), dot(2.0, staleness=2.0, delay=1.5), dot(3.0, staleness=9.0, lineage="client", versions=(2, 2))]
    drawing = timeline("Commits", dots, [2.5])
    assert [mark.get("class") for mark in of_class(drawing, "commit")] == ["commit s0", "commit s1", "commit s3"]
    assert [mark.tag for mark in of_class(drawing, "commit")] == ["circle", "circle", "path"]
    assert len(of_class(drawing, "round")) == 1
    waited = "body, version 1\nat 2 s\n2 batches\nwaited 1.5 s on average\nstaleness 2 on average"
    assert tips(drawing)[1] == waited


def test_without_delays_the_timeline_shows_batches() -> None:
    """A source that doesn't know how long batches waited leaves the height to how many there were."""
    drawing = timeline("Commits", [dot(1.0, delay=None), dot(2.0, delay=None, num_batches=8)], [])
    first, second = (float(mark.get("cy", "")) for mark in of_class(drawing, "commit"))
    assert first > second
    assert not any("waited" in tip for tip in tips(drawing))


def test_many_commits_are_averaged() -> None:
    """A thousand become some hundred, in order, with all their batches; each lineage for itself."""
    dots = [dot(float(n), versions=(n, n), staleness=float(n % 2)) for n in range(1, 1001)]
    found = merged([*dots, dot(5.0, lineage="client", delay=None)])
    assert len(found) == 334 + 1
    assert sum(one.num_batches for one in found) == 2002
    assert (found[0].time, found[0].versions, found[0].delay) == (2.0, (1, 3), 0.5)
    assert found[-1].delay is None
    assert re.search("versions 1 to 3", timeline("Commits", dots, []))
