"""A hostile account: a client that may train, and sends whatever it likes under its own id.

Its requests are well-typed, as what a service lets through is. They may be refused with errors of ours, and may count
for itself; they must never harm anybody else, or end in another exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from tests.faults.simulator import model
from tests.faults.simulator.network import Network
from tests.faults.simulator.process import Process

from splitfed.errors import SplitFedError
from splitfed.model.stamp import stamp_of
from splitfed.protocol.messages import (
    BackwardRequest,
    Chain,
    ForwardRequest,
    Housekeeping,
    LossRequest,
    Seal,
)

NAME = "mallory"


def attack(role: str, process: Process) -> None:
    """Send requests until the run ends."""
    attacker = _Attacker(process)
    while process.world.is_stormy:
        with contextlib.suppress(SplitFedError):
            attacker.request()
        process.pause(20 + int(process.choose.random() * 60))


class _Attacker:
    def __init__(self, process: Process) -> None:
        self.network = Network(process, 2)
        self.choose: Random = process.choose
        self.name = process.entropy.randbytes(16).hex()
        self.part = stamp_of(model.body_of(process.world.plan))
        self.incarnation: int | None = None
        self.answered: list[tuple[int, int]] = []
        """Version and call of its forwards."""
        self.numbers = 0

    def request(self) -> None:
        """One request, of some kind."""
        acts: tuple[Callable[[], Any], ...] = (self.forward, self.forward, self.backward, self.backward, self.loss)
        self.choose.choice(acts)()

    def number(self) -> int:
        """A number that exists, or doesn't yet, or never will."""
        return self.choose.choice((0, 1, max(0, self.numbers - 1), self.numbers, self.numbers + 3, 10**9))

    def housekeeping(self) -> Housekeeping:
        """Give up and release anything."""
        if self.choose.random() < 0.5:
            return Housekeeping()
        released = tuple((self.version(), self.number()) for _ in range(2))
        return Housekeeping(released, (self.number(), self.number()), (self.number(),))

    def version(self) -> int:
        """A version, likely one that it has seen."""
        seen = [version for version, _ in self.answered[-4:]]
        return self.choose.choice((*seen, *seen, 0, 10**9))

    def forward(self) -> None:
        """Run a call, at any version, continuing any other."""
        request = self._ahead()
        answer = self.network.send("forward", request)
        self.incarnation = answer.incarnation if self.incarnation is None else self.incarnation
        if request.grad:
            self.answered.append((answer.version, request.call))

    def _ahead(self) -> ForwardRequest:
        self.numbers += 1
        rows = [[self.choose.uniform(-3, 3) for _ in range(model.CUT)] for _ in range(2)]
        values = torch.tensor(rows, dtype=model.DTYPE)
        return ForwardRequest(
            client_id=NAME,
            incarnation=self.choose.choice((self.incarnation, self.incarnation, 7)),
            process=self.name,
            call=self.choose.choice((self.numbers, self.numbers, self.number())),
            cut=self.choose.choice(("", "", "", "0", "no such part")),
            inputs=((values,), {}),
            requires_grad=(True,),
            training=self.choose.random() < 0.8,
            grad=self.choose.random() < 0.8,
            seed=self.choose.randrange(2**64),
            autocast=None,
            version=self.choose.choice((None, None, self.version())),
            seen=self.choose.choice((0, 0, 10**9)),
            previous=self.choose.choice((None, None, self.number())),
            housekeeping=self.housekeeping(),
            part=self.part,
        )

    def backward(self) -> None:
        """Answer a call, or close a batch, of any parts."""
        if not self.answered or self.incarnation is None:
            return
        version, call = self.choose.choice(self.answered[-6:])
        parts = tuple((self.version(), self.choose.randrange(3)) for _ in range(self.choose.choice((0, 0, 0, 1, 2))))
        own = self.choose.choice((0, 0, 1, 2))
        after = self.choose.choice((None, None, None, -1, 0, 5))
        chains = (Chain(2.0, self.choose.choice((own, own, 1)), after),)
        seal = Seal(parts, self.choose.choice((2.0, 2.0, 1e9, 0.0)), self.choose.choice((1.0, 1.0, -0.5)), chains)
        gradient = torch.tensor([[self.choose.choice((1.0, -1e30, torch.inf, torch.nan))], [1.0]], dtype=model.DTYPE)
        request = BackwardRequest(
            client_id=NAME,
            incarnation=self.choose.choice((self.incarnation, self.incarnation, 7)),
            seq=self.number(),
            part=own,
            version=self.choose.choice((version, version, self.version())),
            call=self.choose.choice((call, call, call, None, self.number())),
            grad_outputs=(gradient,),
            seal=self.choose.choice((seal, seal, None)),
            housekeeping=self.housekeeping(),
        )
        self.network.send("backward", request)

    def loss(self) -> None:
        """The same in one trip."""
        ahead = replace(self._ahead(), call=self.numbers)
        target = torch.ones(self.choose.choice((2, 2, 3)), model.OUTPUTS, dtype=model.DTYPE)
        self.network.send("loss", LossRequest(ahead, self.number(), target, self.choose.choice((2.0, 1e9, -1.0))))
