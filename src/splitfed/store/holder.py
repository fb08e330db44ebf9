"""What a process holds in memory of the gradients of a log that it has computed.

The last few are held as they are, and older ones are added up (`sums`), so that memory is bounded
by the size of the body and not by the number of batches. An accumulator of the same process takes
them from here. One of another process asks by a file, `<lineage>/ask/<holder>`: whoever holds
anything writes its sums, and then deletes the question, which is the answer. A thread looks for the
question as long as something is held: an idle server gets no request that could carry it. Unasked
it writes now and then, so that what a kill leaves to be computed again stays bounded.

All of it is a cache of what recipes give: it changes speed and never results, and may lose anything
at any moment. What must hold is that nothing is in it that isn't on file. So a gradient is put here
after the store has created its record, and only by the process that did.

A sum stays in memory after it was written, and the next one that is written continues it; the file
of before is deleted once the later one is whole. It is dropped when one of its batches is counted.

The trap: autograd may hand out a gradient that shares its memory with one that the client has, who
may write to it. So those are copied. And after a fork both processes would answer for one holder.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from splitfed.errors import SplitFedError
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord, SumRecord
from splitfed.protocol.packing import pack
from splitfed.store.batchset import BatchSet
from splitfed.store.lineage import Lineage
from splitfed.store.sums import Shared, Sum, extent, shared_of, single

BYTES = 256 * 2**20
"""So many bytes of gradients are held as they are, or three gradients if these are larger."""
LEAST = 3
BLOCK = 16
"""So many at most are added up at once: a sum is read and written once for all of them."""
MOST_ALONE = 64
"""So many are held as they are at most: what is known of a batch may be larger than a small one."""
MOST_PARTS = 256
"""So many shares of calls are held at most: those of a pass that failed are never taken."""
MOST_BUFFERS, MOST_TENSORS = 256 * 2**20, 50_000
"""No sum goes on that holds so many bytes, or tensors, of changed buffers: these aren't added up,
and no file may have more than 100,000 tensors."""
MOST_SUMS = 2
"""So many sums are held: of the newest version, and of the one before."""
MOST_BATCHES = 1 << 14
"""No sum has more: what it holds of its batches would grow."""
WORTH_WRITING = 64
"""A sum of so many batches is written when it makes room for another; to compute fewer again costs
less than to write each, where loss scales alternate."""
NEAR, FAR = 0.02, 0.25
"""Seconds between two looks for a question: where a read takes microseconds, and elsewhere."""
_LOOK_AT_TABLE = 1.0
_UNASKED = 1.0
"""Seconds from one write of sums to the next that nobody has asked for; and at least so many times
what the last one took: a twentieth of the time is spent so."""
_PAUSE = 20
_IDLE = 10.0
"""Seconds for which memory for the next sum is kept while nothing is held."""


@dataclass(slots=True)
class Held:
    """Gradients and sums, taken out of a holder."""

    gradients: dict[BatchId, GradientRecord] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)

    def without(self, closed: BatchSet) -> Held:
        """What of it no commit has closed."""
        gradients = {batch: held for batch, held in self.gradients.items() if batch not in closed}
        sums = [one for one in self.sums if not any(batch in closed for batch in one.batches)]
        return Held(gradients, sums)


class Holder:
    """The gradients of one lineage; safe to share between threads.

    Args:
        lineage: Its versions say what is counted.
        most: How many bytes are held as they are; 256 MiB if it isn't given.
    """

    def __init__(self, lineage: Lineage, most: int | None = None) -> None:
        self._lineage = lineage
        self._most = BYTES if most is None else most
        self._lock = threading.Lock()
        """Of the dictionaries; never held while tensors are added."""
        self._adding = threading.Lock()
        """Of the tensors of sums; taken before the other."""
        self._process = os.getpid()
        self._begin()

    def _begin(self) -> None:
        self.name = uuid.uuid4().hex[:16]
        """What the process is called in the records of its batches."""
        self._held = Held()
        self._num_bytes = 0
        self._parts: OrderedDict[tuple[BatchId, int], GradientRecord] = OrderedDict()
        """The shares of calls whose batches aren't closed yet."""
        self._newest = -1
        self._alone: dict[BatchId, str] = {}
        """The files of gradients that were written as they are."""
        self._num_written = 0
        self._watch: threading.Thread | None = None
        self._looked = 0.0
        self._is_taken = False
        """Whether an accumulator of this process takes what is held."""
        self._wrote = (time.monotonic(), 0.0)
        """When sums were written last, and how many seconds that took."""
        self._spare: dict[str, Tensor] = {}
        """The totals of a sum that was used, for the next one: as large as the body in float64."""
        self._spared = 0.0
        """When they were kept."""

    def check_process(self) -> str:
        """The name of this process; after a fork, a new one that holds nothing."""
        if self._process != os.getpid():
            # Another thread of the parent may have held them when it forked.
            self._lock, self._adding = threading.Lock(), threading.Lock()
            self._process = os.getpid()
            self._begin()
        return self.name

    def put(self, batch: BatchId, record: GradientRecord) -> None:
        """Hold a gradient whose record this process has created, in memory nobody writes to."""
        self.check_process()
        held = record.as_gradient()
        if record.base_version > self._newest:
            self._newest = record.base_version
            self._drop_counted()
        with self._lock:
            if batch in self._held.gradients:
                return
            self._held.gradients[batch] = held
            self._num_bytes += _size(held)
        self._reduce()
        self._attend()

    def put_part(self, batch: BatchId, part: int, share: GradientRecord) -> None:
        """Hold the share of a call until its batch is closed, if there is room."""
        self.check_process()
        with self._lock:
            self._parts[batch, part] = share.as_gradient()
            self._parts.move_to_end((batch, part))
            total = sum(map(_size, self._parts.values()))
            while len(self._parts) > LEAST and (
                total > self._most or len(self._parts) > MOST_PARTS
            ):
                total -= _size(self._parts.popitem(last=False)[1])

    def take_part(self, batch: BatchId, part: int, digest: str) -> GradientRecord | None:
        """Take out the share of a call that has this digest; `None` if it isn't held."""
        self.check_process()
        with self._lock:
            found = self._parts.pop((batch, part), None)
        return found if found is not None and found.digest == digest else None

    def collect(self) -> Held:
        """Take out all that is held."""
        self.check_process()
        self._is_taken = True
        with self._adding, self._lock:
            found, self._held = self._held, Held()
            self._num_bytes = 0
            sums = found.sums
            found.sums = [one for one in sums if one.only is None]
            for one in sums:
                if one.only is not None:
                    self._keep_memory(one)
                    batch = next(iter(one.batches))
                    found.gradients[batch] = one.only
                    self._alone.update((batch, key) for key in one.files)
        return found

    def give_back(self, held: Held) -> None:
        """Hold again what was taken out and not used."""
        with self._adding:
            with self._lock:
                self._held.gradients = {**held.gradients, **self._held.gradients}
                self._held.sums[:0] = held.sums
                self._num_bytes = sum(map(_size, self._held.gradients.values()))
            self._make_room()
        self._reduce()

    def recycle(self, one: Sum) -> None:
        """Keep the memory of a sum that was used, for the next one; nobody may need it any more."""
        self.check_process()
        with self._adding:
            self._keep_memory(one)
        self._attend()  # it isn't kept for ever

    def _keep_memory(self, one: Sum) -> None:
        """Keep the memory of a sum for the next one; `_adding` is held."""
        self._spare, self._spared = one.total or one.spare or self._spare, time.monotonic()

    def write(self) -> None:
        """Write what is held as sums, one for what can be added up, and answer whoever asked.

        Raises:
            StoreError: the storage failed.
            CorruptedError: the run isn't there any more.
        """
        self._lineage.confirm()
        self._drop_counted()
        began = time.monotonic()
        with self._adding:
            groups: dict[Shared, list[tuple[BatchId, GradientRecord]]] = {}
            with self._lock:
                for batch, record in self._held.gradients.items():
                    groups.setdefault(shared_of(record), []).append((batch, record))
            for shared, block in groups.items():
                batch, record = block[0]
                if len(block) > 1 or self._open(shared) is not None:
                    self._take(batch for batch, _ in block)
                    self._write(self._add(shared, block))  # before another takes its place
                elif batch not in self._alone:  # it stays: one that comes later is added to it
                    self._alone[batch] = self._create(shared, single(batch, record))
            for one in self._held.sums:
                self._write(one)
        self._lineage.blobs.delete(self._lineage.keys.ask(self.name))
        now = time.monotonic()
        self._wrote = (now, now - began)

    def _is_due(self, now: float) -> bool:
        """Whether to write unasked: were this process killed, all would be computed again."""
        wrote, took = self._wrote
        if self._is_taken or now - wrote < max(_UNASKED, _PAUSE * took):
            return False
        is_new = any(batch not in self._alone for batch in self._held.gradients)
        return is_new or any(one.num_written < len(one.batches) for one in self._held.sums)

    def _write(self, one: Sum) -> None:
        """Write a sum, if it has batches that its last file hasn't."""
        if one.num_written < len(one.batches):
            one.files.append(self._create(one.shared, one.pack()))
            one.num_written = len(one.batches)
            while len(one.files) > 1:
                self._lineage.blobs.delete(one.files.pop(0))

    def _create(self, shared: Shared, record: SumRecord) -> str:
        """Write a file; its key."""
        self._num_written += 1
        key = self._lineage.keys.sum(shared[0], self.name, self._num_written)
        self._lineage.blobs.put(key, pack(record))
        return key

    def _reduce(self) -> None:
        """Add up what is too much to be held as it is: all that can be, but for the newest."""
        if self._is_over():
            # One may have been counted before it came here, and would spoil the sum.
            self._drop_counted()
        while self._is_over():
            with self._adding:
                with self._lock:
                    if not self._is_over():
                        return
                    older = [*self._held.gradients.items()][:-1]
                    shared = shared_of(older[0][1])
                    same = [one for one in older if shared_of(one[1]) == shared]
                    block = same[: self._room(shared, same)]
                self._take(batch for batch, _ in block)
                self._add(shared, block)

    def _room(self, shared: Shared, block: Sequence[tuple[BatchId, GradientRecord]]) -> int:
        """How many of these are added to the open sum at once: one, and as many as it may hold."""
        found = self._open(shared)
        before = 0 if found is None else len(found.batches)
        tensors, num_bytes = (0, 0) if found is None else found.num_buffers
        for count, (_, record) in enumerate(block[:BLOCK]):
            if _is_full(before + count, tensors, num_bytes):
                return count
            more = extent(record.buffers)
            tensors, num_bytes = tensors + more[0], num_bytes + more[1]
        return len(block[:BLOCK])

    def _take(self, batches: Iterable[BatchId]) -> None:
        """Hold some gradients no longer as they are; `_adding` is held."""
        with self._lock:
            for batch in batches:
                self._num_bytes -= _size(self._held.gradients.pop(batch))

    def _is_over(self) -> bool:
        count = len(self._held.gradients)
        return count > LEAST and (self._num_bytes > self._most or count > MOST_ALONE)

    def _add(self, shared: Shared, block: list[tuple[BatchId, GradientRecord]]) -> Sum:
        """Add gradients to the open sum, and return it; `_adding` is held."""
        found = self._open(shared)
        if found is None:
            found, self._spare = Sum(shared, spare=self._spare), {}
        # Whatever stops an addition midway, an interrupt of the user too, leaves a wrong sum: so
        # nobody has it meanwhile.
        with self._lock:
            self._held.sums = [one for one in self._held.sums if one is not found]
        found.add(block)
        found.files += [self._alone.pop(batch) for batch, _ in block if batch in self._alone]
        with self._lock:
            self._held.sums.append(found)
        self._make_room()
        return found

    def _make_room(self) -> None:
        """Hold no more sums than may be held; `_adding` is held."""
        with self._lock:
            gone = self._held.sums[:-MOST_SUMS]
            del self._held.sums[:-MOST_SUMS]
        for one in gone:
            if len(one.batches) >= WORTH_WRITING:
                with contextlib.suppress(SplitFedError):  # what it held is computed again
                    self._write(one)

    def _open(self, shared: Shared) -> Sum | None:
        """The sum that such gradients are added to, if there is one."""
        for one in reversed(self._held.sums):
            if one.shared == shared:
                return None if _is_full(len(one.batches), *one.num_buffers) else one
        return None

    def _drop_counted(self) -> None:
        """Drop what can't be used any more, as one of its batches is counted."""
        if not (self._held.gradients or self._held.sums):
            return
        with contextlib.suppress(SplitFedError):
            closed = self._lineage.counted()
            with self._adding, self._lock:
                before, self._held = self._held, self._held.without(closed)
                for one in before.sums:
                    if one not in self._held.sums:
                        self._keep_memory(one)
                self._num_bytes = sum(map(_size, self._held.gradients.values()))
                held = self._held.gradients
                self._alone = {batch: key for batch, key in self._alone.items() if batch in held}

    # ------------------------------------------------------------------------------ being asked

    def _attend(self) -> None:
        """Look for a question from now on, until nothing is held."""
        with self._lock:
            if self._watch is None:
                args = (weakref.ref(self),)
                self._watch = threading.Thread(target=_watch, args=args, daemon=True)
                self._watch.start()

    def poll(self) -> float | None:
        """Look for a question once; seconds until the next look, `None` if nothing is kept."""
        with self._lock:
            pause = NEAR if self._lineage.blobs.is_near else FAR
            if not (self._held.gradients or self._held.sums):
                if self._spare and time.monotonic() - self._spared < _IDLE:
                    return pause
                self._spare = {}
                self._watch = None
                return None
        now = time.monotonic()
        try:
            is_asked = self._lineage.blobs.raw.get(self._lineage.keys.ask(self.name)) is not None
            if is_asked or self._is_due(now):
                self.write()
            elif now - self._looked > _LOOK_AT_TABLE:
                self._looked = now
                self._drop_counted()
        except SplitFedError:  # the storage fails: who asked derives
            return 10 * pause
        except BaseException:
            with self._lock:  # this thread ends, and the next gradient starts another
                self._watch = None
            raise
        return pause


def _watch(found: weakref.ref[Holder]) -> None:
    """Answer questions for a holder as long as somebody uses it."""
    while True:
        holder = found()
        if holder is None:
            return
        pause = holder.poll()
        if pause is None:
            return
        del holder
        time.sleep(pause)


def _is_full(num_batches: int, tensors: int, num_bytes: int) -> bool:
    """Whether no sum goes on with so many batches, and tensors and bytes of changed buffers."""
    return num_batches >= MOST_BATCHES or tensors > MOST_TENSORS or num_bytes > MOST_BUFFERS


def _size(record: GradientRecord) -> int:
    gradients = sum(gradient.nbytes for gradient in record.gradients.values())
    return gradients + extent(record.buffers)[1]


def apart(gradients: Mapping[str, Tensor], others: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Gradients that share no memory with the tensors of others."""
    taken = {_memory(tensor) for tensor in others if tensor is not None}
    return {
        name: gradient.clone() if _memory(gradient) in taken else gradient
        for name, gradient in gradients.items()
    }


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
