"""What only remote filesystems can get wrong."""

from __future__ import annotations

import errno
import os
import threading
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from backends import AsyncObjects, Objects, content, in_threads, open_backend

from splitfed.blobs import open_blobs
from splitfed.blobs.remote import RemoteBlobs
from splitfed.errors import BusyError, InputError, StoreCapabilityError, StoreError


class HttpError(Exception):
    """What an HTTP client raises: a status, here under the name that the client happens to give it."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__("Precondition Failed")
        setattr(self, name, value)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RemoteBlobs]:
    """Open a store on a filesystem that is `Objects` but for the methods given."""

    def build(base: type[Any] = Objects, **methods: Any) -> RemoteBlobs:
        protocol = f"x{uuid.uuid4().hex}"
        fsspec.register_implementation(protocol, type("Odd", (base,), {"protocol": protocol, **methods}))
        return RemoteBlobs(f"{protocol}://bucket/run")

    return build


def test_a_store_that_ignores_the_condition_is_refused(remote: Callable[..., RemoteBlobs]) -> None:
    """The probe finds that a second create replaced the first, and cleans up."""
    blobs = remote(pipe_file=lambda self, path, value, mode="", **kwargs: Objects.pipe_file(self, path, value))
    with pytest.raises(StoreCapabilityError, match="create-if-absent"):
        blobs.probe()
    assert blobs.list("") == []


def test_a_store_that_asks_and_then_writes_is_refused(remote: Callable[..., RemoteBlobs]) -> None:
    """The probe's race finds two winners where a single writer would find nothing wrong."""
    together, main = threading.Barrier(4), threading.get_ident()

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        exists = path in self.objects
        if threading.get_ident() != main:
            together.wait(30)
        if exists:
            raise FileExistsError(path)
        Objects.pipe_file(self, path, value)

    blobs = remote(pipe_file=pipe_file)
    with pytest.raises(StoreCapabilityError, match="4 of 4 racing writers"):
        blobs.probe()
    assert blobs.list("") == []


def test_a_store_that_answers_wrongly_about_the_winner_is_refused(remote: Callable[..., RemoteBlobs]) -> None:
    """One writer is told that it won, but another's object stands there."""

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        with self.guard:
            fresh = path not in self.objects
            if fresh or not path.endswith("/twice"):
                self.objects[path] = value
            if not fresh:
                raise FileExistsError(path)

    with pytest.raises(StoreCapabilityError, match="another's object"):
        remote(pipe_file=pipe_file).probe()


def test_the_default_of_fsspec_is_refused_unseen(remote: Callable[..., RemoteBlobs]) -> None:
    """A filesystem without a conditional create of its own is refused without a race that it might win by luck."""
    with pytest.raises(StoreCapabilityError, match="only fsspec's default"):
        remote(pipe_file=fsspec.AbstractFileSystem.pipe_file).probe()


@pytest.mark.parametrize("exc", [TypeError("unexpected keyword argument 'mode'"), NotImplementedError()])
def test_a_store_without_a_conditional_create_says_so(remote: Callable[..., RemoteBlobs], exc: Exception) -> None:
    """A filesystem that doesn't know the mode is named as unfit."""

    def pipe_file(self: Objects, path: str, value: bytes, **kwargs: Any) -> None:
        raise exc

    with pytest.raises(StoreCapabilityError, match="conditionally"):
        remote(pipe_file=pipe_file).create("a", [b"1"])


def test_an_error_of_the_storage_in_the_probe_is_itself(remote: Callable[..., RemoteBlobs]) -> None:
    """A broken connection in one racing thread is reported as such, and no thread hangs."""
    main = threading.get_ident()

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        if threading.get_ident() != main and value.endswith(b"2"):
            raise ConnectionError("gone")
        Objects.pipe_file(self, path, value, mode)

    with pytest.raises(StoreError, match="ConnectionError: gone") as caught:
        remote(pipe_file=pipe_file).probe()
    assert not isinstance(caught.value, StoreCapabilityError)


CAUSES = [
    HttpError("status", 412),
    HttpError("status_code", 412),
    HttpError("code", "412"),
    HttpError("response", {"ResponseMetadata": {"HTTPStatusCode": 412}}),
    HttpError("response", HttpError("status_code", 412)),
    FileExistsError("beneath"),
    HttpError("status", 409),
]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: f"{vars(cause) or type(cause).__name__}")
@pytest.mark.parametrize("chained", ["cause", "context", "twice"])
def test_exists_is_told_by_its_status(remote: Callable[..., RemoteBlobs], cause: Exception, chained: str) -> None:
    """An OSError over HTTP 412, wherever the client library keeps the status, means that the key exists."""

    def refuse(self: Objects, path: str) -> None:
        error = OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
        if chained == "cause":
            raise error from cause
        try:
            raise cause
        except type(cause) as first:
            if chained == "context":
                raise error  # noqa: B904
            middle = OSError("in between")
            middle.__cause__ = first
            raise error from middle

    blobs = remote(refuse=refuse)
    assert (blobs.create("a", [b"1"]), blobs.create("a", [b"2"])) == (True, False)
    assert content(blobs, "a") == b"1"


@pytest.mark.parametrize(("conflicts", "outcome"), [(1, True), (4, True), (5, BusyError)])
def test_a_conflict_over_an_absent_key_is_tried_again(
    remote: Callable[..., RemoteBlobs], conflicts: int, outcome: object
) -> None:
    """409 without an object means "two at once": the create is repeated, and gives up in the end."""
    left = [conflicts]

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EBUSY, "conflict") from HttpError("status", 409)
        Objects.pipe_file(self, path, value, mode)

    blobs = remote(pipe_file=pipe_file)
    if outcome is BusyError:
        with pytest.raises(BusyError, match="'a/b'"):
            blobs.create("a/b", [b"1"])
    else:
        assert blobs.create("a/b", [b"1"]) is outcome


def test_what_the_caller_is_handling_is_no_answer(remote: Callable[..., RemoteBlobs]) -> None:
    """A create from within the handling of an older 412 doesn't mistake a broken connection for "exists"."""

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        raise ConnectionError("gone")

    blobs = remote(pipe_file=pipe_file)
    try:
        raise OSError from HttpError("status", 412)
    except OSError:
        with pytest.raises(StoreError, match=r"can't create 'a'.*gone"):
            blobs.create("a", [b"1"])


def test_other_errors_are_wrapped_with_the_key(remote: Callable[..., RemoteBlobs]) -> None:
    """Whatever a client library raises becomes a StoreError with the key, and the original as its cause."""

    def fail(self: Objects, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("throttled")

    blobs = remote(pipe_file=fail, cat_file=fail, rm_file=fail, ls=fail)
    calls: list[Callable[[], object]] = [
        lambda: blobs.create("a/b", [b"1"]),
        lambda: blobs.put("a/b", [b"1"]),
        lambda: blobs.get("a/b"),
        lambda: blobs.delete("a/b"),
        lambda: blobs.list("a/b"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"'a/b'.*RuntimeError: throttled") as caught:
            call()
        assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("kind", [Objects, AsyncObjects])
def test_half_a_listing_is_an_error(remote: Callable[..., RemoteBlobs], kind: type[Any]) -> None:
    """A directory that can't be listed raises; fsspec's own find would leave it out in silence."""

    def ls(self: Objects, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if path.endswith("/d"):
            raise ConnectionError("slow")
        return Objects.ls(self, path, detail)

    async def _ls(self: AsyncObjects, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        return ls(Objects(), path)

    blobs = remote(kind, ls=ls) if kind is Objects else remote(kind, _ls=_ls)
    blobs.create("a/1", [b"1"])
    blobs.create("d/2", [b"1"])
    assert blobs.list("a") == ["a/1"]
    with pytest.raises(StoreError, match="slow"):
        blobs.list("")


def test_a_flat_listing_is_used_where_there_is_one(remote: Callable[..., RemoteBlobs]) -> None:
    """A filesystem with its own find is asked once; directories and names that aren't keys are left out."""

    def find(self: Objects, path: str, detail: bool = False, **kwargs: Any) -> Any:
        found = {name: {"type": "file"} for name in self.objects}
        return {**found, f"{path}/dir": {"type": "directory"}, f"{path}/": {"type": "file"}, f"{path}/a b": {}}

    blobs = remote(find=find, ls=None)
    blobs.create("x/1", [b"1"])
    blobs.create("y", [b"1"])
    assert blobs.list("") == ["x/1", "y"]
    assert blobs.list("x") == ["x/1"]
    assert remote(find=lambda self, path, **kwargs: [path]).list("x") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("kind", ["fsspec", "fsspec-async"])
def test_a_forked_child_gets_an_instance_of_its_own(kind: str, tmp_path: Path) -> None:
    """A store that was used before a fork works after it, in the child and in the parent."""
    blobs = open_backend(kind, tmp_path)
    blobs.create("a", [b"1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: that is what we test
        pid = os.fork()
    if pid == 0:
        os._exit(0 if content(blobs, "a") == b"1" and blobs.create("b", [b"2"]) and blobs.list("") == ["a", "b"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert blobs.create("c", [b"3"])
    assert blobs.list("") == ["a", "c"]


def test_synchronous_filesystems_are_one_a_thread_and_uncached(tmp_path: Path) -> None:
    """Each thread has its own instance, kept from call to call, made with our options and without any cache."""
    blobs = RemoteBlobs("objects://bucket/run", flavour="sour")
    before = [blobs._at("")[0] for _ in range(2)]
    others = in_threads(2, lambda _: blobs._at("")[0])
    assert before[0] is before[1]
    assert len({id(fs) for fs in [before[0], *others]}) == 3
    assert before[0].options == {"flavour": "sour", "use_listings_cache": False}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol whose package isn't installed says what to install."""
    fsspec.register_implementation("absent", "absentfs.core.AbsentFileSystem", clobber=True)
    with pytest.raises(StoreError, match=r"absent://bucket/run.*pip install absentfs"):
        open_blobs("absent://bucket/run")


def test_a_url_without_a_bucket(tmp_path: Path) -> None:
    """A URL that names no place raises at the first use."""
    with pytest.raises(InputError, match="bucket"):
        open_blobs("objects://").get("a")


def test_credentials_do_not_appear_in_messages(remote: Callable[..., RemoteBlobs]) -> None:
    """Neither the URL's password and signature nor secret options are shown, whoever quotes them."""
    secrets = ["hunter2", "sig-nature", "AKIA123", "wJalr", "nested-pass"]

    class Leaky(Objects):
        protocol = "leaky"

        def pipe_file(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(f"403 for https://me:other@host/p?X-Signature=abc with {' '.join(secrets)}")

    fsspec.register_implementation("leaky", Leaky, clobber=True)
    blobs = open_blobs(
        "leaky://me:hunter2@bucket/run?sig=sig-nature",
        key="AKIA123",
        secret="wJalr",
        client={"password": "nested-pass", "endpoint_url": "https://host"},
        token="",
    )
    with pytest.raises(StoreError) as caught:
        blobs.create("a", [b"1"])
    shown = f"{caught.value} {blobs!r}"
    assert "403 for https://***host/p?***" in shown
    for secret in [*secrets, "other", "abc"]:
        assert secret not in shown
    with pytest.raises(InputError) as refused:
        open_blobs("nosuch://me:hunter2@host/x")
    assert "hunter2" not in str(refused.value)


def test_a_filesystem_that_cannot_be_built_is_named() -> None:
    """Options that the filesystem doesn't take raise with the URL at the first use."""

    class Strict(Objects):
        protocol = "strict"

        def __init__(self, colour: str, **options: Any) -> None:
            super().__init__(**options)

    fsspec.register_implementation("strict", Strict, clobber=True)
    with pytest.raises(StoreError, match=r"strict://bucket.*colour"):
        open_blobs("strict://bucket").get("a")
