"""Requests of which one field, at any depth, is something else: an error of ours each, whoever sends them."""

from __future__ import annotations

import copy
import dataclasses
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness_requests import ahead, back
from torch import nn

import splitfed
from splitfed.errors import SplitFedError
from splitfed.protocol.deltas import Delta
from splitfed.protocol.messages import Housekeeping, LossRequest, PullRequest, PushRequest
from splitfed.protocol.packing import pack, unpack

T = torch.ones(2, 2)
LINE = (torch.tensor([-1, -1], dtype=torch.int32), torch.tensor([True, True]))
DELTA = Delta(0, "delta/1", "float32", (2, 2), (2, 1), (), *LINE, adds=False, keeps=True)
KEPT = Housekeeping(released=((0, 50),), abandoned=(99,), answered=(98,), references=("0f" * 8,))
LATER = {"incarnation": 1, "call": 2, "previous": 1, "previous_nonce": 8, "nonce": 9}
REQUESTS: dict[str, tuple[str, Any]] = {
    "forward": ("forward", ahead(**LATER, repeats=3, housekeeping=KEPT, deltas=(DELTA,))),
    "a forward that continues": ("forward", ahead(**LATER, previous_version=0)),
    "backward": ("backward", back(nonce=7, housekeeping=KEPT)),
    "loss": ("loss", LossRequest(ahead(incarnation=1, call=5, nonce=3, deltas=(DELTA,)), 3, T, 2.0)),
    "pull": ("pull", PullRequest("a", 0, frozen="0f" * 32)),
    "push": (
        "push",
        dataclasses.replace(
            PushRequest("a", 1, "first", 0, 0, None, {"0.weight": T}, {}, {}, 4.0, 1.0),
            upto=3,
            flows={"outputs": [1, 0, 64, 64, 0.0, 0.0]},
        ),
    ),
}
OTHERS: list[Any] = [None, True, "x", -1, 2**70, {"u": []}, {"d": []}, {"t": 0}, {"u": [{"d": []}]}]
"""As the header of a message has them: a tuple, a dict, its first tensor."""


def server() -> splitfed.SplitServer:
    """One with a half, and two calls of a client on record."""
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    half, body = splitfed.split(nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2))), "1")
    found = splitfed.SplitServer(body, store, loss_fn=nn.functional.mse_loss)
    splitfed.SplitClient(half, found, "a").pull()
    found.forward(ahead(part=found._part, nonce=7))
    found.forward(ahead(part=found._part, incarnation=1, call=1, previous=0, previous_nonce=7, nonce=8))
    return found


def changed(tree: Any) -> Iterator[Any]:
    """Copies of a tree with something else in one place each."""
    for kind in ("d", "u"):
        for place, child in enumerate(tree.get(kind, ()) if isinstance(tree, dict) else ()):
            inner = child[1] if kind == "d" else child
            for other in [*OTHERS, *changed(inner)]:
                made = copy.deepcopy(tree)
                made[kind][place] = [child[0], other] if kind == "d" else other
                yield made


@pytest.mark.parametrize("name", REQUESTS)
def test_whatever_a_field_is_the_error_is_ours(name: str) -> None:
    """Numbers beyond all keys, and tuples, dicts and tensors in place of anything."""
    verb, request = REQUESTS[name]
    served = server()
    if verb == "forward":
        request = dataclasses.replace(request, part=served._part)
    elif verb == "loss":
        request = dataclasses.replace(request, forward=dataclasses.replace(request.forward, part=served._part))
    data = b"".join(map(bytes, pack(request)))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    refused = 0
    for spec in changed(json.loads(header["__metadata__"]["spec"])):
        metadata = {"kind": header["__metadata__"]["kind"], "spec": json.dumps(spec)}
        text = json.dumps({**header, "__metadata__": {**header["__metadata__"], **metadata}}).encode()
        text += b" " * (-len(text) % 8)
        try:
            getattr(served, verb)(unpack(type(request), len(text).to_bytes(8, "little") + text + data[end:]))
        except SplitFedError:
            refused += 1
    assert refused
