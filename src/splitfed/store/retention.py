"""Retention: which versions and calls a sweep must leave, beyond the window of the newest versions.

The window counts commits. Where commits follow each other in milliseconds it is over before a
client has answered, so a version that an open call was run at stays, with the call, as long as all
that is held so is below a bound in bytes. There is no clock in it: what a sweep leaves follows from
what it finds.

What a client can make a store hold is limited: to its newest calls, none of a process that a newer
one has superseded, and in turns with the other clients, so that one with many open calls doesn't
take the room of those with few. A call that nobody will answer, of an owner who has gone for good,
stays until others need its room.

Each listing costs in proportion to what is on file. So the more a sweep finds, the longer the next
one may wait, as long as the versions that pile up meanwhile are few bytes, too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from splitfed.errors import CorruptedError, FormatError
from splitfed.store.checked import Checked
from splitfed.store.layout import Keys, read_pin

LEAST_BYTES = 64 << 20
WEIGHTS_HELD = 4
"""By default as many bytes are held, or so many versions' weights if these are more."""
BYTES_A_CALL = 64 << 10
"""A call counts as at least so many bytes: listing it costs time, however small it is."""
CALLS_A_CLIENT = 64
"""So many calls of a client are held: as many as it may have passes under way at once."""
FOUND_A_COMMIT = 64
"""So many files a sweep may find for each commit; if it finds more, the next one waits."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The file of an open call."""

    key: str
    client_id: str
    incarnation: int
    version: int
    kind: str


class Retention:
    """What one lineage holds beyond its window.

    Args:
        blobs: The storage backend.
        keys: The lineage's keys.
    """

    def __init__(self, blobs: Checked, keys: Keys) -> None:
        self._blobs = blobs
        self._keys = keys
        self._pins: dict[str, int] = {}
        """The versions of pins; what is in a file of a call never changes."""
        self._sizes: dict[str, int] = {}
        """The bytes of late calls, by key."""
        self._weights: dict[int, int] = {}
        """The bytes of the weights of late calls' versions; 0 if they aren't there any more."""
        self._due: int | None = None

    def sort(self, oldest: int, most: int | None) -> tuple[set[int], list[str]]:
        """Which versions before a window stay, and which files of calls go.

        Args:
            oldest: The first version of the window.
            most: How many bytes may be held in all; `None` for the default.
        """
        calls = self._calls()
        newest: dict[str, int] = {}
        for call in calls:
            newest[call.client_id] = max(call.incarnation, newest.get(call.client_id, 0))
        late = [call for call in calls if call.version < oldest]
        live = [call for call in late if call.incarnation == newest[call.client_id]]
        self._measure(live)
        held = self._held(live, most) if live else []
        stay = {call.key for call in held}
        versions = {call.version for call in held if call.kind != "part"}
        dropped = [call.key for call in late if call.key not in stay]
        self._postpone(oldest, len(calls) - len(dropped))
        return versions, dropped

    def is_due(self, oldest: int) -> bool:
        """Whether a sweep is due that leaves a window from that version on."""
        return self._due is None or oldest >= self._due

    def _postpone(self, oldest: int, found: int) -> None:
        """Let the next sweep wait for as many commits as what this one found is worth."""
        # Versions pile up meanwhile, so only where they are known to be small.
        weights = max(self._weights.values(), default=LEAST_BYTES)
        wait = min(found // FOUND_A_COMMIT, LEAST_BYTES // (4 * max(weights, 1)))
        self._due = oldest + wait if wait > 1 else None

    def _calls(self) -> list[_Call]:
        """The files of open calls."""
        found = []
        pins = {}
        for kind in ("forward", "part", "pin"):
            for key in self._blobs.list(f"{self._keys.root}/{kind}"):
                parsed = self._keys.parse_call(key)
                if parsed is None:
                    continue
                client_id, incarnation, version = parsed
                if version is None:
                    version = self._pins.get(key)
                    if version is None:
                        version = self._pinned(key)
                        if version is None:  # answered meanwhile
                            continue
                    pins[key] = version
                found.append(_Call(key, client_id, incarnation, version, kind))
        self._pins = pins
        return found

    def _pinned(self, key: str) -> int | None:
        """The version in the file of a pin; -1 if that is damaged, `None` if it is gone."""
        try:
            data = self._blobs.get(key)
            return None if data is None else read_pin(data, key)
        except (CorruptedError, FormatError):
            # It says nothing any more, and as an error it would stop the commits of everybody.
            return -1

    def _measure(self, calls: list[_Call]) -> None:
        """Look up the sizes of late calls and of the weights that they need, where new."""
        versions = {call.version for call in calls}
        self._sizes = {call.key: self._sizes.get(call.key, -1) for call in calls}
        self._weights = {v: size for v, size in self._weights.items() if v in versions}
        root = self._keys.root
        for kind in {call.kind for call in calls if self._sizes[call.key] < 0}:
            sizes = self._blobs.sizes(f"{root}/{kind}")
            self._sizes |= {key: size for key, size in sizes.items() if key in self._sizes}
        if versions - self._weights.keys():
            self._weights = dict.fromkeys(versions, 0)
            for key, size in self._blobs.sizes(f"{root}/weights").items():
                parsed = self._keys.parse_versioned(key)
                if parsed is not None and parsed[0] in versions:
                    self._weights[parsed[0]] = size

    def _held(self, calls: list[_Call], most: int | None) -> list[_Call]:
        """The calls that stay, as many as there is room for: the newest, clients in turns."""
        if most is None:
            most = max(LEAST_BYTES, WEIGHTS_HELD * max(self._weights.values()))
        held = []
        versions: set[int] = set()
        room = most
        for call in _in_turns(calls):
            cost = max(BYTES_A_CALL, self._sizes[call.key])
            if call.kind != "part" and call.version not in versions:
                # Without its weights no call can be answered. (A part has been.)
                weights = self._weights.get(call.version, 0)
                cost = cost + weights if weights else room + 1
            if cost <= room:
                room -= cost
                held.append(call)
                if call.kind != "part":
                    versions.add(call.version)
        return held


def _in_turns(calls: list[_Call]) -> list[_Call]:
    """The newest call of each client, newest first, then the second of each, and so on."""
    ranks = Counter[str]()
    ranked = []
    for call in sorted(calls, key=lambda call: (-call.version, call.key)):
        rank = ranks[call.client_id]
        ranks[call.client_id] += 1
        if rank < CALLS_A_CLIENT:
            ranked.append((rank, -call.version, call.key, call))
    return [call for *_, call in sorted(ranked, key=lambda entry: entry[:3])]
