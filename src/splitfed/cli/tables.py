"""Numbers as people read them: aligned columns, sizes with a unit, ages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of one length as aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes with a decimal unit and three digits: 999 B, 1.00 kB, 12.3 MB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    # The limits are those from which rounding would make a fourth digit.
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    if units[0] == "B" or num_bytes >= 99.95:
        return f"{num_bytes:.0f} {units[0]}"
    if num_bytes >= 9.995:
        return f"{num_bytes:.1f} {units[0]}"
    return f"{num_bytes:.2f} {units[0]}"


def age(seconds: float) -> str:
    """A length of time in its largest unit: 59 s, 2 min, 3 h, 4 days."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def counts(numbers: Mapping[int, int]) -> str:
    """How many of each: '0: 12, 1: 3'; '-' for none."""
    return ", ".join(f"{key}: {count}" for key, count in sorted(numbers.items())) or "-"
