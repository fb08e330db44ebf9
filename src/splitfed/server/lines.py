"""The lines of versions that a server answers from: one body for all clients, or one for each.

In SFLV1 (Thapa et al. 2020, arXiv 2004.12088) every client trains against a body of its own, and these are averaged
when a round ends. So each client's calls run on `body@<id>`, which begins as a copy of the newest `body` at the
client's first call. Who commits there, and who averages, is `perclient`.

The trap: the first call may be under no_grad, and a line that whoever averages doesn't know of would stay behind for
ever. A client is known by its process, so that is opened first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitfed.errors import InputError, MissingError
from splitfed.model.skeleton import Template
from splitfed.protocol.ids import check_client_id
from splitfed.server.runner import Runner
from splitfed.store.batches import Pile
from splitfed.store.cache import Bounded
from splitfed.store.sealing import Sealer
from splitfed.store.store import GradientStore

KEPT_LINES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """What answers the calls of one lineage."""

    pile: Pile
    sealer: Sealer
    runner: Runner


class Lines:
    """Finds the line that answers a client. What is kept of lines changes speed, never results.

    Args:
        template: The body's structure.
        store: Where the lineages are.
        lineage: The one that all clients share, or that theirs begin from.
        numerics: The short name of this process's numerics class.
        device: Where to compute.
        keep_models: How many versions of a line stay loaded.
        keep_graphs: How many forwards of a line keep their graph.
        per_client: Whether each client has a line of its own.

    Raises:
        InputError: lines of their own that don't begin from `body`.
    """

    def __init__(
        self,
        template: Template,
        store: GradientStore,
        lineage: str,
        numerics: str,
        device: torch.device,
        keep_models: int,
        keep_graphs: int,
        *,
        per_client: bool,
    ) -> None:
        if per_client and lineage != "body":
            raise InputError(f"per_client=True with lineage={lineage!r}: each client's line begins from 'body'")
        self._template = template
        self._store = store
        self._numerics = numerics
        self._device = device
        self._most = (keep_models, keep_graphs)
        self._shared = None if per_client else self._open(lineage)
        self._own: Bounded[str, Line] = Bounded(KEPT_LINES)

    def of(self, client_id: str, process: str | None = None) -> Line:
        """The line of a client.

        Args:
            client_id: The client.
            process: What its process calls itself, if the request says so: then the line may begin here.

        Raises:
            MissingError: the line hasn't begun.
        """
        if self._shared is not None:
            return self._shared
        found = self._own.get(check_client_id(client_id))
        if found is None:
            self._begin(client_id, process)
            found = self._own.put(client_id, self._open(f"body@{client_id}"))
        return found

    def _begin(self, client_id: str, process: str | None) -> None:
        own, body = self._store.lineage(f"body@{client_id}"), self._store.lineage("body")
        if own.head() >= 0:
            return
        if process is None:
            raise MissingError(f"client {client_id!r} has no body of its own yet: its first forward begins it")
        self._store.open_client(client_id, process)
        source = body.head()
        own.initialise(body.fingerprint(), body.checked_state(source), source)

    def _open(self, name: str) -> Line:
        versions, pile = self._store.lineage(name), self._store.pile(name)
        runner = Runner(self._template, versions, pile, self._numerics, self._device, *self._most)
        return Line(pile, Sealer(versions, pile, self._numerics), runner)
