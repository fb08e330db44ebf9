"""Which storage backend a URL names."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from splitfed.blobs import open_blobs
from splitfed.blobs.local import LocalBlobs
from splitfed.blobs.memory import MemoryBlobs
from splitfed.errors import InputError


def test_open_blobs_by_kind_of_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and file URLs are local and absolute, memory is by name, the rest is fsspec's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    roots: dict[str | Path, str] = {
        "runs/demo": f"{tmp_path}/runs/demo",
        Path("runs"): f"{tmp_path}/runs",
        "~/runs": "/home/someone/runs",
        "file:///abs/path": "/abs/path",
        "FILE:///abs/path/": "/abs/path",
        "local:///abs": "/abs",
        (tmp_path / "a b%1").as_uri(): f"{tmp_path}/a b%1",
        Path("odd:/dir"): f"{tmp_path}/odd:/dir",
    }
    for url, root in roots.items():
        opened = open_blobs(url)
        assert isinstance(opened, LocalBlobs)
        assert opened.root == root
    assert isinstance(open_blobs("memory://a"), MemoryBlobs)
    assert repr(open_blobs("objects://bucket/run")) == "RemoteBlobs('objects://bucket/run')"
    assert os.listdir(tmp_path) == []


def test_memory_is_shared_by_name() -> None:
    """Two opens of one memory URL are one store, two names are two."""
    name = uuid.uuid4()
    open_blobs(f"memory://{name}").create("a", [b"1"])
    assert open_blobs(f"memory://{name}/").list("") == ["a"]
    assert open_blobs(f"memory://{name}x").list("") == []


@pytest.mark.parametrize(
    "url",
    ["", "a\0b", "file://relative", "file://", "file:///%00", "nosuch://a/b", "://a", "4://a", "simplecache::s3://b"],
)
def test_urls_that_cannot_be_stores(url: str) -> None:
    """What isn't a URL of ours raises, with what would be."""
    with pytest.raises(InputError, match="expected"):
        open_blobs(url)


def test_options_where_none_apply() -> None:
    """Local and memory stores take no storage options."""
    for url in ("runs", "memory://a"):
        with pytest.raises(InputError, match="anon"):
            open_blobs(url, anon=True)
