"""A client of the wire format, written from `docs/wire.md`: it shares no code with splitfed, and needs no torch.

Only the standard library is imported, so that each line of it could be one of another language. It can do what an
owner needs: calls and their gradients, batches of one or several calls, client halves.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import struct
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
LETTERS = {"U8": "B", "I8": "b", "I16": "h", "I32": "i", "F32": "f", "I64": "q", "F64": "d"}
RETRIED = {429, 502, 503, 504}


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor: row-major, little-endian. One object is one tensor, however often a tree has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: list[float], *shape: int, dtype: str = "F32") -> Array:
        """A tensor of numbers in row-major order."""
        assert len(values) == math.prod(shape)
        return cls(dtype, shape, struct.pack(f"<{len(values)}{LETTERS[dtype]}", *values))

    def values(self) -> list[float]:
        """Its numbers in row-major order."""
        return list(struct.unpack(f"<{len(self.data) // SIZES[self.dtype]}{LETTERS[self.dtype]}", self.data))

    @property
    def crc(self) -> int:
        """The CRC-32 of its bytes."""
        return zlib.crc32(self.data)


class RefusedError(Exception):
    """An error that the server has answered.

    Args:
        status: The HTTP status.
        name: The class of the error.
        message: What is wrong, and how to mend it.
    """

    def __init__(self, status: int, name: str, message: str) -> None:
        super().__init__(f"{status} {name}: {message}")
        self.status = status
        self.name = name


# ------------------------------------------------------------------------------------- bytes


def to_spec(value: Any, arrays: list[Array]) -> Any:
    """The JSON of a tree; its tensors are appended, each one once."""
    if isinstance(value, Array):
        places = [place for place, known in enumerate(arrays) if known is value]
        if not places:
            arrays.append(value)
        return {"t": places[0] if places else len(arrays) - 1}
    if isinstance(value, float) and not math.isfinite(value):
        return {"f": str(value)}
    if isinstance(value, tuple | list):
        return {"u" if isinstance(value, tuple) else "l": [to_spec(one, arrays) for one in value]}
    if isinstance(value, dict):
        return {"d": [[key, to_spec(one, arrays)] for key, one in value.items()]}
    return value


def from_spec(spec: Any, arrays: list[Array]) -> Any:
    """The tree of such a JSON."""
    if not isinstance(spec, dict):
        return spec
    ((kind, content),) = spec.items()
    if kind == "t":
        return arrays[content]
    if kind == "f":
        return float(content)
    if kind == "d":
        return {key: from_spec(one, arrays) for key, one in content}
    assert kind in ("u", "l"), f"a container of kind {kind!r}, which this client doesn't use"
    found = [from_spec(one, arrays) for one in content]
    return tuple(found) if kind == "u" else found


def encode(kind: str, fields: dict[str, Any]) -> bytes:
    """A packed message."""
    arrays: list[Array] = []
    spec = json.dumps(to_spec(fields, arrays), separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"kind": kind, "spec": spec}}

    def place(number: int) -> tuple[bool, int, int]:
        one = arrays[number]
        ragged = len(one.data) % 64 != 0
        return ragged, -SIZES[one.dtype] if ragged else 0, number

    body, end = [], 0
    for number in sorted(range(len(arrays)), key=place):
        one = arrays[number]
        begin, end = end, end + len(one.data)
        header[f"{number:06d}"] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [begin, end]}
        body.append(one.data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text + b"".join(body)


def decode(data: bytes) -> tuple[str, dict[str, Any]]:
    """The kind of a packed message, and its fields."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert "splitfed.layout" not in metadata, "this client reads no tensors in another order than row-major"
    body = data[8 + length :]
    arrays = []
    for name in sorted(header):
        entry = header[name]
        begin, end = entry["data_offsets"]
        arrays.append(Array(entry["dtype"], tuple(entry["shape"]), body[begin:end]))
    return metadata["kind"], from_spec(json.loads(metadata["spec"]), arrays)


def sealed(data: bytes) -> bytes:
    """A packed message with its checksum, which whoever receives it compares."""
    (length,) = struct.unpack_from("<Q", data)
    text, body = data[8 : 8 + length].rstrip(b" "), data[8 + length :]
    start = b'{"__metadata__":{'
    front = b'%b"crc32":"%08x' % (start, zlib.crc32(body))
    rest = b'",' + text.removeprefix(start)
    rest += b" " * (-(8 + len(front) + 8 + len(rest)) % 64)
    size = struct.pack("<Q", len(front) + 8 + len(rest))
    crc = zlib.crc32(b"%b%b00000000%b" % (size, front, rest))
    return b"%b%b%08x%b%b" % (size, front, crc, rest, body)


# ------------------------------------------------------------------------------------- an owner

NOTHING = {"released": (), "abandoned": (), "answered": ()}


@dataclass
class Call:
    """A forward that was answered."""

    number: int
    version: int
    outputs: tuple[Array, ...]


@dataclass
class ForeignClient:
    """One process of a data owner.

    Args:
        host: Where the service is.
        port: Its port.
        client_id: Whose data it is.
        token: The owner's, if the service asks for one.
    """

    host: str
    port: int
    client_id: str
    token: str = ""
    process: str = field(default_factory=lambda: os.urandom(16).hex())
    incarnation: int | None = None
    seen: int = 0
    next_call: int = 0
    next_batch: int = 0
    next_push: int = 0
    released: list[tuple[int, int]] = field(default_factory=list)
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    """The verb and the body of each request."""

    def post(self, verb: str, body: bytes, tries: int = 20) -> tuple[str, dict[str, Any]]:
        """Send a request, again after failures that pass: the kind of the answer, and its fields."""
        self.sent.append((verb, body))
        headers = {"content-type": "application/octet-stream"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        while True:
            tries -= 1
            connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
            try:
                connection.request("POST", f"/v1/{verb}", body, headers)
                answer = connection.getresponse()
                status, pause, data = answer.status, answer.getheader("retry-after", "1"), answer.read()
            except OSError:
                if not tries:
                    raise
                status, pause, data = 0, "1", b""
            finally:
                connection.close()
            if status == 200:
                return decode(data)
            if not tries or status not in {0, *RETRIED}:
                said = json.loads(data)
                raise RefusedError(status, said["error"], said["message"])
            time.sleep(float(pause))

    def ask(self, verb: str, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of the answer to a message."""
        return self.post(verb, encode(kind, fields))[1]

    def forward(self, *inputs: Array, training: bool = True, grad: bool = True, seed: int = 0) -> Call:
        """Have the body run on tensors."""
        number, self.next_call = self.next_call, self.next_call + 1
        answer = self.ask(
            "forward",
            "ForwardRequest",
            {
                "client_id": self.client_id,
                "incarnation": self.incarnation,
                "process": self.process,
                "call": number,
                "cut": "",
                "inputs": (inputs, {}),
                "requires_grad": (True,) * len(inputs),
                "training": training,
                "grad": grad,
                "seed": seed,
                "autocast": None,
                "version": None,
                "seen": self.seen,
                "previous": None,
                "housekeeping": self.notes(),
            },
        )
        self.incarnation = answer["incarnation"]
        self.seen = max(self.seen, answer["version"])
        outputs = answer["outputs"]
        outputs = (outputs,) if isinstance(outputs, Array) else outputs
        assert tuple(one.crc for one in outputs) == answer["crcs"], "the outputs aren't what the server has computed"
        return Call(number, answer["version"], outputs)

    def backward(self, call: Call, *gradients: Array | None, samples: float) -> tuple[tuple[Array | None, ...], str]:
        """The gradients of a call's inputs, and what became of the batch that it is."""
        seal = {
            "parts": (),
            "num_samples": samples,
            "loss_scale": 1.0,
            "chains": ({"num_samples": samples, "last_part": 0},),
        }
        return self.part(self.number_batch(), 0, call, gradients, seal)

    def number_batch(self) -> int:
        """The number of the next batch."""
        self.next_batch += 1
        return self.next_batch - 1

    def part(
        self, seq: int, part: int, call: Call, gradients: tuple[Array | None, ...], seal: dict[str, Any] | None
    ) -> tuple[tuple[Array | None, ...], str]:
        """The gradients of a call's inputs; the batch is closed if the seal comes along."""
        answer = self.ask(
            "backward",
            "BackwardRequest",
            {
                "client_id": self.client_id,
                "incarnation": self.incarnation,
                "seq": seq,
                "part": part,
                "version": call.version,
                "call": call.number,
                "grad_outputs": gradients,
                "seal": seal,
                "housekeeping": self.notes(),
            },
        )
        self.released.append((call.version, call.number))
        return answer["grad_inputs"], answer["status"]

    def notes(self) -> dict[str, Any]:
        """What the next request confirms."""
        found = {**NOTHING, "released": tuple(self.released)}
        self.released = []
        return found

    def pull(self) -> tuple[int, dict[str, Array]]:
        """The newest half, and its version; -1 if nobody has published one."""
        fields = {"client_id": self.client_id, "version": None, "weights": True}
        answer = self.ask("pull", "PullRequest", fields)
        return answer["version"], answer["weights"]

    def publish(self, weights: dict[str, Array], fingerprint: dict[str, Any]) -> str:
        """Begin the lineage of halves; nothing happens if somebody has."""
        return self.push(weights, -1, 1.0, 0, fingerprint)

    def push_change(self, change: dict[str, Array], version: int, samples: float) -> str:
        """Publish start - end of a half that was pulled at a version."""
        number, self.next_push = self.next_push, self.next_push + 1
        return self.push(change, version, samples, number, None)

    def push(
        self, gradients: dict[str, Array], version: int, samples: float, number: int, fingerprint: dict[str, Any] | None
    ) -> str:
        """What became of a push."""
        answer = self.ask(
            "push",
            "PushRequest",
            {
                "client_id": self.client_id,
                "incarnation": self.incarnation,
                "process": self.process,
                "seq": number,
                "base_version": version,
                "fingerprint": fingerprint,
                "gradients": gradients,
                "values": {},
                "bases": {},
                "num_samples": samples,
                "loss_scale": 1.0,
            },
        )
        self.incarnation = answer["incarnation"]
        return answer["status"]
