"""Tensors of a message in fewer bytes: codecs, and what a message says of them.

A coded message holds in a tensor's place what the codecs made of it, and beside it a `Coded` that
says how to undo that. So a server needs no setting, and no memory of earlier requests: it decodes
before it does anything else, and all that is computed, recorded, hashed and replayed is the decoded
value. A codec's name carries a version. What an end doesn't know it refuses by both names.

The codecs, each on one tensor x:

`bfloat16`: x rounded to bfloat16, 8 of its 24 bits of precision; half the bytes of float32.

`int8`: s·q with integers q = round(x / s) and s = max|x| / 127 over each channel, the symmetric
quantization per channel of Krishnamoorthi, arXiv 1806.08342. Rounding is to the nearest, not
stochastic as in QSGD (Alistarh et al., NeurIPS 2017): a repeated request has to have the same
bytes. The channels of (N, C) and (N, C, H, W) are in dimension 1, those of (N, L, C) in dimension
2. Neighbours share a scale where a channel has less than 64 elements, so the scales are less than
1/64 of the elements.

`topk:f`: of each example the largest share f of its elements, by magnitude; zero elsewhere.

`zstd`: no loss; the bytes, ordered by significance, through Zstandard (RFC 8878).

`delta` before one of these: of activations, what each example's have changed by since it was last
sent (`deltas`), coded by the rest of the name.

Two traps. A tensor that isn't finite can't be scaled, and a mask with -inf is one: whatever doesn't
come out finite travels as it is. And what is small on the way may be large once it is decoded, so
there is a limit to that (`GROWTH`), which an encoder keeps to as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from splitfed.checks import install, positive
from splitfed.errors import FormatError, InputError

GROWTH = 256
"""A decoded tensor may have so many times the bytes that were sent for it ..."""
GROWTH_BYTES = 1 << 20
"""... and so many more."""
SMALL = 1024
"""Tensors of fewer bytes aren't worth the description, and travel as they are."""
_PER_SCALE = 64
_LEVEL = 3
_FLOATS = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """How one tensor of a message is coded."""

    place: int
    """Which tensor it is."""
    codec: str
    """What it was coded by, with versions, in that order: 'int8/1+zstd/1'."""
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    extra: tuple[Tensor, ...]
    """What the value's codec needs beside its payload: scales, indices."""
    squared_error: float
    """‖x − x̂‖², in float64."""
    squared_norm: float
    """‖x‖²."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return math.prod(self.shape) * float_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Codec:
    """What a tensor is coded by: how its values are, and whether bytes are compressed after that.

    Raises:
        InputError: no codec has that name, or its share is none.
    """

    values: str = ""
    """'bfloat16', 'int8', 'topk' or '' for the exact values."""
    share: float = 1.0
    """Of `topk`: the share of elements that travels."""
    zstd: bool = False
    delta: bool = False
    """Whether the rest is of the change since an example was last sent."""

    @classmethod
    def of(cls, text: str) -> Codec:
        """The codec that a user names, as 'int8', 'topk:0.1', 'bfloat16+zstd' or 'delta+int8'.

        Raises:
            InputError: none has that name, or what it needs isn't installed.
        """
        values, share, zstd = "", 1.0, False
        parts = text.split("+") if isinstance(text, str) else [text]
        delta = parts[0] == "delta"
        for part in parts[delta:]:
            name, _, number = part.partition(":") if isinstance(part, str) else (part, "", "")
            if name == "zstd" and not number and not zstd:
                zstd = True
            elif name in ("bfloat16", "int8") and not number and not values and not zstd:
                values = name
            elif name == "topk" and not values and not zstd:
                values, share = name, _share(number)
            else:
                raise InputError(f"{text!r:.60} isn't a codec: expected {_KNOWN}")
        if zstd:
            load_zstd()
        return cls(values, share, zstd, delta)

    @property
    def of_changes(self) -> Codec | None:
        """Of a delta: what changes are coded by; `None` if they are exact."""
        return replace(self, delta=False) if self.values or self.zstd else None

    @property
    def of_new(self) -> Codec | None:
        """Of a delta: what an example is coded by that has no earlier value; `None` for exact."""
        # A share of the elements is much of a change and little of an example.
        return (
            replace(self, values="", share=1.0).of_changes
            if self.values == "topk"
            else self.of_changes
        )

    def __str__(self) -> str:
        named = f"topk:{self.share:g}" if self.values == "topk" else self.values
        parts = ("delta" if self.delta else "", named, "zstd" if self.zstd else "")
        return "+".join(filter(None, parts))

    def on_wire(self) -> str:
        """Its name between two ends, with the versions of its parts."""
        return "+".join(f"{part}/1" for part in str(self).split("+"))

    @classmethod
    def from_wire(cls, text: str, *, what: str) -> Codec:
        """The codec of such a name.

        Args:
            text: It.
            what: What is coded by it, or is to be, for the error.

        Raises:
            InputError: this end doesn't have it.
        """
        parts = [part.rpartition("/") for part in text.split("+")]
        try:
            if any(version != "1" for _, _, version in parts):
                raise InputError("of another version")
            found = cls.of("+".join(name for name, _, _ in parts))
            if found.delta:
                raise InputError("a delta isn't a tensor's own codec")
            return found
        except InputError as error:
            raise InputError(
                f"{what} {text[:60]!r}, and this end has {_ON_WIRE} ({error}): "
                "give both ends the same release of splitfed, and its extra 'zstd' if zstd "
                "is used, or use a codec that both have"
            ) from error


_KNOWN = (
    "'bfloat16', 'int8', 'topk:0.1' (a share), 'zstd', or one of them and '+zstd'; of activations "
    "also 'delta', or 'delta+' and one of those"
)
_ON_WIRE = "'bfloat16/1', 'int8/1', 'topk/1', 'zstd/1'"


def encode(tensor: Tensor, codec: Codec, place: int) -> tuple[Tensor, Coded] | None:
    """What travels in a tensor's place, and how it is coded; `None` if it has to travel as it is.

    Args:
        tensor: Of floating point; others are never coded.
        codec: What to code it by.
        place: Which one of its message it is.
    """
    if not is_codable(tensor):
        return None
    with torch.no_grad():
        tensor = tensor.detach()
        payload, extra = _encode_values(tensor, codec)
        if payload is None:
            return None
        error = norm = 0.0
        if codec.values:
            error, norm = distance(tensor, _decode_values(payload, extra, codec.values, tensor))
            if not math.isfinite(error):
                return None
        else:
            norm = float(tensor.double().square().sum())
        if codec.zstd:
            payload = _squeezed(payload)
    coded = Coded(
        place=place,
        codec=codec.on_wire(),
        dtype=_name(tensor.dtype),
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        extra=extra,
        squared_error=error,
        squared_norm=norm,
    )
    sent = _sent(payload, coded)
    # What has grown, or would shrink by more than the other end lets it grow, travels as it is.
    if sent >= tensor.nbytes or not may_grow(sent, tensor.nbytes):
        return encode(tensor, Codec(codec.values, codec.share), place) if codec.zstd else None
    return payload, coded


def decode(payload: Tensor, coded: Coded) -> Tensor:
    """The tensor that was coded.

    Raises:
        InputError: this end doesn't have the codec.
        FormatError: the parts don't fit each other, or it would be too large.
    """
    codec = Codec.from_wire(coded.codec, what="a tensor is coded by")
    dtype = float_dtype(coded.dtype)
    shape, strides = coded.shape, coded.strides
    template = dense_template(shape, strides, dtype)
    if template is None:
        raise _misfit(coded, f"shape {shape} with strides {strides}")
    if not may_grow(_sent(payload, coded), coded.num_bytes):
        raise _misfit(
            coded,
            f"{_sent(payload, coded)} bytes for {coded.num_bytes}: at most {GROWTH} times as many "
            f"and {GROWTH_BYTES} more",
        )
    if codec.zstd:
        payload = _unsqueezed(payload, coded, codec.values)
    _check(payload, coded, codec.values)
    found = _decode_values(payload, coded.extra, codec.values, template)
    if found.stride() == template.stride():
        return found
    return _like(template, dtype, found.device).copy_(found)


def decode_all(tensors: Sequence[Any], coding: Sequence[Coded]) -> list[Any]:
    """The tensors of a message, those that were coded among them.

    Raises:
        InputError: as `decode`.
        FormatError: as `decode`, or there is no such tensor.
    """
    found = list(tensors)
    for coded in coding:
        place = coded.place
        if not 0 <= place < len(found) or not isinstance(found[place], Tensor):
            raise FormatError(f"a message has no tensor {place} that could be coded")
        found[place] = decode(found[place], coded)
    return found


def encode_all(tensors: Sequence[Any], codec: Codec | None) -> tuple[list[Any], tuple[Coded, ...]]:
    """The tensors of a message in as few bytes as a codec makes of them, and how they are coded."""
    found, coding = list(tensors), []
    for place, tensor in enumerate(tensors):
        made = None if codec is None or tensor is None else encode(tensor, codec, place)
        if made is not None:
            found[place] = made[0]
            coding.append(made[1])
    return found, tuple(coding)


def is_codable(tensor: Tensor) -> bool:
    """Whether a tensor may be coded: floats that lie in memory once each, and not a handful."""
    return (
        tensor.dtype in _FLOATS.values()
        and tensor.nbytes >= SMALL
        and tensor.layout is torch.strided
        and _is_dense(tensor)
    )


# ------------------------------------------------------------------------------------------- values


def _encode_values(tensor: Tensor, codec: Codec) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Payload and extra of a tensor's values; no payload where nothing would be gained."""
    if codec.values == "bfloat16":
        if tensor.itemsize <= torch.bfloat16.itemsize:
            return None, ()
        return tensor.to(torch.bfloat16), ()
    if codec.values == "int8":
        wide = _wide(tensor)
        scale = _scales(wide)
        step = _spread(scale, tensor.shape)
        steps = torch.round(wide / step).clamp_(-127, 127)
        return _like(tensor, torch.int8).copy_(steps), (scale,)
    if codec.values == "topk":
        rows = tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
        count = max(1, math.ceil(codec.share * rows.shape[1]))
        places = rows.abs().topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        return rows.gather(1, places), (places.to(_place_dtype(rows.shape[1])),)
    return tensor, ()


def _decode_values(payload: Tensor, extra: tuple[Tensor, ...], values: str, like: Tensor) -> Tensor:
    """The tensor, with the shape, dtype and strides of another."""
    if values == "bfloat16":
        return payload.to(like.dtype)
    if values == "int8":
        wide = payload.to(extra[0].dtype) * _spread(extra[0], like.shape)
        return wide.to(like.dtype)
    if values == "topk":
        rows = payload.new_zeros(len(payload), math.prod(like.shape) // max(1, len(payload)))
        rows.scatter_(1, extra[0].long(), payload)
        return rows.view(like.shape)
    return payload


def _like(like: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Memory for a tensor of another's shape and strides, whatever its dtype."""
    device = like.device if device is None else device
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=device)


def _wide(tensor: Tensor) -> Tensor:
    """As float32, or float64 if it is that: halves would round the scale."""
    return tensor if tensor.itemsize >= 4 else tensor.float()


def _channel(shape: Sequence[int]) -> int:
    return 2 if len(shape) == 3 else min(1, len(shape) - 1)


def _neighbours(shape: Sequence[int]) -> int:
    """How many channels share a scale."""
    channels = shape[_channel(shape)]
    each = max(1, math.prod(shape) // max(1, channels))
    return min(channels, math.ceil(_PER_SCALE / each))


def _scales(wide: Tensor) -> Tensor:
    """A scale for each channel, or each few neighbours."""
    channel = _channel(wide.shape)
    others = [dim for dim in range(wide.dim()) if dim != channel]
    largest = wide.abs().amax(dim=others) if others else wide.abs()
    together = _neighbours(wide.shape)
    if together > 1:
        room = -len(largest) % together
        largest = torch.nn.functional.pad(largest, (0, room)).view(-1, together).amax(dim=1)
    # A channel of zeros: any scale will do.
    return torch.where(largest == 0, 1.0, largest / 127).to(wide.dtype)


def _spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """The scales as a tensor that broadcasts to a shape."""
    channel = _channel(shape)
    together = _neighbours(shape)
    if together > 1:
        scale = scale.repeat_interleave(together)[: shape[channel]]
    return scale.view([-1 if dim == channel else 1 for dim in range(len(shape))])


def _place_dtype(length: int) -> torch.dtype:
    return torch.int16 if length <= 2**15 else torch.int32


def distance(tensor: Tensor, decoded: Tensor) -> tuple[float, float]:
    """‖x − x̂‖² and ‖x‖², in float64."""
    exact = tensor.double()
    return float((exact - decoded.double()).square().sum()), float(exact.square().sum())


# --------------------------------------------------------------------------------------------- zstd


def load_zstd() -> Any:
    """The module of Zstandard.

    Raises:
        InputError: it isn't installed.
    """
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise InputError(
            f"the codec 'zstd' needs the package zstandard: {install('zstd')}, at both ends; "
            "the other codecs need nothing"
        ) from error
    return zstandard


def _squeezed(payload: Tensor) -> Tensor:
    """Its bytes, compressed: all first bytes, then all second ones, as exponents repeat."""
    flat = payload.as_strided((payload.numel(),), (1,)).cpu()
    planes = flat.view(torch.uint8).view(-1, flat.itemsize).t().contiguous()
    compressed = load_zstd().ZstdCompressor(level=_LEVEL).compress(planes.numpy().tobytes())
    return torch.frombuffer(bytearray(compressed), dtype=torch.uint8)


def _unsqueezed(payload: Tensor, coded: Coded, values: str) -> Tensor:
    """The payload that was compressed.

    Raises:
        FormatError: the bytes aren't that.
    """
    if payload.dtype != torch.uint8 or payload.dim() != 1 or not payload.is_contiguous():
        raise _misfit(coded, "a payload that isn't bytes")
    dtype, shape, strides = _form(coded, values)
    size = math.prod(shape) * dtype.itemsize
    zstandard = load_zstd()
    try:
        # Only as much is read as there should be, whatever the frame says of itself.
        with zstandard.ZstdDecompressor().stream_reader(payload.numpy().tobytes()) as reader:
            raw = reader.read(size + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise _misfit(coded, f"bytes that aren't Zstandard's: {error}") from error
    if len(raw) != size:
        raise _misfit(coded, f"other than {size} bytes in its frame")
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype.itemsize, -1)
    flat = planes.t().contiguous().view(-1).view(dtype)
    return flat.as_strided(shape, strides)


# ------------------------------------------------------------------------------------------- checks


def _form(coded: Coded, values: str) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """Dtype, shape and strides of the payload of a value's codec."""
    if values == "topk":
        shape = tuple(coded.extra[0].shape) if coded.extra else ()
        if len(shape) != 2:
            raise _misfit(coded, "no places")
        return float_dtype(coded.dtype), shape, (shape[1], 1)
    dtype = {"int8": torch.int8, "bfloat16": torch.bfloat16}.get(values, float_dtype(coded.dtype))
    return dtype, coded.shape, coded.strides


def _check(payload: Tensor, coded: Coded, values: str) -> None:
    """Refuse parts that don't fit each other: they may come from anywhere."""
    dtype, shape, _ = _form(coded, values)
    if payload.dtype != dtype or tuple(payload.shape) != shape:
        got = f"{_name(payload.dtype)} {tuple(payload.shape)}"
        raise _misfit(coded, f"a payload of {got}, not {_name(dtype)} {shape}")
    if len(coded.extra) != (values in ("int8", "topk")):
        raise _misfit(coded, f"{len(coded.extra)} tensors beside its payload")
    if values == "int8":
        scale = coded.extra[0]
        expected = -(-coded.shape[_channel(coded.shape)] // _neighbours(coded.shape))
        wide = torch.float64 if coded.dtype == "float64" else torch.float32
        if scale.dtype != wide or tuple(scale.shape) != (expected,):
            raise _misfit(coded, f"scales of {_name(scale.dtype)} {tuple(scale.shape)}")
    if values == "topk":
        places, rows = coded.extra[0], coded.shape[0] if len(coded.shape) > 1 else 1
        length = math.prod(coded.shape) // max(1, rows)
        if places.dtype != _place_dtype(length) or places.shape[0] != rows or not places.numel():
            raise _misfit(coded, f"places of {_name(places.dtype)} {tuple(places.shape)}")
        if not 0 <= int(places.min()) <= int(places.max()) < length:
            raise _misfit(coded, "places outside of it")


def _misfit(coded: Coded, why: str) -> FormatError:
    return FormatError(
        f"tensor {coded.place} of a message isn't one of {coded.codec[:60]!r}: it has {why}"
    )


def _sent(payload: Tensor, coded: Coded) -> int:
    return payload.nbytes + sum(tensor.nbytes for tensor in coded.extra)


def may_grow(sent: int, size: int) -> bool:
    """Whether so many bytes that were sent may become so many once they are decoded."""
    return size <= GROWTH_BYTES + GROWTH * sent


def dense_template(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """A tensor without memory that is laid out so; `None` if none is, or with gaps."""
    if len(shape) != len(strides) or any(size < 0 for size in (*shape, *strides)):
        return None
    try:
        found = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    except (RuntimeError, TypeError):  # more bytes than there are; a number beyond 64 bits
        return None
    return found if _is_dense(found) else None


def _is_dense(tensor: Tensor) -> bool:
    """Whether each place of its memory is one element: no gap, nothing expanded."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=_by_stride):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _by_stride(pair: tuple[int, int]) -> tuple[int, int]:
    return pair[1], pair[0]


def _share(text: str) -> float:
    try:
        share = positive("share", float(text))
    except (ValueError, InputError):
        share = math.inf
    if share > 1:
        raise InputError(
            f"'topk:{text[:20]}' has no share: expected a number above 0, at most 1: 'topk:0.1'"
        )
    return share


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def float_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        FormatError: tensors of it aren't coded.
    """
    found: torch.dtype | None = _FLOATS.get(name)
    if found is None:
        raise FormatError(f"{name[:40]!r} isn't coded: expected one of {[*_FLOATS]}")
    return found
