"""`gc`: delete what no process of a run can need any more, whatever its settings.

A commit sweeps up by itself what has left the retention window. What it leaves alone, since looking
for it would cost each commit, is collected here: files of attempts that no record names, calls of
processes that a newer one of their client has superseded, or of versions whose weights are gone or
were undone, gradients that are counted already, and what is kept for a replay of batches that no
commit has folded.

The race: a process that is superseded may have a request under way. What it still writes is garbage
of a later time; what it still reads is gone, and its call counts nowhere, as it wouldn't have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from splitfed.diagnostics.integrity import ASIDE
from splitfed.errors import MissingError
from splitfed.store.batchset import BatchSet
from splitfed.store.store import GradientStore
from splitfed.store.sums import batches_in


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file that nobody needs."""

    key: str
    num_bytes: int
    why: str


def collect(
    store: GradientStore,
    *,
    keep_versions: int | None = None,
    aside: bool = False,
    dry_run: bool = False,
) -> list[Garbage]:
    """Delete what nobody can need any more; what was, or with `dry_run` would be, deleted.

    Args:
        store: The store; its accumulators must be stopped.
        keep_versions: Also what is older than so many versions: at least as many as the
            accumulators keep.
        aside: Also what `repair` has set aside.
        dry_run: Whether to list only.

    Raises:
        MissingError: there is no run in it.
        FormatError: it is of another format version.
        BusyError: an accumulator is at work on it.
    """
    names = store.lineages() if store.header() is not None else []
    if not names:
        raise MissingError(f"no run was begun in {store.shown}: is the URL right?")
    with store.alone(names):
        sizes = store.blobs.sizes("")
        processes = _newest_processes(sizes)
        lines = [_Line(store, name, processes) for name in names]
        found = _found(lines, sizes, keep_versions, aside=aside)
        if not dry_run:
            _delete(store, lines, [garbage.key for garbage in found])
    return found


def _found(
    lines: Sequence[_Line], sizes: Mapping[str, int], keep_versions: int | None, *, aside: bool
) -> list[Garbage]:
    """What nobody can need of these lineages, and what else was asked for."""
    found = [garbage for line in lines for garbage in line.garbage(sizes)]
    if keep_versions is not None:
        known = {garbage.key for garbage in found}
        expired = [one for line in lines for one in line.expired(sizes, keep_versions)]
        found += [garbage for garbage in expired if garbage.key not in known]
    if aside:
        keys = [key for key in sizes if key.startswith(f"{ASIDE}/")]
        found += [Garbage(key, sizes[key], "set aside by repair") for key in keys]
    return found


def _delete(store: GradientStore, lines: Sequence[_Line], keys: Sequence[str]) -> None:
    """Delete files, and the folders that are empty then."""
    for line in lines:
        line.adopt(keys)
    for key in keys:
        store.blobs.delete(key)
    store.blobs.prune("")


def _newest_processes(keys: Iterable[str]) -> dict[str, int]:
    """The newest process of each client, by number."""
    found: dict[str, int] = {}
    for key in keys:
        folder, _, number = key.rpartition("/")
        if folder.startswith("clients/") and number.isdecimal():
            client_id = folder.removeprefix("clients/")
            found[client_id] = max(found.get(client_id, 0), int(number))
    return found


class _Line:
    """What nobody needs of one lineage."""

    def __init__(self, store: GradientStore, name: str, processes: Mapping[str, int]) -> None:
        self._lineage = store.lineage(name)
        self._archive = store.archive(name)
        self._processes = processes
        self._head = self._lineage.head()
        is_begun = self._head >= 0
        self._kept = self._lineage.kept() if is_begun else set()
        self._closed = self._lineage.counted() if is_begun else BatchSet()

    def garbage(self, sizes: Mapping[str, int]) -> list[Garbage]:
        """What nobody needs whatever the retention window is."""
        if self._head < 0:
            return []
        own = (key for key in sizes if key.startswith(f"{self._lineage.name}/"))
        found = ((key, self._why(key)) for key in own)
        return [Garbage(key, sizes[key], why) for key, why in found if why]

    def expired(self, sizes: Mapping[str, int], keep: int) -> Iterator[Garbage]:
        """What is older than so many versions."""
        oldest = self._head - keep + 1
        if oldest <= 0:
            return
        base = self._lineage.commit(oldest).base
        for key in sizes:
            if not key.startswith(f"{self._lineage.name}/"):
                continue
            file = self._lineage.keys.parse_versioned(key)
            call = self._lineage.keys.parse_transient(key)
            floor = base if "/applied/" in key else oldest
            # A replay begins with the first weights.
            is_first = file is not None and file[0] == 0 and "/weights/" in key
            is_older = file is not None and file[0] < floor and not is_first
            if is_older or (call is not None and call < oldest):
                yield Garbage(key, sizes[key], f"of a version before {oldest}")

    def adopt(self, keys: Iterable[str]) -> None:
        """Keep, of gradients that are to be deleted, what a replay needs."""
        for key in keys:
            batch = self._lineage.keys.parse_gradient(key)
            if batch is not None and self._archive is not None:
                self._archive.adopt(batch)

    def _why(self, key: str) -> str:
        """Why nobody needs a file; '' if somebody may."""
        file = self._lineage.keys.parse_versioned(key)
        if file is not None:
            is_older = file[0] <= self._head
            if is_older and self._lineage.commit(file[0]).nonce != file[1]:
                return "no record names it: another attempt won that version"
            return ""
        batch = self._lineage.keys.parse_gradient(key)
        if batch is not None:
            return "a gradient that is closed already" if batch in self._closed else ""
        if key.startswith(f"{self._lineage.keys.asks}/"):
            return "a question of an accumulator that waits no more"
        if self._lineage.keys.parse_sum(key) is not None:
            batches = batches_in(self._lineage.blobs, key)
            is_used = any(batch in self._closed for batch in batches)
            return "a sum of which a batch is closed already" if is_used else ""
        if key.startswith(f"{self._lineage.name}/kept/"):
            batch = self._lineage.keys.parse_gradient(key.replace("/kept/", "/grad/", 1))
            is_folded = batch is None or batch not in self._closed or batch in self._folded
            return "" if is_folded else "kept for a replay, and its batch wasn't folded"
        return self._why_call(key)

    def _why_call(self, key: str) -> str:
        owner = self._lineage.keys.parse_call(key)
        if owner is None:
            return ""
        client_id, incarnation, version = owner
        if incarnation < self._processes.get(client_id, 0):
            return "a call of a process that a newer one has superseded"
        if version is not None and version not in self._kept:
            return "a call at a version whose weights are gone"
        if version is not None and self._lineage.commit(self._head).is_abandoned(version):
            return "a call at a version that a rollback has undone"
        return ""

    @cached_property
    def _folded(self) -> BatchSet:
        """The batches that any commit has folded."""
        records = map(self._lineage.commit, range(self._head + 1))
        return BatchSet(batch for record in records for batch in record.folded)
