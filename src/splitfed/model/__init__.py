"""The user's model: cut in two, described, copied, run with exact bits, and joined again.

Nothing here does I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["CutPoint", "join", "reference", "split"]

if TYPE_CHECKING:
    from splitfed.model.cut import join, split
    from splitfed.model.cutpoint import CutPoint
    from splitfed.model.unsplit import reference
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CutPoint": "model.cutpoint",
            "join": "model.cut",
            "reference": "model.unsplit",
            "split": "model.cut",
        },
    )
