"""Split federated learning for any PyTorch model, with a server that holds nothing.

`split` cuts a model; a `SplitClient` trains its half in the user's own loop; stateless `SplitServer` replicas answer
over a `GradientStore`; an `Accumulator` commits the batch-averaged update. `reference` and `check` show that the bits
are those of the unsplit model.

Names load when they are first used (PEP 562): a device that only wants `SplitClient` needs nothing of the server's, and
`splitfed --help` doesn't wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitfed.accumulator import Accumulator
    from splitfed.checking import check
    from splitfed.client import SplitClient
    from splitfed.commits import Commit
    from splitfed.cutpoint import CutPoint
    from splitfed.cutting import join, split
    from splitfed.errors import (
        AbsentError,
        AccessError,
        AlreadyAppliedError,
        ArchitectureError,
        BodyError,
        BusyError,
        ContainerError,
        CorruptedError,
        CutError,
        DigestError,
        ExpiredError,
        FormatError,
        IdError,
        InPlaceError,
        InputError,
        MissingError,
        NotConnectedError,
        ProtocolError,
        ReplayError,
        SharedParameterError,
        SplitFedError,
        StoreCapabilityError,
        StoreError,
        SupersededError,
        TokenError,
        TooLargeError,
        UnknownCutError,
        UnreachableError,
        UnsupportedError,
        WorkerError,
    )
    from splitfed.federation import Federation
    from splitfed.history import History
    from splitfed.ids import BatchId
    from splitfed.perclient import PerClient
    from splitfed.server import SplitServer
    from splitfed.simulation.simulating import simulate
    from splitfed.simulation.virtual import VirtualTime
    from splitfed.store import GradientStore
    from splitfed.transport import Transport
    from splitfed.trees import register_container
    from splitfed.unsplit import reference

__version__ = "0.1.0"

__all__ = [
    "AbsentError",
    "AccessError",
    "Accumulator",
    "AlreadyAppliedError",
    "ArchitectureError",
    "BatchId",
    "BodyError",
    "BusyError",
    "Commit",
    "ContainerError",
    "CorruptedError",
    "CutError",
    "CutPoint",
    "DigestError",
    "ExpiredError",
    "Federation",
    "FormatError",
    "GradientStore",
    "History",
    "IdError",
    "InPlaceError",
    "InputError",
    "MissingError",
    "NotConnectedError",
    "PerClient",
    "ProtocolError",
    "ReplayError",
    "SharedParameterError",
    "SplitClient",
    "SplitFedError",
    "SplitServer",
    "StoreCapabilityError",
    "StoreError",
    "SupersededError",
    "TokenError",
    "TooLargeError",
    "Transport",
    "UnknownCutError",
    "UnreachableError",
    "UnsupportedError",
    "VirtualTime",
    "WorkerError",
    "__version__",
    "check",
    "join",
    "reference",
    "register_container",
    "simulate",
    "split",
]

# The imports above once more, for the run time: a module of the same name as what it exports would shadow it.
_MODULES = {
    "Accumulator": "accumulator",
    "BatchId": "ids",
    "Commit": "commits",
    "CutPoint": "cutpoint",
    "Federation": "federation",
    "GradientStore": "store",
    "History": "history",
    "PerClient": "perclient",
    "SplitClient": "client",
    "SplitServer": "server",
    "Transport": "transport",
    "VirtualTime": "simulation.virtual",
    "check": "checking",
    "join": "cutting",
    "reference": "unsplit",
    "register_container": "trees",
    "simulate": "simulation.simulating",
    "split": "cutting",
}

# Modules that are used by their own names, as in `splitfed.policies.mode("buffered")`.
_ROOMS = ("callbacks", "errors", "partition", "policies", "progress", "report", "simulation", "testing")


if not TYPE_CHECKING:  # else a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
