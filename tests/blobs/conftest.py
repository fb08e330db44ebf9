"""Empty stores of each storage backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from backends import BACKENDS, WAYS, AsyncObjects, Objects, open_backend

from splitfed.blobs.contract import Blobs
from splitfed.blobs.local import LocalBlobs


@pytest.fixture(autouse=True)
def protocols() -> Iterator[None]:
    """The filesystems above under their protocols, empty."""
    Objects.objects.clear()
    for filesystem in (Objects, AsyncObjects):
        fsspec.register_implementation(filesystem.protocol, filesystem, clobber=True)
    yield
    Objects.objects.clear()


@pytest.fixture(params=BACKENDS)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """An empty store of each backend."""
    return open_backend(request.param, tmp_path)


@pytest.fixture(params=WAYS)
def local(request: pytest.FixtureRequest, tmp_path: Path) -> LocalBlobs:
    """An empty directory, for each way of publishing a file."""
    return LocalBlobs(tmp_path / "store", way=request.param, fsync=False)
