"""The registry of clients: which processes they have begun, so that only the newest of each counts.

Each process of a client opens an incarnation, a number that is part of all its batch ids. What an
older process still sends is refused: two processes under one id would otherwise count the same
sequence numbers twice.

The race: a process may ask twice, because an answer was lost, and two processes may ask at once.
Each says what it calls itself, a random string, and its incarnation is the create-once file that
holds this string. So a repeated request finds its own file, and of two that meet one moves on. It
is looked for among the newest few only: whoever asks again does so at once.

Files of superseded processes are deleted, else a client that restarts often would fill the store.
The trap is an opener that slept meanwhile: it would create a number whose file is gone, and that
number was another process's. So a file is deleted only once the next multiple of `BRANCH` above its
number is there, and a multiple only once the next multiple of `BRANCH`² is, and so on. Whatever was
deleted has such a milestone above it; whoever finds one above the number that it has just created
gives that number up. This rests on reads of single keys, never on a listing.
"""

from __future__ import annotations

import json
import os
import time

from splitfed.errors import InputError, ProtocolError, SupersededError
from splitfed.protocol.checksum import text_of
from splitfed.store import layout
from splitfed.store.cache import Bounded
from splitfed.store.checked import Checked

BRANCH = 256
"""So many files of processes stay at most, and so many milestones of each level."""
_LEVELS = 4
"""Above this one a milestone's number has more digits than a number may have."""
_LOOKED_AT = 4
"""Among so many of the newest processes one that asks again is looked for."""
_DELETED_AT_ONCE = 8
_KNOWN = 4096
_RECHECK_SECONDS = 5.0
_MOST_CHARACTERS = 256


class Clients:
    """The clients of a store.

    Args:
        blobs: The storage backend.
    """

    def __init__(self, blobs: Checked) -> None:
        self._blobs = blobs
        self._joined: Bounded[str, bool] = Bounded(_KNOWN)
        self._opened: Bounded[tuple[str, int], float] = Bounded(_KNOWN)
        """When the file of a process was last seen."""
        self._resumed: Bounded[tuple[str, int, str], bool] = Bounded(_KNOWN)

    def ids(self) -> list[str]:
        """The ids of all clients that ever pulled or trained, sorted."""
        found = {layout.parse_client(key) for key in self._blobs.list(layout.CLIENTS)}
        return sorted(client_id for client_id in found if client_id is not None)

    def forgotten(self) -> set[str]:
        """The clients whose data was deleted on request."""
        keys = self._blobs.list(layout.CLIENTS)
        found = (layout.parse_client(key) for key in keys if key.endswith("/forgotten"))
        return {client_id for client_id in found if client_id is not None}

    def join(self, client_id: str) -> None:
        """Make a client known, so that it can be sampled."""
        if not self._joined.get(client_id):
            self._blobs.create(layout.joined(client_id), [b"{}"], durable=False)
            self._joined.put(client_id, True)

    def open(self, client_id: str, process: str | None = None) -> int:
        """The incarnation of a client's process: its own if it has one, else a new one.

        Args:
            client_id: The client.
            process: What the process calls itself; a random string.

        Raises:
            InputError: that name is far longer than a random string need be.
        """
        if process is not None and len(process) > _MOST_CHARACTERS:
            raise InputError(
                f"the process of client {client_id!r} calls itself by {len(process)} characters: "
                f"expected at most {_MOST_CHARACTERS}, such as os.urandom(16).hex()"
            )
        mine = _contents(process or os.urandom(16).hex())
        names = [key.rpartition("/")[2] for key in self._blobs.list(layout.client(client_id))]
        taken = sorted(int(name) for name in names if name.isdecimal() and name.isascii())
        for incarnation in reversed(taken[-_LOOKED_AT:]):
            is_mine = self._process(client_id, incarnation) == mine
            if is_mine and self._milestone(client_id, incarnation) is None:
                return incarnation
        incarnation = self._create(client_id, max(taken, default=0) + 1, mine)
        self._sweep(client_id, incarnation, taken)
        return incarnation

    def check(self, client_id: str, incarnation: int) -> None:
        """Refuse a process that isn't its client's newest.

        Raises:
            SupersededError: it isn't, or was never opened.
            CorruptedError: the run was deleted, or another one was begun in its place.
        """
        if self._blobs.get(layout.client(client_id, incarnation + 1)) is not None:
            raise SupersededError(
                f"client {client_id!r} has begun a newer process than its number {incarnation}: "
                "only the newest may count. Is a second SplitClient using the same client_id, or "
                "a forked process this one? Give each a client_id of its own"
            )
        now = time.monotonic()
        seen = self._opened.get((client_id, incarnation))
        # Now and then again: after many newer ones, both its file and the next one are gone.
        if seen is None or now - seen > _RECHECK_SECONDS:
            # A milestone's own file stays for long.
            is_passed = incarnation % BRANCH == 0 and self._milestone(client_id, incarnation)
            if is_passed or self._blobs.get(layout.client(client_id, incarnation)) is None:
                if not self._blobs.has_format():
                    raise self._blobs.gone()
                raise SupersededError(
                    f"client {client_id!r} never opened process {incarnation} in this store, "
                    "or has begun many newer ones: make a new SplitClient"
                )
            self._opened.put((client_id, incarnation), now)

    def is_newest(self, client_id: str, incarnation: int) -> bool:
        """Whether a process is its client's newest."""
        try:
            self.check(client_id, incarnation)
        except SupersededError:
            return False
        return True

    def _create(self, client_id: str, incarnation: int, mine: bytes) -> int:
        """Create the file of a process under the first number that nobody had, from a given one."""
        while True:
            key = layout.client(client_id, incarnation)
            # "Exists" can mean that this call created it and the reply was lost.
            if self._blobs.create(key, [mine]) or self._process(client_id, incarnation) == mine:
                later = self._milestone(client_id, incarnation)
                if later is None:
                    return incarnation
                self._blobs.delete(key)
                incarnation = later
            incarnation += 1

    def _milestone(self, client_id: str, incarnation: int) -> int | None:
        """The highest milestone above a number that is there; `None` if none is."""
        for level in range(_LEVELS, 0, -1):
            above = _next_multiple(incarnation, BRANCH**level)
            if self._blobs.get(layout.client(client_id, above)) is not None:
                return above
        return None

    def _sweep(self, client_id: str, newest: int, taken: list[int]) -> None:
        """Delete some files that have a milestone above them, the oldest first."""
        gone = [number for number in taken if _milestone_of(number) <= newest]
        for number in gone[:_DELETED_AT_ONCE]:
            self._blobs.delete(layout.client(client_id, number))

    def check_resumed(self, client_id: str, incarnation: int, process: str) -> None:
        """Refuse a process that goes on under the numbers of one that isn't of this store.

        Without a look at what that one called itself, a position of another run would count under
        the numbers of a stranger.

        Raises:
            ProtocolError: this store has no such process, or another one under that number.
            SupersededError: the client has a newer process.
        """
        if self._resumed.get((client_id, incarnation, process)):
            return
        if self._process(client_id, incarnation) != _contents(process):
            raise ProtocolError(
                f"client {client_id!r} resumes from a position of another run: its process "
                f"{incarnation} there isn't that of this store. Give the server or store that the "
                "position was taken with, or begin anew, without client.resume()"
            )
        self.check(client_id, incarnation)
        self._resumed.put((client_id, incarnation, process), True)

    def _process(self, client_id: str, incarnation: int) -> bytes:
        return text_of(self._blobs.get(layout.client(client_id, incarnation)) or b"")


def _contents(process: str) -> bytes:
    """What the file of an incarnation holds."""
    return json.dumps({"process": process}).encode()


def _next_multiple(number: int, of: int) -> int:
    return (number // of + 1) * of


def _milestone_of(number: int) -> int:
    """The milestone after which a number's file may go."""
    step = BRANCH
    while number and number % step == 0:
        step *= BRANCH
    return _next_multiple(number, step)
