"""Tables of a terminal."""

from __future__ import annotations

from splitfed.cli.tables import table


def test_tables_are_aligned() -> None:
    """Columns begin below each other, and no line ends in blanks."""
    assert table([("a", "long one"), ("bcd", 1), (1, "")]) == "a    long one\nbcd  1\n1"
