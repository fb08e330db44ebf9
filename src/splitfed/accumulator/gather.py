"""Gathering: the gradients of a log that somebody holds, so that they needn't be computed again.

What this process holds is taken from memory. Other processes are asked for what they hold
(`store.holder`), and are waited for, but not for long: whoever doesn't answer may have died, and
what it held is computed again from the recipes.

The order matters: first sums are listed, then the batches that wait. The record of a batch precedes
the sum that it is in. So a listed sum names what is listed too, and in the other order sums would
hold batches that nothing was decided on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from splitfed.errors import IdError, SplitFedError
from splitfed.protocol.backoff import Backoff, growing
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import SumRecord
from splitfed.protocol.packing import unpack
from splitfed.store.batchset import BatchSet
from splitfed.store.holder import Held
from splitfed.store.store import GradientStore
from splitfed.store.sums import Sum, batches_in, from_file

WAIT = 2.0
"""Seconds to wait for holders, or three times as long as the last one took."""


class Gatherer:
    """Finds the sums of one lineage.

    Args:
        store: The store.
        lineage: The lineage's name.
    """

    def __init__(self, store: GradientStore, lineage: str) -> None:
        self._blobs = store.blobs
        self._versions = store.lineage(lineage)
        self._keys = self._versions.keys
        self._holder = store.holder(lineage)
        self._own = Held()
        """What was taken out of this process's holder."""
        self._taken = 0.0
        """Seconds that the slowest answer took."""

    def gather(self, waiting: Mapping[BatchId, str], closed: BatchSet) -> Held:
        """What is held of the batches that wait.

        Args:
            waiting: Who holds each of them, by its record; '' for nobody.
            closed: The batches that are closed by now.
        """
        self._own = self._holder.collect()
        found = Held(dict(self._own.gradients), list(self._own.sums))
        known = set(found.gradients).union(*(one.batches for one in found.sums))
        elsewhere = {batch: name for batch, name in waiting.items() if name and batch not in known}
        if not elsewhere:
            return found
        files = self._files(closed)
        known.update(*files.values())
        asked = {name for batch, name in elsewhere.items() if batch not in known}
        asked.discard(self._holder.check_process())  # it has given all that it has
        if asked:
            self._ask(asked)
            files = self._files(closed)
        fingerprint = self._versions.fingerprint()
        for key in files:
            with contextlib.suppress(SplitFedError):  # a cache: what is damaged is derived
                data = self._blobs.get(key)
                if data is None:
                    continue
                held = from_file(unpack(SumRecord, data), fingerprint)
                if isinstance(held, Sum):
                    found.sums.append(held)
                else:
                    found.gradients.setdefault(*held)
        return found

    def _files(self, closed: BatchSet) -> dict[str, list[BatchId]]:
        """The sums on file that may be used, with their batches."""
        found: dict[str, list[BatchId]] = {}
        for key in self._blobs.list(self._keys.sums):
            batches = batches_in(self._blobs, key)
            if batches and not any(batch in closed for batch in batches):
                found[key] = batches
        return found

    def recycle(self, used: Iterable[Sum]) -> None:
        """Keep the memory of this process's sums that have become part of a version."""
        own = set(map(id, self._own.sums))
        for one in used:
            if id(one) in own:
                self._holder.recycle(one)

    def give_back(self, used: Iterable[Sum]) -> None:
        """Hold on to what of this process's wasn't used.

        Args:
            used: Sums that have become part of a mean.
        """
        left, self._own = self._own, Held()
        with contextlib.suppress(SplitFedError):  # else it is dropped when the holder looks next
            left = left.without(self._versions.counted())
        taken = set(map(id, used))
        left.sums = [one for one in left.sums if id(one) not in taken]
        self._holder.give_back(left)

    def clean(self, closed: BatchSet, oldest: int) -> None:
        """Delete the files of sums that can't be used any more.

        Args:
            closed: The batches that are closed by now.
            oldest: The oldest version that batches may be of.
        """
        for key in self._blobs.list(self._keys.sums):
            version = self._keys.parse_sum(key)
            if version is None:
                continue
            if version < oldest or any(batch in closed for batch in batches_in(self._blobs, key)):
                self._blobs.delete(key)

    def _ask(self, holders: set[str]) -> None:
        """Ask others for their sums, and wait until they have answered, or for long enough."""
        asked: list[str] = []
        for name in holders:
            with contextlib.suppress(IdError):  # a name that is none holds nothing
                asked.append(self._keys.ask(name))
        for key in asked:
            self._blobs.put(key, [b"{}"])
        within = max(WAIT, 3 * self._taken)
        tries = Backoff(growing(0.005, 1.5), most=0.1, within=within, last_look=True)
        while asked:
            asked = [key for key in asked if self._blobs.raw.get(key) is not None]
            if not asked:
                self._taken = max(self._taken / 2, tries.elapsed)
            elif not tries.wait():
                break
        for key in asked:
            self._blobs.delete(key)
