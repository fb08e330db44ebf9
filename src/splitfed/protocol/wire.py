"""What crosses between processes, whichever way it travels: which request has which answer, and errors by their class.

HTTP and the store as transport share this table, so a client can't tell them apart. An error arrives as the class that
the server raised, with its message: a loop that catches `ExpiredError` in one process catches it over any transport.

The trap is what an error may tell. Ours are written for the client. Of an unforeseen exception only the class crosses,
since its text may quote a path, a credential or somebody else's data; the text belongs in the server's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from splitfed import errors
from splitfed.errors import FormatError, SplitFedError
from splitfed.protocol import safetensors
from splitfed.protocol.messages import (
    BackwardAnswer,
    BackwardRequest,
    ForwardAnswer,
    ForwardRequest,
    LossAnswer,
    LossRequest,
    PullAnswer,
    PullRequest,
    PushAnswer,
    PushRequest,
)
from splitfed.protocol.packing import pack_tree, unpack, unpack_tree

METHODS: Mapping[str, tuple[type, type]] = MappingProxyType(
    {
        "forward": (ForwardRequest, ForwardAnswer),
        "backward": (BackwardRequest, BackwardAnswer),
        "loss": (LossRequest, LossAnswer),
        "push": (PushRequest, PushAnswer),
        "pull": (PullRequest, PullAnswer),
    }
)
"""The methods of `Transport`: what each takes and what it answers."""

_ERROR = "Error"
_MAX_MESSAGE = 4_000


def kind_of(data: memoryview | bytes | bytearray) -> str:
    """What packed bytes say they are: the name of a message's class, or 'Error'.

    Raises:
        FormatError: they say nothing.
    """
    return safetensors.read_metadata(data).get("kind", "")


def method_of(kind: str) -> str:
    """The method that takes requests of this kind.

    Raises:
        FormatError: none does.
    """
    for method, (request, _) in METHODS.items():
        if request.__name__ == kind:
            return method
    expected = ", ".join(request.__name__ for request, _ in METHODS.values())
    raise FormatError(f"a {kind[:60]!r} isn't a request: expected one of {expected}")


def owner(request: Any) -> str:
    """The client id that a request speaks for; unchecked, as it came."""
    found: str = (request.forward if isinstance(request, LossRequest) else request).client_id
    return found


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error as plain JSON: its class, its message and its HTTP status."""
    if not isinstance(error, SplitFedError):
        error = SplitFedError(f"the server failed ({type(error).__name__}); its log has the traceback")
    return {"error": type(error).__name__, "message": str(error)[:_MAX_MESSAGE], "status": error.status}


def error_from(fields: Mapping[str, Any]) -> SplitFedError:
    """The error that `error_fields` told of, by its class; one that isn't known here keeps its name in the message."""
    name, message = str(fields.get("error", ""))[:60], str(fields.get("message", ""))[:_MAX_MESSAGE]
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


def unpack_answer(method: str, data: memoryview | bytes | bytearray) -> Any:
    """The answer to a request of `method`.

    Raises:
        SplitFedError: the error that was answered instead.
        FormatError: the bytes are neither.
    """
    if kind_of(data) == _ERROR:
        raise unpack_error(data)
    return unpack(METHODS[method][1], data)
