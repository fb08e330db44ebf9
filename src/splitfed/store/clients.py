"""The registry of clients: which processes they have begun, so that only the newest of each counts.

Each process of a client opens an incarnation, a number that is part of all its batch ids. What an
older process still sends is refused: two processes under one id would otherwise count the same
sequence numbers twice.

The race: a process may ask twice, because an answer was lost, and two processes may ask at once.
Each says what it calls itself, a random string, and its incarnation is the create-once file that
holds this string. So a repeated request finds its own file, and of two that meet one moves on.
"""

from __future__ import annotations

import json
import os

from splitfed.blobs.contract import Blobs
from splitfed.errors import ProtocolError, SupersededError
from splitfed.protocol.checksum import text_of
from splitfed.store import layout


class Clients:
    """The clients of a store.

    Args:
        blobs: The storage backend.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._joined: set[str] = set()
        self._opened: set[tuple[str, int]] = set()
        self._resumed: set[tuple[str, int, str]] = set()

    def ids(self) -> list[str]:
        """The ids of all clients that ever pulled or trained, sorted."""
        found = {layout.parse_client(key) for key in self._blobs.list(layout.CLIENTS)}
        return sorted(client_id for client_id in found if client_id is not None)

    def join(self, client_id: str) -> None:
        """Make a client known, so that it can be sampled."""
        if client_id not in self._joined:
            self._blobs.create(layout.joined(client_id), [b"{}"], durable=False)
            self._joined.add(client_id)

    def open(self, client_id: str, process: str | None = None) -> int:
        """The incarnation of a client's process: its own if it has one, else a new one.

        Args:
            client_id: The client.
            process: What the process calls itself; a random string.
        """
        mine = _contents(process or os.urandom(16).hex())
        names = [key.rpartition("/")[2] for key in self._blobs.list(layout.client(client_id))]
        taken = [int(name) for name in names if name.isdecimal() and name.isascii()]
        for incarnation in sorted(taken, reverse=True):
            if self._process(client_id, incarnation) == mine:
                return incarnation
        incarnation = max(taken, default=0) + 1
        while not self._blobs.create(layout.client(client_id, incarnation), [mine]):
            # "Exists" can mean that this call created it and the reply was lost.
            if self._process(client_id, incarnation) == mine:
                return incarnation
            incarnation += 1
        return incarnation

    def check(self, client_id: str, incarnation: int) -> None:
        """Refuse a process that isn't its client's newest.

        Raises:
            SupersededError: it isn't, or was never opened.
        """
        if self._blobs.get(layout.client(client_id, incarnation + 1)) is not None:
            raise SupersededError(
                f"client {client_id!r} has begun a newer process than its number {incarnation}: "
                "only the newest may count. Is a second SplitClient using the same client_id, or "
                "a forked process this one? Give each a client_id of its own"
            )
        if (client_id, incarnation) not in self._opened:
            if self._blobs.get(layout.client(client_id, incarnation)) is None:
                raise SupersededError(
                    f"client {client_id!r} never opened process {incarnation} in this store: "
                    "make a new SplitClient"
                )
            self._opened.add((client_id, incarnation))

    def check_resumed(self, client_id: str, incarnation: int, process: str) -> None:
        """Refuse a process that goes on under the numbers of one that isn't of this store.

        Without a look at what that one called itself, a position of another run would count under
        the numbers of a stranger.

        Raises:
            ProtocolError: this store has no such process, or another one under that number.
            SupersededError: the client has a newer process.
        """
        if (client_id, incarnation, process) in self._resumed:
            return
        if self._process(client_id, incarnation) != _contents(process):
            raise ProtocolError(
                f"client {client_id!r} resumes from a position of another run: its process "
                f"{incarnation} there isn't that of this store. Give the server or store that the "
                "position was taken with, or begin anew, without client.resume()"
            )
        self.check(client_id, incarnation)
        self._resumed.add((client_id, incarnation, process))

    def _process(self, client_id: str, incarnation: int) -> bytes:
        return text_of(self._blobs.get(layout.client(client_id, incarnation)) or b"")


def _contents(process: str) -> bytes:
    """What the file of an incarnation holds."""
    return json.dumps({"process": process}).encode()
