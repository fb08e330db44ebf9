"""The report of a run: one HTML file with everything in it, drawn from a history."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["render", "write"]

if TYPE_CHECKING:
    from splitfed.tracking.report.page import render, write
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "render": "tracking.report.page",
            "write": "tracking.report.page",
        },
    )
