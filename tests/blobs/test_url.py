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
from splitfed.store.store import GradientStore


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


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("s3:/bucket/run", "s3://bucket/run"),
        ("s3:bucket/run", "s3://bucket/run"),
        ("S3:/bucket", "s3://bucket"),
        ("gs:/b", "gs://b"),
        ("data:x", "data://x"),
        ("file:/abs/run", "file:///abs/run"),
        ("memory:x", "memory://x"),
        ("s3//bucket/run", "s3://bucket/run"),
        ("C:\\runs", "which has no drives"),
        ("c:/runs", "which has no drives"),
    ],
)
def test_what_begins_like_a_url_is_no_folder(
    url: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused with the URL that was meant, and with the path of a folder of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        GradientStore(url)
    assert meant in str(caught.value)
    assert repr(f"./{url}") in str(caught.value)
    assert GradientStore(f"./{url}").blobs.create("a", [b"1"])


def test_what_does_not_begin_like_a_url_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colon further on, a time, a `Path` of any name; and a drive, on Windows."""
    monkeypatch.chdir(tmp_path)
    for path in ("runs/a:b", "2026-01-01T10:00", "s3/run", Path("data:x"), "./data:x"):
        assert isinstance(open_blobs(path), LocalBlobs)
    monkeypatch.setattr("splitfed.blobs.url.os.name", "nt")
    assert isinstance(open_blobs("C:\\runs"), LocalBlobs)
    assert isinstance(open_blobs("d:/runs"), LocalBlobs)
    with pytest.raises(InputError, match="s3://b"):
        open_blobs("s3:/b")


@pytest.mark.parametrize("url", [None, 5, b"runs", ["runs"]])
def test_what_is_no_text_is_no_url(url: object) -> None:
    """By its class, with what is expected."""
    with pytest.raises(InputError, match=f"a store's URL is a {type(url).__name__}: expected"):
        GradientStore(url)  # type: ignore[arg-type]


def test_a_service_s_url_is_no_store() -> None:
    """And who takes it is said."""
    for url in ("http://host:8000", "https://host"):
        with pytest.raises(InputError, match=r"service's URL.*SplitClient"):
            GradientStore(url)


def test_only_local_files_are_shared_by_a_group() -> None:
    """Elsewhere the setting would say nothing."""
    for url in ("memory://a", "objects://bucket/run"):
        with pytest.raises(InputError, match="shared=True is about the modes of local files"):
            GradientStore(url, shared=True)
