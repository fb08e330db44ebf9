"""Codecs as parameters of tests: those that need zstandard are left out where it isn't installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

HAS_ZSTD = find_spec("zstandard") is not None
needs_zstd = pytest.mark.skipif(not HAS_ZSTD, reason="zstandard isn't installed: splitfed[zstd]")


def codecs(*names: str) -> list[Any]:
    """Their names, as parameters."""
    return [pytest.param(name, marks=[needs_zstd] if "zstd" in name else []) for name in names]
