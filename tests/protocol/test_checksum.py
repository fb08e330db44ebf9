"""Checksums within files: each flipped bit is found, and readers of the format see none of it."""

from __future__ import annotations

import json
import random
import zlib

import pytest
import torch
from safetensors.torch import load

from splitfed.errors import CorruptedError, FormatError
from splitfed.protocol import parallel, safetensors
from splitfed.protocol.checksum import check, crc32, joined, sealed, text_of
from splitfed.protocol.packing import read_json

TENSORS = {"a": torch.arange(40.0), "b": torch.tensor([True, False])}
FILES = {
    "json": [b'{"version":3,"files":{}}'],
    "indented": [b'{\n "w": {\n  "shape": [2]\n }\n}'],
    "empty object": [b"{}"],
    "lines": [b'{"kind":"round"}\n', b'{"kind":"commit"}\n'],
    "tensors": safetensors.encode(TENSORS, {"kind": "x"}),
    "tensors without metadata": safetensors.encode(TENSORS),
    "no tensors": safetensors.encode({}, {"kind": "x"}),
    "nothing": safetensors.encode({}),
}


def whole(name: str) -> bytes:
    """A file with its checksum."""
    return b"".join(sealed(FILES[name]))


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_checksum_that_it_says(name: str) -> None:
    """Once it is there it stays as it is."""
    data = whole(name)
    check(data)
    check(memoryview(data), header_only=True)
    assert b"".join(sealed([data])) == data
    assert b"".join(sealed([b"".join(FILES[name])])) == data, "in one piece or in many"


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(name: str) -> None:
    """Also those in the checksum itself, and in what says that there is one."""
    data = whole(name)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptedError, FormatError)):
            check(flipped)


@pytest.mark.parametrize("name", FILES)
def test_what_is_cut_off_or_added_is_found(name: str) -> None:
    """At any place."""
    data = whole(name)
    for size in range(len(data)):
        with pytest.raises((CorruptedError, FormatError)):
            check(data[:size])
    with pytest.raises(CorruptedError):
        check(data + b"\0")


def test_a_header_is_compared_without_its_data() -> None:
    """So that it can be trusted when the data aren't read; they are compared by who reads them."""
    data = bytearray(whole("tensors"))
    data[-1] ^= 1
    check(data, header_only=True)
    with pytest.raises(CorruptedError, match="data"):
        check(data)


def test_readers_of_both_formats_see_what_was_written() -> None:
    """The safetensors library too; and the data stay aligned to 64 bytes."""
    data = whole("tensors")
    assert all(torch.equal(load(data)[name], tensor) for name, tensor in TENSORS.items())
    tensors, metadata = safetensors.decode(data)
    assert (metadata, list(tensors)) == ({"kind": "x"}, ["a", "b"])
    assert safetensors.read_metadata(data) == {"kind": "x"}
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0
    for name in ("json", "indented", "empty object"):
        assert read_json(whole(name), name) == json.loads(b"".join(FILES[name]))
    assert text_of(whole("lines")) == b"".join(FILES["lines"])


def test_a_key_of_that_name_is_the_users() -> None:
    """The checksum is told by its place and form, not by its name."""
    text = b'{"crc32":{"1":[[0,3]]}}'
    data = b"".join(sealed([text]))
    check(data)
    assert read_json(data, "it") == {"crc32": {"1": [[0, 3]]}}


@pytest.mark.parametrize("data", [b"", b"junk", b"\x80\x02cos", random.Random(0).randbytes(200)])
def test_what_is_in_no_format_stays_as_it_is(data: bytes) -> None:
    """And is no file of a store."""
    assert sealed([data]) == [data]
    with pytest.raises(FormatError, match="no checksum"):
        check(data)


def test_halves_of_large_data_are_checked_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CRC of both is that of the whole, wherever the parts of a file end; an empty half is none."""
    monkeypatch.setattr(parallel, "LARGE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rng = random.Random(0)
    for _ in range(50):
        parts = [rng.randbytes(rng.choice([0, 1, 7, 300])) for _ in range(rng.randrange(5))]
        assert crc32(parts) == zlib.crc32(b"".join(parts))
    for name in FILES:
        check(whole(name))
    assert joined(1, 2, 0) == 1 ^ 2
    assert joined(zlib.crc32(b"a"), zlib.crc32(bytes(1 << 20)), 1 << 20) == zlib.crc32(b"a" + bytes(1 << 20))
