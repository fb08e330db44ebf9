"""The files of batches: forwards, parts, and the gradients that are pending until a commit.

A gradient is created once under its batch id. A retry finds it there: with the same digest it is a
success, with another it is an error, and either way nothing is counted twice. Forwards and parts
are transient: their loss costs one batch a retry, so they are never fsynced.

The trap: two processes may bear one incarnation (a restored snapshot of a machine does) and number
their calls alike. So a forward is created too and never overwritten by another; and as many losses
have the same gradient at the cut (a plain sum), two batches with one digest are the same only if
their parameter gradients are.

A batch is closed by its seal: what its parts add up to becomes one gradient file. Parts add up in
the order in which autograd reached the calls, in the gradients' own dtype, as autograd itself would
have done it. A gradient that isn't finite is answered like any other (GradScaler makes Inf by
design) but closes its id as rejected.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from splitfed.checks import positive
from splitfed.errors import (
    AlreadyAppliedError,
    BusyError,
    DigestError,
    ExpiredError,
    FormatError,
    InputError,
)
from splitfed.model.numerics import all_finite, common_class
from splitfed.protocol import checksum
from splitfed.protocol.ids import BatchId, check_client_id, check_number
from splitfed.protocol.messages import (
    BufferUpdate,
    Chain,
    ForwardRecord,
    GradientRecord,
    Housekeeping,
    Recipe,
    Seal,
)
from splitfed.protocol.packing import pack, peek, unpack
from splitfed.store.archive import Archive
from splitfed.store.batchset import MAX_GAPS, BatchSet, Outcome
from splitfed.store.cache import Bounded
from splitfed.store.checked import Checked
from splitfed.store.holder import Holder
from splitfed.store.layout import REFERENCE, TRANSIENT, Keys, read_pin
from splitfed.store.lineage import Lineage
from splitfed.store.numbers import MAX_SKIPS, Numbers, Skips

MAX_OPEN = 64
"""Holes that a process may have where it gives a number up: as many as it may have passes under
way at once."""
_UNFIT = "unfit"
"""The kind of a part in a log whose gradient isn't finite."""
_PROCESSES = 4096
OUTCOMES = {
    "gradient": Outcome.FOLDED,
    "rejected": Outcome.REJECTED,
    "skip": Outcome.SKIPPED,
}
"""What a gradient file of each kind is meant for; of no other kind is there a whole batch."""
_COPIES = (
    "two processes bear the incarnation of its client, as copies of a running one do. "
    "Make a new SplitClient in each of them"
)
_PLAIN = (
    "kind",
    "base_version",
    "num_samples",
    "loss_scale",
    "digest",
    "numerics",
    "holder",
    "upto",
    "flows",
)


class Pile:
    """The files of one lineage's batches.

    Args:
        blobs: The storage backend.
        keys: The lineage's keys.
    """

    def __init__(self, blobs: Checked, keys: Keys) -> None:
        self.blobs = blobs
        self.keys = keys

    def put_forward(
        self, version: int, client_id: str, incarnation: int, call: int, record: ForwardRecord
    ) -> None:
        """Keep a forward until its backward is confirmed or its version expires.

        Raises:
            DigestError: that call was made before with other content.
        """
        key = self.keys.forward(version, client_id, incarnation, call)
        parts = pack(record)
        if self.blobs.create(key, parts, durable=False):
            return
        data = self.blobs.get(key)
        if data is not None and bytes(data) == b"".join(checksum.sealed(parts)):
            return
        if data is not None and _asked(unpack(ForwardRecord, data)) != _asked(record):
            raise DigestError(
                f"call {call} of client {client_id!r} was made before with other content: {_COPIES}"
            )
        # A retry that was computed elsewhere: its bits are the ones that the client gets.
        self.blobs.put(key, parts)

    def forward(
        self, version: int, client_id: str, incarnation: int, call: int
    ) -> ForwardRecord | None:
        """A forward that is kept, or `None`."""
        data = self.blobs.get(self.keys.forward(version, client_id, incarnation, call))
        return None if data is None else unpack(ForwardRecord, data)

    def drop_forward(self, version: int, client_id: str, incarnation: int, call: int) -> None:
        """Delete a forward."""
        self.blobs.delete(self.keys.forward(version, client_id, incarnation, call))

    def pin(self, batch: BatchId, version: int) -> tuple[int, bool]:
        """Note the version that a one-trip batch runs at.

        Returns:
            `version`, or that of an earlier try of the batch; and whether no earlier one is known.
        """
        key = self.keys.pin(batch)
        if self.blobs.create(key, [json.dumps({"version": version}).encode()], durable=False):
            return version, True
        found = self.blobs.get(key)
        if found is None:  # dropped meanwhile
            return version, True
        return read_pin(found, key), False

    def drop_pin(self, batch: BatchId) -> None:
        """Delete the version of a one-trip batch."""
        self.blobs.delete(self.keys.pin(batch))

    def put_part(self, version: int, batch: BatchId, part: int, record: GradientRecord) -> None:
        """Keep one call's share of a batch until the batch is sealed.

        Raises:
            DigestError: this part was sent before with other content.
        """
        key = self.keys.part(version, batch, part)
        if not self.blobs.create(key, pack(record), durable=False):
            name = f"part {part} of batch {batch}"
            self._kind_at(key, record.digest, record.resumed, name)

    def part(self, version: int, batch: BatchId, part: int) -> GradientRecord | None:
        """A share that is kept, or `None`."""
        data = self.blobs.get(self.keys.part(version, batch, part))
        return None if data is None else unpack(GradientRecord, data)

    def drop_part(self, version: int, batch: BatchId, part: int) -> None:
        """Delete a share."""
        self.blobs.delete(self.keys.part(version, batch, part))

    def open_calls(self) -> list[str]:
        """The keys of what calls need: forwards, parts, pins, and references of their deltas."""
        kinds = (*TRANSIENT, REFERENCE)
        return [key for kind in kinds for key in self.blobs.list(f"{self.keys.root}/{kind}")]

    def drop_calls(self, keys: Iterable[str]) -> None:
        """Delete some of `open_calls()`: what is answered later raises, and counts nowhere."""
        for key in keys:
            self.blobs.delete(key)

    def create(
        self, batch: BatchId, record: GradientRecord, *, exactly: bool = False
    ) -> tuple[str, bool]:
        """Add a pending batch, once.

        Args:
            batch: Its id.
            record: Its content.
            exactly: Whether one of that digest must have this gradient too.

        Returns:
            The kind of the file that holds it, this one's or an earlier one's; and whether this
            call has surely made it.

        Raises:
            DigestError: that id was used before with other content.
        """
        key = self.keys.gradient(batch)
        if self.blobs.create(key, pack(record), durable=True):
            return record.kind, True
        name = f"batch {batch}"
        kind = self._kind_at(key, record.digest, record.resumed, name)
        if kind is None:
            return record.kind, False
        if exactly and kind == record.kind:
            found = self.read(batch)
            if found is not None and found.digest == record.digest:
                _check_recipes(found.recipes, record.recipes, name)
                _check_same(found.gradients, record.gradients, name)
        return kind, False

    def read(self, batch: BatchId) -> GradientRecord | None:
        """A pending batch, or `None`.

        Raises:
            FormatError: its file isn't a gradient of ours.
        """
        data = self.blobs.get(self.keys.gradient(batch))
        return None if data is None else unpack(GradientRecord, data)

    def peek(self, batch: BatchId) -> dict[str, object] | None:
        """A pending batch's header: its plain fields, without tensors; `None` if it isn't there.

        Raises:
            FormatError: its file isn't a gradient of ours.
        """
        data = self.blobs.peek(self.keys.gradient(batch))
        return None if data is None else peek(GradientRecord, data, _PLAIN)

    def waiting(self, client_id: str | None = None) -> list[BatchId]:
        """The batches on file, in canonical order; those of a clean-up that crashed among them.

        Args:
            client_id: Only those of one client.
        """
        folder = self.keys.gradients
        if client_id is not None:
            folder = f"{folder}/{check_client_id(client_id)}"
        found = (self.keys.parse_gradient(key) for key in self.blobs.list(folder))
        return sorted(batch for batch in found if batch is not None)

    def drop(self, batches: Iterable[BatchId]) -> None:
        """Delete batches; only those that the head's applied table holds may be."""
        for batch in batches:
            self.blobs.delete(self.keys.gradient(batch))

    def kind_of(self, batch: BatchId, digest: str, resumed: int = 0) -> str | None:
        """The kind of a pending batch that was made of a request; `None` if it isn't there.

        Args:
            batch: Its id.
            digest: Of the request.
            resumed: Which process of those that share an incarnation sends it.

        Raises:
            DigestError: it was made of another one.
        """
        key = self.keys.gradient(batch)
        return self._kind_at(key, digest, resumed, f"batch {batch}")

    def _kind_at(self, key: str, digest: str, resumed: int, name: str) -> str | None:
        """The kind of the file at a key, of the same digest; `None` if there is none.

        Raises:
            DigestError: it has other content.
        """
        data = self.blobs.peek(key)
        if data is None:
            return None
        found = peek(GradientRecord, data, ("kind", "digest", "resumed"))
        # A process that resumes repeats what an earlier one has stored: that stays as it is.
        is_repeated = resumed and found["resumed"] != resumed
        if found["digest"] != digest and not is_repeated:
            if found["kind"] == "skip":
                raise DigestError(f"{name} was given up by its client: take a new number")
            raise DigestError(
                f"{name} was sent before with other content: "
                f"expected {digest}, got {found['digest']}"
            )
        if not isinstance(found["kind"], str):
            raise FormatError(f"the file of {name} has no kind")
        return found["kind"]


class Sealer:
    """Closes the batches of one lineage.

    Args:
        lineage: Its applied table says which batches are counted.
        pile: The files of its batches.
        numerics: The short name of this process's numerics class.
        archive: Where recipes are kept; `None` where they aren't.
        holder: Where gradients in a log are held in memory; `None` for nowhere.
        repeatable: Whether the same operations give the same bits each time here; if not, a
            gradient is on file even in a log.
    """

    def __init__(
        self,
        lineage: Lineage,
        pile: Pile,
        numerics: str,
        archive: Archive | None = None,
        holder: Holder | None = None,
        *,
        repeatable: bool = True,
    ) -> None:
        self._lineage = lineage
        self._pile = pile
        self._numerics = numerics
        self._archive = archive
        self._in_log = lineage.durability == "log" and repeatable
        self._holder = holder if self._in_log else None
        self.wants_recipes = self._in_log or archive is not None
        """Whether what is stored must say what its gradient follows from."""
        self._numbers: Bounded[tuple[str, int], Numbers] = Bounded(_PROCESSES)
        self._skips: Bounded[str, Skips] = Bounded(_PROCESSES)
        self._lock = threading.Lock()

    def hand_over(self) -> None:
        """Write what is held in memory of a log.

        Raises:
            StoreError: the storage failed.
        """
        if self._holder is not None:
            self._holder.write()

    def is_known(self, batch: BatchId) -> bool:
        """Whether a batch is counted or pending."""
        # The file is looked for first: a batch that is committed in between has none any more, and
        # is in the table then. The other way round it would be found in neither.
        return self._pile.peek(batch) is not None or batch in self._lineage.counted()

    def store(
        self,
        batch: BatchId,
        record: GradientRecord,
        *,
        is_one_trip: bool = False,
        is_first: bool = False,
        is_whole: bool = True,
    ) -> str:
        """Add a pending batch, as rejected if it isn't finite; a repeated call changes nothing.

        Args:
            batch: Its id.
            record: What it contributes.
            is_one_trip: Whether the record was computed just now, at a version of this side's
                choice.
            is_first: Whether the store knows of no earlier try; then a batch that is counted was
                computed at another version than this record may be.
            is_whole: Whether the record has the gradients of all of its calls.

        Returns:
            'stored' or 'rejected'; 'skipped' if it repeats one that an earlier process gave up.

        Raises:
            AlreadyAppliedError: the batch is counted, and was computed at another version, which
                the store has no record of any more.
            DigestError: the batch was sent before with other content.
            BusyError: too many of the client's earlier batches are missing.
        """
        positive("num_samples", record.num_samples)
        if not math.isfinite(record.loss_scale) or record.loss_scale == 0:
            raise InputError(
                f"loss_scale of batch {batch} is {record.loss_scale}: "
                "expected a finite number other than 0"
            )
        applied = self._lineage.counted()
        if batch in applied:
            if not record.resumed:
                self._check_counted(batch, record, is_one_trip=is_one_trip, is_first=is_first)
            return _status(self._lineage.outcome(batch), record.resumed)
        self._take(batch, applied, MAX_GAPS)
        stored = self._as_stored(batch, record, is_whole=is_whole)
        kind, is_new = self._pile.create(batch, stored, exactly=True)
        # One that was there may have been computed elsewhere, with other bits.
        if is_new and self._holder is not None and stored.holder:
            self._holder.put(batch, record)
        return _status(OUTCOMES[kind], record.resumed)

    def _as_stored(
        self, batch: BatchId, record: GradientRecord, *, is_whole: bool
    ) -> GradientRecord:
        """What is on file of a batch: its gradient, or in a log its recipes; neither if it's unfit.

        What it follows from is archived, where that is done, before the gradient is there.
        """
        if record.kind != "gradient" or not _is_finite(record):
            unfit = replace(record, kind="rejected", gradients={}, buffers=[])
            return replace(unfit, recipes=(), seal=None)
        if self._in_log and record.recipes:
            held = self._holder if is_whole else None
            name = "" if held is None else held.check_process()
            return replace(record.as_recipes(), holder=name)
        if self._archive is not None and record.recipes:
            self._archive.put(batch, record, self.is_known)
        return record.as_gradient()

    def put_part(self, version: int, batch: BatchId, part: int, share: GradientRecord) -> None:
        """Keep one call's share of a batch until the batch is sealed.

        Raises:
            DigestError: this part was sent before with other content.
        """
        record = replace(share, kind="part")
        if self._in_log and share.recipes:
            kind = "part" if _is_finite(share) else _UNFIT
            record = replace(share.as_recipes(), kind=kind)
        self._pile.put_part(version, batch, part, record)
        if self._holder is not None:
            self._holder.put_part(batch, part, share)

    def _check_counted(
        self, batch: BatchId, record: GradientRecord, *, is_one_trip: bool, is_first: bool
    ) -> None:
        """Refuse a batch that is counted and surely isn't this one."""
        ran_elsewhere = self._lineage.ran_elsewhere(batch, record.base_version)
        if is_first or (is_one_trip and ran_elsewhere):
            raise answer_is_lost(batch)
        if ran_elsewhere:
            # What was sent is on file no more; but a retry has the version of its first try.
            raise DigestError(
                f"batch {batch} is counted with other content, of another version: {_COPIES}"
            )

    def seal(
        self, batch: BatchId, own: int, seal: Seal, share: GradientRecord | None, resumed: int = 0
    ) -> str:
        """Make a batch of its parts.

        Args:
            batch: Its id.
            own: The part number of the call that rides along.
            seal: Which parts make it, in the order in which they are added.
            share: That call's share, which comes last; `None` if no call rides along.
            resumed: Which process of those that share an incarnation sends it.

        Returns:
            As `store`.

        Raises:
            ExpiredError: a part is gone and the batch isn't known: it is lost, and counts nowhere.
        """
        parts = self._parts(batch, seal)
        digest = seal.digest(batch) if share is None else share.digest
        if parts is None:
            return self._status(batch, digest, resumed)
        if share is not None:
            parts[own] = share
        if not parts:
            raise InputError(f"the seal of batch {batch} names no part: expected at least one")
        # In a log the parts of before are recipes alone, unless they are held in memory.
        is_whole = all(part.buffers for part in parts.values())
        record = sum_of(parts, seal, digest, resumed, of_recipes=not is_whole)
        status = self.store(batch, record, is_whole=is_whole)
        # Only now: were the parts dropped first and the process killed, the retry would find
        # neither parts nor batch.
        for version, number in seal.parts:
            self._pile.drop_part(version, batch, number)
        return status

    def tidy(self, client_id: str, incarnation: int, housekeeping: Housekeeping) -> None:
        """Delete what a client has confirmed, and close the numbers that it gave up.

        Raises:
            BusyError: it has given up too many.
        """
        for version, call in housekeeping.released:
            self._pile.drop_forward(version, client_id, incarnation, call)
        for seq in housekeeping.answered:
            self._pile.drop_pin(BatchId(client_id, incarnation, seq))
        if housekeeping.abandoned:
            self._give_up(client_id, incarnation, housekeeping.abandoned)

    def _give_up(self, client_id: str, incarnation: int, numbers: Iterable[int]) -> None:
        """Close numbers by skips: what comes later under them is refused."""
        applied = self._lineage.counted()
        skips = self._skips.get(client_id) or self._skips.put(client_id, Skips())
        # In order: one after another they make no hole, whatever order they come in.
        for seq in sorted(set(numbers)):
            batch = BatchId(client_id, incarnation, check_number("seq", seq))
            if batch in applied or batch in skips:
                continue
            if not skips.may_add(applied):
                raise BusyError(
                    f"client {client_id!r} has given up more than {MAX_SKIPS} batches that no "
                    "commit has closed: does an accumulator run? Try again after its next commit"
                )
            self._take(batch, applied, MAX_OPEN)
            skip = GradientRecord("skip", 0, 0.0, 1.0, "", self._numerics, {}, [])
            try:
                self._pile.create(batch, skip)
            except (DigestError, FormatError):
                continue  # a gradient that was late has come first: it counts
            skips.add(batch)

    def _parts(self, batch: BatchId, seal: Seal) -> dict[int, GradientRecord] | None:
        """The parts that a seal names; `None` if they are gone because the batch was sealed."""
        parts: dict[int, GradientRecord] = {}
        for version, number in seal.parts:
            part = self._pile.part(version, batch, number)
            if part is None:
                if self.is_known(batch):  # an earlier try of this seal dropped them
                    return None
                raise ExpiredError(
                    f"part {number} of batch {batch} has left the store, "
                    "so the batch is lost and counts nowhere: go on with the next one"
                )
            if len(part.buffers) not in (1, 2) and not part.recipes:
                raise FormatError(
                    f"part {number} of batch {batch} isn't one call's share: "
                    f"{len(part.buffers)} of them"
                )
            held = None
            if self._holder is not None:
                held = self._holder.take_part(batch, number, part.digest)
            if held is not None and part.kind != _UNFIT:
                part = replace(held, kind=part.kind, recipes=part.recipes)
            parts[number] = part
        return parts

    def _status(self, batch: BatchId, digest: str, resumed: int) -> str:
        """What is answered of a batch that is counted or pending.

        Raises:
            DigestError: it is pending, and was made of another request: of a copy of this process.
        """
        kind = self._pile.kind_of(batch, digest, resumed)
        if kind is None:
            return _status(self._lineage.outcome(batch), resumed)
        return _status(OUTCOMES.get(kind, Outcome.FOLDED), resumed)

    def _take(self, batch: BatchId, applied: BatchSet, most: int) -> None:
        """Take note of a number, unless its process has too many holes.

        One that fills a hole is always let in, else a client with many holes never gets out.

        Args:
            batch: Whose number it is.
            applied: The batches that are closed.
            most: How many holes there may be.
        """
        process = (batch.client_id, batch.incarnation)
        numbers = self._numbers.get(process)
        if numbers is None:
            numbers = self._numbers.put(process, self._look(batch, applied))
        with self._lock:
            if numbers.has_room(batch.seq, most):
                numbers.add(batch.seq)
                return
        # Other servers may have filled some since.
        numbers = self._numbers.put(process, self._look(batch, applied))
        if not numbers.has_room(batch.seq, most):
            raise BusyError(
                f"client {batch.client_id!r} has more than {most} holes in its sequence of "
                "batches: earlier ones are still under way or lost. Try again after the next commit"
            )
        with self._lock:
            numbers.add(batch.seq)

    def _look(self, batch: BatchId, applied: BatchSet) -> Numbers:
        """The numbers of a process, as the store has them: closed and pending."""
        runs = [*applied.runs(batch)]
        if batch.seq > 0 or runs:  # the first number of a process has none before it
            for pending in self._pile.waiting(batch.client_id):
                if pending.incarnation == batch.incarnation:
                    runs.append([pending.seq, pending.seq])
        return Numbers(runs)


def answer_is_lost(batch: BatchId) -> AlreadyAppliedError:
    """What a one-trip batch is told whose first try ran at a version that isn't on record."""
    return AlreadyAppliedError(
        f"batch {batch} is counted already, or will be by the next commit, and the version that it "
        "ran at is no longer on record, so its answer can't be repeated: go on with the next one"
    )


def _status(outcome: Outcome, resumed: int) -> str:
    """What a client is answered; one that repeats a batch is told if that was given up."""
    return "skipped" if resumed and outcome is Outcome.SKIPPED else outcome.status


def sum_of(
    parts: Mapping[int, GradientRecord],
    seal: Seal,
    digest: str,
    resumed: int = 0,
    *,
    of_recipes: bool = False,
) -> GradientRecord:
    """A batch: the gradient that its parts add up to, or their recipes.

    Args:
        parts: Its parts by number, in the order in which they are added.
        seal: What closes it.
        digest: Of the request that does.
        resumed: Which process of those that share an incarnation sends it.
        of_recipes: Whether the parts are recipes, and only the last has its gradient still.
    """
    shares = [*parts.values()]
    recipes = tuple(recipe for part in shares for recipe in part.recipes)
    return GradientRecord(
        kind="rejected" if any(part.kind == _UNFIT for part in shares) else "gradient",
        base_version=min(part.base_version for part in shares),
        num_samples=seal.num_samples,
        loss_scale=seal.loss_scale,
        digest=digest,
        # Whoever adds them up adds nothing of its own: a sum of two has the same bits anywhere.
        numerics=common_class(part.numerics for part in shares),
        # Of the call that rides along: whether it is finite is tested when it is stored.
        gradients=shares[-1].gradients if of_recipes else _sum(shares),
        buffers=[] if of_recipes else _updates(seal.chains, parts),
        resumed=resumed,
        recipes=recipes,
        seal=seal if recipes else None,
    )


def _is_finite(record: GradientRecord) -> bool:
    return all(all_finite(gradient) for gradient in record.gradients.values())


def _sum(parts: Sequence[GradientRecord]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, gradient in part.gradients.items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _updates(chains: Sequence[Chain], parts: Mapping[int, GradientRecord]) -> list[BufferUpdate]:
    """What the chains of a batch left in the buffers; those that continue each other are one."""
    found: dict[int, BufferUpdate] = {}
    for chain in chains:
        update = _last_update(chain, parts)
        if chain.after is not None and chain.after >= 0:
            earlier = found.pop(chain.after, None)
            if earlier is None:
                raise InputError(
                    f"a seal has a chain after part {chain.after}: "
                    f"expected the last part of an earlier chain, {sorted(found)}"
                )
            bases = {**update.bases, **earlier.bases}
            total = earlier.num_samples + update.num_samples
            update = BufferUpdate(update.values, bases, total)
        found[chain.last_part] = update
    return list(found.values())


def _last_update(chain: Chain, parts: Mapping[int, GradientRecord]) -> BufferUpdate:
    """What a chain of calls left in the buffers: its last call's update, weighted as the chain."""
    if chain.last_part not in parts:
        raise InputError(
            f"a seal names part {chain.last_part}, which isn't among its parts {sorted(parts)}"
        )
    # The first is the change from the version, the last that from what the call began with.
    buffers = parts[chain.last_part].buffers
    last = buffers[-1] if chain.after == -1 else buffers[0]
    return BufferUpdate(last.values, last.bases, positive("num_samples", chain.num_samples))


def _asked(record: ForwardRecord) -> bytes:
    """What was asked for, without what came of it: another numerics class has other bits there."""
    return b"".join(pack(replace(record, buffers=None, outputs=(), crcs=(), numerics="")))


def _check_recipes(found: Sequence[Recipe], computed: Sequence[Recipe], name: str) -> None:
    """Refuse recipes whose digest is on file with other inputs.

    Raises:
        DigestError: they are others.
    """
    pairs = zip(found, computed, strict=False)
    if any(_asked(one.forward) != _asked(other.forward) for one, other in pairs):
        raise DigestError(f"{name} was sent before for other inputs: {_COPIES}")


def _check_same(found: Mapping[str, Tensor], computed: Mapping[str, Tensor], name: str) -> None:
    """Refuse a gradient whose digest is on file with another gradient.

    A repeated backward may be computed by a kernel without a fixed order, or in another numerics
    class: differences of rounding are none. They are measured by the gradient as a whole: that of a
    bias before a BatchNorm is zero but for rounding, and all of it differs.

    Raises:
        DigestError: it is another one.
    """
    lengths, distances = [], {}
    for parameter, gradient in computed.items():
        other = found.get(parameter)
        if other is None or other.shape != gradient.shape:
            raise DigestError(f"{name} was sent before for other inputs: {_COPIES}")
        wide = torch.complex128 if gradient.is_complex() else torch.float64
        own = gradient.detach().to("cpu", wide)
        lengths.append(float(own.norm()))
        distances[parameter] = float((own - other.to("cpu", wide)).norm())
    whole = math.hypot(*filter(math.isfinite, lengths))
    for parameter, distance in distances.items():
        if not math.isfinite(distance):
            continue
        if distance > torch.finfo(computed[parameter].dtype).eps ** 0.5 * whole:
            raise DigestError(f"{name} was sent before for other inputs: {_COPIES}")
