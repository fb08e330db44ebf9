"""The store: all state of a run, as files that any replica, worker or accumulator reads and writes.

Server and accumulator never meet but here. This file is the door: the keys of the files are in
`layout`, how versions are added in `lineage`, how batches are kept in `batches`, which process of a
client counts in `clients`, and the storage backends are `splitfed.blobs`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from splitfed.blobs.url import open_blobs
from splitfed.errors import (
    ArchitectureError,
    BusyError,
    CorruptedError,
    FormatError,
    InputError,
    MissingError,
    StoreError,
    UnsupportedError,
)
from splitfed.model.numerics import class_id, numerics_class
from splitfed.protocol.ids import BatchId
from splitfed.protocol.packing import read_json
from splitfed.store import layout
from splitfed.store.archive import Archive
from splitfed.store.aside import folder_of, set_aside
from splitfed.store.batches import Pile
from splitfed.store.cache import Bounded
from splitfed.store.checked import Checked
from splitfed.store.clients import Clients
from splitfed.store.commit import Commit
from splitfed.store.holder import Holder
from splitfed.store.lineage import Lineage
from splitfed.store.rounds import Rounds
from splitfed.store.together import Pair, Together

FORMAT_VERSION = 2
"""The format of stores that are begun here; since 2 each file has a checksum."""
READABLE = (1, 2)
KEPT_LINEAGES = 32
_log = logging.getLogger("splitfed")
LOCK_SECONDS = 10.0
"""How long who changes a store by hand waits for the accumulator's lock."""


class GradientStore:
    """Weights by version, pending gradients, and the record of every commit, at any fsspec URL.

    Args:
        url: A local folder (`"runs/demo"`), or any fsspec URL (`file://`, `memory://` ...).
        sync: How durable an acknowledged batch is. `"power"` survives a power cut (gradients,
            states and commits are fsynced); `"process"` survives SIGKILL and is faster. Activations
            are never fsynced: their loss costs one batch a retry.
        shared: Whether the users of a group share a local folder: what is created in it is for the
            group too, as far as the umask lets it. That is so without it where the folder that
            holds the store is setgid; elsewhere a store is its owner's alone.
        keep_forwards: Whether a run that begins here keeps what its gradients follow from
            (activations, the gradients at the cut, the weights of version 0) after they are
            counted, so that `replay` can compute each version again from the store alone. It is
            noted in the store, and whoever opens it later does so too. About as many bytes a batch
            as cross the cut, for ever.
        fresh: Whether a new run is to begin here. One in which something was trained is set aside
            first: its folder becomes `NAME-until-DATE-TIME` (`aside`). Only for the process that
            begins the run; others, and a restarted one, open the store without it.
        storage_options: Passed to the fsspec filesystem.

    Raises:
        InputError: an unknown `sync` or URL; or `fresh=True` with a run that isn't in a folder.
        BusyError: `fresh=True`, and an accumulator is at work on the run.
        StoreCapabilityError: the backend has no atomic create-if-absent.

    Opening one does no I/O, but for `fresh=True`; the first use does. It may be shared between
    threads, and used after a fork.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        sync: Literal["power", "process"] = "power",
        shared: bool = False,
        keep_forwards: bool = False,
        fresh: bool = False,
        **storage_options: Any,
    ) -> None:
        if sync not in ("power", "process"):
            raise InputError(
                f"sync={sync!r} isn't known: expected 'power' (fsync) "
                "or 'process' (survives SIGKILL only)"
            )
        self.sync = sync
        self.shared = shared
        self._keeps_forwards = keep_forwards
        self.storage_options: Mapping[str, Any] = MappingProxyType(dict(storage_options))
        """What the fsspec filesystem is given; it may hold secrets."""
        self._open_blobs(url)
        self.url = os.fspath(url)
        if fresh:
            self.begin_anew()

    def _open_blobs(self, url: str | os.PathLike[str]) -> None:
        """Open the storage; nothing of a run is known yet."""
        raw = open_blobs(
            url, fsync=self.sync == "power", shared=self.shared, **self.storage_options
        )
        self.blobs = Checked(raw)
        """The storage backend, whose objects carry checksums."""
        self.is_continued: bool | None = None
        """Whether the run had versions when this process came to it; `None` before it has."""
        self.attended = False
        """Whether this process has an accumulator on it."""
        self._lineages: Bounded[str, tuple[Lineage, Pile]] = Bounded(KEPT_LINEAGES)
        self._holders: dict[str, Holder] = {}
        self._registry: Clients | None = None
        self._rounds: Rounds | None = None
        self._lock = threading.Lock()
        self._header: dict[str, Any] | None = None

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a GradientStore, or a server or accumulator on it, can't be pickled or deep-copied: "
            f"open the store again where it is needed, GradientStore({self.shown!r})"
        )

    def __repr__(self) -> str:
        return f"GradientStore({self.shown!r}, sync={self.sync!r})"

    @property
    def shown(self) -> str:
        """The URL without secrets."""
        return str(getattr(self.blobs, "url", self.url))

    def begin_anew(self) -> str | None:
        """Set a run aside in which something was trained, so that another one begins here.

        What this process has made of the old run, such as its servers, is of no use any more.

        Returns:
            Where the old run is now; `None` if nothing was trained here, and all stays as it is.

        Raises:
            InputError: it isn't in a folder of this machine.
            BusyError: an accumulator is at work on it.
        """
        if self.header() is None:
            return None
        heads = {name: self.lineage(name).head() for name in self.lineages()}
        # Of several processes that each say fresh=True, the second mustn't undo what the first has
        # begun: a run in which nothing was trained stays.
        if max(heads.values(), default=0) <= 0 and not self.rounds().newest():
            return None
        folder = folder_of(self.blobs.raw, self.shown)
        with self.alone(heads):
            pass  # nobody is at work; held any longer, the locks' files couldn't move with it
        times = [self.lineage(name).commit(head).time for name, head in heads.items() if head >= 0]
        moved = set_aside(folder, max(times))
        _log.warning("a run at %s was set aside: it is at %s now", self.shown, moved)
        self._open_blobs(self.url)
        return moved

    def note_begun(self, head: int) -> None:
        """Take note of the version at which a process comes to the run; one to go on from is told.

        It is told once, as a warning of the log: a script that is run again goes on with the run
        of before, which may be what nobody meant.

        Args:
            head: The newest version of the lineage that it works on.
        """
        if self.is_continued is None:
            self.is_continued = head > 0
            if self.is_continued:
                about = "continuing %s at version %d (to begin a new run, give fresh=True)"
                _log.warning(about, self.shown, head)

    def latest_version(self, lineage: str = "body") -> int:
        """The newest version of a lineage.

        Raises:
            MissingError: nobody has begun it.
        """
        self.confirm()
        head = self.lineage(lineage).head()
        if head < 0:
            self.lineage(lineage).fingerprint()
            raise MissingError(
                f"lineage {lineage!r} is being begun and has no version yet: try again"
            )
        return head

    def load_weights(self, version: int | None = None, lineage: str = "body") -> dict[str, Tensor]:
        """The weights of a version, with the keys of the module's `state_dict()`.

        Args:
            version: Which; the newest if it isn't given.
            lineage: Of which line: `body`, `client` or `body@<id>`.

        Raises:
            MissingError: there is no such version.
            ExpiredError: it has left the retention window.
            CorruptedError: the file was changed from outside.
        """
        chosen = self.latest_version(lineage) if version is None else version
        return self.lineage(lineage).weights(chosen)

    def waiting(self, lineage: str = "body") -> list[BatchId]:
        """The batches that are pending: on file and in no commit yet, in canonical order."""
        self.confirm()
        versions = self.lineage(lineage)
        # The files are listed first: a batch that is folded in between is then in the table, and
        # the other way round it would be found on file and not counted.
        found = self.pile(lineage).waiting()
        applied = versions.counted() if versions.head() >= 0 else ()
        return [batch for batch in found if batch not in applied]

    def rollback(self, version: int, lineage: str = "body") -> list[str]:
        """Go back: make the next version from the state of an older one.

        Where body and halves are committed together, the halves go back with the body.

        Returns:
            The ids of the batches that are thereby lost; they don't count again.

        Raises:
            InputError: the version isn't older than the newest, or it is one of the halves that
                are committed together with the body.
            ExpiredError: it has left the retention window.
        """
        return self.roll_back(version, lineage)[1]

    def roll_back(self, version: int, lineage: str = "body") -> tuple[Commit, list[str]]:
        """As `rollback`; returns the commit too."""
        if lineage in ("body", "client") and self.together().is_begun():
            if lineage == "client":
                raise InputError(
                    "the halves are committed together with the body, and can't go back without "
                    "it: roll back lineage 'body', and the halves follow"
                )
            return self.together().rollback(version)
        return self.lineage(lineage).rollback(version)

    def together(self) -> Together:
        """Which versions of body and halves belong together, where one commit makes both."""
        (body, batches), (halves, updates) = self._open("body"), self._open("client")
        return Together(body, batches, halves, updates)

    def pair(self) -> Pair:
        """The newest version of the body, and that of the client halves that belongs to it.

        Where they aren't committed together it is the newest of each.

        Raises:
            MissingError: nobody has begun one of them.
        """
        found = Pair(self.latest_version(), self.latest_version("client"))
        together = self.together()
        return together.newest() if together.is_begun() else found

    def lineages(self) -> list[str]:
        """The names of all lineages that were begun, sorted."""
        return layout.lineages(self.blobs.list(""))

    @contextlib.contextmanager
    def alone(self, lineages: Iterable[str]) -> Iterator[None]:
        """Keep accumulators of this host away from lineages, for who changes what they rely on.

        Raises:
            BusyError: one is at work on them.
        """
        with contextlib.ExitStack() as locks:
            for name in sorted(set(lineages)):
                lock = self.blobs.lock(layout.Keys(name).lock, LOCK_SECONDS)
                if not locks.enter_context(lock):
                    raise BusyError(
                        f"an accumulator is at work on lineage {name!r} of {self.shown}: "
                        "stop it first"
                    )
            yield

    def lineage(self, name: str = "body") -> Lineage:
        """The versions of a lineage."""
        return self._open(name)[0]

    def holder(self, lineage: str = "body") -> Holder:
        """What this process holds in memory of the gradients of a log."""
        versions = self.lineage(lineage)
        with self._lock:
            if lineage not in self._holders:
                self._holders[lineage] = Holder(versions)
            return self._holders[lineage]

    def pile(self, lineage: str = "body") -> Pile:
        """The files of a lineage's batches."""
        return self._open(lineage)[1]

    def archive(self, lineage: str = "body") -> Archive | None:
        """What folded gradients of a lineage follow from; `None` where that isn't kept."""
        if not self.keeps_forwards:
            return None
        return Archive(self.blobs, self.lineage(lineage).keys)

    @property
    def keeps_forwards(self) -> bool:
        """Whether what gradients follow from is kept after they are counted."""
        found = self.header()
        return self._keeps_forwards if found is None else bool(found.get("keep_forwards"))

    def confirm(self) -> None:
        """Check that the run that was opened is still there, where that costs next to nothing.

        Raises:
            CorruptedError: it was deleted, or another one was begun in its place.
        """
        self.lineage().confirm()

    def rounds(self) -> Rounds:
        """The rounds of a federation: plans, decisions and reports."""
        if self._rounds is None:
            self.header()
            self._rounds = Rounds(self.blobs)
        return self._rounds

    def begin(self, device: torch.device) -> str:
        """Open the store for computing: check its format, and this process's numerics class.

        Returns:
            The short name of this process's class, which its batches carry.

        Raises:
            FormatError: the store is of another format version.
        """
        expected = self._read_format(device)["numerics"]
        own = numerics_class(device, expected)
        if own != expected:
            names = {*own, *expected}
            differing = {
                name: (expected.get(name), own.get(name))
                for name in names
                if own.get(name) != expected.get(name)
            }
            warnings.warn(
                "this process computes in another numerics class "
                f"than version 0 of {self.shown} did: {differing} (theirs, ours). "
                "Its batches are exact up to rounding, and counted; bits may differ",
                stacklevel=3,
            )
        return class_id(own)

    def _read_format(self, device: torch.device) -> dict[str, Any]:
        """The store's format record; if there is none, it is begun with this numerics class."""
        if self.header() is None:
            self.blobs.probe()
            header = {"format": FORMAT_VERSION, "numerics": numerics_class(device)}
            # The header may have been lost: then what was kept says that it is kept.
            if self._keeps_forwards or self.blobs.list("body/kept"):
                header["keep_forwards"] = True
            self.blobs.create(layout.FORMAT, [json.dumps(header, indent=1).encode()])
        found = self.header()
        if found is None:
            raise FormatError(f"{self.shown} has no {layout.FORMAT}, though it was just created")
        if self._keeps_forwards and not found.get("keep_forwards"):
            raise InputError(
                f"the run in {self.shown} was begun without keep_forwards=True, so what its "
                "earlier gradients follow from is gone: begin a new run with it, or open this one "
                "without it"
            )
        return found

    def header(self) -> dict[str, Any] | None:
        """The store's format record; `None` if nobody has begun it.

        Raises:
            FormatError: the store is of another format version.
            CorruptedError: the record is damaged.
        """
        if self._header is not None:
            return self._header
        damage: StoreError | FormatError | None = None
        try:
            data = self.blobs.get(layout.FORMAT)
        except (CorruptedError, FormatError) as error:
            # Unless it is of a later format, which may have another checksum.
            damage, data = error, self.blobs.raw.get(layout.FORMAT)
        if data is None:
            return None
        found = read_json(data, layout.FORMAT)
        version = found.get("format")
        if version not in READABLE or not isinstance(found.get("numerics"), dict):
            raise FormatError(
                f"{self.shown} has format {version!r}, expected one of {READABLE}: "
                "use the splitfed that wrote it"
            )
        if damage is not None:
            raise damage
        self.blobs.note_format(version, data)
        self._header = found
        return found

    def check_beside(self, lineage: str, values: Mapping[str, Any], numerics: str) -> None:
        """Compare the tensors that no version has with those of the first server.

        Args:
            lineage: Whose body it is.
            values: What tells them, as `values_beside` finds it; nothing happens if there are none.
            numerics: The short name of this process's numerics class.

        Raises:
            ArchitectureError: a transient buffer has other values, so answers would differ from
                replica to replica.
        """
        if not values:
            return
        key = self.lineage(lineage).keys.beside
        if self.blobs.get(key) is None:
            self.blobs.create(key, [json.dumps(values, indent=1).encode()])
        expected = read_json(self.blobs.get(key), key)
        differing = [name for name, found in values.items() if expected.get(name) != found]
        if not differing:
            return
        # In another shape, a table may just have grown in use; in another numerics class, a cosine
        # may be rounded otherwise; and an attribute may hold what a forward left. Random features
        # in a buffer are neither.
        is_same_class = numerics == self.numerics()
        refused = [n for n in differing if is_same_class and _differs(expected.get(n), values[n])]
        said = (
            f"{(refused or differing)[:5]} of the body isn't as it was when the store was begun, "
            "and it is in no version: register it as a persistent buffer, "
            "or make it the same on each replica, with a seed of its own"
        )
        if refused:
            raise ArchitectureError(said)
        warnings.warn(said, stacklevel=3)

    def numerics(self) -> str:
        """The short name of version 0's numerics class."""
        return class_id(self._header["numerics"]) if self._header else ""

    def clients(self) -> list[str]:
        """The ids of all clients that ever pulled or trained, sorted."""
        return self.registry().ids()

    def join_client(self, client_id: str) -> None:
        """Make a client known, so that it can be sampled."""
        self.registry().join(client_id)

    def open_client(self, client_id: str, process: str | None = None) -> int:
        """The incarnation of a client's process: its own if it has one, else a new one.

        From then on the client's processes of before can't count any more.

        Args:
            client_id: The client.
            process: What the process calls itself; a random string, so that a repeated request
                opens nothing new.

        Raises:
            CorruptedError: the run was deleted, or begun again, while this store was open.
        """
        self.lineage().checked_head()
        return self.registry().open(client_id, process)

    def check_client(self, client_id: str, incarnation: int) -> None:
        """Refuse a process that isn't its client's newest.

        Raises:
            SupersededError: it isn't, or was never opened.
        """
        self.registry().check(client_id, incarnation)

    def registry(self) -> Clients:
        """The registry of clients and their processes."""
        if self._registry is None:
            self.header()
            self._registry = Clients(self.blobs)
        return self._registry

    def _open(self, name: str) -> tuple[Lineage, Pile]:
        with self._lock:
            found = self._lineages.get(name)
            if found is None:
                self.header()  # a store that a later splitfed has begun is refused, not read
                lineage = Lineage(self.blobs, name)
                found = self._lineages.put(name, (lineage, Pile(self.blobs, lineage.keys)))
            return found


def _differs(expected: Any, found: Mapping[str, Any]) -> bool:
    """Whether a transient buffer has other values in the same shape."""
    if not isinstance(expected, dict) or found["kind"] != "buffer":
        return False
    return all(expected.get(key) == found[key] for key in ("kind", "shape", "dtype"))


def check_store(store: object) -> None:
    """Refuse what isn't a store.

    Raises:
        InputError: it isn't.
    """
    if not isinstance(store, GradientStore):
        raise InputError(
            f"store is a {type(store).__name__}: expected a GradientStore, "
            "as in GradientStore('runs/demo')"
        )
