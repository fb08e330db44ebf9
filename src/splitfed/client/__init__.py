"""The client side: the user's half as an `nn.Module` whose middle part runs on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["BatchResult", "Pipeline", "SplitClient"]

if TYPE_CHECKING:
    from splitfed.client.client import SplitClient
    from splitfed.client.pipeline import BatchResult, Pipeline
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "BatchResult": "client.pipeline",
            "Pipeline": "client.pipeline",
            "SplitClient": "client.client",
        },
    )
