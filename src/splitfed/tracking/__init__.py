"""The record of a run and its receivers: history, callbacks, progress bars, plots, HTML report."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["History"]

if TYPE_CHECKING:
    from splitfed.tracking.history import History
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "History": "tracking.history",
        },
    )
