"""Messages, records and errors as safetensors bytes: one packing for the wire and the disk.

The fields of a message form one tree; its spec goes into the header as JSON, its tensors are named
by their place in the tree and share their memory with the message on the way out, and with the file
on the way in.

An error arrives as the class that the server raised, with its message: a loop that catches
`ExpiredError` in one process catches it over any transport. The trap is what an error may tell.
Ours are written for the client. Of an unforeseen exception only the class crosses, since its text
may quote a path, a credential or somebody else's data; the text belongs in the server's log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from splitfed import errors
from splitfed.errors import ContainerError, FormatError, SplitFedError
from splitfed.protocol import checksum, header, pytree, safetensors
from splitfed.protocol.fields import added_fields, check_types, nested_messages
from splitfed.protocol.transport import VERBS

M = TypeVar("M")
# Specs are built here and have no circles: looking for them takes half of the time.
_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode

_ERROR = "Error"
_MAX_MESSAGE = 4_000


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

    Each field's type is checked here.

    Raises:
        FormatError: the bytes aren't a `cls` of ours, or have more tensors or a larger header than
            that.
    """
    tensors, metadata = safetensors.decode(data, max_tensors=max_tensors, max_header=max_header)
    return check_types(_rebuild(cls, _tree(cls.__name__, tensors, metadata)))


def unpack_answer(verb: str, data: memoryview | bytes | bytearray) -> Any:
    """The answer to a request of a verb.

    Raises:
        SplitFedError: the error that was answered instead.
        FormatError: the bytes are neither.
    """
    if kind_of(data) == _ERROR:
        raise unpack_error(data)
    return unpack(VERBS[verb][1], data)


def kind_of(data: memoryview | bytes | bytearray) -> str:
    """What packed bytes are: the name of a message's class, or 'Error'; '' if they don't say.

    Raises:
        FormatError: they aren't safetensors bytes.
    """
    return safetensors.read_metadata(data).get("kind", "")


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


# --------------------------------------------------------------------------------- trees and JSON


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


def read_json(data: bytes | memoryview | None, what: str) -> dict[str, Any]:
    """The JSON object in `data`, without its checksum.

    Raises:
        FormatError: there is none.
    """
    try:
        found = json.loads(checksum.text_of(data or b""))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} isn't readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{what} isn't a JSON object: expected {{...}}, got {str(found)[:40]}")
    return found


# --------------------------------------------------------------------------------- errors


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error as plain JSON: its class, its message and its HTTP status."""
    if not isinstance(error, SplitFedError):
        error = SplitFedError(
            f"the server failed ({type(error).__name__}); its log has the traceback"
        )
    return {
        "error": type(error).__name__,
        "message": str(error)[:_MAX_MESSAGE],
        "status": error.status,
    }


def error_from(fields: Mapping[str, Any]) -> SplitFedError:
    """The error of `error_fields`, by its class.

    One that isn't known here keeps its name in the message.
    """
    name = str(fields.get("error", ""))[:60]
    message = str(fields.get("message", ""))[:_MAX_MESSAGE]
    found = vars(errors).get(name)
    if isinstance(found, type) and issubclass(found, SplitFedError):
        return found(message)
    return SplitFedError(f"{name or 'an error without a name'}: {message}")


def pack_error(error: BaseException) -> list[memoryview | bytes]:
    """An error as bytes of the one format."""
    return pack_tree(_ERROR, error_fields(error))


def unpack_error(data: memoryview | bytes | bytearray) -> SplitFedError:
    """The error that `pack_error` wrote.

    Raises:
        FormatError: the bytes are none.
    """
    fields = unpack_tree(_ERROR, data)
    if not isinstance(fields, dict):
        raise FormatError(f"expected the fields of an error, got {str(fields)[:60]!r}")
    return error_from(fields)


# --------------------------------------------------------------------------------- fields as a tree


def _fields(cls: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = cls.__dataclass_fields__
    return found


def _plain(message: Any) -> dict[str, Any]:
    """The fields of a message as plain values; messages within it likewise."""
    fields = {name: getattr(message, name) for name in _fields(type(message))}
    for name, default in added_fields(type(message)).items():
        if fields[name] == default:
            del fields[name]
    for name, inner in nested_messages(type(message)).items():
        value = fields.get(name)  # not there if it has its default
        if isinstance(value, list | tuple):
            plain = [_plain(item) if type(item) is inner else item for item in value]
            fields[name] = plain if isinstance(value, list) else tuple(plain)
        elif type(value) is inner:
            fields[name] = _plain(value)
    return fields


def _rebuild(cls: type[M], values: Any) -> M:
    known = _fields(cls).keys()
    # What came later may be missing: then it has its default.
    needed = known - added_fields(cls).keys()
    if not isinstance(values, dict) or not needed <= values.keys() <= known:
        got: Any = type(values).__name__
        if isinstance(values, dict):
            got = [key for key in values if type(key) is str]
        raise FormatError(
            f"a {cls.__name__} needs the fields {list(_fields(cls))}, got {str(got)[:200]}"
        )
    for name, inner in nested_messages(cls).items():
        value = values.get(name)
        if isinstance(value, dict):
            values[name] = _rebuild(inner, value)
        elif isinstance(value, list | tuple):
            # Not by the value's own class: foreign bytes may name a tuple of any fields.
            rebuilt: list[Any] = [_rebuild(inner, item) for item in value]
            values[name] = rebuilt if isinstance(value, list) else tuple(rebuilt)
    return cls(**values)


def _tree(kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Any:
    return pytree.unflatten(_spec(kind, metadata), [tensors[name] for name in sorted(tensors)])


def _spec(kind: str, metadata: Mapping[str, str]) -> Any:
    if metadata.get("kind") != kind:
        raise FormatError(f"expected a {kind}, got {str(metadata.get('kind'))[:60]!r}")
    try:
        return json.loads(metadata["spec"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"the {kind} has no readable spec: {error}") from error
