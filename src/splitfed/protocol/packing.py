"""Messages and records as safetensors bytes: one packing for the wire and the disk.

The fields of a message form one tree; its spec goes into the header as JSON, its tensors are named by their place in
the tree and share their memory with the message on the way out, and with the file on the way in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from splitfed.errors import ContainerError, FormatError, SplitFedError
from splitfed.protocol import header, pytree, safetensors
from splitfed.protocol.kinds import check_kinds
from splitfed.protocol.messages import Chain, ForwardRequest, Housekeeping, RoundInfo, Seal

M = TypeVar("M")
_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode  # a spec is made anew, without circles

_NESTED: dict[str, type] = {
    "housekeeping": Housekeeping,
    "seal": Seal,
    "chains": Chain,
    "forward": ForwardRequest,
    "round": RoundInfo,
}


def pack(message: Any) -> list[memoryview | bytes]:
    """The message as the buffers of a safetensors file; tensors aren't copied.

    Raises:
        ContainerError: a field holds something that can't travel.
    """
    return pack_tree(type(message).__name__, _plain(message))


def unpack(
    cls: type[M],
    data: memoryview | bytes | bytearray,
    *,
    max_tensors: int = header.MAX_TENSORS,
    max_header: int = header.MAX_HEADER,
) -> M:
    """The message in `data`; its tensors share that memory.

    Raises:
        FormatError: the bytes aren't a `cls` of ours, or have more tensors or a larger header than that.
    """
    tensors, metadata = safetensors.decode(data, max_tensors=max_tensors, max_header=max_header)
    return check_kinds(_rebuild(cls, _tree(cls.__name__, tensors, metadata)))


def pack_tree(kind: str, tree: Any) -> list[memoryview | bytes]:
    """Any tree as the buffers of a safetensors file that says of what kind it is.

    Raises:
        ContainerError: it holds something that can't travel.
    """
    spec, tensors = pytree.flatten(tree)
    named = {f"{index:06d}": tensor for index, tensor in enumerate(tensors)}
    try:
        text = _to_json(spec)
    except ValueError as error:
        raise ContainerError(f"the {kind} holds a value that can't travel: {error}") from error
    return safetensors.encode(named, {"kind": kind, "spec": text})


def unpack_tree(kind: str, data: memoryview | bytes | bytearray) -> Any:
    """The tree that `pack_tree` wrote.

    Raises:
        FormatError: the bytes aren't one of this kind.
    """
    return _tree(kind, *safetensors.decode(data))


def peek(cls: type, data: memoryview | bytes | bytearray, fields: Iterable[str]) -> dict[str, Any]:
    """Some fields without tensors of a packed message, read from its header alone.

    Raises:
        FormatError: as `unpack`, or such a field holds tensors.
    """
    spec = _spec(cls.__name__, safetensors.read_metadata(data))
    try:
        found = dict(spec["d"])
        return {name: pytree.unflatten(found.get(name), []) for name in fields}
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, SplitFedError):
            raise
        raise FormatError(f"the {cls.__name__} has a malformed spec: {error}") from error


def read_json(data: bytes | memoryview | None, what: str) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        FormatError: there is none.
    """
    try:
        found = json.loads(bytes(data or b""))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} isn't readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{what} isn't a JSON object: expected {{...}}, got {str(found)[:40]}")
    return found


def digest(said: object, tensors: Iterable[Tensor | None]) -> str:
    """SHA-256 of what a request says: a retry has the same, another request another.

    Args:
        said: Its plain fields, housekeeping apart; anything whose `repr` tells them apart.
        tensors: What it carries.
    """
    contents = [("", b"") if tensor is None else safetensors.content(tensor) for tensor in tensors]
    hasher = hashlib.sha256(repr((said, [text for text, _ in contents])).encode())
    for _, memory in contents:
        hasher.update(memory)
    return hasher.hexdigest()


def _fields(cls: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = cls.__dataclass_fields__
    return found


def _plain(message: Any) -> dict[str, Any]:
    """The fields of a message; those that are messages themselves, or tuples of them, likewise."""
    fields = {name: getattr(message, name) for name in _fields(type(message))}
    for name in _NESTED:
        value = fields.get(name)
        if isinstance(value, tuple):
            fields[name] = tuple([_plain(item) for item in value])
        elif value is not None:
            fields[name] = _plain(value)
    return fields


def _tree(kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Any:
    return pytree.unflatten(_spec(kind, metadata), [tensors[name] for name in sorted(tensors)])


def _spec(kind: str, metadata: Mapping[str, str]) -> Any:
    if metadata.get("kind") != kind:
        raise FormatError(f"expected a {kind}, got {str(metadata.get('kind'))[:60]!r}")
    try:
        return json.loads(metadata["spec"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"the {kind} has no readable spec: {error}") from error


def _rebuild(cls: type[M], values: Any) -> M:
    if not isinstance(values, dict) or values.keys() != _fields(cls).keys():
        got = [key for key in values if type(key) is str] if isinstance(values, dict) else type(values).__name__
        raise FormatError(f"a {cls.__name__} needs the fields {list(_fields(cls))}, got {str(got)[:200]}")
    for name, nested in _NESTED.items():
        value = values.get(name)
        if isinstance(value, dict):
            values[name] = _rebuild(nested, value)
        elif isinstance(value, tuple):
            values[name] = tuple([_rebuild(nested, item) for item in value])
    return cls(**values)
