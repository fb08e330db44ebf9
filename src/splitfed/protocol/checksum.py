"""Checksums within files: each file of a store says what its own bytes are.

Both formats of a store have a place for it that readers of the format skip: a JSON object has it as
its first key, a safetensors file as the first entry of its metadata. It is the CRC-32 of all bytes,
in hexadecimal, taken with zeros in its own place: so it finds every flipped bit and every burst of
up to 32 bits, and costs a fraction of reading the bytes. (Who else could have written the file is
another question, which the SHA-256 in a commit record answers.) Of a safetensors file there are
two: of the data, and of the header that holds the first, so that a header can be trusted without
reading the data.

The trap is a flip in the place itself: then there seems to be no checksum. So a reader has to know
that there must be one.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

from splitfed.errors import CorruptedError, FormatError
from splitfed.protocol import parallel

KEY = "crc32"
"""Its name, among the metadata of a safetensors file and the keys of a JSON object."""

Buffer = memoryview | bytes | bytearray
_ALIGNMENT = 64
_LENGTH = 8  # bytes of the length that a safetensors file begins with
_JSON = b'{"crc32":"'
_TENSORS = b'{"__metadata__":{"crc32":"'
_METADATA = b'{"__metadata__":{'
_DIGITS = 8
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
"""The polynomial 1."""


def sealed(parts: Sequence[Buffer]) -> list[Buffer]:
    """The parts of a file, with its checksum in the first; what has one stays as it is.

    What is in neither format has no place for it, and stays as it is.
    """
    first = bytes(parts[0])
    if first.startswith(b"{"):
        return list(parts) if first.startswith(_JSON) else [_sealed_json(b"".join(parts))]
    if first[_LENGTH : _LENGTH + 1] != b"{" or first.startswith(_TENSORS, _LENGTH):
        return list(parts)
    end = _LENGTH + int.from_bytes(first[:_LENGTH], "little")
    data = [first[end:], *parts[1:]] if len(first) > end else parts[1:]
    return [_sealed_header(first[_LENGTH:end], data), *data]


def text_of(data: Buffer) -> bytes:
    """A JSON file without its checksum."""
    text = bytes(data)
    if not text.startswith(_JSON):
        return text
    return b"{" + text[len(_JSON) + _DIGITS + 1 :].removeprefix(b",")


def _sealed_json(text: bytes) -> bytes:
    rest = text[1:] if text[1:].lstrip().startswith(b"}") else b"," + text[1:]
    crc = zlib.crc32(rest, zlib.crc32(_JSON + b'00000000"'))
    return b'%b%08x"%b' % (_JSON, crc, rest)


def _sealed_header(text: bytes, data: Sequence[Buffer]) -> bytes:
    text = text.rstrip(b" ")
    if text.startswith(_METADATA):
        rest = text[len(_METADATA) :]
        rest = rest if rest.startswith(b"}") else b"," + rest
    else:
        rest = b"}" + (text[1:] if text == b"{}" else b"," + text[1:])
    text = b'%b%08x00000000"%b' % (_TENSORS, crc32(data), rest)
    text += b" " * (-(_LENGTH + len(text)) % _ALIGNMENT)
    head = len(text).to_bytes(_LENGTH, "little") + text
    place = _LENGTH + len(_TENSORS) + _DIGITS
    return b"%b%08x%b" % (head[:place], zlib.crc32(head), head[place + _DIGITS :])


def check(data: Buffer, *, header_only: bool = False, required: bool = True) -> None:
    """Compare a file with its checksum.

    Args:
        data: All its bytes.
        header_only: Of a safetensors file, compare the header alone.
        required: Whether there must be one.

    Raises:
        CorruptedError: they differ.
        FormatError: there is none.
    """
    view = memoryview(data).cast("B")
    start = bytes(view[: _LENGTH + len(_TENSORS)])
    if start.startswith(_JSON):
        _compare(view, len(_JSON))
    elif start.startswith(_TENSORS, _LENGTH):
        length = _LENGTH + int.from_bytes(start[:_LENGTH], "little")
        place = _LENGTH + len(_TENSORS)
        _compare(view[:length], place + _DIGITS)
        if not header_only and crc32([view[length:]]) != _said(view, place):
            raise CorruptedError("its data aren't what was written")
    elif required:
        raise FormatError("it has no checksum: it isn't one of splitfed's, or its start is damaged")


def crc32(parts: Sequence[Buffer]) -> int:
    """CRC-32 of the joined parts. Of many bytes, two threads take half each."""
    # Asked here first: an ordinary file enters nothing else.
    if sum(map(len, parts)) < parallel.LARGE:
        return _crc32(parts)
    views = [memoryview(part).cast("B") for part in parts]
    num_bytes = sum(map(len, views))
    if not parallel.is_worth_it(num_bytes):
        return _crc32(views)
    first, second = [], []
    left = num_bytes // 2
    for view in views:
        first.append(view[:left])
        second.append(view[left:])
        left = max(0, left - len(view))
    one, other = parallel.together(lambda: _crc32(first), lambda: _crc32(second))
    return joined(one, other, num_bytes - num_bytes // 2)


def _crc32(parts: Sequence[Buffer]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def joined(one: int, other: int, num_bytes: int) -> int:
    """The CRC-32 of two byte strings after each other, by theirs and the bytes of the second.

    A CRC is the remainder of the bytes as a polynomial over GF(2). So many zeros behind the first
    multiply it by x^(8·num_bytes), and the second is added.
    """
    power = _ONE
    doubled = 3  # x^8 = x^(2³)
    while num_bytes:
        if num_bytes & 1:
            power = _times(_powers()[doubled % 32], power)
        num_bytes >>= 1
        doubled += 1
    return _times(power, one) ^ other


@functools.cache
def _powers() -> list[int]:
    """x^(2^k) for k of 0 to 31; they repeat after that."""
    found = [_ONE >> 1]
    for _ in range(31):
        found.append(_times(found[-1], found[-1]))
    return found


def _times(one: int, other: int) -> int:
    """The product of two remainders. The highest bit is the coefficient of x^0."""
    product = 0
    while one:
        if one & _ONE:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


def _compare(view: memoryview, place: int) -> None:
    """Compare bytes with the checksum that is at a place among them."""
    crc = zlib.crc32(b"0" * _DIGITS, zlib.crc32(view[:place]))
    if zlib.crc32(view[place + _DIGITS :], crc) != _said(view, place):
        raise CorruptedError("its bytes aren't what was written")


def _said(view: memoryview, place: int) -> int:
    digits = bytes(view[place : place + _DIGITS])
    # Only as they are written: int() also takes signs, spaces and capitals, which a flip may make.
    if len(digits) < _DIGITS or not set(digits) <= _HEX:
        return -1
    return int(digits, 16)


_HEX = frozenset(b"0123456789abcdef")
