"""The accumulator: pending gradients become the next version."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Accumulator"]

if TYPE_CHECKING:
    from splitfed.accumulator.accumulator import Accumulator
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Accumulator": "accumulator.accumulator",
        },
    )
