"""Hostile input for every door: bodies that lie about themselves, and client ids that must never become a key."""

from __future__ import annotations

import json
import struct
from typing import Any


def raw(header: bytes, data: bytes = b"") -> bytes:
    """A body with exactly this header."""
    return struct.pack("<Q", len(header)) + header + data


def body(header: dict[str, Any], data: bytes = b"") -> bytes:
    """A body with this header, padded to 64 bytes."""
    text = json.dumps(header).encode()
    return raw(text + b" " * (-(8 + len(text)) % 64), data)


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    """What a header says of a tensor; four bytes, unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(*args: Any, name: str = "x", **more: Any) -> bytes:
    """A body of one tensor with four bytes of data."""
    return body({name: entry(*args, **more)}, b"\1\0\1\0")


def pair(first: tuple[int, int], second: tuple[int, int], data: bytes = bytes(8)) -> bytes:
    """A body of two tensors at these offsets."""
    return body(
        {"x": entry("U8", [first[1] - first[0]], first), "y": entry("U8", [second[1] - second[0]], second)}, data
    )


def layout(value: Any, shape: Any = (2, 2)) -> bytes:
    """A body of one tensor of four bytes and a foreign layout."""
    text = value if isinstance(value, str) else json.dumps(value)
    return body({"__metadata__": {"splitfed.layout": text}, "x": entry("U8", shape)}, bytes(4))


def many(count: int, pattern: str) -> bytes:
    """A JSON object of so many entries."""
    return ("{" + ",".join(pattern % number for number in range(count)) + "}").encode()


GOOD = one()
NESTED = b"[" * 100_000
DUPLICATE = json.dumps(entry()).encode()

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected 8 bytes or more, got 0"),
    "7 bytes": (bytes(7), "expected 8 bytes or more, got 7"),
    "header length 0": (bytes(8), "expected 2 to 16777216 bytes, got 0"),
    "header beyond the body": (raw(b"{}")[:-1], "expected 10 bytes or more, got 9"),
    "header above 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "got 100000001"),
    "header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "got 9223372036854775808"),
    "header of 2^64-1": (b"\xff" * 8 + b"{}", "got 18446744073709551615"),
    "not UTF-8": (raw(b'{"\xff":1}'), "expected UTF-8, got invalid start byte at byte 2"),
    "not JSON": (raw(b"{'a': 1}"), "expected a JSON object, got Expecting property name"),
    "two JSON values": (raw(b"{}{}"), "got Extra data"),
    "JSON list": (raw(b"[1]"), "expected '{' first"),
    "leading spaces": (raw(b"  {}"), "expected '{' first"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "expected '{' first"),
    "UTF-16": (raw("{}".encode("utf-16-le")), "isn't readable"),
    "truncated": (GOOD[:-1], "expected a body of 132 bytes or more, got 131"),
    "trailing byte": (GOOD + b"\0", "expected a body of 132 bytes, got 133"),
    "trailing byte after no tensors": (raw(b"{}", b"\0"), "expected a body of 10 bytes, got 11"),
    "gap": (pair((0, 3), (4, 8)), "a gap before tensor 'y': expected offset 131, got 132"),
    "gap at the start": (one("U8", [3], [1, 4]), "a gap before tensor 'x'"),
    "overlap": (pair((0, 5), (4, 8)), "an overlap before tensor 'y'"),
    "one tensor twice": (pair((0, 8), (0, 8)), "an overlap before tensor 'y'"),
    "inverted offsets": (one("U8", [4], [4, 0]), r"expected \[begin, end\] in order, got \[4, 0\]"),
    "negative offset": (one("U8", [4], [-4, 0]), "bad offsets"),
    "three offsets": (one("U8", [4], [0, 4, 4]), "bad offsets"),
    "float offset": (one("U8", [4], [0, 4.0]), "bad offsets"),
    "boolean begin": (one("U8", [4], [False, 4]), "bad offsets"),
    "boolean end": (one("U8", [1], [0, True]), "bad offsets"),
    "offset of 2^64": (one("U8", [4], [0, 1 << 64]), "expected a body of 18446744073709551744 bytes or more"),
    "no offsets": (one("U8", [4], None), "bad offsets"),
    "size mismatch": (one("U8", [5]), r"expected 5 bytes for \[5\], got 4"),
    "size mismatch by dtype": (one("F32", [4]), r"expected 16 bytes for \[4\], got 4"),
    "bytes for an empty tensor": (one("U8", [0, 4]), r"expected 0 bytes for \[0, 4\], got 4"),
    "shape that overflows": (one("U8", [1 << 32, 1 << 32]), "bad shape"),
    "shape of 2^64": (one("U8", [1 << 64]), "bad shape"),
    "shape [0, 2^60]": (one("U8", [0, 1 << 60], [0, 0]), "bad shape"),
    "shape [0, 2^40, 2^40]": (one("U8", [0, 1 << 40, 1 << 40], [0, 0]), "bad shape"),
    "negative shape": (one("U8", [-4]), r"bad shape.*got \[-4\]"),
    "two negative sizes": (one("U8", [-2, -2]), "bad shape"),
    "float shape": (one("U8", [4.0]), "bad shape"),
    "NaN shape": (one("U8", [float("nan")]), "bad shape"),
    "boolean shape": (one("U8", [True, 4]), "bad shape"),
    "string shape": (one("U8", "4"), "bad shape"),
    "nested shape": (one("U8", [[4]]), "bad shape"),
    "shape of thousands of digits": (one("U8", [10**4000]), "bad shape"),
    "shape of 5000 digits": (
        raw(b'{"x":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "header|shape",
    ),
    "9 dimensions": (one("U8", [1] * 8 + [4]), "at most 8 integers"),
    "70 dimensions": (one("U8", [1] * 69 + [4]), "at most 8 integers"),
    "unknown dtype": (one("F128"), "unknown dtype.*got 'F128'"),
    "dtype F4": (one("F4", [8]), "unknown dtype"),
    "dtype F8_E8M0": (one("F8_E8M0"), "unknown dtype"),
    "dtype in lower case": (one("u8"), "unknown dtype"),
    "dtype that is a list": (one(["U8"]), "unknown dtype"),
    "dtype null": (one(None), "unknown dtype"),
    "boolean byte of 2": (body({"x": entry("BOOL")}, b"\1\0\2\0"), "expected bytes 0 and 1"),
    "extra field": (one(extra=1), "other fields.*'extra'"),
    "missing field": (body({"x": {"dtype": "U8", "shape": [4]}}, bytes(4)), "other fields"),
    "tensor that is a list": (body({"x": [1]}), "other fields"),
    "tensor that is null": (body({"x": None}), "other fields"),
    "duplicate tensor": (raw(b'{"x":' + DUPLICATE + b',"x":' + DUPLICATE + b"}", bytes(4)), "expected 'x' once"),
    "duplicate field": (raw(b'{"x":{"dtype":"U8",' + DUPLICATE[1:] + b"}", bytes(4)), "expected 'dtype' once"),
    "duplicate by an escape": (
        raw(b'{"x":' + DUPLICATE + b',"\\u0078":' + DUPLICATE + b"}", bytes(4)),
        "expected 'x' once",
    ),
    "duplicate metadata": (raw(b'{"__metadata__":{"a":"","a":""}}'), "expected 'a' once"),
    "name with NUL": (one(name="a\0b"), "expected no NUL"),
    "name with ../": (one(name="../../etc/passwd"), "no '..'"),
    "name with ..\\": (one(name="a\\..\\b"), "no '..'"),
    "name of 1025 characters": (one(name="a" * 1025), "expected at most 1024, got 1025"),
    "name of 1 MB": (one(name="a" * (1 << 20)), "expected at most 1024, got 1048576"),
    "name with a lone surrogate": (one(name="a\ud800"), "surrogates not allowed"),
    "metadata list": (body({"__metadata__": ["a"]}), "expected {...}, got a list"),
    "metadata null": (body({"__metadata__": None}), "got a NoneType"),
    "metadata number": (body({"__metadata__": {"a": 1}}), "expected text, got a int"),
    "metadata object": (body({"__metadata__": {"a": {}}}), "expected text, got a dict"),
    "metadata with a lone surrogate": (body({"__metadata__": {"a": "\udfff"}}), "surrogates not allowed"),
    "deep nesting": (raw(b'{"x":' + NESTED + b"]" * 100_000 + b"}"), "isn't readable"),
    "deep nesting of a shape": (
        raw(b'{"x":{"dtype":"U8","data_offsets":[0,4],"shape":' + b"[" * 400 + b"]" * 400 + b"}}"),
        "bad shape",
    ),
    "misaligned data": (
        body({"a": entry("U8", [1], [0, 1]), "b": entry("I16", [1], [1, 3])}, bytes(3)),
        "a multiple of 2, got",
    ),
    "misaligned header": (raw(json.dumps({"x": entry("I16", [2])}).encode(), bytes(4)), "'x' is misaligned"),
    "layout that isn't JSON": (layout("{"), "the layout isn't readable"),
    "layout that is a list": (layout([]), "the layout isn't a JSON object"),
    "layout nested deeply": (layout("[" * 100_000), "the layout isn't readable"),
    "layout of another tensor": (layout({"y": {"order": [1, 0]}}), "a tensor that isn't there: expected none, got 'y'"),
    "layout with a duplicate": (layout('{"x":{"order":[1,0]},"x":{"order":[1,0]}}'), "expected 'x' once"),
    "layout without fields": (layout({"x": {}}), "bad layout"),
    "layout null": (layout({"x": None}), "bad layout"),
    "layout of lists": (layout({"x": [1, 0]}), "bad layout"),
    "layout with an extra field": (layout({"x": {"order": [1, 0], "more": [1, 0]}}), "bad layout"),
    "layout of both kinds": (layout({"x": {"order": [1, 0], "strides": [1, 2]}}), "bad layout"),
    "layout with a shape only": (layout({"x": {"shape": [2, 2]}}), "bad layout"),
    "order of other dimensions": (layout({"x": {"order": [2, 0]}}), "bad layout"),
    "order with a dimension twice": (layout({"x": {"order": [0, 0]}}), "bad layout"),
    "order of too few": (layout({"x": {"order": [0]}}), "bad layout"),
    "order of booleans": (layout({"x": {"order": [True, False]}}), "bad layout"),
    "order of floats": (layout({"x": {"order": [1.0, 0.0]}}), "bad layout"),
    "order of an empty tensor": (
        body({"__metadata__": {"splitfed.layout": '{"x":{"order":[1,0]}}'}, "x": entry("U8", [0, 2], [0, 0])}),
        "bad layout",
    ),
    "strides out of reach": (layout({"x": {"strides": [1 << 40, 1]}}), "bad layout"),
    "strides above an int64": (layout({"x": {"strides": [1 << 64, 1]}}), "bad layout"),
    "negative strides": (layout({"x": {"strides": [-2, 1]}}), "bad layout"),
    "overlapping strides": (layout({"x": {"strides": [1, 1]}}), "bad layout"),
    "strides over 64 bytes": (layout({"x": {"strides": [64, 1]}}), "bad layout"),
    "strides of a contiguous tensor": (layout({"x": {"strides": [2, 1]}}), "bad layout"),
    "strides of a transpose": (layout({"x": {"strides": [1, 2]}}), "bad layout"),
    "float strides": (layout({"x": {"strides": [4.0, 1]}}), "bad layout"),
    "stride 0 without a shape": (layout({"x": {"strides": [0, 1]}}), "bad layout"),
    "expanded, but stored whole": (layout({"x": {"strides": [0, 1], "shape": [2, 2]}}), "bad layout"),
    "expanded to 2^40": (layout({"x": {"strides": [0, 1], "shape": [1 << 40, 4]}}, [1, 4]), "bad layout"),
    "expanded to nothing": (layout({"x": {"strides": [0, 1], "shape": [0, 4]}}, [1, 4]), "bad layout"),
    "shape without expansion": (layout({"x": {"strides": [4, 1], "shape": [2, 2]}}), "bad layout"),
    "shape of other dimensions": (layout({"x": {"strides": [0, 1], "shape": [2, 5]}}, [1, 4]), "bad layout"),
}

HOSTILE = {
    "empty": "",
    "dot": ".",
    "dots": "..",
    "up": "../a",
    "hidden": ".a",
    "option": "-a",
    "underscore_first": "_a",
    "slash": "a/b",
    "absolute": "/etc",
    "backslash": "a\\b",
    "nul": "a\0b",
    "percent": "a%00b",
    "star": "*",
    "question": "a?",
    "version": "a?versionId=3",
    "chain": "a::b",
    "colon": "a:b",
    "space": "a b",
    "newline": "a\n",
    "65": "a" * 65,
    "300": "a" * 300,
    "umlaut": "klinik-köln",
    "digit_of_another_script": "a٣",
    "bytes": b"a",
    "none": None,
    "number": 3,
    "true": True,
    "list": ["a"],
}
