"""The command line: `splitfed VERB`, a file per verb."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["main"]

if TYPE_CHECKING:
    from splitfed.cli.command import main
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "main": "cli.command",
        },
    )
