"""`forget`: delete what a store holds of one client.

Its recorded calls, pending gradients and what was kept for a replay are deleted in every lineage,
its mail too, and a body of its own begins again from the average without it. Its processes are
superseded first, so nothing that they send from then on counts; a new process of it may join again.

What stays: its id and its numbers of batches and samples in commit records, rounds and history,
which are the fence of exactly-once and the schedule of the run; and what the body has learned from
it, which no deletion takes out of weights.

The race: a request that a server has begun before may end after. So a pending gradient isn't
deleted but replaced by one that closes its number, and whoever wants to be sure looks again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from splitfed.errors import MissingError
from splitfed.protocol.ids import BatchId, check_client_id
from splitfed.protocol.messages import GradientRecord
from splitfed.protocol.packing import pack
from splitfed.store import layout
from splitfed.store.commit import Commit
from splitfed.store.store import GradientStore
from splitfed.store.sums import batches_in


@dataclass(slots=True)
class Forgotten:
    """What `forget` has deleted, or would delete."""

    client_id: str
    keys: list[str] = field(default_factory=list)
    """The files that are gone."""
    closed: list[str] = field(default_factory=list)
    """Pending batches that count nowhere now."""
    restarted: list[str] = field(default_factory=list)
    """Lineages of its own that begin again from the average."""
    num_folded: int = 0
    """Its batches that the weights have learned from; their ids stay on record."""


def forget(store: GradientStore, client_id: str, *, dry_run: bool = False) -> Forgotten:
    """Delete what a store holds of a client.

    Args:
        store: The store; its accumulators must be stopped.
        client_id: The client.
        dry_run: Whether to list only.

    Raises:
        MissingError: the store doesn't know such a client.
        FormatError: it is of another format version.
        BusyError: an accumulator is at work on it.
    """
    check_client_id(client_id)
    names = store.lineages() if store.header() is not None else []
    if client_id not in (store.clients() if names else []):
        raise MissingError(
            f"{store.shown} has no client {client_id!r}: expected one that `splitfed status` lists"
        )
    found = Forgotten(client_id)
    with store.alone(names):
        if not dry_run:
            store.blobs.create(layout.forgotten(client_id), [b"{}"])
            store.registry().open(client_id)
        for name in names:
            _in_lineage(store, name, found, dry_run=dry_run)
        mail = store.blobs.list(f"{layout.POST}/{client_id}")
        found.keys += mail
        if not dry_run:
            for key in mail:
                store.blobs.delete(key)
            _restart(store, f"body@{client_id}", names, found)
            store.blobs.prune("")
        elif f"body@{client_id}" in names:
            found.restarted.append(f"body@{client_id}")
    return found


def _in_lineage(store: GradientStore, name: str, found: Forgotten, *, dry_run: bool) -> None:
    lineage, pile = store.lineage(name), store.pile(name)
    if lineage.head() < 0:
        return
    counted = lineage.counted()
    found.num_folded += sum(1 for batch in counted if batch.client_id == found.client_id)
    for key in store.blobs.list(name):
        if lineage.keys.parse_sum(key) is not None:
            # A cache: what it holds of others is computed again.
            if any(batch.client_id == found.client_id for batch in batches_in(store.blobs, key)):
                _delete(store, key, found, dry_run=dry_run)
            continue
        owner = lineage.keys.parse_call(key)
        if owner is None or owner[0] != found.client_id:
            continue
        batch = lineage.keys.parse_gradient(key)
        if batch is None or batch in counted:
            _delete(store, key, found, dry_run=dry_run)
            continue
        header = pile.peek(batch)
        if header is None or header["kind"] == "skip":
            continue
        found.keys.append(key)
        found.closed.append(str(batch))
        if not dry_run:
            _close(store, key, batch)


def _delete(store: GradientStore, key: str, found: Forgotten, *, dry_run: bool) -> None:
    found.keys.append(key)
    if not dry_run:
        store.blobs.delete(key)


def _close(store: GradientStore, key: str, batch: BatchId) -> None:
    """Put in place of a pending gradient what closes its number."""
    skip = GradientRecord("skip", 0, 0.0, 1.0, "", "", {}, [])
    store.blobs.put(key, pack(skip), durable=True)


def _restart(store: GradientStore, name: str, names: list[str], found: Forgotten) -> None:
    """Let a body of the client's own go on as the newest average, and delete what it was."""
    if name not in names:
        return
    line, body = store.lineage(name), store.lineage("body")
    head = line.head()
    if head < 0:
        return
    newest = body.head()
    begun = Commit(
        version=head + 1,
        kind="begin",
        nonce="",
        files={},
        source=newest,
        turn=line.commit(head).turn + 1,
    )
    if line.restate(begun, body.checked_state(newest), optimizer=False) is not None:
        line.sweep(1, first=store.keeps_forwards)
        found.restarted.append(name)
