"""Split federated learning for any PyTorch model, with a server that holds nothing.

`split` cuts a model; a `SplitClient` trains its half in the user's own loop; stateless
`SplitServer` replicas answer over a `GradientStore`; an `Accumulator` commits the batch-averaged
update. `reference` and `check` show that the bits are those of the unsplit model.

Names load when they are first used (PEP 562): a device that only wants `SplitClient` needs nothing
of the server's, and `splitfed --help` doesn't wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitfed._version import __version__

__all__ = [
    "Accumulator",
    "AlreadyAppliedError",
    "ArchitectureError",
    "BatchId",
    "BodyError",
    "BusyError",
    "Commit",
    "CorruptedError",
    "CutError",
    "CutPoint",
    "ExpiredError",
    "Federation",
    "GradientStore",
    "History",
    "InputError",
    "PerClient",
    "ReplayError",
    "SplitClient",
    "SplitFedError",
    "SplitServer",
    "StoreError",
    "SupersededError",
    "TokenError",
    "Transport",
    "UnreachableError",
    "VirtualTime",
    "__version__",
    "check",
    "join",
    "reference",
    "register_container",
    "simulate",
    "split",
]

if TYPE_CHECKING:
    from splitfed import errors as errors
    from splitfed import simulation as simulation
    from splitfed.accumulator import policies as policies
    from splitfed.accumulator.accumulator import Accumulator
    from splitfed.blobs import testing as testing
    from splitfed.client.client import SplitClient
    from splitfed.diagnostics.comparison import check
    from splitfed.errors import AbsentError as AbsentError
    from splitfed.errors import AccessError as AccessError
    from splitfed.errors import (
        AlreadyAppliedError,
        ArchitectureError,
        BodyError,
        BusyError,
        CorruptedError,
        CutError,
        ExpiredError,
        InputError,
        ReplayError,
        SplitFedError,
        StoreError,
        SupersededError,
        TokenError,
        UnreachableError,
    )
    from splitfed.errors import ContainerError as ContainerError
    from splitfed.errors import DigestError as DigestError
    from splitfed.errors import FormatError as FormatError
    from splitfed.errors import IdError as IdError
    from splitfed.errors import InPlaceError as InPlaceError
    from splitfed.errors import MissingError as MissingError
    from splitfed.errors import NotConnectedError as NotConnectedError
    from splitfed.errors import ProtocolError as ProtocolError
    from splitfed.errors import ReferenceLostError as ReferenceLostError
    from splitfed.errors import SharedParameterError as SharedParameterError
    from splitfed.errors import StoreCapabilityError as StoreCapabilityError
    from splitfed.errors import TooLargeError as TooLargeError
    from splitfed.errors import UnknownCutError as UnknownCutError
    from splitfed.errors import UnsupportedError as UnsupportedError
    from splitfed.errors import WorkerError as WorkerError
    from splitfed.federation.federation import Federation
    from splitfed.federation.per_client import PerClient
    from splitfed.model.cut import join, split
    from splitfed.model.cutpoint import CutPoint
    from splitfed.model.unsplit import reference
    from splitfed.protocol.ids import BatchId
    from splitfed.protocol.pytree import register_container
    from splitfed.protocol.transport import Transport
    from splitfed.server.server import SplitServer
    from splitfed.simulation import partition as partition
    from splitfed.simulation.launch import simulate
    from splitfed.simulation.virtual_time import VirtualTime
    from splitfed.store import status as status
    from splitfed.store.commit import Commit
    from splitfed.store.store import GradientStore
    from splitfed.tracking import callbacks as callbacks
    from splitfed.tracking import progress as progress
    from splitfed.tracking import report as report
    from splitfed.tracking.history import History
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        names={
            "AbsentError": "errors",
            "AccessError": "errors",
            "Accumulator": "accumulator.accumulator",
            "AlreadyAppliedError": "errors",
            "ArchitectureError": "errors",
            "BatchId": "protocol.ids",
            "BodyError": "errors",
            "BusyError": "errors",
            "Commit": "store.commit",
            "ContainerError": "errors",
            "CorruptedError": "errors",
            "CutError": "errors",
            "CutPoint": "model.cutpoint",
            "DigestError": "errors",
            "ExpiredError": "errors",
            "Federation": "federation.federation",
            "FormatError": "errors",
            "GradientStore": "store.store",
            "History": "tracking.history",
            "IdError": "errors",
            "InPlaceError": "errors",
            "InputError": "errors",
            "MissingError": "errors",
            "NotConnectedError": "errors",
            "PerClient": "federation.per_client",
            "ProtocolError": "errors",
            "ReferenceLostError": "errors",
            "ReplayError": "errors",
            "SharedParameterError": "errors",
            "SplitClient": "client.client",
            "SplitFedError": "errors",
            "SplitServer": "server.server",
            "StoreCapabilityError": "errors",
            "StoreError": "errors",
            "SupersededError": "errors",
            "TokenError": "errors",
            "TooLargeError": "errors",
            "Transport": "protocol.transport",
            "UnknownCutError": "errors",
            "UnreachableError": "errors",
            "UnsupportedError": "errors",
            "VirtualTime": "simulation.virtual_time",
            "WorkerError": "errors",
            "check": "diagnostics.comparison",
            "join": "model.cut",
            "reference": "model.unsplit",
            "register_container": "protocol.pytree",
            "simulate": "simulation.launch",
            "split": "model.cut",
        },
        modules={
            "callbacks": "tracking.callbacks",
            "errors": "errors",
            "partition": "simulation.partition",
            "policies": "accumulator.policies",
            "progress": "tracking.progress",
            "report": "tracking.report",
            "simulation": "simulation",
            "status": "store.status",
            "testing": "blobs.testing",
        },
    )
