"""Figures as people read them, by hand."""

from __future__ import annotations

import pytest

from splitfed.quantities import age, counts, percent, plain, plural, size, span


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_345, "12.3 kB"),
        (123_456, "123 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (86_700_000, "86.7 MB"),
        (5e9, "5 GB"),
        (2e15, "2,000 TB"),
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (119, "119 s"), (200, "3.33 min"), (1e9, "11,574 d")],
)
def test_spans_have_three_digits(seconds: float, text: str) -> None:
    """In the largest unit of which there are two, and below a second in milliseconds."""
    assert span(seconds) == text


def test_numbers_shares_and_counts() -> None:
    """Three digits, thousands apart; counts with their nouns, and in order of the key."""
    assert (plain(1234.5), plain(0.12345), plain(7)) == ("1,234", "0.123", "7")
    assert (percent(0.98765), percent(1)) == ("98.8 %", "100 %")
    assert (plural(1, "batch", "batches"), plural(1200, "batch", "batches")) == ("1 batch", "1,200 batches")
    assert (counts({3: 1, 0: 12}), counts({})) == ("0: 12, 3: 1", "-")
