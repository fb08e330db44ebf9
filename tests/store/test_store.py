"""The door to all state: opening, versions, pending batches."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from harness_store import Point, again, batch, bits, folder, net, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import (
    CorruptedError,
    FormatError,
    IdError,
    InputError,
    MissingError,
    SplitFedError,
    StoreCapabilityError,
)
from splitfed.model.numerics import class_id
from splitfed.store import layout
from splitfed.store.store import GradientStore

CPU = torch.device("cpu")


@pytest.fixture
def store(store_url: str) -> GradientStore:
    """An empty store."""
    return GradientStore(store_url, sync="process")


def test_opening_does_no_io(tmp_path: Path) -> None:
    """A store that nobody uses leaves no trace."""
    GradientStore(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_sync_is_one_of_two() -> None:
    """A typing error doesn't silently mean no durability."""
    with pytest.raises(InputError, match=r"'power'.*'process'"):
        GradientStore("runs", sync="fsync")


@pytest.mark.parametrize("url", ["", "file://relative/path", "a\0b"])
def test_what_isnt_a_url_is_refused(url: str) -> None:
    """Before anything is written anywhere."""
    with pytest.raises(InputError):
        GradientStore(url)


def test_a_path_a_string_and_a_url_name_one_store(tmp_path: Path) -> None:
    """Three spellings, one set of versions."""
    Accumulator(Point(), GradientStore(tmp_path / "s", sync="process"), sgd())
    for url in (str(tmp_path / "s"), (tmp_path / "s").as_uri()):
        assert GradientStore(url).latest_version() == 0


def test_an_empty_store_says_who_begins_it(store: GradientStore) -> None:
    """Reading before anybody wrote is MissingError with what to do."""
    with pytest.raises(MissingError, match="SplitServer or Accumulator begins it"):
        store.latest_version()
    with pytest.raises(MissingError):
        store.load_weights()
    assert store.waiting() == []


def test_load_weights_gives_what_version_0_was(store: GradientStore) -> None:
    """All keys of `state_dict()`, bit for bit, buffers included."""
    body = net()
    Accumulator(body, store, sgd())
    assert bits(again(store).load_weights()) == bits(body.state_dict())


def test_weights_that_were_handed_out_may_be_changed(store: GradientStore) -> None:
    """They are copies: writing to them reaches neither the cache nor the file."""
    Accumulator(net(), store, sgd())
    before = bits(store.load_weights())
    for tensor in store.load_weights().values():
        tensor.zero_()
    assert bits(store.load_weights()) == before
    assert bits(again(store).load_weights()) == before


def test_lineages_have_versions_of_their_own(store: GradientStore) -> None:
    """The body's commits don't move the client's lineage, nor that of one client."""
    for lineage in ("body", "client", "body@a"):
        Accumulator(Point(), store, sgd(), lineage=lineage)
    store.pile("client").create(batch(0), record())
    assert Accumulator(Point(), store, sgd(), lineage="client").step() is not None
    assert [store.latest_version(name) for name in ("body", "client", "body@a")] == [0, 1, 0]
    with pytest.raises(IdError):
        store.latest_version("heads")


def test_waiting_leaves_out_what_is_counted(store: GradientStore) -> None:
    """A gradient that a crashed clean-up left behind doesn't wait."""
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record())
    accumulator.step()
    store.pile().create(batch(0), record())
    store.pile().create(batch(1), record())
    assert store.pile().waiting() == [batch(0), batch(1)]
    assert store.waiting() == [batch(1)]


def test_the_first_to_begin_writes_the_format_once(store: GradientStore) -> None:
    """It holds the format's version and the numerics class of version 0."""
    store.begin(CPU)
    first = bytes(store.blobs.get(layout.FORMAT) or b"")
    again(store).begin(CPU)
    assert bytes(store.blobs.get(layout.FORMAT) or b"") == first
    assert json.loads(first)["format"] == 2
    assert json.loads(first)["numerics"]["torch"] == torch.__version__
    assert store.blobs.list("probe") == []


def test_another_numerics_class_says_so(store: GradientStore) -> None:
    """Two threads round otherwise than one: the process is warned of what differs, and carries on under its name."""
    own = store.begin(CPU)
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match=r"numerics class.*'threads': \(1, 2\)"):
        other = again(store).begin(CPU)
    assert other != own
    assert store.numerics() == own


def test_a_store_of_before_kernels_were_noted_goes_on(store: GradientStore) -> None:
    """What its record can't have isn't compared: no warning, and this process has the name of version 0's class."""
    store.begin(CPU)
    header = json.loads(bytes(store.blobs.get(layout.FORMAT) or b""))
    del header["numerics"]["kernels"]
    store.blobs.put(layout.FORMAT, [json.dumps(header).encode()])
    later = again(store)
    assert later.begin(CPU) == later.numerics() == class_id(header["numerics"])


def test_other_kernels_are_another_class(store: GradientStore) -> None:
    """A CPU of another vendor, which says the same of itself, is told by its bits."""
    store.begin(CPU)
    header = json.loads(bytes(store.blobs.get(layout.FORMAT) or b""))
    header["numerics"]["kernels"] = "0" * 16
    store.blobs.put(layout.FORMAT, [json.dumps(header).encode()])
    with pytest.warns(UserWarning, match=r"numerics class.*'kernels': \('0{16}', '[0-9a-f]{16}'\)"):
        assert again(store).begin(CPU) != class_id(header["numerics"])


@pytest.mark.parametrize(
    "data", [b'{"format": 3, "numerics": {}}', b"{}", b"[]", b"null", b"\xff", b'{"format": 1}', b'{"format']
)
def test_a_store_of_another_format_is_refused(store: GradientStore, data: bytes) -> None:
    """A later format, or something that isn't one: our own error, before anything is computed."""
    store.blobs.create(layout.FORMAT, [data])
    with pytest.raises(FormatError):
        store.begin(CPU)


@pytest.mark.parametrize("data", [b"\xff", b"[]", b"{", b"3", b'{"w": 3}'])
def test_a_fingerprint_that_isnt_one_raises_our_own_error(store: GradientStore, data: bytes) -> None:
    """Foreign bytes never surface as the error of a parser."""
    store.blobs.create("body/fingerprint.json", [data])
    with pytest.raises(SplitFedError):
        Accumulator(Point(), store, sgd())


@pytest.mark.parametrize("hint", [b"x", b"", b"-1", b"77", b"9999999999999999", b"\xb2"])
def test_the_head_file_is_a_hint_only(store: GradientStore, hint: bytes) -> None:
    """Whatever it says, readers find the newest commit."""
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record())
    accumulator.step()
    store.blobs.delete("body/head")
    if hint:
        store.blobs.put("body/head", [hint])
    assert again(store).latest_version() == 1


def test_a_backend_without_an_atomic_create_is_refused_before_it_is_used(store: GradientStore) -> None:
    """The probe races for keys when a store is begun; one that lets two win is StoreCapabilityError."""
    store.blobs.raw.create = lambda key, parts, durable=True: True  # type: ignore[method-assign]
    with pytest.raises(StoreCapabilityError):
        Accumulator(Point(), store, sgd())


def test_a_pickle_planted_as_weights_is_never_loaded(tmp_path: Path) -> None:
    """Its hash isn't the commit's, and nothing here could run it: CorruptedError, no side effect."""
    store = GradientStore(tmp_path / "store", sync="process")
    Accumulator(Point(), store, sgd())
    (path,) = (folder(store) / "body" / "weights").iterdir()
    path.unlink()
    path.write_bytes(pickle.dumps(_Bomb(str(tmp_path / "pwned"))))
    with pytest.raises(CorruptedError):
        again(store).load_weights()
    assert not (tmp_path / "pwned").exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (self.path,)


def test_what_the_filesystem_is_told_can_be_read_but_not_changed() -> None:
    """So that others open the store as this process did; it isn't in the repr, as it may hold secrets."""
    store = GradientStore("ftp://elsewhere/run", password="hunter2")
    assert store.storage_options == {"password": "hunter2"}
    assert not hasattr(store.storage_options, "update")
    assert "hunter2" not in repr(store)
