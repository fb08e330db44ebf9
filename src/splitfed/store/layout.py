"""The keys of a store: every key is made here, and parsed here.

    format.json                              create-once: format version, numerics of version 0
    clients/<id>/<incarnation>               create-once: one per client process
    clients/<id>/joined                      create-once: it has pulled, and may be sampled
    clients/<id>/forgotten                   create-once: what was kept of it is gone (`forget`)
    rounds/<number>/                         each create-once, in this order:
      plan.json                                who is sampled, and from which versions
      ending.json                              the decision which updates count
      report.json                              the report of the round
      finished.json                            no round follows for now
    history/<number>.jsonl                   create-once: rows of the run's history
    post/<id>/                               mail of clients without a server; transient
      <process>-<number>.request               a client asks
      <process>-<number>.claim-<k>             create-once: a worker has taken it
      <process>-<number>.answer                create-once: its answer
    <lineage>/                               body | client | body@<id>
      fingerprint.json                         create-once: names, shapes, dtypes, ties, roles
      fingerprint-copy.json                    create-once: the same, for `repair`
      beside.json                              create-once: CRCs of what no version has
      frozen-<sha256>.safetensors              create-once: parameters that never train
      forward/<id>/<version>-<incarnation>-<call>   the record of a forward; transient
      part/<id>/<version>-<incarnation>-<seq>-<k>   one call's share of an open batch; transient
      pin/<id>/<incarnation>-<seq>             the version of a one-trip loss call; transient
      reference/<id>/<incarnation>-<hash>      what next deltas are the change from; a cache
      grad/<id>/<incarnation>-<seq>            create-once: a pending batch
      kept/<id>/<incarnation>-<seq>            what a folded batch follows from (keep_forwards)
      sum/<version>-<holder>-<number>          what gradients of a log add up to; a cache
      ask/<holder>                             an accumulator asks a server to write its sums
      window.json                              create-once: of a log: how long versions are needed
      together.json                            create-once: of client: committed with the body
      settings-<hash>.safetensors              create-once: how commits step
      weights/<version>-<nonce>.safetensors    never overwritten
      optimizer/<version>-<nonce>.safetensors  never overwritten
      applied/<version>-<nonce>.json           now and then: never overwritten
      commit/<version>.json                    CREATE-ONCE = the commit; never deleted
      head                                     a hint only

Each file carries a checksum (`checked`). Folders are of clients and not of versions: a local store
has as many as there are clients, however long it lives.

Numbers are zero-padded, so that listings sort as they do. The trap is a file whose name spells a
number otherwise: it would be a second file of the same batch. So `parse_gradient` makes the key
again and compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from splitfed.errors import FormatError, IdError
from splitfed.protocol.ids import BatchId, check_client_id, check_lineage, check_number
from splitfed.protocol.packing import read_json

FORMAT = "format.json"
HISTORY = "history"
CLIENTS = "clients"
_CLIENT = re.compile(r"clients/([A-Za-z0-9][A-Za-z0-9_.-]{0,63})/(?:\d{8,12}|joined|forgotten)")
_GRADIENT = re.compile(r"grad/([^/]+)/(\d{8,12})-(\d{10,12})")
_VERSIONED = re.compile(
    r"(?:weights|optimizer|applied)/(\d{10,12})-([0-9a-f]+)\.(?:safetensors|json)"
)
_BEGUN = re.compile(r"(body|client|body@[^/]+)/(?:commit/\d{10,12}\.json|fingerprint\.json)")
_HOLDER = re.compile(r"[0-9a-f]{16}")
_HASH = _HOLDER
_SUM = re.compile(r"sum/(\d{10,12})-[0-9a-f]{16}-\d{10,12}")
_HISTORY = re.compile(r"history/(\d{10,12})\.jsonl")
POST = "post"
_POST = re.compile(r"post/([^/]+)/([0-9a-f]{32}-\d{10,12})\.(request|answer|claim-\d{4})")
TRANSIENT = ("forward", "part", "pin")
"""The folders of a lineage whose files are needed until calls are answered, and not after."""
REFERENCE = "reference"
_REFERENCE = re.compile(r"reference/([^/]+)/(\d{8,12})-[0-9a-f]{16}")
_TRANSIENT = re.compile(
    r"(?:forward|part)/(?:([^/]+)/(\d{10,12})-|(\d{10,12})/([^/]+)/)(\d{8,12})-[\d-]+"
)
_BATCH = re.compile(r"(?:pin|grad|kept)/([^/]+)/(\d{8,12})-\d{10,12}")


def client(client_id: str, incarnation: int | None = None) -> str:
    """The key of a client's process, or the folder of all of them."""
    folder = f"{CLIENTS}/{check_client_id(client_id)}"
    if incarnation is None:
        return folder
    return f"{folder}/{_padded('incarnation', incarnation, 8)}"


def lineages(keys: Iterable[str]) -> list[str]:
    """The lineages that were begun, by some keys of a store; sorted."""
    found = map(_BEGUN.fullmatch, keys)
    return sorted({match[1] for match in found if match is not None})


def joined(client_id: str) -> str:
    """The mark of a client that has pulled."""
    return f"{client(client_id)}/joined"


def forgotten(client_id: str) -> str:
    """The mark of a client whose data was deleted."""
    return f"{client(client_id)}/forgotten"


def round_file(number: int, kind: str) -> str:
    """A record of a round: 'plan', 'ending', 'report' or 'finished'."""
    return f"rounds/{_padded('round', number)}/{kind}.json"


def parse_client(key: str) -> str | None:
    """The client that the key of a process, or the mark of one, names; `None` for anything else."""
    found = _CLIENT.fullmatch(key)
    return found[1] if found else None


def history(number: int) -> str:
    """Some rows of the run's history, from number 1 on."""
    return f"{HISTORY}/{_padded('number', number)}.jsonl"


def parse_history(key: str) -> int:
    """The number of a history's key; 0 for anything else."""
    found = _HISTORY.fullmatch(key)
    return int(found[1]) if found else 0


def post(client_id: str, process: str, number: int) -> str:
    """The key of a client's request, its claims and its answer, but for the end."""
    return f"{POST}/{check_client_id(client_id)}/{process}-{_padded('number', number)}"


def parse_post(key: str) -> tuple[str, str, str] | None:
    """The parts of a key beneath post/: client id, what `post` returns, the end; else `None`."""
    found = _POST.fullmatch(key)
    if found is None:
        return None
    end = found[3]
    try:
        return check_client_id(found[1]), key.removesuffix(f".{end}"), end
    except IdError:
        return None


class Keys:
    """The keys of one lineage.

    Args:
        lineage: Its name.
        by_version: Whether folders of forwards and parts are of versions, as in format 1.
    """

    def __init__(self, lineage: str, *, by_version: bool = False) -> None:
        self._by_version = by_version
        self.root = check_lineage(lineage)
        self.fingerprint = f"{lineage}/fingerprint.json"
        self.spare = f"{lineage}/fingerprint-copy.json"
        self.beside = f"{lineage}/beside.json"
        self.window = f"{lineage}/window.json"
        self.together = f"{lineage}/together.json"
        self.head = f"{lineage}/head"
        self.gradients = f"{lineage}/grad"
        self.sums = f"{lineage}/sum"
        self.asks = f"{lineage}/ask"
        self.lock = f"{lineage}/commit"

    def frozen(self, sha256: str) -> str:
        """Parameters that never train, by the hash of their file."""
        return f"{self.root}/frozen-{sha256}.safetensors"

    def commit(self, version: int) -> str:
        """The commit that made `version`."""
        return f"{self.root}/commit/{_padded('version', version)}.json"

    def versioned(self, kind: str, version: int, nonce: str) -> str:
        """A file of one commit: 'weights', 'optimizer' or 'applied'."""
        end = "json" if kind == "applied" else "safetensors"
        return f"{self.root}/{kind}/{_padded('version', version)}-{nonce}.{end}"

    def gradient(self, batch: BatchId) -> str:
        """A pending batch."""
        return f"{self.gradients}/{_batch(batch)}"

    def forward(self, version: int, client_id: str, incarnation: int, call: int) -> str:
        """What a forward ran on."""
        process = _padded("incarnation", incarnation, 8)
        folder = self._transient("forward", version, client_id)
        return f"{folder}{process}-{_padded('call', call)}"

    def part(self, version: int, batch: BatchId, part: int) -> str:
        """One call's share of a batch."""
        process = _padded("incarnation", batch.incarnation, 8)
        folder = self._transient("part", version, batch.client_id)
        return f"{folder}{process}-{_padded('seq', batch.seq)}-{_padded('part', part, 6)}"

    def _transient(self, kind: str, version: int, client_id: str) -> str:
        number, client_id = _padded("version", version), check_client_id(client_id)
        if self._by_version:
            return f"{self.root}/{kind}/{number}/{client_id}/"
        return f"{self.root}/{kind}/{client_id}/{number}-"

    def pin(self, batch: BatchId) -> str:
        """The version that a one-trip loss call runs at."""
        return f"{self.root}/pin/{_batch(batch)}"

    def reference(self, client_id: str, incarnation: int, name: str) -> str:
        """Rows that a process of a client refers to, by the hash of what they hold.

        Raises:
            IdError: the name isn't such a hash.
        """
        if not _HASH.fullmatch(name):
            raise IdError(f"reference {name[:40]!r} isn't allowed: expected 16 hexadecimal digits")
        return f"{self.root}/{REFERENCE}/{_process(client_id, incarnation)}-{name}"

    def references(self, client_id: str) -> str:
        """The folder of what a client's processes refer to."""
        return f"{self.root}/{REFERENCE}/{check_client_id(client_id)}"

    def sum(self, version: int, holder: str, number: int) -> str:
        """What gradients of a version add up to, as some process has added them."""
        return f"{self.sums}/{_padded('version', version)}-{holder}-{_padded('number', number)}"

    def ask(self, holder: str) -> str:
        """The question to a process for its sums, which it deletes to answer.

        Raises:
            IdError: the name isn't that of a process.
        """
        if not _HOLDER.fullmatch(holder):
            raise IdError(f"holder {holder[:40]!r} isn't allowed: expected 16 hexadecimal digits")
        return f"{self.asks}/{holder}"

    def parse_sum(self, key: str) -> int | None:
        """The version of a sum; `None` for anything else."""
        found = _SUM.fullmatch(key.removeprefix(f"{self.root}/"))
        return int(found[1]) if found else None

    def kept(self, batch: BatchId) -> str:
        """What a batch follows from."""
        return f"{self.root}/kept/{_batch(batch)}"

    def settings(self, digest: str) -> str:
        """How commits step, by the hash of what is in the file."""
        return f"{self.root}/settings-{digest}.safetensors"

    def parse_gradient(self, key: str) -> BatchId | None:
        """The batch whose gradient is at `key`; `None` for anything else."""
        found = _GRADIENT.fullmatch(key.removeprefix(f"{self.root}/"))
        if found is None:
            return None
        try:
            batch = BatchId(found[1], int(found[2]), int(found[3]))
            return batch if self.gradient(batch) == key else None
        except IdError:
            return None

    def parse_versioned(self, key: str) -> tuple[int, str] | None:
        """(version, nonce) of a file of a commit; `None` for anything else."""
        found = _VERSIONED.fullmatch(key.removeprefix(f"{self.root}/"))
        return (int(found[1]), found[2]) if found else None

    def parse_transient(self, key: str) -> int | None:
        """The version of a forward or a part; `None` for anything else."""
        found = self.parse_call(key)
        return None if found is None else found[2]

    def parse_call(self, key: str) -> tuple[str, int, int | None] | None:
        """(client, incarnation, version) of a file of a call, a batch or a reference; else `None`.

        Only the names of forwards and parts tell the version.
        """
        name = key.removeprefix(f"{self.root}/")
        found = _TRANSIENT.fullmatch(name)
        if found is not None:
            return found[1] or found[4], int(found[5]), int(found[2] or found[3])
        found = _BATCH.fullmatch(name) or _REFERENCE.fullmatch(name)
        return None if found is None else (found[1], int(found[2]), None)


def read_pin(data: memoryview, key: str) -> int:
    """The version that is in the file of a pin.

    Raises:
        FormatError: it holds none.
    """
    if bytes(data).isdigit():  # of format 1
        return int(bytes(data))
    version = read_json(data, key).get("version")
    if type(version) is not int:
        raise FormatError(f"{key!r} isn't the pin of a batch: expected a version, got {version!r}")
    return version


def _padded(name: str, value: int, width: int = 10) -> str:
    return str(check_number(name, value)).zfill(width)


def _process(client_id: str, incarnation: int) -> str:
    return f"{check_client_id(client_id)}/{_padded('incarnation', incarnation, 8)}"


def _batch(batch: BatchId) -> str:
    return f"{_process(batch.client_id, batch.incarnation)}-{_padded('seq', batch.seq)}"
