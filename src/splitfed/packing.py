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

from splitfed import codec, trees
from splitfed.errors import ContainerError, FormatError, SplitFedError
from splitfed.kinds import check_kinds
from splitfed.messages import Chain, ForwardRequest, Housekeeping, RoundInfo, Seal

M = TypeVar("M")

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


def unpack(cls: type[M], data: memoryview | bytes | bytearray) -> M:
    """The message in `data`; its tensors share that memory.

    Raises:
        FormatError: the bytes aren't a `cls` of ours.
    """
    return _rebuild(cls, unpack_tree(cls.__name__, data))


def pack_tree(kind: str, tree: Any) -> list[memoryview | bytes]:
    """Any tree as the buffers of a safetensors file that says of what kind it is.

    Raises:
        ContainerError: it holds something that can't travel.
    """
    spec, tensors = trees.flatten(tree)
    named = {f"{index:06d}": tensor for index, tensor in enumerate(tensors)}
    try:
        text = json.dumps(spec, separators=(",", ":"))
    except ValueError as error:
        raise ContainerError(f"the {kind} holds a value that can't travel: {error}") from error
    return codec.encode(named, {"kind": kind, "spec": text})


def unpack_tree(kind: str, data: memoryview | bytes | bytearray) -> Any:
    """The tree that `pack_tree` wrote.

    Raises:
        FormatError: the bytes aren't one of this kind.
    """
    tensors, metadata = codec.decode(data)
    return trees.unflatten(_spec(kind, metadata), [tensors[name] for name in sorted(tensors)])


def peek(cls: type, data: memoryview | bytes | bytearray, fields: Iterable[str]) -> dict[str, Any]:
    """Some fields without tensors of a packed message, read from its header alone.

    Raises:
        FormatError: as `unpack`, or such a field holds tensors.
    """
    spec = _spec(cls.__name__, codec.read_metadata(data))
    try:
        found = dict(spec["d"])
        return {name: trees.unflatten(found.get(name), []) for name in fields}
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
    kept = {f"{index:06d}": tensor for index, tensor in enumerate(tensors) if tensor is not None}
    hasher = hashlib.sha256(repr(said).encode())
    for part in codec.encode(kept):
        hasher.update(part)
    return hasher.hexdigest()


def _fields(cls: Any) -> list[str]:
    return list(cls.__dataclass_fields__)


def _plain(message: Any) -> dict[str, Any]:
    """The fields of a message; those that are messages themselves, or tuples of them, likewise."""
    fields = {name: getattr(message, name) for name in _fields(type(message))}
    for name in _NESTED:
        value = fields.get(name)
        if isinstance(value, tuple):
            fields[name] = tuple(_plain(item) for item in value)
        elif value is not None:
            fields[name] = _plain(value)
    return fields


def _spec(kind: str, metadata: Mapping[str, str]) -> Any:
    if metadata.get("kind") != kind:
        raise FormatError(f"expected a {kind}, got {str(metadata.get('kind'))[:60]!r}")
    try:
        return json.loads(metadata["spec"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"the {kind} has no readable spec: {error}") from error


def _rebuild(cls: type[M], values: Any) -> M:
    if not isinstance(values, dict) or set(values) != set(_fields(cls)):
        raise FormatError(f"a {cls.__name__} needs the fields {_fields(cls)}, got {str(values)[:200]}")
    for name, nested in _NESTED.items():
        if isinstance(values.get(name), dict):
            values[name] = _rebuild(nested, values[name])
        elif isinstance(values.get(name), tuple):
            values[name] = tuple(_rebuild(nested, item) for item in values[name])
    return check_kinds(cls(**values))
