"""What every storage backend does: one suite over all of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from backends import BACKENDS, in_threads, open_backend
from hypothesis import given
from hypothesis import strategies as st

from splitfed.blobs.contract import Blobs, check_key
from splitfed.blobs.remote import RemoteBlobs
from splitfed.blobs.testing import BlobsSuite
from splitfed.errors import IdError


@pytest.mark.parametrize("kind", BACKENDS)
class TestEveryBackend(BlobsSuite):
    """The public conformance suite, over each backend and each way of publishing a file."""

    @pytest.fixture(autouse=True)
    def where(self, kind: str, tmp_path: Path) -> None:
        """Which backend, and a directory for it."""
        self.kind, self.root = kind, tmp_path

    def open(self, place: str) -> Blobs:
        """Open a store of that name."""
        return open_backend(self.kind, self.root / place)


@given(st.text(st.sampled_from("aZ0_.@=-/\\%*?~ \n\0é"), max_size=12) | st.text(max_size=20))
def test_no_key_leaves_the_root(key: str) -> None:
    """Whatever passes the check stays beneath the root, hides nothing and is one path only."""
    try:
        check_key(key)
    except IdError:
        return
    assert os.path.normpath(f"/base/{key}") == f"/base/{key}"
    assert key.isascii()
    assert not re.search(r"(^|/)\.|[*?:%\\\s\0~]", key)


def test_probes_may_run_beside_each_other(blobs: Blobs) -> None:
    """Two processes that begin a store at once don't disturb each other, and no key of a probe remains."""
    in_threads(2, lambda _: blobs.probe())
    assert blobs.list("") == []


def test_lock_is_released_by_an_error(blobs: Blobs) -> None:
    """An exception in the guarded block passes through and frees the lock."""
    with pytest.raises(KeyError, match="mine"), blobs.lock("x", 1):
        raise KeyError("mine")
    with blobs.lock("x", 0) as held:
        assert held is not isinstance(blobs, RemoteBlobs)


def test_locked_sections_never_overlap(blobs: Blobs) -> None:
    """Threads that wait for the lock take turns."""
    if isinstance(blobs, RemoteBlobs):
        pytest.skip("no locks there")
    inside: list[int] = []

    def work(number: int) -> bool:
        with blobs.lock("turn", 30) as held:
            inside.append(number)
            alone = len(inside) == 1
            inside.remove(number)
        return held and alone

    assert all(in_threads(4, work))
