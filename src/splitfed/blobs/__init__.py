"""Storage backends: a few atomic operations on bytes under keys, for any place that holds files.

`contract` is what a backend promises, and `testing` the suite that a backend of your own must pass.
`open_blobs` (in `url`) chooses the backend of a URL: `local` (built on `files`), `memory`, or
`remote` for any other filesystem of fsspec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Blobs", "BlobsSuite", "Buffer", "check_key", "open_blobs"]

if TYPE_CHECKING:
    from splitfed.blobs.contract import Blobs, Buffer, check_key
    from splitfed.blobs.testing import BlobsSuite
    from splitfed.blobs.url import open_blobs
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Blobs": "blobs.contract",
            "BlobsSuite": "blobs.testing",
            "Buffer": "blobs.contract",
            "check_key": "blobs.contract",
            "open_blobs": "blobs.url",
        },
    )
