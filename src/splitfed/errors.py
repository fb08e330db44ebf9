"""Every exception of splitfed, in one tree.

Each error is also the builtin that a caller would catch without us. It carries the HTTP status that
a service answers with, and keeps its class on the wire: a client catches what the server raised.

    SplitFedError
    ├── CutError(ValueError)                 the model can't be cut as asked
    │   ├── UnknownCutError(LookupError)     no submodule or slice has that name
    │   ├── SharedParameterError             a parameter is on both sides of the cut
    │   └── AbsentError(AttributeError)      the half uses something of the part that was cut out
    ├── InputError(ValueError)               an argument or setting doesn't fit
    │   ├── IdError                          an id that can't become a key
    │   ├── FormatError                      bytes that aren't a file of ours
    │   ├── TooLargeError                    a request beyond a limit of the service
    │   └── ContainerError(TypeError)        a value that can't cross the cut
    ├── ArchitectureError(ValueError)        a body or half that isn't the store's
    ├── UnsupportedError(TypeError)          a feature of torch that can't work here
    ├── NotConnectedError(RuntimeError)      a cut point was called outside of a SplitClient
    ├── InPlaceError(RuntimeError)           the body changed an input that the client still uses
    ├── BodyError(RuntimeError)              the body, or the loss on the server, raised
    ├── ReplayError(RuntimeError)            a recompute has other bits than its forward
    ├── ProtocolError(RuntimeError)          a request contradicts the records of the store
    │   ├── AlreadyAppliedError              the batch is counted already
    │   ├── DigestError                      the batch id was used with other content
    │   └── SupersededError                  a newer process of the same client has begun
    ├── WorkerError(RuntimeError)            a worker process of a simulation failed
    ├── AccessError(PermissionError)         the token belongs to another client
    │   └── TokenError                       no token, or an unknown one
    ├── UnreachableError(ConnectionError)    no splitfed server answers at that URL
    ├── MissingError(LookupError)            no such version, lineage or record
    │   └── ExpiredError                     it was there, and left the retention window
    │       └── ReferenceLostError           what a delta is the change from isn't there
    └── StoreError(OSError)                  the storage failed
        ├── StoreCapabilityError             a backend without an atomic create
        ├── CorruptedError                   stored bytes differ from what was committed
        └── BusyError(TimeoutError)          try again later
"""

from __future__ import annotations


class SplitFedError(Exception):
    """The base of all errors of this package.

    Attributes:
        status: The HTTP status that a service answers with.
    """

    status = 500


class CutError(SplitFedError, ValueError):
    """The model can't be cut as asked."""

    status = 400


class UnknownCutError(CutError, LookupError):
    """The cut names no submodule or slice of the model; the message lists the nearest names."""


class SharedParameterError(CutError):
    """A parameter, buffer or module would be on both sides of the cut."""


class AbsentError(CutError, AttributeError):
    """The client half uses a value or method of the part that was cut out of it."""


class InputError(SplitFedError, ValueError):
    """An argument or setting doesn't fit: a value, a shape, a type."""

    status = 422


class IdError(InputError):
    """An id doesn't match the strict pattern, so it can't become part of a key."""

    status = 400


class FormatError(InputError):
    """Bytes that aren't well-formed safetensors or JSON of ours, or of another format version."""

    status = 400


class TooLargeError(InputError):
    """A request with more bytes, tensors or samples than the service takes at once."""

    status = 413


class ContainerError(InputError, TypeError):
    """A value of a type that can't cross the cut; the message says where it is."""


class ArchitectureError(SplitFedError, ValueError):
    """The module's names, shapes, dtypes, ties or frozen parameters differ from the store's."""

    status = 409


class UnsupportedError(SplitFedError, TypeError):
    """A feature of torch that can't work across the cut; the message says what to do instead."""

    status = 422


class NotConnectedError(SplitFedError, RuntimeError):
    """A cut point was called outside of a `SplitClient`: wrap the client half in one."""


class InPlaceError(SplitFedError, RuntimeError):
    """The body changed an input in place that the client uses elsewhere."""


class BodyError(SplitFedError, RuntimeError):
    """The body's own code, or the loss function on the server, raised; the message repeats it."""

    status = 422


class ReplayError(SplitFedError, RuntimeError):
    """Recomputing a forward gave other bits than the forward itself."""

    status = 409


class ProtocolError(SplitFedError, RuntimeError):
    """A request contradicts the records of the store."""

    status = 409


class AlreadyAppliedError(ProtocolError):
    """The batch is counted already and its answer is gone; nothing counts twice."""


class DigestError(ProtocolError):
    """The batch id was used before with other content."""

    status = 422


class SupersededError(ProtocolError):
    """A newer process of the same client has begun; requests of this older one are refused."""


class WorkerError(SplitFedError, RuntimeError):
    """A worker process of a simulation died, or raised an error that can't be sent over."""


class AccessError(SplitFedError, PermissionError):
    """The token belongs to another client than the request."""

    status = 403


class TokenError(AccessError):
    """The request has no token, or one that the service doesn't know."""

    status = 401


class UnreachableError(SplitFedError, ConnectionError):
    """Nothing answers at the server's URL, or what answers isn't a splitfed server."""

    status = 502


class MissingError(SplitFedError, LookupError):
    """A version, lineage or record that isn't in the store."""

    status = 404


class ExpiredError(MissingError):
    """A record or version that was in the store and has left the retention window."""

    status = 410


class ReferenceLostError(ExpiredError):
    """What a delta is the change from isn't in the store; the client's compression sends all."""


class StoreError(SplitFedError, OSError):
    """The storage failed, or can't do what a store needs."""

    status = 503


class StoreCapabilityError(StoreError):
    """The storage backend has no atomic create-if-absent, on which exactly-once rests."""


class CorruptedError(StoreError):
    """Stored bytes differ from what was committed."""

    status = 500


class BusyError(StoreError, TimeoutError):
    """The request can't be served right now: try again later."""

    status = 429
