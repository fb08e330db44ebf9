"""The formats on the wire and on disk, pinned: what an earlier splitfed wrote is read and written.

Who upgrades in the middle of a run has a store from before, and clients that repeat requests from
before. Both must go on, so bytes of each format lie under `formats/`:

    messages/      a packed message a file: each class, optional fields with and without a value
    digests.json   what tells a repeated request from another one, for each kind of request
    errors.json    each error as the JSON of a service; errors/ has some as packed bytes
    traffic/       requests and their answers, which a service and a mailbox carry as they are
    mailbox.json   the keys of a mailbox
    tokens         a token file
    store/         a run of three rounds, in the middle of the third
    requests.json  what the clients of that run asked
    lines/         a run with a body per client, whose average was interrupted
    outcomes/      what came of carrying these two on; tensors as plain safetensors
    format-1/      the same four as a splitfed of before checksums wrote them
    format.json    how a run begins today: the store and the lines above are of before a numerics
                   class had its kernels

`python tests/promises/test_formats.py --write` writes all of it anew. Do so only for a deliberate
change of a format, together with a new format version: a test of this file that fails says that
runs and clients of today would break.

The bits of a float depend on the numerics class (torch, CPU, threads). So the stores are compared
bit for bit where the class is the one in their `format.json` and torch itself, without splitfed,
has their bits: their record can't tell a CPU of one vendor from another's. Elsewhere they are
compared in all but the floats and what depends on them. Everything else in here is the same on
every machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import sys
import tempfile
import time
import types
import uuid
import warnings
import zlib
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from splitfed import (
    Accumulator,
    ArchitectureError,
    DigestError,
    Federation,
    GradientStore,
    History,
    PerClient,
    ReplayError,
    SplitClient,
    SplitServer,
    errors,
    register_container,
    split,
)
from splitfed.model.cutpoint import hole_of
from splitfed.model.numerics import numerics_class
from splitfed.model.stamp import remove_stamps
from splitfed.protocol.checksum import sealed, text_of
from splitfed.protocol.coding import Coded
from splitfed.protocol.deltas import Delta
from splitfed.protocol.messages import (
    BackwardAnswer,
    BackwardRequest,
    BufferUpdate,
    Chain,
    ForwardAnswer,
    ForwardRecord,
    ForwardRequest,
    GradientRecord,
    Housekeeping,
    LossAnswer,
    LossRequest,
    PullAnswer,
    PullRequest,
    PushAnswer,
    PushRequest,
    RoundInfo,
    Seal,
)
from splitfed.protocol.packing import pack, pack_error, unpack, unpack_error
from splitfed.service.http.app import make_app
from splitfed.service.http.auth import new_token
from splitfed.service.http.contract import encode_error
from splitfed.service.mailbox.client import StoreTransport
from splitfed.service.mailbox.worker import Worker
from splitfed.store.records import commit_rows
from splitfed.store.status import read_status

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "formats"
EDITIONS = {"2": "", "1": "format-1/"}
"""Of each format version that is read, the folder of its runs."""
editions = pytest.mark.parametrize("edition", EDITIONS.values(), ids=EDITIONS)

# A run warns of a gradient that isn't finite; a machine of another numerics class warns of that.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def packed(message: Any) -> bytes:
    """A message as it travels and lies in a file."""
    return b"".join(pack(message))


def pinned(name: str) -> bytes:
    """What lies under `formats/`."""
    return (DATA / name).read_bytes()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of quarters, whose bits are the same on every machine."""
    found = (torch.arange(torch.Size(shape).numel()) * 5 % 17 - 8).to(torch.float64) / 4
    return (found if dtype.is_signed else found.abs()).reshape(shape).to(dtype)


# ------------------------------------------------------------------------------------ messages

Pair = namedtuple("Pair", "left right", module="a_users_module")
"""A named tuple whose module isn't imported where the message arrives."""


class Crop:
    """A container of the user's, registered on both sides."""

    def __init__(self, image: Tensor, corner: tuple[int, int]) -> None:
        self.image = image
        self.corner = corner


Crop.__module__ = "a_users_module"  # else it had another name as a script
register_container(Crop, lambda crop: [crop.image, crop.corner], lambda parts: Crop(*parts))


class ModelOutput(OrderedDict[str, Any]):
    """What transformers calls so, without its seconds of import."""


class Output(ModelOutput):
    """A class of it."""


ModelOutput.__module__ = Output.__module__ = "transformers.pinned"


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in which an arriving message finds the class of a `ModelOutput`."""
    module = types.ModuleType("transformers.pinned")
    module.Output = Output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.pinned", module)


DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def layouts() -> dict[str, Tensor]:
    """Tensors by how they lie in memory."""
    return {
        "plain": numbers(4, 4),
        "ragged": numbers(3, 5, dtype=torch.float64),
        "scalar": numbers(1)[0],
        "empty": torch.empty(0, 3),
        "none": torch.empty(2, 0, dtype=torch.bfloat16),
        "transposed": numbers(3, 4).t(),
        "channels_last": numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "gaps": numbers(4, 6)[:, ::2],
        "expanded": numbers(3, 1).expand(3, 4),
        "conjugated": torch.complex(numbers(3), numbers(3)).conj(),
        "grown": numbers(2, 2).requires_grad_(),
    }


def scalars() -> list[Any]:
    """Plain values, the awkward ones too."""
    odd = [0.1, -0.0, 1e-300, float("inf"), float("-inf"), float("nan")]
    return [None, True, False, 0, -3, 2**70, *odd, "", 'text "ä\\ß" \u2028 \U0001f600\n']


def tree() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a call may hand over: every kind of container, and a tensor that occurs twice."""
    x, y = numbers(2, 3), numbers(5, dtype=torch.bfloat16)
    containers = {
        "dict": {"b": x, "a": 1, 3: None, None: 2, True: [], 2.5: {}},
        "ordered": OrderedDict([("z", y), ("a", ())]),
        "counter": Counter({"seen": 3}),
        "size": torch.Size([2, 3]),
        "known": PackedSequence(numbers(3, 2), torch.tensor([2, 1]), None, None),
        "registered": Crop(numbers(2, 2), (1, 2)),
        "output": Output(logits=y, hidden=(x, y)),
    }
    return (x, scalars(), (x, [y, [x]])), {**containers, **layouts()}


def messages() -> dict[str, Any]:
    """Every message that is pinned, by the name of its file."""
    x, y = numbers(2, 3), numbers(3, 2, dtype=torch.bfloat16)
    notes = Housekeeping(released=((0, 1), (2, 3)), abandoned=(4, 5), answered=(6,))
    chains = (Chain(8.0, 1), Chain(num_samples=8, last_part=2))
    seal = Seal(parts=((0, 0), (1, 1)), num_samples=16, loss_scale=0.5, chains=chains)
    first = ForwardRequest(
        client_id="a",
        incarnation=None,
        process="3f00",
        call=0,
        cut="",
        inputs=((x,), {}),
        requires_grad=(True,),
        training=True,
        grad=True,
        seed=0,
        autocast=None,
        version=None,
        seen=0,
        previous=None,
    )
    full = ForwardRequest(
        client_id="hospital-A_1.x",
        incarnation=2,
        process="ff" * 16,
        call=10**12 - 1,
        cut="encoder.layer.1,encoder.layer.2",
        inputs=tree(),
        requires_grad=(True, False, True),
        training=False,
        grad=False,
        seed=2**64 - 1,
        autocast="bfloat16",
        version=7,
        seen=9,
        previous=3,
        housekeeping=notes,
    )
    back = BackwardRequest(
        client_id="a",
        incarnation=1,
        seq=5,
        part=2,
        version=7,
        call=3,
        grad_outputs=(x, None, y),
        seal=seal,
        housekeeping=notes,
    )
    stranger = dataclasses.replace(first, inputs=((Pair(x, Pair(1.5, "inner")),), {}))
    going = RoundInfo(2, True, None, True, False, False, False)
    ended = RoundInfo(3, False, 70.5, False, True, True, True)
    fingerprint = {
        "w": {"role": "trainable", "shape": [2, 3], "dtype": "float32"},
        "v": {"tied": "w"},
        "m": {"role": "buffer", "shape": [3, 2], "dtype": "bfloat16"},
    }
    buffers = BufferUpdate({"m": y}, {"m": y + 1}, 8.0)
    update = PushRequest(
        client_id="a",
        incarnation=1,
        process="3f00",
        seq=4,
        base_version=3,
        fingerprint=None,
        gradients={"w": x},
        values={"m": y},
        bases={"m": y + 1},
        num_samples=16.0,
        loss_scale=0.25,
    )
    kept = (((2, 3), "float32", True), ((), "int64", False))
    gradient = {
        "base_version": 3,
        "num_samples": 8.0,
        "loss_scale": 0.5,
        "digest": "d1" * 32,
        "numerics": "0123456789abcdef",
        "gradients": {"w": x, "b": y},
        "buffers": [buffers, BufferUpdate({}, {}, 8)],
    }
    none = {**gradient, "gradients": {}, "buffers": []}
    skip = {**none, "base_version": 0, "num_samples": 0.0, "loss_scale": 1.0, "digest": ""}
    every = tuple(numbers(3, 2, dtype=dtype) for dtype in DTYPES)
    return {
        "Housekeeping.empty": Housekeeping(),
        "Housekeeping.full": notes,
        "Chain": chains[0],
        "Seal.empty": Seal((), 2.0, 1.0, ()),
        "Seal.full": seal,
        "RoundInfo.going": going,
        "RoundInfo.ended": ended,
        "ForwardRequest.first": first,
        "ForwardRequest.full": full,
        "ForwardRequest.stranger": stranger,
        "ForwardAnswer.unrecorded": ForwardAnswer(None, 0, x, (False,), True, {}, (1,)),
        "ForwardAnswer.full": ForwardAnswer(
            1, 7, {"out": [x, every]}, (True, False), False, {0: x, 2: y}, (0, 2**32 - 1)
        ),
        "BackwardRequest.full": back,
        "BackwardRequest.part": dataclasses.replace(back, seal=None, housekeeping=Housekeeping()),
        "BackwardRequest.seal": dataclasses.replace(back, call=None, grad_outputs=()),
        "BackwardAnswer.full": BackwardAnswer((x, None), "part"),
        "BackwardAnswer.seal": BackwardAnswer((), "stored"),
        "LossRequest.plain": LossRequest(first, 0, torch.tensor([1, 2]), 2.0),
        "LossRequest.tree": LossRequest(full, 3, {"y": x, "weight": 0.5, "none": None}, 7),
        "LossAnswer.full": LossAnswer(1, 7, torch.tensor(0.5), (x, None), "stored", True),
        "LossAnswer.unrecorded": LossAnswer(None, 0, numbers(1).double(), (), "uncounted", False),
        "PullRequest.newest": PullRequest("a"),
        "PullRequest.pinned": PullRequest("a", 3, weights=False),
        "PullAnswer.nothing": PullAnswer(-1, None, {}),
        "PullAnswer.going": PullAnswer(3, fingerprint, {"w": x, "m": y}, going),
        "PullAnswer.ended": PullAnswer(4, None, {}, ended),
        "PushRequest.first": dataclasses.replace(
            update,
            incarnation=None,
            seq=0,
            base_version=-1,
            fingerprint=fingerprint,
            gradients={"w": x, "m": y},
            values={},
            bases={},
            num_samples=1,
        ),
        "PushRequest.update": update,
        "PushAnswer.first": PushAnswer(None, "published"),
        "PushAnswer.update": PushAnswer(1, "rejected"),
        "ForwardRecord.fresh": ForwardRecord(
            "", ((x,), {}), (True,), True, 5, None, None, kept, (7, 8), "0123456789abcdef"
        ),
        "ForwardRecord.full": ForwardRecord(
            "a,b", tree(), (True, False), False, 2**64 - 1, "float16", {"m": y}, kept, (0, 1), "x"
        ),
        "GradientRecord.gradient": GradientRecord("gradient", **gradient),
        "GradientRecord.part": GradientRecord("part", **gradient),
        "GradientRecord.rejected": GradientRecord("rejected", **none),
        "GradientRecord.skip": GradientRecord("skip", **skip),
        **added_later(),
    }


NONCE = 4
"""The bytes of the random number that a call bears."""


def added_later() -> dict[str, Any]:
    """Messages that use the fields which came after the others were pinned."""
    x = numbers(2, 3)
    settings = {"layer.beta": 0.5, "1.training": False, "stack.sizes": (2, [3, None]), "mode": "max"}
    ahead = ForwardRequest("a", 1, "3f00", 4, "", ((x,), {}), (True,), True, True, 5, None, None, 2, 3)
    set_by_half = dataclasses.replace(ahead, part="3:5/9f2c01ab", settings=settings, previous_version=2)
    kept = (((2, 3), "float32", True),)
    record = ForwardRecord("", ((x,), {}), (True,), True, 5, None, None, kept, (7,), "x", settings)
    steps = torch.tensor([[127, -64, 0], [1, 2, 3]], dtype=torch.int8)
    coding = (Coded(0, "int8/1", "float32", (2, 3), (3, 1), (x[0, :1],), 0.5, 2.0),)
    wanted = {"coding": coding, "answer_codec": "bfloat16/1+zstd/1"}
    begins = (torch.tensor([2, -1], dtype=torch.int32), torch.tensor([False, True]))
    change = Delta(0, "delta/1", "float32", (2, 3), (3, 1), ("0f" * 8, "a1" * 8), *begins, adds=True, keeps=True)
    notes = Housekeeping(references=("0f" * 8,))
    flows = {"activations": [2, 1, 4096, 1088, 0.5, 2.0], "outputs": [1, 0, 64, 64, 0.0, 0.0]}
    return {
        "Housekeeping.references": notes,
        "ForwardRequest.deltas": dataclasses.replace(
            ahead, inputs=((steps[1:],), {}), coding=coding, deltas=(change,), housekeeping=notes
        ),
        "ForwardRequest.coded": dataclasses.replace(ahead, inputs=((steps,), {}), **wanted),
        "ForwardAnswer.coded": ForwardAnswer(1, 7, steps, (True,), False, {}, (1,), coding=coding),
        "BackwardRequest.coded": BackwardRequest("a", 1, 5, 0, 7, 3, (steps,), None, **wanted),
        "BackwardAnswer.coded": BackwardAnswer((steps,), "stored", coding),
        "LossAnswer.coded": LossAnswer(1, 7, x[0, 0], (steps,), "stored", False, coding=coding),
        "Chain.after": Chain(8.0, 1, after=0),
        "ForwardRequest.settings": set_by_half,
        "ForwardAnswer.written": ForwardAnswer(1, 7, x, (True,), False, {}, (1,), True, ("layer.kl",)),
        "ForwardRecord.settings": record,
        "BackwardRequest.uncounted": BackwardRequest("a", 1, 5, 0, 7, 3, (x,), None, counted=False),
        "LossRequest.uncounted": LossRequest(set_by_half, 3, x, 7.0, counted=False),
        "ForwardRequest.resumed": dataclasses.replace(ahead, resumed=2**32, repeats=3),
        "ForwardRequest.nonce": dataclasses.replace(ahead, previous=2, nonce=2**32 - 1, previous_nonce=2**31),
        "BackwardRequest.nonce": BackwardRequest("a", 1, 5, 0, 7, 3, (x,), None, nonce=2**32 - 1),
        "ForwardAnswer.repeated": ForwardAnswer(1, 7, x, (True,), False, {}, (1,), repeated=True),
        "BackwardRequest.resumed": BackwardRequest("a", 1, 5, 2**32, 7, 2**32, (x,), None, resumed=2**32),
        "LossAnswer.repeated": LossAnswer(1, 7, x[0, 0], (x,), "stored", False, repeated=True),
        "PullRequest.frozen": PullRequest("a", frozen="0" * 64),
        "PushRequest.resumed": PushRequest("a", 1, "3f00", 5, 7, None, {"w": x}, {}, {}, 7.0, 1.0, resumed=2**32),
        "PushRequest.flows": PushRequest("a", 1, "3f00", 5, 7, None, {"w": x}, {}, {}, 7.0, 1.0, flows=flows),
        "GradientRecord.flows": GradientRecord("gradient", 7, 8.0, 1.0, "0" * 64, "x", {"w": x}, [], flows=flows),
        "GradientRecord.resumed": GradientRecord("gradient", 7, 8.0, 1.0, "0" * 64, "x", {"w": x}, [], 2**32),
        "PullAnswer.body_version": PullAnswer(7, {"w": {}}, {"w": x}, None, 6),
        "PushRequest.upto": PushRequest("a", 1, "3f00", 5, 7, None, {"w": x}, {}, {}, 7.0, 1.0, upto=6),
        "GradientRecord.upto": GradientRecord("gradient", 7, 8.0, 1.0, "0" * 64, "x", {"w": x}, [], upto=6),
        "ForwardAnswer.complex128": ForwardAnswer(
            1, 7, numbers(2, 2, dtype=torch.complex128), (True,), False, {}, (1,)
        ),
    }


def described(value: Any, seen: dict[int, int] | None = None) -> Any:
    """A message as plain values for `==`: each bit, type and stride, and which tensors are one."""
    seen = {} if seen is None else seen
    inner = functools.partial(described, seen=seen)
    kind = type(value).__name__
    if isinstance(value, Tensor):
        place = seen.setdefault(id(value), len(seen))
        strides = value.stride() if value.numel() else None
        return place, value.dtype, tuple(value.shape), strides, bits(value)
    if dataclasses.is_dataclass(value):
        return kind, {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return kind, [(repr(key), inner(child)) for key, child in value.items()]
    if isinstance(value, list | tuple):
        return kind, getattr(value, "_fields", None), [inner(child) for child in value]
    return (kind, inner(vars(value))) if isinstance(value, Crop) else (kind, repr(value))


def bits(tensor: Tensor) -> str:
    """The bytes of a tensor in the order of its indices, as hex digits."""
    plain = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
    return bytes(plain.tolist()).hex()


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("name", messages())
def test_a_message_is_packed_to_the_pinned_bytes(name: str) -> None:
    """Names of classes and fields, their order, the trees and the tensors' layout are a format."""
    assert packed(messages()[name]) == pinned(f"messages/{name}.safetensors")


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("name", messages())
def test_pinned_bytes_are_read_as_the_message_and_written_again(name: str) -> None:
    """Every field comes back, and a message that is passed on has the bytes that it came in."""
    expected, data = messages()[name], pinned(f"messages/{name}.safetensors")
    found = unpack(type(expected), data)
    assert described(found) == described(expected)
    again = "ForwardRequest.passed-on" if name == "ForwardRequest.stranger" else name
    assert packed(found) == pinned(f"messages/{again}.safetensors")


def test_a_named_tuple_of_an_unknown_module_is_passed_on_under_a_pinned_name() -> None:
    """A stand-in bears the name of the module that makes it, which enters records and digests."""
    data = pinned("messages/ForwardRequest.passed-on.safetensors")
    assert b"splitfed.trees:Pair" in data
    assert packed(unpack(ForwardRequest, data)) == data


def test_each_pinned_message_is_built_here() -> None:
    """No file lies there that nothing compares."""
    names = {path.stem for path in (DATA / "messages").iterdir()}
    assert names == {*messages(), "ForwardRequest.passed-on"}


# ------------------------------------------------------------- a body in exact numbers, by hand


class Exact(nn.Module):
    """`x -> {"double": 2x, "triple": 3x}` on two features, in numbers without rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight = nn.Parameter(torch.eye(2) * 2)

    def forward(self, x: Any) -> dict[str, Tensor]:
        """Both; of a pair, the left half."""
        x = x[0] if isinstance(x, tuple) else x
        return {"double": self.linear(x), "triple": x * 3}


def squares(outputs: Any, target: Any) -> Tensor:
    """A loss on the server; of outputs by name, that of the first."""
    outputs = outputs["double"] if isinstance(outputs, dict) else outputs
    return (outputs.float() - target["y"]).square().mean()


X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
ONES = torch.ones(2, 2)
SKEW = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
SEAL = Seal((), 2.0, 1.0, (Chain(2.0, 0),))
PROCESS = "0123456789abcdef" * 2
HALF = {
    "w": {"role": "trainable", "shape": [2], "dtype": "float32"},
    "m": {"role": "buffer", "shape": [2], "dtype": "float32"},
}


def ahead(call: int, x: Any = X, **changes: Any) -> ForwardRequest:
    """A recorded call of client a."""
    made: dict[str, Any] = {
        "client_id": "a",
        "incarnation": None if call == 0 else 1,
        "process": PROCESS,
        "call": call,
        "cut": "",
        "inputs": ((x,), {}),
        "requires_grad": (True,),
        "training": True,
        "grad": True,
        "seed": 7,
        "autocast": None,
        "version": None,
        "seen": 0,
        "previous": None,
    }
    return ForwardRequest(**{**made, **changes})


def back(seq: int, call: int | None, **changes: Any) -> BackwardRequest:
    """The request for its backward, sealed."""
    made: dict[str, Any] = {
        "client_id": "a",
        "incarnation": 1,
        "seq": seq,
        "part": 0,
        "version": 0,
        "call": call,
        "grad_outputs": () if call is None else (ONES, ONES),
        "seal": SEAL,
    }
    return BackwardRequest(**{**made, **changes})


def push(seq: int, base_version: int = 0, **changes: Any) -> PushRequest:
    """An update of client a's half; of version -1, the first weights."""
    w, m = numbers(2), numbers(2) + 1
    made: dict[str, Any] = {
        "client_id": "a",
        "incarnation": 1,
        "process": PROCESS,
        "seq": seq,
        "base_version": base_version,
        "fingerprint": HALF if base_version < 0 else None,
        "gradients": {"w": w, "m": m} if base_version < 0 else {"w": w},
        "values": {} if base_version < 0 else {"m": m},
        "bases": {} if base_version < 0 else {"m": m - 1},
        "num_samples": 16.0,
        "loss_scale": 1.0,
    }
    return PushRequest(**{**made, **changes})


def exact(root: Path, **settings: Any) -> SplitServer:
    """A server of the exact body over a folder."""
    store = GradientStore(str(root), sync="process")
    return SplitServer(Exact(), store, loss_fn=squares, **settings)


# ------------------------------------------------------------------------------------- digests


def backward_said(seq: int, part: int, call: int, seal: str, *grads: str) -> str:
    """What is hashed of a backward."""
    return f"(('a', 1, {seq}, {part}, 0, {call}, {seal}), {list(grads)})"


PLAIN = "torch.float32 [2, 2] None"
FLIPPED = "torch.float32 [2, 2] {'order': [1, 0]}"
HALVED = "torch.bfloat16 [2, 2] None"
RODE = Seal(((0, 0),), 6, 0.5, (Chain(2, 0), Chain(4.0, 1)))
CLOSED = Seal(((0, 0), (0, 1)), 4.0, 2.0, (Chain(4.0, 1),))
TARGET_SPEC = "{'d': [['y', {'t': 1}], ['weight', 0.5]]}"
LOSS_SPEC = f"{{'u': [{{'u': [{{'u': [{{'t': 0}}]}}, {{'d': []}}]}}, {TARGET_SPEC}]}}"
PAIR = "{'n': ['splitfed.trees:Pair', ['left', 'right'], [{'t': 0}, 1.5]]}"
PAIR_SPEC = f"{{'u': [{{'u': [{{'u': [{PAIR}]}}, {{'d': []}}]}}, {TARGET_SPEC}]}}"


def loss_said(seq: int, call: int, seed: int, autocast: str, samples: str, spec: str) -> str:
    """What is hashed of a one-trip loss."""
    batch = f"BatchId(client_id='a', incarnation=1, seq={seq})"
    said = f"({batch}, 0, {call}, '', {seed}, {autocast}, {samples}, {spec})"
    return f"({said}, {[PLAIN, PLAIN]})"


SAID: dict[str, tuple[str, list[Tensor]]] = {
    "backward": (
        backward_said(0, 0, 0, "((), 2.0, 1.0, [(2.0, 0)])", PLAIN, PLAIN),
        [ONES, ONES],
    ),
    "backward, whole numbers": (
        backward_said(1, 0, 1, "((), 2, 1, [(2, 0)])", PLAIN, PLAIN),
        [ONES, ONES],
    ),
    "backward, none and transposed": (
        backward_said(2, 0, 2, "((), 2.0, 1.0, [(2.0, 0)])", "", FLIPPED),
        [SKEW],
    ),
    "backward, bfloat16": (
        backward_said(3, 0, 3, "((), 2.0, 1.0, [(2.0, 0)])", HALVED, PLAIN),
        [ONES.bfloat16(), ONES],
    ),
    "backward, rejected": (
        backward_said(4, 0, 4, "((), 2.0, 1.0, [(2.0, 0)])", PLAIN, PLAIN),
        [ONES * float("inf"), ONES],
    ),
    "part 0": (backward_said(5, 0, 5, "None", PLAIN, PLAIN), [ONES, ONES]),
    "part 1": (backward_said(5, 1, 6, "None", PLAIN, PLAIN), [SKEW, ONES]),
    "seal alone": ("(('a', 1, 5, (((0, 0), (0, 1)), 4.0, 2.0, [(4.0, 1)])), [])", []),
    "seal that rides": (
        backward_said(6, 1, 8, "(((0, 0),), 6, 0.5, [(2, 0), (4.0, 1)])", PLAIN, PLAIN),
        [ONES, SKEW],
    ),
    "line of one client": (
        f"(('c', 1, 0, 0, 0, 0, ((), 2.0, 1.0, [(2.0, 0)])), {[PLAIN, PLAIN]})",
        [ONES, ONES],
    ),
    "loss": (loss_said(8, 9, 7, "None", "2.0", LOSS_SPEC), [X, ONES]),
    "loss, autocast": (loss_said(9, 10, 2**64 - 1, "'bfloat16'", "3", LOSS_SPEC), [X, ONES]),
    "loss, passed-on named tuple": (
        loss_said(10, 11, 7, "None", "2.0", PAIR_SPEC),
        [X, ONES],
    ),
    "push": (
        "(('a', 1, 0, 0, 16.0, 1.0, ['w'], ['m']), ['torch.float32 [2] None', "
        "'torch.float32 [2] None', 'torch.float32 [2] None'])",
        [numbers(2), numbers(2) + 1, numbers(2)],
    ),
    "push of a gradient": (
        "(('a', 1, 1, 0, 3, 4.0, ['w'], []), ['torch.float32 [2] None'])",
        [numbers(2)],
    ),
    "push, rejected": (
        "(('a', 1, 2, 0, 16.0, 1.0, ['w'], []), ['torch.float32 [2] None'])",
        [numbers(2) * float("inf")],
    ),
    "change of a line": (
        "((BatchId(client_id='a', incarnation=0, seq=0), 0, 3, 3.0), [])",
        [],
    ),
}
"""What each digest is the SHA-256 of: a `repr`, and after it the tensors' bytes as they lie."""


def digests(root: Path) -> dict[str, dict[str, Any]]:
    """Ask a server for everything once; what the records that come of it bear."""
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, key: str) -> None:
        fields = spec(root / key)
        found[name] = {"key": key, "kind": fields["kind"], "digest": fields["digest"]}

    def batch(name: str, seq: int, lineage: str = "body") -> None:
        note(name, f"{lineage}/grad/a/00000001-{seq:010d}")

    server = exact(root)
    for call in range(9):
        autocast = "bfloat16" if call == 3 else None
        server.forward(ahead(call, autocast=autocast))
    server.backward(back(0, 0))
    batch("backward", 0)
    server.backward(back(1, 1, seal=Seal((), 2, 1, (Chain(2, 0),))))
    batch("backward, whole numbers", 1)
    server.backward(back(2, 2, grad_outputs=(None, SKEW.t())))
    batch("backward, none and transposed", 2)
    server.backward(back(3, 3, grad_outputs=(ONES.bfloat16(), ONES)))
    batch("backward, bfloat16", 3)
    server.backward(back(4, 4, grad_outputs=(ONES * float("inf"), ONES)))
    batch("backward, rejected", 4)
    server.backward(back(5, 5, seal=None))
    note("part 0", "body/part/a/0000000000-00000001-0000000005-000000")
    server.backward(back(5, 6, part=1, seal=None, grad_outputs=(SKEW, ONES)))
    note("part 1", "body/part/a/0000000000-00000001-0000000005-000001")
    server.backward(back(5, None, part=2, seal=CLOSED))
    batch("seal alone", 5)
    server.backward(back(6, 7, seal=None))
    server.backward(back(6, 8, part=1, seal=RODE, grad_outputs=(ONES, SKEW)))
    batch("seal that rides", 6)

    target = {"y": ONES, "weight": 0.5}
    notes = Housekeeping(abandoned=(7,))
    server.loss(LossRequest(ahead(9, housekeeping=notes), 8, target, 2.0))
    batch("given up", 7)
    batch("loss", 8)
    cast = ahead(10, autocast="bfloat16", seed=2**64 - 1)
    server.loss(LossRequest(cast, 9, target, 3))
    batch("loss, autocast", 9)
    strange = LossRequest(ahead(11, Pair(X, 1.5)), 10, target, 2.0)
    server.loss(unpack(LossRequest, packed(strange)))
    batch("loss, passed-on named tuple", 10)

    server.push(push(0, -1))
    server.push(push(0))
    batch("push", 0, "client")
    server.push(push(1, values={}, bases={}, num_samples=3, loss_scale=4.0))
    batch("push of a gradient", 1, "client")
    server.push(push(2, values={}, bases={}, gradients={"w": numbers(2) * float("inf")}))
    batch("push, rejected", 2, "client")

    root = root / "lines"
    lines(root)
    note("line of one client", "body@c/grad/c/00000001-0000000000")
    note("change of a line", "body/grad/a/00000000-0000000000")
    return found


def test_each_kind_of_request_has_the_pinned_digest(tmp_path: Path) -> None:
    """A request that is repeated after an upgrade is the same request, and never counts twice."""
    assert digests(tmp_path) == json.loads(pinned("digests.json"))


@pytest.mark.parametrize("name", SAID)
def test_a_digest_is_the_hash_of_what_its_request_says(name: str) -> None:
    """The `repr` of a tuple of plain values, then the tensors' bytes, as they are spelled here."""
    text, tensors = SAID[name]
    said = text.encode() + b"".join(bytes.fromhex(bits(tensor)) for tensor in tensors)
    assert json.loads(pinned("digests.json"))[name]["digest"] == hashlib.sha256(said).hexdigest()


def test_a_batch_that_was_given_up_has_no_digest() -> None:
    """So no request with its number is taken for a repetition."""
    found = json.loads(pinned("digests.json"))
    assert (found["given up"]["kind"], found["given up"]["digest"]) == ("skip", "")
    assert {*found} == {*SAID, "given up"}


# -------------------------------------------------------------------------------------- errors


def error_classes() -> dict[str, type[errors.SplitFedError]]:
    """Every class of the tree, by name."""
    base = errors.SplitFedError
    classes = [one for one in vars(errors).values() if isinstance(one, type)]
    return {one.__name__: one for one in classes if issubclass(one, base)}


def told(name: str) -> errors.SplitFedError:
    """An error with a message that JSON has to escape."""
    return error_classes()[name](f'{name}: expected "ä", got \u2028')


def test_each_error_is_told_by_its_pinned_name_and_status() -> None:
    """The JSON of a service: a client from before catches the class that it knows."""
    for name, text in json.loads(pinned("errors.json")).items():
        assert encode_error(told(name)).decode() == text


def test_an_unforeseen_error_is_told_as_the_base_class() -> None:
    """A client from before knows that one."""
    found = json.loads(encode_error(ValueError("/a/path/that/may/not/cross")))
    assert (found["error"], found["status"]) == ("SplitFedError", 500)


@pytest.mark.parametrize("name", ["SplitFedError", "DigestError", "BusyError"])
def test_a_packed_error_has_the_pinned_bytes(name: str) -> None:
    """What a mailbox answers; it comes back as its class, with its message."""
    data = pinned(f"errors/{name}.safetensors")
    assert b"".join(pack_error(told(name))) == data
    found = unpack_error(data)
    assert (type(found), str(found)) == (error_classes()[name], str(told(name)))


def test_each_error_comes_back_as_its_class() -> None:
    """Over the wire as packed bytes, whichever it is."""
    for name in json.loads(pinned("errors.json")):
        found = unpack_error(b"".join(pack_error(told(name))))
        assert (type(found), str(found)) == (error_classes()[name], str(told(name)))


# ------------------------------------------------------------------------------------- traffic


def traffic() -> dict[str, tuple[str, Any]]:
    """Requests in the order in which they are asked: the method, and what it is given."""
    notes = Housekeeping(released=((0, 0),))
    ahead_again = ahead(1, housekeeping=notes)
    return {
        "forward": ("forward", ahead(0)),
        "backward": ("backward", back(0, 0)),
        "loss": ("loss", LossRequest(ahead_again, 1, {"y": ONES, "weight": 0.5}, 2.0)),
        "publish": ("push", push(0, -1)),
        "push": ("push", push(0)),
        "pull": ("pull", PullRequest("a")),
    }


REFUSED = back(0, 0, grad_outputs=(SKEW, ONES))
"""The same batch with other content."""


def test_requests_and_answers_have_the_pinned_bytes(tmp_path: Path) -> None:
    """A client from before and a server of today understand each other, and the other way round."""
    server = exact(tmp_path)
    for name, (method, request) in traffic().items():
        assert packed(request) == pinned(f"traffic/{name}.request"), name
        answer = getattr(server, method)(unpack(type(request), pinned(f"traffic/{name}.request")))
        assert packed(answer) == pinned(f"traffic/{name}.answer"), name


Answer = tuple[int, dict[str, str], bytes]


async def ask(app: Any, path: str, body: bytes, token: str = "") -> Answer:
    """Status, headers and body of what an ASGI app answers to a POST."""
    headers = [(b"content-type", b"application/octet-stream")]
    headers += [(b"content-length", b"%d" % len(body))]
    headers += [(b"authorization", f"Bearer {token}".encode())] if token else []
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app({**scope, "headers": headers, "root_path": ""}, receive, send)
    named = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], named, b"".join(message["body"] for message in sent[1:])


def serve(root: Path, bodies: Mapping[str, bytes], **settings: Any) -> dict[str, Answer]:
    """What a service answers to bodies, by the paths that they are sent to, with `#` and a name."""

    async def serving() -> dict[str, Answer]:
        app = make_app(exact(root), **settings)
        async with app.router.lifespan_context(app):
            return {to: await ask(app, to.partition("#")[0], body) for to, body in bodies.items()}

    return asyncio.run(serving())


def test_a_service_answers_the_pinned_bytes_at_the_pinned_paths(tmp_path: Path) -> None:
    """A body is the packed message itself, and an error is JSON under its status."""
    bodies = {}
    for name, (method, _) in traffic().items():
        bodies[f"/v1/{method}#{name}"] = pinned(f"traffic/{name}.request")
        if name == "backward":
            bodies["/v1/backward#refused"] = packed(REFUSED)
    found = serve(tmp_path, bodies)
    status, headers, text = found.pop("/v1/backward#refused")
    assert (status, headers["content-type"]) == (422, "application/json")
    assert json.loads(text)["error"] == "DigestError"
    for path, (status, headers, body) in found.items():
        assert (status, headers["content-type"]) == (200, "application/octet-stream"), path
        assert body == pinned(f"traffic/{path.partition('#')[2]}.answer"), path


def entries(data: bytes) -> list[bytes]:
    """The lines of a token file but for comments."""
    return [line for line in data.splitlines(keepends=True) if not line.startswith(b"#")]


def make_token(path: Path) -> str:
    """A token that is drawn as these bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda size=None: bytes(range(size or 32)))
        return new_token(path, "a")


def test_a_token_file_is_written_and_read_as_pinned(tmp_path: Path) -> None:
    """A line has a client's id and the hash of its token; the header says Bearer."""
    token = make_token(tmp_path / "tokens")
    assert entries((tmp_path / "tokens").read_bytes()) == entries(pinned("tokens"))
    assert token == "sf_" + base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode()
    shutil.copyfile(DATA / "tokens", tmp_path / "copy")

    async def asking() -> list[Answer]:
        app = make_app(exact(tmp_path / "store"), tokens=tmp_path / "copy")
        async with app.router.lifespan_context(app):
            body = pinned("traffic/forward.request")
            return [await ask(app, "/v1/forward", body, given) for given in (token, "sf_unknown")]

    (status, _, body), (refused, headers, _) = asyncio.run(asking())
    assert (status, body) == (200, pinned("traffic/forward.answer"))
    assert (refused, headers["www-authenticate"]) == (401, "Bearer")


def mailbox(root: Path) -> tuple[dict[str, tuple[bytes, bytes]], list[list[list[str]]]]:
    """The traffic through a mailbox: its files, and its keys before and after each answer."""
    folder, found, seen = root / "post", {}, []
    with fixed() as clock, pytest.MonkeyPatch.context() as patch:
        server = exact(root)
        worker = Worker(server, server.store, clock=clock)
        client = StoreTransport(str(root), client_id="a")

        def sleep(seconds: float) -> None:
            """A client that waits sleeps; a worker answers meanwhile."""
            before = listed(folder)
            worker.step()
            seen.append([before, listed(folder)])
            (request,), (answer,) = folder.rglob("*.request"), folder.rglob("*.answer")
            found[name] = request.read_bytes(), answer.read_bytes()

        patch.setattr(time, "sleep", sleep)
        for name, (method, request) in traffic().items():
            assert on_file(packed(getattr(client, method)(request))) == found[name][1]
    return found, seen


def on_file(data: bytes) -> bytes:
    """Packed bytes as a store has them: with their checksum."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return b"".join(sealed([data[:end], data[end:]]))


def test_a_mailbox_has_the_pinned_keys_and_bytes(tmp_path: Path) -> None:
    """A client posts, a worker claims and answers; either may be of an earlier splitfed."""
    found, seen = mailbox(tmp_path)
    assert seen == json.loads(pinned("mailbox.json"))
    for name, (request, answer) in found.items():
        assert request == on_file(pinned(f"traffic/{name}.request")), name
        assert answer == on_file(pinned(f"traffic/{name}.answer")), name


# -------------------------------------------------------------------------- what the runs share


class Clock:
    """Tells the time that it was told."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        """In seconds since 1970."""
        return self.now


@contextlib.contextmanager
def fixed() -> Iterator[Clock]:
    """Random names and the time of day are the same in every run; torch's generators too.

    What is drawn is counted by its kind and size: on some machines there are more temporary files,
    whose names are drawn too. Calls bear no nonce, as those of clients that draw none.
    """
    counts: Counter[str] = Counter()
    clock = Clock()

    def drawn(kind: str, size: int) -> bytes:
        if size == NONCE:
            return bytes(size)
        counts[f"{kind} {size}"] += 1
        return hashlib.sha256(f"{kind} {size} {counts[f'{kind} {size}']}".encode()).digest()[:size]

    def uuid4() -> uuid.UUID:
        # Modules of torch that are imported in the middle of a run draw some for themselves, and
        # a process names itself for what it holds in memory: only what lineages draw is in keys.
        caller = str(sys._getframe(1).f_globals["__name__"])
        of_lineages = caller == "splitfed.store.lineage"
        return uuid.UUID(bytes=drawn("uuid" if of_lineages else f"uuid of {caller}", 16))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "urandom", functools.partial(drawn, "urandom"))
        patch.setattr(secrets, "token_bytes", lambda size=None: drawn("token", size or 32))
        patch.setattr(uuid, "uuid4", uuid4)
        patch.setattr(time, "time", clock)
        torch.manual_seed(0)
        yield clock


def as_json(value: object) -> bytes:
    """As it is written into a file of this test's own."""
    return json.dumps(value, indent=1).encode() + b"\n"


def listed(root: Path) -> list[str]:
    """The keys beneath a folder; locks and temporary files are none."""
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if "/." not in f"/{path.as_posix()}")


def general(key: str) -> str:
    """A key without what depends on the version of torch: which settings an optimizer has."""
    return re.sub(r"settings-[0-9a-f]+", "settings-", key)


def copied(name: str, to: Path) -> Path:
    """A pinned store where it may be written, in the modes that its writer gave it."""
    shutil.copytree(DATA / name, to, copy_function=shutil.copyfile)
    for path in (to, *to.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return to


def header(data: bytes) -> dict[str, Any]:
    """The JSON at the front of safetensors bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    return dict(json.loads(data[8 : 8 + size]))


def spec(path: Path) -> dict[str, Any]:
    """The fields of a packed record, each as it is spelled in the header."""
    return dict(json.loads(header(path.read_bytes())["__metadata__"]["spec"])["d"])


def outline(key: str, data: bytes) -> str | bytes:
    """What every machine writes: all but floats, and what depends on them or names the machine."""
    if data[8:9] == b"{":
        found = header(data)
        said = found.get("__metadata__", {})
        said.pop("crc32", None)
        if "/optimizer/" in key or "/settings-" in key:  # another torch has other settings
            return str(said["kind"])
        if "spec" in said:
            fields = json.loads(said["spec"])["d"]
            masked = ("digest", "crcs", "numerics")
            said["spec"] = [[name, name in masked or value] for name, value in fields]
        return json.dumps(found)
    if key == "format.json":
        found = json.loads(data)
        return json.dumps({**found, "numerics": list(found["numerics"]), "crc32": None})
    if "/commit/" in key or key.endswith("/head"):
        found = json.loads(data)
        found = json.loads(found["record"]) if "record" in found else found
        files = [*found["files"]]
        return json.dumps(
            {**found, "files": files, "num_foreign": None, "parent": None, "settings": None, "crc32": None}
        )
    return data


def unworded(data: bytes) -> bytes:
    """Records of rounds without the sentences for people that say why an update was dropped."""

    def silenced(found: re.Match[bytes]) -> bytes:
        return re.sub(rb': ?"[^"]*"', b":...", found[0])

    return re.sub(rb'"dropped": ?\{[^}]+\}', silenced, data)


@functools.cache
def same_class() -> bool:
    """Whether this process computes the bits that the pinned stores were made in."""
    record = json.loads(pinned("format-1/store/format.json"))["numerics"]
    return numerics_class(CPU, record) == record and torch_has_the_bits()


def torch_has_the_bits() -> bool:
    """Whether torch alone gives some of the pinned bits: a half's, a body's forward, its backward.

    Not by splitfed's own runs, or a defect there would look like another machine.
    """
    weights = load_file(DATA / "outcomes/loaded.safetensors")

    def record(key: str) -> ForwardRecord:
        return unpack(ForwardRecord, pinned(f"store/body/forward/{key}"))

    def whole(version: int) -> Whole:
        found = Whole().train()
        found.load_state_dict(
            {f"body.{name}": weights[f"body/{version}/{name}"] for name in found.body.state_dict()}
            | {name: weights[f"client/{version}/{name}"] for name in found.state_dict() if not name.startswith("body.")}
        )
        return found

    def has_its_bits(called: ForwardRecord, outputs: Tensor) -> bool:
        return called.crcs == (zlib.crc32(bytes.fromhex(bits(outputs))),)

    with torch.random.fork_rng(devices=[]):
        # A call of client a, through bottom and body.
        called, model = record("a/0000000001-00000001-0000000003"), whole(1)
        activations = model.bottom(numbers(4, 5) - 2)
        torch.manual_seed(called.seed)
        is_same = bits(activations) == bits(called.inputs[0][0]) and has_its_bits(called, model.body(activations))
        # The call of client c whose backward is among the outcomes.
        called, body = record("c/0000000002-00000001-0000000004"), whole(2).body
        x = called.inputs[0][0].clone().requires_grad_()
        torch.manual_seed(called.seed)
        outputs = body(x)
    outputs.backward(numbers(6, 3))
    assert x.grad is not None
    found = {f"gradients/{name}": parameter.grad for name, parameter in body.named_parameters()}
    expected = load_file(DATA / "outcomes/answered.safetensors")
    found["inputs/0"] = x.grad
    return (
        is_same
        and has_its_bits(called, outputs)
        and all(bits(found[name]) == bits(tensor) for name, tensor in expected.items())
    )


def as_begun(data: bytes, other: bytes) -> bytes:
    """A format record as the splitfed that wrote another would have written it, with its checksum."""
    found, keys = json.loads(data), json.loads(other)["numerics"].keys()
    found["numerics"] = {key: value for key, value in found["numerics"].items() if key in keys}
    found.pop("crc32")
    return b"".join(sealed([json.dumps(found, indent=1).encode()]))


def test_a_run_begins_with_the_pinned_record(tmp_path: Path) -> None:
    """The keys of the numerics class in it are a format; where the kernels are those of its writer, every byte is."""
    exact(tmp_path)
    own, expected = (tmp_path / "format.json").read_bytes(), pinned("format.json")
    assert outline("format.json", own) == outline("format.json", expected)
    if json.loads(own)["numerics"] == json.loads(expected)["numerics"]:
        assert own == expected


def check_run(root: Path, name: str) -> None:
    """A run that was made anew has the pinned keys, and in them the pinned bytes."""
    keys = {general(key): key for key in listed(DATA / name)}
    assert [general(key) for key in listed(root)] == list(keys)
    for key in listed(root):
        own, other = unworded((root / key).read_bytes()), unworded(pinned(f"{name}/{keys[general(key)]}"))
        own = as_begun(own, other) if key == "format.json" else own
        assert outline(key, own) == outline(key, other), key
        if same_class():
            assert own == other, key


def check_outcome(name: str, tensors: Mapping[str, Tensor], facts: object = None, edition: str = "") -> None:
    """What came of something is what came of it when it was pinned."""
    expected = load_file(DATA / f"{edition}outcomes/{name}.safetensors")
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        other = expected[key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
        if same_class():
            assert bits(tensor) == bits(other), key
        else:
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-6)
    assert unworded(as_json(facts)) == unworded(pinned(f"{edition}outcomes/{name}.json"))


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """In another numerics class a recompute may find that its bits are others, and say so."""
    try:
        yield
    except ReplayError:
        if same_class():
            raise
        pytest.skip("the forwards on record were computed in another numerics class")


# ---------------------------------------------------------------------------- a run of 3 rounds


class Body(nn.Module):
    """A body with frozen, tied and strided tensors, statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 1.0]), requires_grad=False)
        self.up = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(6, 3)
        self.also = self.down

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 4)` to `(N, 3)`."""
        return self.also(self.drop(self.norm(self.up(x * self.scale)).relu()))


class Whole(nn.Module):
    """Bottom, body and head."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.body = Body()
        self.head = nn.Linear(3, 2)
        for place, parameter in enumerate(self.parameters()):
            if parameter.requires_grad:
                parameter.data = numbers(*parameter.shape) / (2 + place % 3)
        self.body.up.weight.data = numbers(4, 6).t() / 4  # not contiguous

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 5)` to `(N, 2)`."""
        return self.head(self.body(self.bottom(x)))


def adam(params: Any) -> torch.optim.Optimizer:
    """An optimizer with state."""
    return torch.optim.Adam(params, lr=0.125)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule with state."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.5)


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """A factory of plain SGD."""
    return lambda params: torch.optim.SGD(params, lr=lr)


class Tap:
    """A transport that remembers what it is asked."""

    def __init__(self, server: SplitServer) -> None:
        self._server = server
        self.asked: list[bytes] = []

    def forward(self, request: ForwardRequest, /) -> ForwardAnswer:
        """Pass it on."""
        self.asked.append(packed(request))
        return self._server.forward(request)

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Pass it on."""
        self.asked.append(packed(request))
        return self._server.backward(request)

    def loss(self, request: LossRequest, /) -> LossAnswer:
        """Pass it on."""
        self.asked.append(packed(request))
        return self._server.loss(request)

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Pass it on."""
        self.asked.append(packed(request))
        return self._server.push(request)

    def pull(self, request: PullRequest, /) -> PullAnswer:
        """Pass it on."""
        self.asked.append(packed(request))
        return self._server.pull(request)


def unstamped() -> tuple[nn.Module, nn.Module]:
    """The two sides as an earlier splitfed made them: without the stamp of their cut."""
    half, body = split(Whole(), "body")
    hole_of(half.body).part = None
    remove_stamps(body)
    return half, body


class Site:
    """The processes of a run over a folder; those of the clients come by their names."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self.half, self.body = unstamped()
        self.clock = clock
        self.store = GradientStore(str(root), sync="process")
        self.server = SplitServer(self.body, self.store, loss_fn=squares)
        self.tap = Tap(self.server)
        self.bodies = Accumulator(self.body, self.store, adam, lr_scheduler=halving)

    def client(self, name: str, **settings: Any) -> SplitClient:
        """A client with a half of its own, pulled."""
        client = SplitClient(copy.deepcopy(self.half), self.tap, name, **settings)
        client.pull()
        return client

    def coordinator(self) -> Federation:
        """Whoever ends the rounds; the client lineage must have begun."""
        halves = Accumulator(self.half, self.store, sgd(1.0), lineage="client")
        return Federation(self.bodies, halves, clients=("c",), deadline=60.0, clock=self.clock)


def step(client: SplitClient, *batches: Tensor, scale: float = 1.0) -> None:
    """One pass over some calls of a client, and a step of its optimizer unless it is not finite."""
    optimizer = torch.optim.SGD(client.parameters(), lr=0.125)
    loss = torch.stack([client(x).square().mean() for x in batches]).sum()
    (loss * scale).backward()
    if scale == scale:
        optimizer.step()


def ahead_c(call: int, **changes: Any) -> ForwardRequest:
    """A call of client c, which is asked for by hand."""
    x = numbers(2 + call, 4)
    return ahead(call, x, **{"client_id": "c", "seed": 100 + call, **changes})


def back_c(seq: int, call: int, **changes: Any) -> BackwardRequest:
    """The request for its backward."""
    n = float(2 + call)
    grads = (numbers(2 + call, 3),)
    seal = Seal((), n, 1.0, (Chain(n, 0),))
    return back(seq, call, **{"client_id": "c", "grad_outputs": grads, "seal": seal, **changes})


def target_c(call: int) -> dict[str, Tensor]:
    """What its loss is computed with."""
    return {"y": numbers(2 + call, 3)}


def push_c(seq: int, **changes: Any) -> PushRequest:
    """An update of its half."""
    base = numbers(4)
    made = {
        "client_id": "c",
        "gradients": {"head.bias": numbers(2) / 8},
        "values": {"bottom.1.running_mean": base + 1},
        "bases": {"bottom.1.running_mean": base},
    }
    return push(seq, 2, **{**made, **changes})


def pending() -> dict[str, tuple[str, Any, Any]]:
    """What no commit has counted: method, request, and another request under that number."""
    backward = back_c(3, 3, version=2)
    part = back_c(4, 5, version=2, seal=None)
    loss = LossRequest(ahead_c(6, version=2), 5, target_c(6), 2.0)
    halves = {"grad_outputs": (numbers(5, 3) / 2,)}, {"grad_outputs": (numbers(7, 3) / 2,)}
    return {
        "backward": ("backward", backward, dataclasses.replace(backward, **halves[0])),
        "part": ("backward", part, dataclasses.replace(part, **halves[1])),
        "loss": ("loss", loss, dataclasses.replace(loss, num_samples=3.0)),
        "push": ("push", push_c(0), push_c(0, num_samples=4.0)),
    }


def rounds(root: Path) -> list[bytes]:
    """Two rounds and the beginning of a third: clients a and b train, c is asked for by hand.

    Returns:
        What a and b asked.
    """
    with fixed() as clock, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the batch that isn't finite
        site = Site(root, clock)
        server, store = site.server, site.store
        history = History(store)
        history.append({"kind": "run", "mode": "round", "clients": ["a", "b", "c"]})

        def report(number: int) -> None:
            clock.now += 61.0
            row = coordinator.poll()
            for lineage in ("body", "client"):
                for commit in commit_rows(store, lineage, number - 1, number, number):
                    history.append(commit)
            history.append(row or {})

        a, b = site.client("a"), site.client("b", loss_scale=4.0)
        coordinator = site.coordinator()
        coordinator.open()
        clock.now += 1.5
        step(a, numbers(4, 5))
        step(a, numbers(4, 5) + 1, numbers(2, 5) - 1)
        step(b, numbers(3, 5), scale=4.0)
        step(b, numbers(3, 5), scale=float("nan"))
        server.forward(ahead_c(0))
        server.forward(ahead_c(1, previous=0, housekeeping=Housekeeping(abandoned=(0,))))
        a.push()
        report(1)

        coordinator.open()
        clock.now += 2.5
        a.pull()
        with a.batch(num_samples=7):
            step(a, numbers(4, 5) - 2)
        server.backward(back_c(1, 1, version=0))
        server.loss(LossRequest(ahead_c(2), 2, target_c(2), 2.0))
        a.push()
        b.push()
        report(2)

        coordinator.open()
        a.pull()
        a.push(num_samples=3)
        for call in (3, 4, 5):
            server.forward(ahead_c(call))
        for method, request, _ in pending().values():
            getattr(server, method)(request)
        return site.tap.asked


def test_a_run_writes_the_pinned_keys_and_bytes(tmp_path: Path) -> None:
    """Whoever looks for a file of another splitfed finds it, as that one would write it."""
    rounds(tmp_path)
    check_run(tmp_path, "store")


def described_requests(asked: list[bytes]) -> list[list[Any]]:
    """Kind, fields and hash of some packed requests."""
    found = [(header(data)["__metadata__"], hashlib.sha256(data)) for data in asked]
    return [[said["kind"], said["spec"], sha256.hexdigest()] for said, sha256 in found]


def test_clients_ask_the_pinned_requests(tmp_path: Path) -> None:
    """Numbers, seeds, seals and what is confirmed are those of an earlier splitfed."""
    expected = json.loads(pinned("requests.json"))
    found = described_requests(rounds(tmp_path))
    assert [request[:2] for request in found] == [request[:2] for request in expected]
    if same_class():
        assert found == expected


def loaded(root: Path) -> tuple[dict[str, Tensor], Any]:
    """Every version of a store's lineages, and which they are."""
    store = GradientStore(str(root))
    heads = {lineage: store.latest_version(lineage) for lineage in ("body", "client")}
    weights = {
        f"{lineage}/{version}/{name}": tensor.clone(memory_format=torch.contiguous_format)
        for lineage, head in heads.items()
        for version in range(head + 1)
        for name, tensor in store.load_weights(version, lineage).items()
    }
    return weights, heads


@editions
def test_the_weights_of_the_pinned_store_are_loaded(tmp_path: Path, edition: str) -> None:
    """Of every version of body and client halves, tied names included."""
    check_outcome("loaded", *loaded(copied(f"{edition}store", tmp_path / "store")), edition=edition)


@editions
def test_the_pinned_store_takes_the_same_body_and_half_and_no_others(tmp_path: Path, edition: str) -> None:
    """Fingerprints are compared with those on record."""
    root = copied(f"{edition}store", tmp_path / "store")
    site = Site(root, Clock())
    assert site.client("a").version == 2
    other = Whole()
    other.body.also = nn.Linear(6, 3)  # no longer tied
    with pytest.raises(ArchitectureError):
        SplitServer(other.body, site.store)


def status(root: Path) -> tuple[dict[str, Tensor], Any]:
    """What an operator sees of a store, but for what depends on where and when he looks."""
    found = read_status(GradientStore(str(root))).to_json()
    for lineage in found["lineages"]:  # what was told later than the store was pinned
        assert lineage.pop("durability") == "gradient"
    kept = [name for name in found if name not in ("url", "bytes", "seconds")]
    return {}, {name: found[name] for name in kept}


@editions
def test_the_status_of_the_pinned_store_is_read(tmp_path: Path, edition: str) -> None:
    """Versions, commits, clients, and what waits in which lineage."""
    check_outcome("status", *status(copied(f"{edition}store", tmp_path / "store")), edition=edition)


def reported(root: Path) -> tuple[dict[str, Tensor], Any]:
    """The rows of a store's history."""
    return {}, History.load(GradientStore(str(root))).rows


@editions
def test_the_history_of_the_pinned_store_is_read(tmp_path: Path, edition: str) -> None:
    """Rows of the run, its commits and its rounds."""
    check_outcome("reported", *reported(copied(f"{edition}store", tmp_path / "store")), edition=edition)


def gradients(answer: BackwardAnswer | LossAnswer | PushAnswer) -> dict[str, Tensor]:
    """The tensors of an answer, by name."""
    found = getattr(answer, "grad_inputs", ())
    return {str(place): tensor for place, tensor in enumerate(found) if tensor is not None}


def repeated(root: Path) -> tuple[dict[str, Tensor], Any]:
    """The answers to what was asked before the store was pinned, asked once more."""
    server, tensors, statuses = Site(root, Clock()).server, {}, {}
    for name, (method, request, _) in pending().items():
        answer = getattr(server, method)(unpack(type(request), packed(request)))
        statuses[name] = answer.status
        tensors |= {f"{name}/{place}": tensor for place, tensor in gradients(answer).items()}
    return tensors, statuses


@editions
def test_a_request_from_before_is_answered_the_same_when_it_is_repeated(tmp_path: Path, edition: str) -> None:
    """Its digest is the one on record: a backward, a part, a one-trip loss and a push."""
    root = copied(f"{edition}store", tmp_path / "store")
    before = {key: (root / key).read_bytes() for key in listed(root)}
    with recomputing():
        check_outcome("repeated", *repeated(root), edition=edition)
    assert {key: (root / key).read_bytes() for key in listed(root)} == before


@pytest.mark.parametrize("name", pending())
@editions
def test_another_request_under_a_number_from_before_is_refused(name: str, tmp_path: Path, edition: str) -> None:
    """What is on record stays; the other content counts nowhere."""
    server = Site(copied(f"{edition}store", tmp_path / "store"), Clock()).server
    method, _, other = pending()[name]
    with recomputing(), pytest.raises(DigestError):
        getattr(server, method)(other)


def answered(root: Path) -> tuple[dict[str, Tensor], Any]:
    """The backward of a forward that was on record without one, and the file that comes of it."""
    server = Site(root, Clock()).server
    answer = server.backward(back_c(6, 4, version=2))
    key = root / "body/grad/c/00000001-0000000006"
    record = unpack(GradientRecord, key.read_bytes())
    found = {f"inputs/{place}": tensor for place, tensor in gradients(answer).items()}
    found |= {f"gradients/{name}": tensor.contiguous() for name, tensor in record.gradients.items()}
    return found, {"status": answer.status, "kind": record.kind, "version": record.base_version}


@editions
def test_a_forward_from_before_gets_its_backward(tmp_path: Path, edition: str) -> None:
    """It is run again from its record, at its version, with its seed, to its bits."""
    with recomputing():
        check_outcome("answered", *answered(copied(f"{edition}store", tmp_path / "store")), edition=edition)


def folded(root: Path) -> tuple[dict[str, Tensor], Any]:
    """The next version of the body, from what waits."""
    site = Site(root, Clock())
    commit = site.bodies.step()
    assert commit is not None
    names = ("version", "num_batches", "num_samples", "num_rejected", "num_skipped", "staleness")
    facts = {name: getattr(commit, name) for name in names}
    weights = site.store.load_weights(commit.version)
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}, facts


@editions
def test_batches_from_before_are_folded_into_the_next_version(tmp_path: Path, edition: str) -> None:
    """The optimizer and its schedule go on with the state on record, to the same bits."""
    check_outcome("folded", *folded(copied(f"{edition}store", tmp_path / "store")), edition=edition)


def closed(root: Path) -> tuple[dict[str, Tensor], Any]:
    """The third round, ended by another coordinator, and what it reports."""
    with fixed() as clock:
        coordinator = Site(root, clock).coordinator()
        plan = coordinator.open()
        clock.now += 1_000.0
        report = coordinator.poll()
        coordinator.finish()
    assert plan is not None
    told = text_of((root / "rounds/0000000003/finished.json").read_bytes()).decode()
    facts = {"plan": dataclasses.asdict(plan), "report": report, "finished": told}
    return loaded(root)[0], facts


@editions
def test_a_round_from_before_is_ended_by_another_coordinator(tmp_path: Path, edition: str) -> None:
    """The plan on record holds, and the updates that came to it are averaged."""
    check_outcome("closed", *closed(copied(f"{edition}store", tmp_path / "store")), edition=edition)


# ------------------------------------------------------------------------- a run of lines (SFLV1)


class StoppedError(Exception):
    """Whoever averaged ends here."""


class Stopping(torch.optim.SGD):
    """An optimizer that never comes to its first step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Stop."""
        raise StoppedError


def stopping(params: Any) -> torch.optim.Optimizer:
    """The factory of one."""
    return Stopping(params, lr=1.0)


def lines(root: Path) -> None:
    """A body per client: a moves twice, b is rolled back, c waits; the average is interrupted."""
    with fixed():
        server = exact(root, per_client=True)
        store = server.store
        bodies = PerClient(Exact(), store, sgd(0.5), average=stopping)

        def batch(client_id: str, number: int, version: int, samples: float) -> None:
            server.forward(ahead(number, client_id=client_id))
            seal = Seal((), samples, 1.0, (Chain(samples, 0),))
            server.backward(back(number, number, client_id=client_id, version=version, seal=seal))

        batch("a", 0, 0, 2.0)
        batch("b", 0, 0, 4.0)
        bodies.step()
        store.rollback(0, "body@b")
        batch("a", 1, 1, 1.0)
        batch("b", 1, 2, 1.0)
        batch("c", 0, 0, 2.0)
        with contextlib.suppress(StoppedError):
            bodies.average(["a", "b"])


def test_a_run_of_lines_writes_the_pinned_keys_and_bytes(tmp_path: Path) -> None:
    """Lines of one client, their closing commits, and the changes that wait for an average."""
    lines(tmp_path)
    check_run(tmp_path, "lines")


def averaged(root: Path) -> tuple[dict[str, Tensor], Any]:
    """The average, carried out by another process, and the lines after it."""
    store = GradientStore(str(root), sync="process")
    commit = PerClient(Exact(), store, sgd(0.5)).average(["a", "b"])
    assert commit is not None
    names = ("body", "body@a", "body@b", "body@c")
    facts = {name: store.latest_version(name) for name in names}
    facts |= {"folded": [str(batch) for batch in commit.folded], "samples": commit.num_samples}
    return {name: store.load_weights(lineage=name)["linear.weight"] for name in names}, facts


@editions
def test_an_average_from_before_is_carried_out(tmp_path: Path, edition: str) -> None:
    """Each line's change is on record under a number that its end determines, and counts once."""
    check_outcome("averaged", *averaged(copied(f"{edition}lines", tmp_path / "lines")), edition=edition)


# -------------------------------------------------------------------------------------- writing

OUTCOMES = {
    **dict.fromkeys((loaded, status, reported, repeated, answered, folded, closed), "store"),
    averaged: "lines",
}


def write() -> None:
    """Write all of the data anew."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    for path in DATA.iterdir():  # but not what an earlier format wrote: nobody can write it anew
        if path.is_dir() and not path.name.startswith("format-"):
            shutil.rmtree(path)

    def put(name: str, data: bytes) -> None:
        path = DATA / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, message in messages().items():
            put(f"messages/{name}.safetensors", packed(message))
        stranger = unpack(ForwardRequest, packed(messages()["ForwardRequest.stranger"]))
        put("messages/ForwardRequest.passed-on.safetensors", packed(stranger))
        put("digests.json", as_json(digests(scratch / "digests")))
        put("errors.json", as_json({n: encode_error(told(n)).decode() for n in error_classes()}))
        for name in ("SplitFedError", "DigestError", "BusyError"):
            put(f"errors/{name}.safetensors", b"".join(pack_error(told(name))))
        put("requests.json", as_json(described_requests(rounds(scratch / "store"))))
        lines(scratch / "lines")
        for name in ("store", "lines"):
            for key in listed(scratch / name):
                put(f"{name}/{key}", (scratch / name / key).read_bytes())
        for number, (outcome, name) in enumerate(OUTCOMES.items()):
            tensors, facts = outcome(copied(name, scratch / str(number)))
            put(f"outcomes/{outcome.__name__}.json", as_json(facts))
            save_file(tensors, DATA / f"outcomes/{outcome.__name__}.safetensors")
        server = exact(scratch / "traffic")
        for name, (method, request) in traffic().items():
            put(f"traffic/{name}.request", packed(request))
            put(f"traffic/{name}.answer", packed(getattr(server, method)(request)))
        put("mailbox.json", as_json(mailbox(scratch / "mailbox")[1]))
        exact(scratch / "begun")
        put("format.json", (scratch / "begun/format.json").read_bytes())
        make_token(scratch / "tokens")
        put("tokens", (scratch / "tokens").read_bytes())


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("this writes the pinned data anew, for a new format version only: --write")
    write()
