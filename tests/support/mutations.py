"""Requests of a hostile client: valid ones in any order, and valid ones that were changed in some place.

A change makes a request longer by up to some tens of kilobytes. What a request costs grows with its length, as valid
ones do: a header of 1 MiB, the most that a server takes, costs a tenth of a second or more to read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness_requests import ahead, back, body
from torch import Tensor

from splitfed.model.skeleton import Template
from splitfed.protocol.messages import Chain, Housekeeping, LossRequest, PullRequest, PushRequest, Seal
from splitfed.protocol.packing import pack

LONGEST = 64 << 10
VERBS = ("forward", "backward", "loss", "push", "pull")
CLIENTS = ("a", "b", "c")
_BIG = (2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -1, -(2**63))
_FLOATS = (0.0, -1.0, 1e-300, 1e300, 1e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "..", "a/b", "a\0b", "\ud800", "x" * 3000, "1", "nan", "body", "weight", "é" * 200, "__metadata__")
_DTYPES = ("F32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "U8", "Z9", "")


@dataclass(frozen=True)
class Asked:
    """One request."""

    kind: str
    path: str
    body: bytes | None
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()


class Mutator:
    """Makes requests.

    Args:
        chance: Chooses them.
        token: The token of each client; none if nobody needs one.
    """

    def __init__(self, chance: random.Random, tokens: dict[str, str] | None = None) -> None:
        self._chance = chance
        self._tokens = tokens or {}
        self.head = 0
        """The newest version, about."""
        self._fingerprint = Template(body()).fingerprint()

    def draw(self) -> Asked:
        """The next request."""
        while True:
            asked = self._draw()
            if len(asked.body or b"") <= LONGEST:
                return asked

    def _draw(self) -> Asked:
        verb = self._chance.choice(VERBS)
        client = self._chance.choice(CLIENTS)
        data = b"".join(pack(getattr(self, f"_{verb}")(client)))
        kinds: dict[str, Callable[[bytes], bytes]] = {
            "order": lambda data: data,
            "spec": self._in_spec,
            "header": self._in_header,
            "bytes": self._in_bytes,
            "door": lambda data: data,
        }
        kind = self._chance.choices([*kinds], weights=(35, 22, 15, 18, 10))[0]
        asked = Asked(kind, f"/v1/{verb}", kinds[kind](data), headers=self._headers(client))
        return self._at_the_door(asked) if kind == "door" else asked

    def _headers(self, client: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._tokens[client]}"),) if self._tokens else ()

    # ------------------------------------------------------------------------------ valid messages

    def _number(self, most: int) -> int:
        chance = self._chance
        return chance.choice(_BIG[:3]) if chance.random() < 0.02 else chance.randrange(most)

    def _tensor(self, rows: int | None = None) -> Tensor:
        chance = self._chance
        made = torch.randn(chance.choice((0, 1, 2, 2, 2, 3, 16)) if rows is None else rows, 2)
        if chance.random() < 0.1:
            made = made * chance.choice(_FLOATS)
        if chance.random() < 0.05:
            made = made.to(chance.choice((torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.bool)))
        return made.expand(chance.choice((2, 1000)), *made.shape) if chance.random() < 0.02 else made

    def _notes(self) -> Housekeeping:
        chance = self._chance
        if chance.random() < 0.7:
            return Housekeeping()
        some = range(chance.choice((1, 3, 40)))
        return Housekeeping(
            tuple((self._version(), self._number(30)) for _ in some),
            tuple(self._number(60) for _ in some),
            tuple(self._number(60) for _ in some),
        )

    def _version(self) -> int:
        chance = self._chance
        return max(0, self.head - chance.randrange(4)) if chance.random() < 0.9 else self._number(1000)

    def _forward(self, client: str) -> Any:
        chance = self._chance
        return ahead(
            client_id=client,
            incarnation=chance.choice((None, 1, 1, 1, 2, 3, 900)),
            process=chance.choice(("first", "first", "second", chance.randbytes(4).hex())),
            call=self._number(30),
            inputs=((self._tensor(),), {}),
            requires_grad=(chance.random() < 0.9,),
            training=chance.random() < 0.9,
            grad=chance.random() < 0.8,
            seed=chance.randrange(4),
            autocast=chance.choice((None,) * 8 + ("bfloat16", "float16", "int8")),
            version=self._version() if chance.random() < 0.3 else None,
            seen=self._version() if chance.random() < 0.5 else 0,
            previous=self._number(30) if chance.random() < 0.1 else None,
            previous_version=self._version() if chance.random() < 0.05 else None,
            housekeeping=self._notes(),
            settings={chance.choice(_TEXTS): 1.0} if chance.random() < 0.05 else {},
            resumed=self._number(9) if chance.random() < 0.1 else 0,
            repeats=self._number(30) if chance.random() < 0.1 else None,
        )

    def _seal(self) -> Seal | None:
        chance = self._chance
        if chance.random() < 0.3:
            return None
        parts = tuple((self._version(), self._number(4)) for _ in range(chance.choice((0, 0, 0, 1, 3))))
        chains = tuple(
            Chain(self._weight(), self._number(4), chance.choice((None, None, -1, 0, 7)))
            for _ in range(chance.choice((0, 1, 1, 2)))
        )
        return Seal(parts, self._weight(), chance.choice((1.0, 1.0, 8.0, *_FLOATS)), chains)

    def _weight(self) -> float:
        chance = self._chance
        return chance.choice(_FLOATS) if chance.random() < 0.1 else float(chance.randrange(1, 5))

    def _backward(self, client: str) -> Any:
        chance = self._chance
        return back(
            client_id=client,
            incarnation=chance.choice((1, 1, 1, 2, 3)),
            seq=self._number(60),
            part=self._number(4),
            version=self._version(),
            call=None if chance.random() < 0.1 else self._number(30),
            grad_outputs=(self._tensor(),) if chance.random() < 0.9 else (None, self._tensor()),
            seal=self._seal(),
            housekeeping=self._notes(),
            counted=chance.random() < 0.9,
            resumed=self._number(9) if chance.random() < 0.1 else 0,
        )

    def _loss(self, client: str) -> Any:
        rows = self._chance.choice((None, 2))
        forward = self._forward(client)
        return LossRequest(forward, self._number(60), self._tensor(rows), self._weight(), self._chance.random() < 0.9)

    def _push(self, client: str) -> Any:
        chance = self._chance
        return PushRequest(
            client,
            chance.choice((None, 1, 2)),
            "first",
            self._number(60),
            chance.choice((-1, 0, 0, self._version())),
            self._fingerprint if chance.random() < 0.8 else {},
            {"weight": torch.randn(2, 2)} if chance.random() < 0.8 else {"other": self._tensor()},
            {},
            {} if chance.random() < 0.9 else {"weight": self._tensor()},
            self._weight(),
            1.0,
        )

    def _pull(self, client: str) -> Any:
        return PullRequest(client, self._chance.choice((None, 0, self._version())), self._chance.random() < 0.5)

    # ------------------------------------------------------------------------------ changed bytes

    def _in_spec(self, data: bytes) -> bytes:
        """Change a place of the tree of the message."""
        header, tensors = _apart(data)
        spec = json.loads(header["__metadata__"]["spec"])
        for _ in range(self._chance.choice((1, 1, 2, 5))):
            spec = self._changed(spec)
        header["__metadata__"]["spec"] = _text(spec)
        return _joined(header, tensors)

    def _in_header(self, data: bytes) -> bytes:
        """Change a place of the header of the file."""
        header, tensors = _apart(data)
        for _ in range(self._chance.choice((1, 1, 2, 5))):
            header = self._changed(header)
        return _joined(header, tensors)

    def _in_bytes(self, data: bytes) -> bytes:
        """Flip, cut, insert or double some bytes."""
        chance = self._chance
        made = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(len(made) + 1)
            kind = chance.randrange(6)
            if kind == 0 and made:
                made[place % len(made)] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del made[place:]
            elif kind == 2:
                made[place:place] = chance.choice((chance.randbytes(8), chance.randbytes(3000), b"[" * 20_000))
            elif kind == 3:
                made[place:place] = made[: chance.randrange(200)] * chance.choice((1, 50))
            elif kind == 4:
                del made[place : place + chance.randrange(20)]
            else:
                made[:8] = chance.choice((0, 7, 8, len(made), 1 << 20, 1 << 63)).to_bytes(8, "little")
        return bytes(made)

    def _changed(self, tree: Any) -> Any:
        """A tree of JSON with another value in one place."""
        chance = self._chance
        if isinstance(tree, dict) and tree and chance.random() < 0.9:
            name = chance.choice([*tree])
            if chance.random() < 0.1:
                return {self._nasty() if key == name else key: value for key, value in tree.items()}
            return {**tree, name: self._changed(tree[name])}
        if isinstance(tree, list) and tree and chance.random() < 0.9:
            place = chance.randrange(len(tree))
            kind = chance.random()
            if kind < 0.1:
                return tree[:place] + tree[place + 1 :]
            if kind < 0.2:
                return tree[:place] + [tree[place]] * chance.choice((2, 9, 100)) + tree[place:]
            return [*tree[:place], self._changed(tree[place]), *tree[place + 1 :]]
        return self._nasty_value()

    def _nasty(self) -> str:
        return self._chance.choice((*_TEXTS, *_DTYPES, *VERBS))

    def _nasty_value(self) -> Any:
        chance = self._chance
        deep: Any = 0
        for _ in range(chance.choice((1, 50, 300))):
            deep = [deep] if chance.random() < 0.7 else {"d": [["a", deep]]}
        numbers = (*range(-1, 9), *_BIG)
        choices = (None, True, False, chance.choice(numbers), chance.choice(_FLOATS), self._nasty(), [], {}, deep)
        return chance.choice((*choices, [chance.choice(numbers)] * chance.choice((2, 8, 300))))

    def _at_the_door(self, asked: Asked) -> Asked:
        """Another path, method or header than is served."""
        chance = self._chance
        kind = chance.randrange(6)
        path = chance.choice([f"/v1/{verb}" for verb in VERBS] + ["/v1/", "/v1/forward/", "/healthz", "/%00", "/a?b=c"])
        if kind == 0:
            return Asked("door", path, asked.body, headers=asked.headers)
        if kind == 1:
            method = chance.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
            return Asked("door", path, None, method, asked.headers)
        if kind == 2:
            token = chance.choice(("", "Bearer", "Bearer x", "Basic a:b", "Bearer " + "x" * 4000))
            return Asked("door", asked.path, asked.body, headers=(("authorization", token),))
        name, value = chance.choice(
            (
                ("content-type", "application/json"),
                ("content-type", ""),
                ("content-encoding", "gzip"),
                ("transfer-encoding", "chunked"),
                ("expect", "100-continue"),
                ("x-" + "y" * 200, "z" * 2000),
                ("content-length", "0"),
            )
        )
        if name == "content-length":
            return Asked("door", asked.path, b"", headers=asked.headers)
        if name == "transfer-encoding":
            return Asked("door", asked.path, asked.body, headers=asked.headers)
        return Asked("door", asked.path, asked.body, headers=(*asked.headers, (name, value)))


def _apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _text(tree: Any) -> str:
    return json.dumps(tree, separators=(",", ":"))


def _joined(header: Any, tensors: bytes) -> bytes:
    text = _text(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + tensors
