"""Truncated and malicious files in the store: our own error, or a loud rejection, from whoever meets them first."""

from __future__ import annotations

import json
import math
import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, sgd
from torch import Tensor, nn

import splitfed
from splitfed.errors import SplitFedError
from splitfed.protocol import packing, safetensors
from splitfed.protocol.messages import ForwardRecord


def memory() -> str:
    """The URL of an empty store in memory."""
    return f"memory://{uuid.uuid4()}"


def x() -> Tensor:
    """A batch `(4, 6)`."""
    return torch.randn(4, 6)


def forged(kind: str, tree: Any) -> bytes:
    """A well-formed file of ours with anything in it."""
    return b"".join(packing.pack_tree(kind, tree))


W = {"weight": torch.ones(8, 8)}
GRADIENT: dict[str, Any] = {
    "kind": "gradient",
    "base_version": 0,
    "num_samples": 1.0,
    "loss_scale": 1.0,
    "digest": "",
    "numerics": "",
    "gradients": W,
    "buffers": [],
}
GRADIENTS = {
    "kind": {"kind": [1]},
    "base_float": {"base_version": 0.5},
    "base_text": {"base_version": "0"},
    "base_ahead": {"base_version": 5},
    "samples_zero": {"num_samples": 0.0},
    "samples_nan": {"num_samples": math.nan},
    "samples_text": {"num_samples": "many"},
    "scale_zero": {"loss_scale": 0.0},
    "scale_none": {"loss_scale": None},
    "scale_tiny": {"loss_scale": 1e-45},
    "gradients_list": {"gradients": [1]},
    "gradient_number": {"gradients": {"weight": 3}},
    "gradient_unknown": {"gradients": {"more": torch.ones(1)}},
    "gradient_shape": {"gradients": {"weight": torch.ones(8, 9)}},
    "gradient_dtype": {"gradients": {"weight": torch.ones(8, 8).double()}},
    "gradient_nan": {"gradients": {"weight": torch.full((8, 8), math.nan)}},
    "buffers_number": {"buffers": 5},
    "buffers_of_nothing": {"buffers": [{}]},
    "buffers_list": {"buffers": [{"values": [1], "bases": {}, "num_samples": 1.0}]},
    "buffers_unknown": {"buffers": [{"values": {"m": torch.ones(1)}, "bases": {}, "num_samples": 1.0}]},
    "buffers_weight": {"buffers": [{"values": {}, "bases": {}, "num_samples": "x"}]},
}
FOREIGN = {
    "pickle": pickle.dumps({"weight": 1}),
    "text": b"{}",
    "truncated": forged("GradientRecord", GRADIENT)[:-40],
    "header_only": forged("GradientRecord", GRADIENT)[:200],
    "other_kind": forged("ForwardRecord", GRADIENT),
    "fields": forged("GradientRecord", {"kind": "gradient"}),
    "no_fields": forged("GradientRecord", 3),
    "spec": b"".join(safetensors.encode({}, {"kind": "GradientRecord", "spec": '{"d": 5}'})),
    "deep": b"".join(safetensors.encode({}, {"kind": "GradientRecord", "spec": '{"l":[' * 600 + "]}" * 600})),
    **{name: forged("GradientRecord", {**GRADIENT, **changes}) for name, changes in GRADIENTS.items()},
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_gradient_is_rejected_by_name(data: bytes) -> None:
    """Warned of, closed as rejected with the good one's commit, which is as if it had never been there."""
    made, other = (Split(sandwich(nn.Linear(8, 8)), "body", memory(), optimizer=sgd) for _ in range(2))
    other.accumulator, given = made.accumulator, x()
    made.client(given).sum().backward()
    (record,) = made.waiting()
    made.store.blobs.create("body/grad/mallory/00000001-0000000000", [data])
    with pytest.warns(UserWarning, match="batch mallory/1/0 is rejected: .*counts nowhere"):
        commit = made.accumulator.step()
    assert commit is not None
    assert (commit.num_batches, [str(batch) for batch in commit.rejected]) == (1, ["mallory/1/0"])
    expected = made.body.weight.detach() - 0.5 * record.gradients["weight"]
    assert torch.equal(splitfed.GradientStore(made.store.url).load_weights()["weight"], expected)


RECORD: list[tuple[str, Any]] = [
    ("cut", 5),
    ("cut", "../x"),
    ("inputs", 7),
    ("inputs", None),
    ("inputs", ((), {})),
    ("requires_grad", None),
    ("training", "x"),
    ("seed", "x"),
    ("seed", 2**70),
    ("autocast", 5),
    ("buffers", 5),
    ("outputs", 7),
    ("outputs", (1,)),
    ("crcs", 5),
    ("crcs", (1,)),
]


def repacked(field: str, value: Any) -> Callable[[bytes], bytes]:
    """A forward record with another value in one field."""
    return lambda data: b"".join(packing.pack(replace(packing.unpack(ForwardRecord, data), **{field: value})))


RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-8],
    "pickle": lambda data: pickle.dumps(3),
    "text": lambda data: b"forward",
    "other_kind": lambda data: forged("GradientRecord", GRADIENT),
    **{f"{field}={value!r}": repacked(field, value) for field, value in RECORD},
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_forward_record_that_was_changed(change: Callable[[bytes], bytes]) -> None:
    """Our own error leaves loss.backward(), nothing waits, and the loop goes on."""
    made = Split(sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), "body", memory(), keep_graphs=0)
    loss = made.client(x()).sum()
    (key,) = made.stored("forward")
    made.store.blobs.put(key, [change(bytes(made.store.blobs.get(key) or b""))])
    with pytest.raises(SplitFedError):
        loss.backward()
    made.client(x()).sum().backward()
    assert [record.kind for record in made.waiting()] == ["skip", "gradient"]


def trained() -> splitfed.GradientStore:
    """A store with two versions, optimizer state and a frozen parameter."""
    net = sandwich(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)))
    made = Split(net, "body", memory(), optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    made.client(x()).sum().backward()
    made.accumulator.step()
    return made.store


def use(store: splitfed.GradientStore) -> None:
    """All that a new process does with it: serve, train, commit, read."""
    net = sandwich(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)))
    made = Split(net, "body", store.url, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), client_id="b")
    made.client(x()).sum().backward()
    assert made.accumulator.step() is not None
    made.store.load_weights()


def edited(**changes: Any) -> Callable[[bytes], bytes]:
    """JSON with some fields replaced."""
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


DEEP = b"[" * 100_000
JSON: dict[str, Any] = {
    "empty_object": lambda data: b"{}",
    "list": lambda data: b"[]",
    "null": lambda data: b"null",
    "number": lambda data: b"3",
    "truncated": lambda data: data[: len(data) // 2],
    "not_text": lambda data: b"\xff\xfe",
    "deep": lambda data: DEEP,
    "digits": lambda data: b"1" * 5000,
    "pickle": lambda data: pickle.dumps(1),
}
STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "format": (
        "format.json",
        {**JSON, "other": edited(format=3), "numerics": edited(numerics=3), "no": lambda d: b'{"format": 1}'},
    ),
    "fingerprint": (
        "body/fingerprint.json",
        {
            **JSON,
            "entry": edited(**{"0.weight": 3}),
            "tie": edited(**{"0.weight": {"tied": "x"}}),
            "more": edited(x={"role": "y"}),
        },
    ),
    "commit": (
        "body/commit/",
        {
            **JSON,
            "nonce": edited(nonce="../../x"),
            "files": edited(files=[]),
            "no_files": edited(files={}),
            "hash": edited(files={"weights": "0", "applied": "0", "optimizer": "0"}),
            "frozen": edited(frozen="../../../etc/passwd"),
            "folded": edited(folded={"../x": {"1": [[0, 1]]}}),
            "runs": edited(folded={"a": {"1": [[5, 1]]}}),
            "staleness": edited(staleness={"x": 1}),
            "extra": edited(surprise=1),
        },
    ),
    "weights": (
        "body/weights/",
        {"truncated": lambda d: d[:-4], "pickle": JSON["pickle"], "bit": lambda d: d[:-1] + bytes([d[-1] ^ 1])},
    ),
    "optimizer": ("body/optimizer/", {"truncated": lambda d: d[:-4], "pickle": JSON["pickle"]}),
    "applied": ("body/applied/", JSON),
    "frozen": ("body/frozen-", {"truncated": lambda d: d[:-4], "text": JSON["list"]}),
}
CHANGES = {f"{kind}-{how}": (prefix, change) for kind, (prefix, ways) in STORED.items() for how, change in ways.items()}


# Whoever comes has weights of its own, which aren't used.
@pytest.mark.filterwarnings("ignore:the weights of this body are neither")
@pytest.mark.parametrize(("prefix", "change"), CHANGES.values(), ids=CHANGES)
def test_a_stored_file_that_was_changed(prefix: str, change: Callable[[bytes], bytes]) -> None:
    """Our own error from whoever meets it first; never one of a parser's, and never a wrong result."""
    store = trained()
    for key in store.blobs.list(""):
        if key.startswith(prefix):
            store.blobs.put(key, [change(bytes(store.blobs.get(key) or b""))])
    with pytest.raises(SplitFedError):
        use(store)
