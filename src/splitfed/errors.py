"""Every exception of splitfed, in one tree.

Each error is also the builtin that a caller would catch without us, carries the HTTP status that a service answers
with, and keeps its class on the wire: a client catches what the server raised.

    SplitFedError
    ├── CutError(ValueError)                 a model can't be cut so
    │   ├── UnknownCutError(LookupError)     no submodule or slice of that name
    │   ├── SharedParameterError             one parameter on both sides of the cut
    │   └── AbsentError(AttributeError)      the half uses what went to the other side
    ├── InputError(ValueError)               what was given doesn't fit
    │   ├── IdError                          an id that may not become a key
    │   ├── FormatError                      foreign bytes that aren't what they should be
    │   ├── TooLargeError                    over a limit of the service
    │   └── ContainerError(TypeError)        a value that can't cross the cut
    ├── ArchitectureError(ValueError)        a body or half that isn't the store's
    ├── UnsupportedError(TypeError)          a feature of torch that can't work here
    ├── NotConnectedError(RuntimeError)      a cut point outside a SplitClient
    ├── InPlaceError(RuntimeError)           the body changed an input that the client still uses
    ├── BodyError(RuntimeError)              the body, or the loss on the server, raised
    ├── ReplayError(RuntimeError)            a recompute that differs from its forward
    ├── ProtocolError(RuntimeError)          a request that contradicts what is on record
    │   ├── AlreadyAppliedError              that batch is counted already
    │   ├── DigestError                      the same batch id with other content
    │   └── SupersededError                  a newer process of the same client has begun
    ├── WorkerError(RuntimeError)            a worker process of a simulation failed
    ├── AccessError(PermissionError)         a client that touches what isn't its own
    │   └── TokenError                       no token, or one that nobody has
    ├── UnreachableError(ConnectionError)    no server at that URL, or something else answers there
    ├── MissingError(LookupError)            a version, lineage or record that isn't there
    │   └── ExpiredError                     it was there, and left the retention window
    └── StoreError(OSError)                  the storage itself
        ├── StoreCapabilityError             a backend without an atomic create
        ├── CorruptedError                   stored bytes that aren't what was committed
        └── BusyError(TimeoutError)          try again later
"""

from __future__ import annotations


class SplitFedError(Exception):
    """Base of all errors of this package; `status` is the HTTP status a service answers with."""

    status = 500


class CutError(SplitFedError, ValueError):
    """The model can't be cut as asked."""

    status = 400


class UnknownCutError(CutError, LookupError):
    """The cut names no submodule or slice of the model."""


class SharedParameterError(CutError):
    """A parameter or buffer would live on both sides of the cut."""


class AbsentError(CutError, AttributeError):
    """The client half uses something of the part that was cut out of it."""


class InputError(SplitFedError, ValueError):
    """A value, shape or setting doesn't fit."""

    status = 422


class IdError(InputError):
    """An id doesn't match the strict pattern, so it may not become part of a key."""

    status = 400


class FormatError(InputError):
    """Bytes that aren't well-formed safetensors or JSON of ours."""

    status = 400


class TooLargeError(InputError):
    """More bytes, tensors or samples than the service takes in one request."""

    status = 413


class ContainerError(InputError, TypeError):
    """A value of a kind that can't cross the cut."""


class ArchitectureError(SplitFedError, ValueError):
    """The module's names, shapes, dtypes, ties or frozen parameters aren't those of the store."""

    status = 409


class UnsupportedError(SplitFedError, TypeError):
    """A feature of torch that can't work across the cut; the message says what to do instead."""

    status = 422


class NotConnectedError(SplitFedError, RuntimeError):
    """A cut point was called outside of a `SplitClient`."""


class InPlaceError(SplitFedError, RuntimeError):
    """The body changed an input in place that the client uses elsewhere."""


class BodyError(SplitFedError, RuntimeError):
    """The body's own code, or the loss function on the server, raised; the message has what it said."""

    status = 422


class ReplayError(SplitFedError, RuntimeError):
    """Recomputing a forward gave other bits than the forward itself."""

    status = 409


class ProtocolError(SplitFedError, RuntimeError):
    """A request contradicts what is on record."""

    status = 409


class AlreadyAppliedError(ProtocolError):
    """The batch was counted and its answer is gone; nothing counts twice."""


class DigestError(ProtocolError):
    """The batch id was used before with other content."""

    status = 422


class SupersededError(ProtocolError):
    """A newer process of the same client has begun; this one is too old to count."""


class WorkerError(SplitFedError, RuntimeError):
    """A worker process of a simulation died, or raised what can't be brought over."""


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
    """A record or version that has left the retention window."""

    status = 410


class StoreError(SplitFedError, OSError):
    """The storage failed, or isn't fit for the job."""

    status = 503


class StoreCapabilityError(StoreError):
    """The backend doesn't honour create-if-absent, on which exactly-once rests."""


class CorruptedError(StoreError):
    """Stored bytes differ from what was committed."""

    status = 500


class BusyError(StoreError, TimeoutError):
    """Too much is under way; try again later."""

    status = 429
