"""Messages as bytes: each comes back as it was, nothing else passes for one, and a digest tells requests apart."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.errors import ContainerError, FormatError
from splitfed.protocol import messages, pytree, safetensors
from splitfed.protocol.coding import Coded
from splitfed.protocol.deltas import Delta
from splitfed.protocol.fields import added_fields
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
    Recipe,
    RoundInfo,
    Seal,
    SumRecord,
    content_digest,
)
from splitfed.protocol.packing import pack, pack_tree, peek, unpack, unpack_tree

T = torch.arange(6.0).view(2, 3)
INPUTS = ((T, [None, 3]), {"mask": T.t() > 1, "again": T})
NOTES = Housekeeping(released=((0, 1), (2, 3)), abandoned=(4,), answered=())
AHEAD = ForwardRequest(
    client_id="a",
    incarnation=None,
    process="3f",
    call=3,
    cut="low,high",
    inputs=INPUTS,
    requires_grad=(True, False),
    training=True,
    grad=True,
    seed=2**64 - 1,
    autocast="bfloat16",
    version=None,
    seen=2,
    previous=1,
    housekeeping=NOTES,
)
SEAL = Seal(parts=((0, 0), (1, 1)), num_samples=16.0, loss_scale=0.5, chains=(Chain(8.0, 0), Chain(8.0, 1)))
BACK = BackwardRequest(
    client_id="a",
    incarnation=1,
    seq=5,
    part=2,
    version=7,
    call=3,
    grad_outputs=(T, None),
    seal=SEAL,
    housekeeping=NOTES,
)
SHARE = BufferUpdate({"mean": T}, {"mean": T + 1}, 8.0)
RAN = ForwardRecord("", INPUTS, (True, False), True, 5, None, {"m": T}, (((2, 3), "float32", True),), (7,), "x")
RECIPE = Recipe(3, 0, RAN, (T, None), (7, 0), "d")
MESSAGES = [
    AHEAD,
    ForwardAnswer(1, 7, {"out": T}, (True,), False, {0: T}, (2**32 - 1,)),
    BACK,
    dataclasses.replace(BACK, call=None, grad_outputs=()),
    dataclasses.replace(BACK, seal=None, housekeeping=Housekeeping()),
    BackwardAnswer((T, None), "stored"),
    LossRequest(AHEAD, 3, {"target": torch.tensor([1, 2])}, 2.0),
    LossAnswer(1, 7, torch.tensor(0.5), (T, None), "rejected", True),
    PullRequest("a", None),
    PullRequest("a", 3, weights=False),
    PullAnswer(-1, None, {}, RoundInfo(2, True, 70.5, True, False, False, True)),
    PullAnswer(3, {"w": {"role": "trainable", "shape": [2, 3], "dtype": "float32"}}, {"w": T}),
    PushRequest("a", None, "3f", 0, -1, {"w": {"tied": "v"}}, {"w": T}, {"m": T}, {"m": T}, 4.0, 1.0),
    PushAnswer(1, "published"),
    RAN,
    RECIPE,
    GradientRecord("gradient", 3, 8.0, 0.5, "d", "n", {"w": T}, [SHARE]),
    GradientRecord("gradient", 3, 8.0, 0.5, "d", "n", {}, [], recipes=(RECIPE, RECIPE), seal=SEAL),
    GradientRecord("skip", 0, 0.0, 1.0, "", "n", {}, []),
    SumRecord(3, 0.5, "n", ("a/1/0", "b/2/7"), ("d", "e"), (2.0, 3.5), (1, 0), [SHARE], {"w": T}),
]


def joined(message: Any) -> bytes:
    """The message's bytes, as they lie in a file."""
    return b"".join(pack(message))


def forged(kind: str, tree: Any = None, **metadata: str) -> bytes:
    """Bytes with any spec and metadata: what somebody else might send."""
    spec, tensors = pytree.flatten(tree)
    named = {f"{i:06d}": tensor for i, tensor in enumerate(tensors)}
    return b"".join(safetensors.encode(named, {"kind": kind, "spec": json.dumps(spec), **metadata}))


def fields(message: Any) -> dict[str, Any]:
    """A message's fields as plain values, with each tensor's dtype, strides and elements."""
    if dataclasses.is_dataclass(message):
        return {f.name: fields(getattr(message, f.name)) for f in dataclasses.fields(message)}
    if isinstance(message, Tensor):
        return {"dtype": message.dtype, "strides": message.stride(), "elements": message.tolist()}
    if isinstance(message, list | tuple):
        return {"type": type(message), "items": [fields(item) for item in message]}
    return {k: fields(v) for k, v in message.items()} if isinstance(message, dict) else message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_comes_back_as_it_was(message: Any) -> None:
    """Nested messages, tensors with their strides, and plain values in their types."""
    found = unpack(type(message), joined(message))
    assert type(found) is type(message)
    assert fields(found) == fields(message)


def test_every_message_is_among_the_examples() -> None:
    """None is left out above."""
    held = {type(message).__name__ for message in MESSAGES} | {
        "Housekeeping",
        "Seal",
        "Chain",
        "RoundInfo",
        "BufferUpdate",
        "Coded",
        "Delta",
    }
    assert held == {n for n, c in vars(messages).items() if dataclasses.is_dataclass(c)}


def test_one_tensor_stays_one() -> None:
    """Identity within a message survives, so a body meets the same object twice."""
    (first, _), named = unpack(ForwardRequest, joined(AHEAD)).inputs
    assert named["again"] is first


def test_packing_copies_no_tensor() -> None:
    """The buffers are the tensors' own memory, to be written out before they change."""
    large = torch.zeros(1000)
    parts = pack(BackwardAnswer((large,), "part"))
    large[0] = 1
    assert unpack(BackwardAnswer, b"".join(parts)).grad_inputs[0][0] == 1  # type: ignore[index]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_isnt_taken_for_another(message: Any) -> None:
    """The kind stands in the header and is checked first."""
    other = PullRequest if type(message) is not PullRequest else PushAnswer
    with pytest.raises(FormatError, match=f"expected a {other.__name__}, got '{type(message).__name__}'"):
        unpack(other, joined(message))


@pytest.mark.parametrize(
    "tree",
    [{"client_id": "a"}, {"client_id": "a", "version": 1, "more": 2}, {}, [1], None, "a", T],
    ids=["missing", "extra", "empty", "list", "none", "text", "tensor"],
)
def test_a_message_has_exactly_its_fields(tree: Any) -> None:
    """One missing, one too many, or no fields at all: FormatError, naming what is expected."""
    with pytest.raises(
        FormatError, match=r"PullRequest needs the fields \['client_id', 'version', 'weights', 'frozen'\]"
    ):
        unpack(PullRequest, forged("PullRequest", tree))


@pytest.mark.parametrize(
    "seal",
    [{"parts": ()}, {"parts": (), "num_samples": 1.0, "loss_scale": 1.0, "chains": (5,)}],
    ids=["seal", "chain"],
)
def test_a_nested_message_has_exactly_its_fields(seal: Any) -> None:
    """A seal within a request is checked like any other."""
    tree = {f.name: None for f in dataclasses.fields(BackwardRequest)} | {"seal": seal, "housekeeping": None}
    with pytest.raises(FormatError, match="needs the fields"):
        unpack(BackwardRequest, forged("BackwardRequest", tree))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",
        joined(SEAL)[:-1],
        joined(BACK)[:100],
        b"".join(safetensors.encode({"x": T})),
        b"".join(safetensors.encode({}, {"kind": "Seal"})),
        b"".join(safetensors.encode({}, {"kind": "Seal", "spec": "{"})),
        b"".join(safetensors.encode({}, {"kind": "Seal", "spec": '{"l":[' * 3000})),
        b"".join(safetensors.encode({}, {"kind": "Seal", "spec": '{"l":[' * 600 + "]}" * 600})),
        b"".join(safetensors.encode({}, {"kind": "Seal", "spec": "1" * 5000})),
        b"".join(safetensors.encode({}, {"kind": "Seal", "spec": f'{{"z":[{2**70}]}}'})),
        b"".join(safetensors.encode({"x": torch.ones(2)}, {"kind": "Seal", "spec": '{"k":[["a",0],["b",{"t":0}]]}'})),
    ],
    ids="empty pickle cut half no_kind no_spec bad_json endless_json deep_json digits size counter".split(),
)
def test_foreign_bytes_are_refused(data: bytes) -> None:
    """With our own error, whatever they are."""
    with pytest.raises(FormatError):
        unpack(Seal, data)


@pytest.mark.parametrize(
    "spec", ["[]", "3", '{"d": 5}', '{"d": null}', '{"d": [[1]]}', '{"d": [[["a"], 1]]}', '{"d": {}}']
)
def test_peek_reads_a_forged_header_safely(spec: str) -> None:
    """It finds nothing there, or says that the bytes aren't ours."""
    data = b"".join(safetensors.encode({}, {"kind": "GradientRecord", "spec": spec}))
    with contextlib.suppress(FormatError):
        assert peek(GradientRecord, data, ["kind"]) == {"kind": None}


def test_peek_reads_plain_fields_only() -> None:
    """A few fields from the header alone; one that holds tensors can't be had so."""
    data = joined(GradientRecord("gradient", 3, 8.0, 0.5, "d", "n", {"w": T}, [SHARE]))
    assert peek(GradientRecord, data, ("kind", "num_samples")) == {"kind": "gradient", "num_samples": 8.0}
    with pytest.raises(FormatError, match="names tensor"):
        peek(GradientRecord, data, ("gradients",))


@pytest.mark.parametrize("value", [object(), {1, 2}, 10**5000], ids=["object", "set", "endless_int"])
def test_what_cant_travel_is_refused(value: Any) -> None:
    """Before a byte is written."""
    with pytest.raises(ContainerError):
        pack_tree("any", {"x": value})


def test_a_tree_of_any_kind_travels() -> None:
    """Optimizer state and the like, under the kind that the writer says."""
    data = b"".join(pack_tree("Optimizer", {0: {"step": T}, "lr": 0.1}))
    assert fields(unpack_tree("Optimizer", data)) == fields({0: {"step": T}, "lr": 0.1})
    with pytest.raises(FormatError, match="expected a Scheduler, got 'Optimizer'"):
        unpack_tree("Scheduler", data)


def test_a_retry_has_the_same_digest() -> None:
    """Equal content, other objects: another process would compute it too."""
    assert content_digest(("a", 1, SEAL), [T, None]) == content_digest(
        ("a", 1, dataclasses.replace(SEAL)), (T.clone(), None)
    )
    assert len(content_digest((), ())) == 64


OTHERS = {
    "said": (("a", 2), [T, None]),
    "order": (("a", 1), [None, T]),
    "element": (("a", 1), [T + 1, None]),
    "shape": (("a", 1), [T.view(3, 2), None]),
    "dtype": (("a", 1), [T.view(torch.int32), None]),
    "strides": (("a", 1), [T.t().contiguous().t(), None]),
    "twice": (("a", 1), [T, T]),
}


@pytest.mark.parametrize(("said", "tensors"), OTHERS.values(), ids=OTHERS)
def test_any_other_content_has_another_digest(said: Any, tensors: Any) -> None:
    """A plain field, an element, a shape, a dtype, strides, or the place of a tensor."""
    assert content_digest(said, tensors) != content_digest(("a", 1), [T, None])


@pytest.mark.parametrize("field", ["num_samples", "loss_scale"])
def test_a_number_that_no_float_can_hold_is_of_no_kind(field: str) -> None:
    """JSON has integers of any length; one of 400 digits would overflow far from here."""
    message = PushRequest(
        "a", None, "3f", 0, 0, None, {}, {}, {}, **{"num_samples": 1.0, "loss_scale": 1.0, field: 10**400}
    )
    with pytest.raises(FormatError, match=f"PushRequest.{field} is 1000"):
        unpack(PushRequest, b"".join(pack(message)))


def test_a_named_tuple_of_messages_is_a_tuple() -> None:
    """The sender may name a class of any fields; it is never called with one list."""
    pair = collections.namedtuple("Pair", "first second")
    seal = Seal((), 2.0, 1.0, pair(Chain(1.0, 0), Chain(1.0, 1)))
    found = unpack(Seal, joined(seal))
    assert type(found.chains) is tuple
    assert [chain.last_part for chain in found.chains] == [0, 1]


CODING = (Coded(0, "int8/1+zstd/1", "float32", (2, 3), (3, 1), (T, T + 1), 0.5, 2.0),)
ROWS = (torch.tensor([2, -1], dtype=torch.int32), torch.tensor([False, True]))
CHANGE = Delta(0, "delta/1", "float32", (2, 3), (3, 1), ("0f" * 8,), *ROWS, adds=True, keeps=True)
LATER = [
    dataclasses.replace(
        AHEAD,
        part="1:3/0f",
        settings={"drop.p": 0.5, "1.training": False},
        previous_version=6,
        resumed=2**32,
        nonce=2**32 - 1,
        previous_nonce=2**31,
        repeats=4,
        coding=CODING,
        answer_codec="int8/1",
        deltas=(CHANGE,),
    ),
    Housekeeping(references=("0f" * 8,)),
    dataclasses.replace(BACK, counted=False, resumed=2**32, nonce=2**31, coding=CODING, answer_codec="int8/1"),
    ForwardAnswer(
        1, 7, {"out": T}, (True,), False, {}, (1,), moved=True, written=("layer.kl",), repeated=True, coding=CODING
    ),
    BackwardAnswer((T, None), "stored", CODING),
    PullRequest("a", 3, frozen="0f" * 32),
    LossAnswer(1, 7, torch.tensor(0.5), (T, None), "rejected", True, repeated=True, coding=CODING),
    PullAnswer(7, {"w": {}}, {"w": T}, None, 6),
    dataclasses.replace(
        PushRequest("a", 1, "3f00", 5, 7, None, {"w": T}, {}, {}, 7.0, 1.0),
        resumed=2**32,
        upto=6,
        flows={"outputs": [1, 0, 64, 64, 0.0, 0.0]},
    ),
]


@pytest.mark.parametrize("message", LATER, ids=lambda message: type(message).__name__)
def test_a_field_that_came_later_travels_only_if_it_says_something(message: Any) -> None:
    """Bytes from before it came are read, and what doesn't use it is written as before."""
    names = [field.name for field in dataclasses.fields(message) if "added" in field.metadata]
    before = dataclasses.replace(message, **{name: added_fields(type(message))[name] for name in names})
    assert {name for name, _ in spec_of(message)} - {name for name, _ in spec_of(before)} == set(names)
    for sent in (message, before):
        found = unpack(type(sent), joined(sent))
        assert [fields(getattr(found, name)) for name in names] == [fields(getattr(sent, name)) for name in names]


def spec_of(message: Any) -> list[Any]:
    """The fields in a message's header."""
    return json.loads(safetensors.read_metadata(joined(message))["spec"])["d"]
