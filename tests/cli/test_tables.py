"""Figures as people read them, by hand."""

from __future__ import annotations

import pytest

from splitfed.cli.tables import age, counts, size, table


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (123_456, "123 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5e9, "5.00 GB"),
        (2e15, "2000 TB"),
    ],
)
def test_sizes_have_three_digits(num_bytes: float, text: str) -> None:
    """Units are decimal, and the next one begins where four digits would."""
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (119, "119 s"), (120, "2 min"), (7_200, "2 h"), (172_800, "2 days")]
)
def test_ages_have_one_unit(seconds: float, text: str) -> None:
    """The largest unit of which there are two."""
    assert age(seconds) == text


def test_tables_are_aligned() -> None:
    """Columns begin below each other, and no line ends in blanks."""
    assert table([("a", "long one"), ("bcd", 1), (1, "")]) == "a    long one\nbcd  1\n1"


def test_counts() -> None:
    """In order of the key; a dash for none."""
    assert (counts({3: 1, 0: 12}), counts({})) == ("0: 12, 3: 1", "-")
