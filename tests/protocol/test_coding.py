"""Codecs: hand-worked values, bytes that were promised, and parts that don't fit each other."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from coders import HAS_ZSTD, codecs, needs_zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitfed.errors import FormatError, InputError
from splitfed.protocol.coding import GROWTH, GROWTH_BYTES, Codec, Coded, decode, encode

LOSSY = ["bfloat16", "int8", "topk:0.25"]
EXACT = "zstd"


def coded(tensor: Tensor, name: str) -> tuple[Tensor, Coded]:
    """A tensor, coded."""
    made = encode(tensor, Codec.of(name), 0)
    assert made is not None
    return made


def sent(payload: Tensor, made: Coded) -> int:
    """The bytes of its tensors."""
    return payload.nbytes + sum(extra.nbytes for extra in made.extra)


def large(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which it isn't installed."""
    monkeypatch.setitem(sys.modules, "zstandard", None)


# --------------------------------------------------------------------------------------- hand-worked


def test_int8_is_the_nearest_of_255_steps_of_each_channel() -> None:
    """A channel up to 127 has steps of 1, another up to 254 steps of 2; halves go to the even one."""
    x = torch.zeros(256, 2)
    x[:6, 0] = torch.tensor([127.0, -127.0, 1.4, 1.5, 2.5, -0.6])
    x[:3, 1] = torch.tensor([254.0, 3.1, -5.0])
    payload, made = coded(x, "int8")
    assert payload.dtype == torch.int8
    assert payload[:6, 0].tolist() == [127, -127, 1, 2, 2, -1]
    assert payload[:3, 1].tolist() == [127, 2, -2]
    assert made.extra[0].tolist() == [1.0, 2.0]
    assert decode(payload, made)[:3, 1].tolist() == [254.0, 4.0, -4.0]
    error = 0.4**2 + 0.5**2 + 0.5**2 + 0.4**2 + 0.9**2 + 1.0**2
    assert made.squared_error == pytest.approx(error, rel=1e-6)
    assert made.squared_norm == pytest.approx(float(x.double().square().sum()))


def test_topk_keeps_the_largest_of_each_example() -> None:
    """By magnitude, whatever other examples have; the others are zero."""
    x = torch.zeros(2, 256)
    x[0, :4] = torch.tensor([1.0, -3.0, 2.0, 0.5])
    x[1, 250:] = torch.tensor([0.1, 0.2, -0.3, 0.0, 0.05, 0.0])
    payload, made = coded(x, "topk:0.0078")  # 2 of 256
    assert payload.tolist() == [[-3.0, 2.0], [pytest.approx(0.2), pytest.approx(-0.3)]]
    assert made.extra[0].tolist() == [[1, 2], [251, 252]]
    kept = decode(payload, made)
    assert kept[0, :4].tolist() == [0.0, -3.0, 2.0, 0.0]
    assert made.squared_error == pytest.approx(1.0 + 0.25 + 0.01 + 0.0025, rel=1e-5)


def test_bfloat16_is_torch_s_own_rounding() -> None:
    """Half the bytes."""
    x = large(64, 64)
    payload, made = coded(x, "bfloat16")
    assert torch.equal(decode(payload, made), x.bfloat16().float())
    assert sent(payload, made) * 2 == x.nbytes


@needs_zstd
def test_zstd_loses_nothing() -> None:
    """Zeros of a ReLU and the exponents of what is left take less room."""
    x = large(128, 64).relu()
    payload, made = coded(x, "zstd")
    assert torch.equal(decode(payload, made), x)
    assert sent(payload, made) < 0.75 * x.nbytes
    assert made.squared_error == 0.0
    both, more = coded(x, "int8+zstd")
    assert torch.equal(decode(both, more), decode(*coded(x, "int8")))
    assert sent(both, more) < sent(*coded(x, "int8"))


@pytest.mark.parametrize("shape", [(64, 256), (16, 16, 8, 8), (4, 32, 1024), (1, 16, 4096), (2, 9000), (16384,)])
def test_int8_takes_at_most_0_27_of_the_bytes(shape: tuple[int, ...]) -> None:
    """Of tensors of 64 KiB and more, of any shape, with its scales."""
    x = large(*shape)
    assert x.nbytes >= 64 << 10
    payload, made = coded(x, "int8")
    assert sent(payload, made) <= 0.27 * x.nbytes
    assert math.sqrt(made.squared_error / made.squared_norm) < 0.02


# -------------------------------------------------------------------------------------- what survives


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([*LOSSY, *([EXACT, "int8+zstd", "topk:0.5+zstd"] if HAS_ZSTD else [])]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.permutations(range(4)),
    st.integers(0, 99),
)
def test_shape_dtype_and_strides_survive(
    shape: list[int], name: str, dtype: torch.dtype, order: list[int], seed: int
) -> None:
    """Channels-last and any other permutation; twice the same bytes; the error is as it was said."""
    shape = [*shape[:-1], shape[-1] * 512]
    x = large(*shape, seed=seed, dtype=dtype).permute([axis for axis in order if axis < len(shape)])
    made = encode(x, Codec.of(name), 3)
    if made is None:
        assert not name.startswith("int8")
        return
    again = encode(x.clone(), Codec.of(name), 3)
    assert again is not None
    assert torch.equal(made[0], again[0])
    found = decode(*made)
    assert (found.shape, found.dtype, found.stride()) == (x.shape, x.dtype, x.stride())
    error = float((found.double() - x.double()).square().sum())
    assert made[1].squared_error == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", codecs(*LOSSY, EXACT))
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(4096),
        torch.ones(4096, dtype=torch.bool),
        torch.ones(4096, dtype=torch.complex64),
        torch.ones(8),
        torch.ones(64, 1).expand(64, 64),
        torch.ones(64, 128)[:, ::2],
        torch.empty(0, 8),
    ],
)
def test_what_isn_t_a_plain_float_tensor_travels_as_it_is(name: str, tensor: Tensor) -> None:
    """Integers, flags, small, expanded and empty ones, and those with gaps."""
    assert encode(tensor, Codec.of(name), 0) is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_isn_t_finite_travels_as_it_is(value: float) -> None:
    """A scale of infinity would make zeros of all others: a mask with -inf, or a gradient under GradScaler."""
    x = large(64, 64)
    x[3, 3] = value
    assert encode(x, Codec.of("int8"), 0) is None
    assert encode(x, Codec.of("topk:0.5"), 0) is None


def test_a_channel_of_zeros_stays_zero() -> None:
    """Its scale divides nothing by zero."""
    x = large(256, 4)
    x[:, 2] = 0
    assert decode(*coded(x, "int8"))[:, 2].abs().max() == 0
    assert decode(*coded(torch.zeros(64, 64), "int8")).abs().max() == 0


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name", ["int7", "", "int8+", "int8+int8", "zstd+int8", "zstd+zstd", "topk", "int8:4", "gzip", 3, None]
)
def test_an_unknown_codec_is_refused_with_those_that_are_known(name: Any) -> None:
    """Before anything is sent."""
    with pytest.raises(InputError, match=r"isn't a codec: expected 'bfloat16', 'int8'|has no share"):
        Codec.of(name)


@pytest.mark.parametrize("share", ["0", "-1", "1.5", "nan", "inf", "ten"])
def test_a_share_is_above_0_and_at_most_1(share: str) -> None:
    """`topk:1` keeps all."""
    with pytest.raises(InputError, match=f"'topk:{share}' has no share"):
        Codec.of(f"topk:{share}")
    assert str(Codec.of("topk:1")) == "topk:1"


@pytest.mark.parametrize(
    "name", codecs("bfloat16", "int8", "topk:0.1", "topk:1e-05", "zstd", "int8+zstd", "topk:0.25+zstd")
)
def test_a_name_survives_the_wire(name: str) -> None:
    """With a version of each part."""
    codec = Codec.of(name)
    assert Codec.from_wire(codec.on_wire(), what="x") == codec


@pytest.mark.parametrize("name", ["int8/2", "fp4/1", "int8", "", "int8/1+zstd/9"])
def test_an_end_that_lacks_a_codec_names_both(name: str) -> None:
    """What is asked for, and what there is."""
    with pytest.raises(InputError, match=r"answers are asked for in .*, and this end has 'bfloat16/1', 'int8/1'"):
        Codec.from_wire(name, what="answers are asked for in")


def test_zstd_that_isn_t_installed_is_named_with_its_extra(without_zstd: None) -> None:
    """And nothing else is used in its place; what needs it not goes on."""
    with pytest.raises(InputError, match=r'pip install "\.\[zstd\]" in a clone'):
        Codec.of("int8+zstd")
    made = replace(coded(large(64, 64), "int8")[1], codec="int8/1+zstd/1")
    with pytest.raises(InputError, match=r"extra .zstd. if zstd"):
        decode(torch.zeros(4, dtype=torch.uint8), made)


# ------------------------------------------------------------------------------------- hostile parts


def misfits() -> Iterator[Any]:
    """Parts that no encoder has made, by what is wrong with them."""
    q, int8 = coded(large(64, 64), "int8")
    k, topk = coded(large(8, 600), "topk:0.25")
    places = topk.extra[0]
    yield "shape", q, replace(int8, shape=(64, 65))
    yield "negative", q, replace(int8, shape=(-64, -64))
    yield "rank", q, replace(int8, shape=(64, 64, 1))
    yield "strides", q, replace(int8, strides=(0, 1))
    yield "gaps", q, replace(int8, strides=(128, 2))
    yield "dtype", q, replace(int8, dtype="int64")
    yield "no dtype", q, replace(int8, dtype="zeros")
    yield "payload", q.float(), int8
    yield "no scales", q, replace(int8, extra=())
    yield "short scales", q, replace(int8, extra=(int8.extra[0][:1],))
    yield "scales", q, replace(int8, extra=(int8.extra[0].double(),))
    yield "outside", k, replace(topk, extra=(places + 600,))
    yield "below", k, replace(topk, extra=(places - 600,))
    yield "wide places", k, replace(topk, extra=(places.long(),))
    yield "flat places", k, replace(topk, extra=(places.view(-1),))
    yield "rows", k, replace(topk, shape=(16, 300), strides=(300, 1))
    yield "a sparse bomb", k[:1, :1], replace(topk, shape=(1, 1 << 40), strides=(1 << 40, 1), extra=(places[:1, :1],))
    if not HAS_ZSTD:
        return
    z, zstd = coded(large(64, 64).relu(), "zstd")
    yield "no zstd", torch.zeros(100, dtype=torch.uint8), zstd
    yield "half a frame", z[: len(z) // 2], zstd
    yield "another length", z, replace(zstd, shape=(64, 63), strides=(63, 1))
    yield "not bytes", z.view(torch.int8), zstd
    yield "a bomb", z, replace(zstd, shape=(1 << 20, 1 << 20), strides=(1 << 20, 1))


@pytest.mark.parametrize(("payload", "made"), [pytest.param(*rest, id=name) for name, *rest in misfits()])
def test_parts_that_don_t_fit_raise_an_error_of_ours(payload: Tensor, made: Coded) -> None:
    """They may come from anywhere."""
    with pytest.raises(FormatError):
        decode(payload, made)


@pytest.mark.parametrize("name", codecs("topk:0.00001", "zstd", "int8+zstd"))
def test_an_encoder_keeps_to_the_limit_that_a_decoder_sets(name: str) -> None:
    """Zeros shrink without end: then only the first of two codecs is used, or none."""
    zeros = torch.zeros(1 << 10, 4096)
    made = encode(zeros, Codec.of(name), 0)
    if made is not None:
        assert zeros.nbytes <= GROWTH_BYTES + GROWTH * sent(*made)
        assert torch.equal(decode(*made), zeros)
