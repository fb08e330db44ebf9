"""The wire format as `docs/wire.md` has it: its tables and examples are true, and a client that only read it trains.

`python tests/promises/test_wire.py --write` writes the examples of the page anew.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import struct
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreign_client
import pytest
import torch
from foreign_client import Array, ForeignClient, RefusedError, decode, encode, sealed
from pages import ROOT
from programs import command, program
from servers import free_ports
from torch import Tensor, nn

import splitfed
from splitfed.model.cut import split
from splitfed.protocol import coding, deltas, messages
from splitfed.protocol.fields import added_fields
from splitfed.protocol.packing import pack, unpack
from splitfed.protocol.transport import VERBS
from splitfed.server.server import SplitServer
from splitfed.service.http.contract import WIRE, document
from splitfed.service.http.limits import Limits
from splitfed.store.store import GradientStore

PAGE = ROOT / "docs" / "wire.md"
X, Y = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.5]])
DESCRIBED = [
    *(cls for pair in VERBS.values() for cls in pair),
    *(messages.Seal, messages.Chain, messages.Housekeeping, messages.RoundInfo, coding.Coded, deltas.Delta),
]


# ------------------------------------------------------------------------------------ the page


def tiny() -> nn.Module:
    """The body of the examples."""
    body = nn.Linear(2, 2)
    with torch.no_grad():
        body.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        body.bias.copy_(torch.tensor([0.0, 0.5]))
    return body


def asked() -> dict[str, Any]:
    """The requests of the examples, by verb."""
    return {
        "forward": messages.ForwardRequest(
            client_id="a",
            incarnation=None,
            process="0123456789abcdef",
            call=0,
            cut="",
            inputs=((X,), {}),
            requires_grad=(True,),
            training=True,
            grad=True,
            seed=7,
            autocast=None,
            version=None,
            seen=0,
            previous=None,
        ),
        "backward": messages.BackwardRequest(
            client_id="a",
            incarnation=1,
            seq=0,
            part=0,
            version=0,
            call=0,
            grad_outputs=(torch.tensor([[1.0, -1.0]]),),
            seal=messages.Seal((), 1.0, 1.0, (messages.Chain(1.0, 0),)),
        ),
        "pull": messages.PullRequest("a"),
    }


def exchanged() -> dict[str, bytes]:
    """The bytes of the examples as the code makes them, by the names of their blocks."""
    server = SplitServer(tiny(), GradientStore(f"memory://{uuid.uuid4()}"))
    found = {}
    for verb, request in asked().items():
        found[f"{verb}-request"] = b"".join(pack(request))
        arrived = unpack(type(request), found[f"{verb}-request"])
        found[f"{verb}-answer"] = b"".join(pack(getattr(server, verb)(arrived)))
    return found


def dump(data: bytes) -> str:
    """Bytes as the page shows them."""
    rows = [data[begin : begin + 32] for begin in range(0, len(data), 32)]
    return "".join(f"{row.hex(' ', 4)}\n" for row in rows)


def readable(data: bytes) -> str:
    """The same message for people: its kind, its tree, and each tensor's elements."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    lines = [f'"length": {length}', f'"kind": {json.dumps(metadata["kind"])}', f'"spec": {metadata["spec"]}']
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        one = Array(entry["dtype"], tuple(entry["shape"]), data[8 + length :][begin:end])
        shown = {**entry, "elements": one.values()}
        lines.append(f"{json.dumps(name)}: {json.dumps(shown)}")
    body = ",\n  ".join(lines)
    return f"{{\n  {body}\n}}\n"


def shown(language: str) -> dict[str, str]:
    """The blocks of the page in a language, by their label."""
    found = re.finditer(rf"^```{language} ([a-z-]+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return {one[1]: one[2] for one in found}


def test_the_examples_are_what_the_code_makes() -> None:
    """Each request as it is packed, and each answer as a server gives it, byte by byte."""
    made = exchanged()
    assert {name: dump(data) for name, data in made.items()} == shown("text")
    assert {name: readable(data) for name, data in made.items()} == {
        name: text for name, text in shown("json").items() if name != "error"
    }


def test_a_foreign_reader_reads_and_writes_the_examples() -> None:
    """What was written from the page alone makes the same bytes of the same fields."""
    for name, text in shown("text").items():
        data = bytes.fromhex(text)
        kind, fields = decode(data)
        assert encode(kind, fields) == data, name
    _, answer = decode(bytes.fromhex(shown("text")["forward-answer"]))
    assert answer["outputs"].values() == Y.flatten().tolist()
    assert answer["crcs"] == (answer["outputs"].crc,)
    _, answer = decode(bytes.fromhex(shown("text")["backward-answer"]))
    assert (answer["status"], answer["grad_inputs"][0].values()) == ("stored", [1.0, -2.0])


def table(name: str) -> list[tuple[str, str, str]]:
    """Field, type and default of each row below a heading."""
    text = PAGE.read_text("utf-8").partition(f"\n### `{name}`\n")[2].partition("\n| field |")[2].partition("\n\n")[0]
    rows = (line.split("|")[1:4] for line in text.splitlines()[2:])
    return [(name.strip(" `"), kind.strip(), default.strip()) for name, kind, default in rows]


@pytest.mark.parametrize("kind", DESCRIBED, ids=lambda kind: kind.__name__)
def test_the_tables_have_each_field_and_its_default(kind: Any) -> None:
    """In the order of the format; a field may be left out if and only if its default is said."""
    rows = table(kind.__name__)
    assert [name for name, _, _ in rows] == [field.name for field in dataclasses.fields(kind)]
    said = {name: text.strip("`") for name, _, text in rows if text}
    names = {"null": None, "true": True, "false": False}
    defaults = {name: names[text] if text in names else ast.literal_eval(text) for name, text in said.items()}
    assert defaults == dict(added_fields(kind))


KINDS = {
    "text": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "tensor": Tensor,
    "map": dict,
}


@pytest.mark.parametrize("kind", DESCRIBED, ids=lambda kind: kind.__name__)
def test_the_tables_have_each_type(kind: Any) -> None:
    """Text, integer, number, boolean, tensor, map, tuple or message, and whether null will do."""
    annotations = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    for name, text, _ in table(kind.__name__):
        said, hint = re.sub(r"\[`(\w+)`\]\(#\w+\)", r"\1", text), annotations[name]
        assert ("null" in said) == ("None" in hint), (name, text, hint)
        assert ("tuple" in said) == ("tuple" in hint or "Arguments" in hint), (name, text, hint)
        if said in KINDS:
            whole = hint.replace("ClientId", "str").replace("Number", "int").replace("Seed", "int")
            whole = whole.replace("Settings", "dict").replace("Mapping", "dict")
            assert whole.startswith(KINDS[said].__name__), (name, text, hint)


def test_the_openapi_document_names_the_page() -> None:
    """Each body is a message that the page describes."""
    found = document(Limits(), secured=False)
    assert (ROOT / WIRE) == PAGE
    for verb, pair in VERBS.items():
        operation = found["paths"][f"/v1/{verb}"]["post"]
        bodies = (operation["requestBody"], operation["responses"]["200"])
        for cls, body in zip(pair, bodies, strict=True):
            (content,) = body["content"].values()
            name = content["schema"]["$ref"].rpartition("/")[2]
            assert name == cls.__name__
            schema = found["components"]["schemas"][name]
            assert WIRE in schema["description"]
            fields = {row: "optional" if default else "required" for row, _, default in table(name)}
            assert schema["x-splitfed-fields"] == fields


# ------------------------------------------------------------------------------------ a client

APP = """
import torch
from torch import nn

def body():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 6))
"""


@contextmanager
def served(folder: Path) -> Iterator[tuple[ForeignClient, GradientStore, str]]:
    """`splitfed serve` in a process of its own: a foreign client, the store, and the URL."""
    (folder / "tiny_app.py").write_text(APP)
    (port,) = free_ports(1)
    words = ("serve", "tiny_app:body", "--store", "run", "--sync", "process", "--port", str(port))
    with program(command, *words, folder=folder, environment={"PYTHONUNBUFFERED": "1"}) as running:
        assert running.stdout.readline().startswith("splitfed: serving on")
        yield ForeignClient("127.0.0.1", port, "foreign"), GradientStore(folder / "run"), f"http://127.0.0.1:{port}"


def as_array(tensor: Tensor) -> Array:
    """A tensor as the foreign client has it."""
    return Array.of(tensor.flatten().tolist(), *tensor.shape)


def test_a_foreign_client_trains(tmp_path: Path) -> None:
    """A forward, a backward and a half, through a real service: with the bits of our own client, up to the commit."""
    torch.manual_seed(3)
    x, gradient = torch.randn(5, 8), torch.randn(5, 6)
    with served(tmp_path) as (foreign, store, url):
        namespace: dict[str, Any] = {}
        exec(APP, namespace)
        half, body = split(nn.Sequential(nn.Identity(), namespace["body"]()), "1")

        # Our own client, whose requests are looked at: the foreign one takes its seed, and nothing else.
        own = splitfed.SplitClient(half, url, "own")
        transport = own._connection.transport
        seeds: list[int] = []
        forward = transport.forward
        transport.forward = lambda request: (seeds.append(request.seed), forward(request))[1]  # type: ignore[method-assign,func-returns-value]
        leaf = x.clone().requires_grad_()
        outputs = own(leaf)
        outputs.backward(gradient)

        call = foreign.forward(as_array(x), seed=seeds[0])
        assert call.outputs[0].values() == outputs.flatten().tolist()
        (found,), status = foreign.backward(call, as_array(gradient), samples=5.0)
        assert (status, foreign.incarnation, call.version) == ("stored", 1, 0)
        assert leaf.grad is not None
        assert found is not None
        assert found.values() == leaf.grad.flatten().tolist()

        # Both batches are pending; the files have the same gradient and the same statistics, bit for bit.
        pile = store.pile("body")
        theirs, ours = map(pile.read, store.waiting())
        assert ours is not None
        assert theirs is not None
        assert [batch.client_id for batch in store.waiting()] == ["foreign", "own"]
        assert theirs.num_samples == ours.num_samples == 5
        for one, other in ((theirs.gradients, ours.gradients), (theirs.buffers[0].values, ours.buffers[0].values)):
            assert one.keys() == other.keys()
            assert one
            assert all(torch.equal(one[name], other[name]) for name in one)
        before = store.load_weights()
        accumulator = splitfed.Accumulator(
            body, store, lambda params: torch.optim.SGD(params, lr=1.0), max_batches=1, keep_versions=4
        )
        commit = accumulator.step()
        assert commit is not None
        assert commit.folded.to_json() == {"foreign": {"1": [[0, 0]]}}
        after = store.load_weights()
        for name, expected in ours.gradients.items():
            assert torch.equal(after[name], before[name] - expected), name

        # The next request confirms the call and sees the commit.
        call = foreign.forward(as_array(x), training=False, grad=False)
        assert (call.version, foreign.released) == (1, [])

        # A half: published, pulled, changed, pushed, averaged.
        names = {"0.weight": {"role": "trainable", "shape": [2], "dtype": "float32"}}
        assert foreign.pull() == (-1, {})
        assert foreign.publish({"0.weight": Array.of([1.0, 2.0], 2)}, names) == "published"
        version, weights = foreign.pull()
        assert (version, weights["0.weight"].values()) == (0, [1.0, 2.0])
        assert foreign.push_change({"0.weight": Array.of([0.5, -0.25], 2)}, version, 5.0) == "stored"
        layer = nn.Module()
        layer.register_module("0", holder := nn.Module())
        holder.weight = nn.Parameter(torch.zeros(2))
        halves = splitfed.Accumulator(layer, store, lambda params: torch.optim.SGD(params, lr=1.0), lineage="client")
        assert halves.step() is not None
        version, weights = foreign.pull()
        assert (version, weights["0.weight"].values()) == (1, [0.5, 2.25])

        repeated_and_wrong(foreign, store, as_array(x), as_array(gradient))


def repeated_and_wrong(foreign: ForeignClient, store: GradientStore, x: Array, gradient: Array) -> None:
    """What the page says of repeated requests, and of wrong ones."""
    call = foreign.forward(x)
    _, status = foreign.backward(call, gradient, samples=5.0)
    verb, body = foreign.sent[-1]
    assert foreign.post(verb, body)[1]["status"] == status == "stored"  # again, with the same bytes
    assert len(store.waiting()) == 2
    kind, fields = decode(body)

    def refused(data: bytes, verb: str = verb) -> tuple[int, str]:
        with pytest.raises(RefusedError) as caught:
            foreign.post(verb, data, tries=1)
        return caught.value.status, caught.value.name

    changed = {**fields, "grad_outputs": (Array.of([0.0] * 30, 5, 6),)}
    assert refused(encode(kind, changed)) == (422, "DigestError")  # an old number with other content
    assert refused(encode(kind, {**fields, "grad_outputs": (Array.of([0.0] * 10, 5, 2),)})) == (422, "InputError")
    assert refused(encode(kind, {**fields, "seq": -1})) == (400, "IdError")
    assert refused(encode(kind, {**fields, "client_id": "../a"})) == (400, "IdError")
    assert refused(encode(kind, {**fields, "colour": "red"})) == (400, "FormatError")  # a field that nobody knows
    assert refused(encode(kind, {name: fields[name] for name in fields if name != "seal"})) == (400, "FormatError")
    assert refused(encode(kind, {**fields, "version": 1.0})) == (400, "IdError")  # no integer
    assert refused(encode(kind, {**fields, "counted": 1})) == (400, "FormatError")  # no boolean
    assert refused(encode(kind, {**fields, "grad_outputs": [gradient]})) == (400, "FormatError")  # no tuple
    assert refused(encode(kind, {**fields, "answer_codec": "gzip/1"})) == (422, "InputError")
    assert refused(encode(kind, fields), "forward") == (400, "FormatError")  # another verb's
    assert refused(body[:-1]) == (400, "FormatError")
    assert refused(b" " + body) == (400, "FormatError")

    # With its checksum it is the same request; with a wrong one it is refused.
    whole = sealed(body)
    assert foreign.post(verb, whole)[1]["status"] == "stored"
    for place in (len(whole) - 1, 40, 48):  # the data, and each of the two sums
        flipped = bytearray(whole)
        flipped[place] ^= 1
        assert refused(bytes(flipped)) == (400, "FormatError"), place

    # Two calls, one batch: the second part has the seal.
    first, second = foreign.forward(x, seed=1), foreign.forward(x, seed=2)
    seq = foreign.number_batch()
    assert foreign.part(seq, 0, first, (gradient,), None)[1] == "part"
    chains = tuple({"num_samples": 2.5, "last_part": part} for part in (0, 1))
    seal = {"parts": ((first.version, 0),), "num_samples": 5.0, "loss_scale": 1.0, "chains": chains}
    assert foreign.part(seq, 1, second, (gradient,), seal)[1] == "stored"

    # What was confirmed is gone: the batch counts, or is lost.
    foreign.forward(x, grad=False)
    assert refused(body) == (409, "AlreadyAppliedError")

    # A newer process of the same client: the older one's numbers are refused from now on.
    newer = ForeignClient(foreign.host, foreign.port, foreign.client_id)
    assert newer.forward(x).version == 1
    assert newer.incarnation == 2
    assert refused(body) == (409, "SupersededError")


def test_the_foreign_client_shares_no_code() -> None:
    """It imports nothing but the standard library."""
    tree = ast.parse(Path(foreign_client.__file__).read_text("utf-8"))
    found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} <= sys.stdlib_module_names


def write() -> None:
    """Write the examples of the page anew."""
    text = PAGE.read_text("utf-8")
    for name, data in exchanged().items():
        for language, block in (("text", dump(data)), ("json", readable(data))):
            pattern = re.compile(rf"^```{language} {name}\n.*?^```$", re.MULTILINE | re.DOTALL)
            text = pattern.sub(lambda _, found=f"```{language} {name}\n{block}```": found, text)
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"]
    write()
