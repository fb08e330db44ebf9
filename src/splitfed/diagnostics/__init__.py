"""Tools that examine a split.

`check` compares it with the unsplit model, `inspect` shows what crosses the cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["check"]

if TYPE_CHECKING:
    from splitfed.diagnostics.comparison import check
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "check": "diagnostics.comparison",
        },
    )
