"""Foreign bodies: every one that lies about itself raises FormatError, quickly and with what was expected and got."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hostile import GOOD, REFUSED, body, entry, layout, many, one, pair, raw
from hypothesis import given
from hypothesis import strategies as st

from splitfed.errors import FormatError
from splitfed.protocol import safetensors as codec


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    """A body that isn't what it says raises FormatError with what was expected and got."""
    data, message = REFUSED[kind]
    for source in (data, bytearray(data)):
        with pytest.raises(FormatError, match=message) as caught:
            codec.decode(source)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "kind", [kind for kind in REFUSED if "layout" not in REFUSED[kind][1] and "byte of 2" not in kind]
)
def test_read_metadata_refuses_the_same(kind: str) -> None:
    """The header is checked in full even where only its metadata are wanted."""
    data, message = REFUSED[kind]
    if '"splitfed.layout"' not in data.decode("latin-1"):
        with pytest.raises(FormatError, match=message):
            codec.read_metadata(data)


def test_what_the_refused_would_be() -> None:
    """The bodies above are refused for their one fault: without it, each kind is accepted."""
    assert codec.decode(GOOD)[0]["x"].tolist() == [1, 0, 1, 0]
    assert codec.decode(one("BOOL"))[0]["x"].tolist() == [True, False, True, False]
    assert codec.decode(one("U8", [1] * 7 + [4], name="a" * 1024))[0]["a" * 1024].shape == (1, 1, 1, 1, 1, 1, 1, 4)
    assert codec.decode(one(name="a..b/c"))[0].keys() == {"a..b/c"}
    assert codec.decode(pair((0, 4), (4, 8)))[0].keys() == {"x", "y"}
    assert codec.decode(raw(b"{} \n")) == ({}, {})
    assert codec.decode(body({"x": entry(), "empty": entry("U8", [0], [0, 0])}, bytes(4)))[0]["empty"].shape == (0,)
    assert codec.decode(body({"x": entry("F32", [0, 1 << 20], [0, 0])}))[0]["x"].shape == (0, 1 << 20)
    assert codec.decode(layout({"x": {"order": [1, 0]}}))[0]["x"].stride() == (1, 2)
    assert codec.decode(layout({"x": {"strides": [4, 1]}}))[0]["x"].stride() == (4, 1)
    assert codec.decode(layout({"x": {"strides": [0, 1], "shape": [9, 4]}}, [1, 4]))[0]["x"].shape == (9, 4)


def test_limits_are_the_callers() -> None:
    """A caller may allow fewer tensors or a shorter header than the defaults."""
    data = b"".join(codec.encode({"x": torch.ones(1), "y": torch.ones(1)}))
    assert len(codec.decode(data, max_tensors=2, max_header=120)[0]) == 2
    with pytest.raises(FormatError, match="expected at most 1, got 2"):
        codec.decode(data, max_tensors=1)
    with pytest.raises(FormatError, match="expected 2 to 119 bytes, got 120"):
        codec.decode(data, max_header=119)


BOMBS: dict[str, Callable[[], bytes]] = {
    "tensors": lambda: many(280_000, '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'),
    "objects": lambda: b'{"x":[' + b"{}," * 5_000_000 + b"{}]}",
    "lists": lambda: b'{"x":[' + b"[]," * 5_000_000 + b"[]]}",
    "keys": lambda: many(1_400_000, '"%x":0'),
    "keys that end in a backslash": lambda: many(1_200_000, '"%x\\\\":0'),
    "metadata": lambda: b'{"__metadata__":' + many(1_300_000, '"%x":""') + b"}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_header_bombs(kind: str) -> None:
    """A header of nearly 16 MB that would parse to gigabytes is refused before it is parsed."""
    data = raw(BOMBS[kind]())
    assert 10 << 20 < len(data) < 16 << 20
    start = time.process_time()
    with pytest.raises(FormatError, match="too many"):
        codec.decode(data)
    assert time.process_time() - start < 0.25


def test_a_large_header_passes() -> None:
    """A lawful header of 8,000 tensors, each with a layout, and of megabytes of quotes isn't taken for a bomb."""
    tensors = {f"encoder.layer.{i}.weight": torch.ones(1).expand(2, 1) for i in range(8_000)}
    results, metadata = codec.decode(b"".join(codec.encode(tensors, {"quotes": '"' * 2_500_000})))
    assert len(metadata["quotes"]) == 2_500_000
    assert len(results) == 8_000
    assert all(result.stride() == (0, 1) for result in results.values())


@given(position=st.integers(0, 1_000), byte=st.integers(0, 255), cut=st.integers(0, 1_000))
def test_damage_raises_nothing_else(position: int, byte: int, cut: int) -> None:
    """A body with one byte changed and its end cut off decodes or raises FormatError, never anything else."""
    image = torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last)
    data = bytearray(b"".join(codec.encode({"x": image, "y": torch.ones(3).expand(2, 3), "z": torch.tensor([True])})))
    data[position % len(data)] = byte
    for source in (data, data[: cut % len(data)]):
        try:
            codec.decode(bytes(source))
        except FormatError:
            continue
