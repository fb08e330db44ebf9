"""The state of a run, as files: weights by version, pending gradients, commits and rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Commit", "GradientStore"]

if TYPE_CHECKING:
    from splitfed.store.commit import Commit
    from splitfed.store.store import GradientStore
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Commit": "store.commit",
            "GradientStore": "store.store",
        },
    )
