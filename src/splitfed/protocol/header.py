"""The header of foreign safetensors bytes, checked before anything in it is believed.

A body from outside may claim anything: sizes that overflow, tensors that share bytes, one name
twice, a header whose parsing alone exhausts the memory. The safetensors library accepts several of
these, so the checks are here, cheapest first: sizes before text, counts before objects, every
number before it is used as one. A header that passes describes tensors that tile the body exactly,
in dtypes that torch has, at offsets that a view may start at.

The trap is in the order: `json.loads` turns a 16 MB header into a gigabyte of small objects, so
`_check_counts` looks at the raw bytes first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from splitfed.errors import FormatError

MAX_DIMS = 8
MAX_NAME = 1024
MAX_METADATA = 10_000
MAX_TENSORS = 100_000
MAX_HEADER = 16 << 20  # bytes
# Elements, bytes or strides: what 64-bit machines can address, and far from overflowing an int64.
MAX_EXTENT = 1 << 47
_SMALL = 1 << 16  # bytes of a header that may be parsed without looking at its counts

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
# Not every torch that is supported has all of them.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)
}


class Entry(NamedTuple):
    """One tensor of a header; `begin` and `end` are offsets in the whole body, in bytes."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


class Header(NamedTuple):
    """A checked header: its tensors in the order of their bytes, and all of its metadata."""

    entries: list[Entry]
    metadata: dict[str, str]


def parse_header(
    data: memoryview, *, max_tensors: int = MAX_TENSORS, max_header: int = MAX_HEADER
) -> Header:
    """Return the checked header of `data`, a whole safetensors body as bytes.

    Raises:
        FormatError: `data` isn't a well-formed body, has more than `max_tensors` tensors, or a
            header above `max_header` bytes.
    """
    text, start = _header_text(data, max_tensors, max_header)
    fields = parse_json(text, "the header")
    metadata = _check_metadata(fields.pop("__metadata__", {}))
    if len(fields) > max_tensors:
        raise FormatError(f"too many tensors: expected at most {max_tensors}, got {len(fields)}")
    # An escape is the only way to a lone surrogate, which UTF-8 can't encode.
    if "\\u" in text:
        for string in (*fields, *metadata, *metadata.values()):
            _check_utf8(string)
    entries = [_check_entry(name, field, start, len(data)) for name, field in fields.items()]
    entries.sort(key=itemgetter(3, 4))  # by begin, and where that is equal by end: empty ones first
    _check_tiling(entries, start, len(data))
    return Header(entries, metadata)


def parse_json(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object in `text`, no key of which occurs twice.

    Raises:
        FormatError: `text` is no JSON object, is nested too deeply or repeats a key; `what` names
            it in the message.
    """
    try:
        value = _DECODER.decode(text)
    except FormatError:  # of `_unique`; it is a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{what} isn't readable: expected a JSON object, got {str(error)[:120]}"
        ) from None
    if type(value) is not dict:
        raise FormatError(
            f"{what} isn't a JSON object: expected {{...}}, got a {type(value).__name__}"
        )
    return value


def check_name(name: str) -> None:
    """Check that a tensor may have this name.

    A name that is allowed is safe on disk, on the wire and in anything that unpacks it into files.

    Raises:
        FormatError: it is longer than 1,024 characters, holds NUL or a path component `..`, or is
            reserved.
    """
    if len(name) > MAX_NAME:
        raise FormatError(
            f"tensor name {name[:80]!r}... is too long: "
            f"expected at most {MAX_NAME}, got {len(name)}"
        )
    # ".." as a part of a word is allowed. The first test is for speed: hardly any name has it.
    climbs = ".." in name and ".." in name.replace("\\", "/").split("/")
    if "\0" in name or name == "__metadata__" or climbs:
        raise FormatError(
            f"tensor name {name[:80]!r} isn't allowed: "
            "expected no NUL, no '..' and not '__metadata__'"
        )
    if not name.isascii():
        _check_utf8(name)


def is_sizes(value: object) -> bool:
    """Whether `value` is a list of at most 8 integers from 0 to 2⁴⁷, as shapes and strides are."""
    # By their exact types: True is an int, and no size.
    if type(value) is not list or len(value) > MAX_DIMS or not {*map(type, value)} <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= MAX_EXTENT)


def extent(shape: Sequence[object], itemsize: int) -> int:
    """Return the bytes of this shape, with empty dimensions counted as one.

    More than `MAX_EXTENT` is returned for what isn't a shape.
    """
    num_bytes = itemsize
    if len(shape) > MAX_DIMS:
        return MAX_EXTENT + 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_EXTENT:
            return MAX_EXTENT + 1
        num_bytes *= size or 1
    return num_bytes


def shown(value: object) -> str:
    """Return the start of a foreign value for a message."""
    try:
        return repr(value)[:120]
    except (RecursionError, ValueError):  # lists within lists; integers of thousands of digits
        return f"a {type(value).__name__}"


def _header_text(data: memoryview, max_tensors: int, max_header: int) -> tuple[str, int]:
    """The JSON text of a header, and the offset of the bytes behind it."""
    if len(data) < 8:
        raise FormatError(f"not a safetensors body: expected 8 bytes or more, got {len(data)}")
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= max_header:
        raise FormatError(
            f"header length out of range: expected 2 to {max_header} bytes, got {length}"
        )
    start = 8 + length
    if start > len(data):
        raise FormatError(f"truncated header: expected {start} bytes or more, got {len(data)}")
    raw = bytes(data[8:start])
    if raw[:1] != b"{":
        raise FormatError(f"the header isn't a JSON object: expected '{{' first, got {raw[:8]!r}")
    if length > _SMALL:
        _check_counts(raw, max_tensors)
    try:
        return raw.decode(), start
    except UnicodeDecodeError as error:
        raise FormatError(
            f"the header isn't text: expected UTF-8, got {error.reason} at byte {error.start}"
        ) from None


def _check_tiling(entries: list[Entry], start: int, total: int) -> None:
    """Check that sorted entries follow each other without a gap or overlap, to the end."""
    cursor = start
    for entry in entries:
        if entry.begin != cursor:
            kind = "a gap" if entry.begin > cursor else "an overlap"
            raise FormatError(
                f"{kind} before tensor {entry.name[:80]!r}: "
                f"expected offset {cursor}, got {entry.begin}"
            )
        cursor = entry.end
    if cursor != total:
        raise FormatError(f"trailing bytes: expected a body of {cursor} bytes, got {total}")


def _check_counts(raw: bytes, max_tensors: int) -> None:
    """Bound the objects that parsing a header would build, by counts of its raw bytes."""
    # Unescaped quotes come in pairs: five for a tensor (its name, dtype and the value of that,
    # shape, data_offsets), two for an entry of the metadata, one for their key.
    quotes = raw.count(b'"') - raw.count(b'\\"')
    allowed = 10 * max_tensors + 4 * MAX_METADATA + 2
    if quotes > allowed:
        raise FormatError(
            f"too many tensors: expected at most {max_tensors}, "
            f"got a header of {quotes // 10} or so"
        )
    # In a lawful header at most one byte in twelve is a bracket.
    brackets = raw.count(b"[") + raw.count(b"{")
    if len(raw) > 1 << 20 and brackets > len(raw) // 8:
        raise FormatError(
            f"too many lists: expected at most {len(raw) // 8} brackets in the header, "
            f"got {brackets}"
        )


def _check_metadata(metadata: object) -> dict[str, str]:
    if type(metadata) is not dict:
        raise FormatError(
            "metadata isn't an object of strings: "
            f"expected {{...}}, got a {type(metadata).__name__}"
        )
    if len(metadata) > MAX_METADATA:
        raise FormatError(
            f"too much metadata: expected at most {MAX_METADATA} entries, got {len(metadata)}"
        )
    for key, value in metadata.items():
        if type(value) is not str:
            raise FormatError(
                f"metadata {key[:80]!r} isn't a string: expected text, got a {type(value).__name__}"
            )
    return metadata


def _check_entry(name: str, field: Any, start: int, total: int) -> Entry:
    """The entry of one tensor, with offsets into a body of `total` bytes."""
    check_name(name)
    if type(field) is not dict or field.keys() != _FIELDS:
        raise FormatError(
            f"tensor {name[:80]!r} has other fields: expected {sorted(_FIELDS)}, got {shown(field)}"
        )
    code = field["dtype"]
    # Its type first: what isn't hashable can't be looked up.
    dtype = DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        raise FormatError(
            f"tensor {name[:80]!r} has an unknown dtype: "
            f"expected one of {list(DTYPES)}, got {shown(code)}"
        )
    shape = field["shape"]
    num_bytes = _check_shape(name, shape, dtype)
    first, last = _check_offsets(name, field["data_offsets"])
    begin = start + first
    end = start + last
    if end > total:
        raise FormatError(
            f"tensor {name[:80]!r} is truncated: "
            f"expected a body of {end} bytes or more, got {total}"
        )
    if end - begin != num_bytes:
        raise FormatError(
            f"tensor {name[:80]!r} has another size: "
            f"expected {num_bytes} bytes for {shape}, got {end - begin}"
        )
    if begin % dtype.itemsize:
        raise FormatError(
            f"tensor {name[:80]!r} is misaligned: "
            f"expected a multiple of {dtype.itemsize}, got {begin}"
        )
    return Entry(name, dtype, shape, begin, end)


def _check_shape(name: str, shape: Any, dtype: torch.dtype) -> int:
    """The bytes of a tensor of this shape."""
    # Empty dimensions count as one: strides are products of the others, and must not overflow.
    reach = MAX_EXTENT + 1
    if type(shape) is list:
        reach = extent(shape, dtype.itemsize)
    if reach > MAX_EXTENT:
        raise FormatError(
            f"tensor {name[:80]!r} has a bad shape: "
            f"expected at most {MAX_DIMS} integers from 0, of at most {MAX_EXTENT} bytes in all, "
            f"got {shown(shape)}"
        )
    return 0 if 0 in shape else reach


def _check_offsets(name: str, offsets: object) -> tuple[int, int]:
    if type(offsets) is list and len(offsets) == 2:
        first, last = offsets
        # `type`, not isinstance: True is an int.
        if type(first) is int and type(last) is int and 0 <= first <= last:
            return first, last
    raise FormatError(
        f"tensor {name[:80]!r} has bad offsets: "
        f"expected [begin, end] in order, got {shown(offsets)}"
    )


def _check_utf8(string: str) -> None:
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{string[:80]!r} isn't text: expected what UTF-8 can hold, got {error.reason}"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; of a key that occurs twice, json would keep the last value."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            break
        seen.add(key)
    raise FormatError(f"duplicate key: expected {key[:80]!r} once, got it twice or more")


_FIELDS = {"dtype", "shape", "data_offsets"}
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
