"""What a client remembers of its examples: what the server saw last of each, for the next delta.

An example is known by a number of the user's, such as its place in the data set, since batches are
shuffled and a row of one is another example each time. The numbers stay here; what travels are the
names of files and rows in them (`deltas`).

The rows of a batch are one file, and the next batch gathers its rows from many. So a file is given
up once none of its rows is the newest of its example and no request under way refers to it: the
next request says so. The trap is a request that fails: nothing here may have moved then, for
neither has anything at the server that could be relied on. So what is remembered moves on only once
an answer is there.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitfed.protocol.coding import Codec, Coded, decode, distance, encode
from splitfed.protocol.deltas import CODEC, Delta, name_of, restored

_GIVEN_UP_AT_ONCE = 256
_REMEMBERED = 64
"""Of so many calls x̂ is at hand if a checkpoint repeats them."""
EXAMPLES = "examples|"
"""What the names of its state begin with."""
_FILE = f"{EXAMPLES}file|"
_PLACES = f"{EXAMPLES}places|"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One tensor (N, *C) as it travels: what has changed of its examples."""

    kind: str
    """Which tensor of which call it is: what an example is known under there."""
    ids: Sequence[int]
    """The numbers of its examples, N."""
    source: str
    """The hash of x, where x̂ is another."""
    payload: Tensor
    """The rows that travel, coded."""
    coded: Coded | None
    delta: Delta
    decoded: Tensor
    """x̂, (N, *C): what the server makes of it."""
    squared_error: float
    """‖x − x̂‖²."""
    squared_norm: float
    """‖x‖²."""

    @property
    def num_sent(self) -> int:
        """The bytes that travel."""
        extra = () if self.coded is None else self.coded.extra
        return self.payload.nbytes + sum(one.nbytes for one in extra) + self.delta.num_sent

    def whole(self) -> Change:
        """The same tensor without reference to anything."""
        rows = torch.full_like(self.delta.rows, -1)
        sent = torch.ones_like(self.delta.sent)
        delta = replace(self.delta, references=(), rows=rows, sent=sent, adds=False)
        return replace(self, payload=self.decoded, coded=None, delta=delta)


class Examples:
    """The newest x̂ of each example, and which file of the server's it is a row of."""

    def __init__(self) -> None:
        self._files: dict[str, Tensor] = {}
        """The rows of each file, (M, *C)."""
        self._places: dict[str, dict[int, tuple[str, int]]] = {}
        """The file and row of each example, by kind."""
        self._uses: Counter[str] = Counter()
        """How many examples have their newest row in a file, and requests under way refer to it."""
        self._given_up: OrderedDict[str, None] = OrderedDict()
        self._lost: set[str] = set()
        """Files that the server may not have any more."""
        self._made: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        """x̂ by what it was made of, for a checkpoint that repeats a call."""
        self._lock = threading.Lock()

    def change(
        self, kind: str, ids: Sequence[int], tensor: Tensor, place: int, codec: Codec
    ) -> Change:
        """What of a tensor travels; `moved` or `lost` has to follow once it has.

        Args:
            kind: Which tensor of which call it is.
            ids: The numbers of its examples.
            tensor: The tensor, (N, *C).
            place: Which one of its message it is.
            codec: What changes are coded by.
        """
        x = tensor.detach().cpu()
        with self._lock:
            names, rows = self._known(kind, ids, x)
            files = {name: self._files[name] for name in names}
            self._uses.update(names)
        change = _change(kind, ids, x, place, codec, files, rows)
        is_whole = names and not bool(change.decoded.isfinite().all())
        if is_whole:
            # Once infinite, sums stay so; and a difference of halves may be beyond what they hold.
            change = _change(kind, ids, x, place, codec, {}, torch.full_like(rows, -1))
        with self._lock:
            if not is_whole and self._lost.isdisjoint(names):
                return change
            self._leave(names)
        return change if is_whole else change.whole()

    def moved(self, change: Change) -> None:
        """A request has arrived: its examples are now as the server has made them."""
        rows = change.decoded.contiguous()[change.delta.sent]
        name = name_of(rows) if len(rows) else ""
        with self._lock:
            if change.source:
                self._made[change.kind, change.source] = change.decoded
                if len(self._made) > _REMEMBERED:
                    self._made.popitem(last=False)
            if name:
                self._files[name] = rows
                self._given_up.pop(name, None)
                self._lost.discard(name)
            places = self._places.setdefault(change.kind, {})
            moved = change.delta.sent.nonzero().view(-1).tolist()
            left = []
            for row, number in enumerate(moved):
                before = places.get(change.ids[number])
                places[change.ids[number]] = (name, row)
                self._uses[name] += 1
                if before is not None:
                    left.append(before[0])
            self._leave(left)

    def made_of(self, kind: str, tensor: Tensor) -> Tensor | None:
        """x̂ of a call that is made again; `None` if it isn't known, or the tensor itself."""
        with self._lock:
            return self._made.get((kind, name_of(tensor.detach().cpu())))

    def ended(self, change: Change) -> None:
        """A request isn't under way any more, whatever came of it."""
        with self._lock:
            self._leave(change.delta.references)

    def lost(self, change: Change) -> None:
        """The server lacks files that a request refers to: no later one does.

        What they hold is still known here, and goes on to be what examples change from: so values
        don't depend on what the server loses.
        """
        with self._lock:
            self._lost.update(change.delta.references)

    def given_up(self) -> tuple[str, ...]:
        """The names that the next request gives up."""
        with self._lock:
            return tuple(self._given_up)[:_GIVEN_UP_AT_ONCE]

    def told(self, names: Iterable[str]) -> None:
        """The server knows that these were given up."""
        with self._lock:
            for name in names:
                self._given_up.pop(name, None)

    def has(self, client_id: str) -> bool:
        """Whether anything is remembered of a client."""
        with self._lock:
            return any(kind.startswith(f"{client_id}|") for kind in self._places)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is remembered: rows by file, and number, file and row of each example."""
        with self._lock:
            names = sorted(self._files)
            state = {f"{_FILE}{name}": self._files[name].clone() for name in names}
            for kind, places in self._places.items():
                table = [(n, names.index(name), row) for n, (name, row) in places.items()]
                state[f"{_PLACES}{kind}"] = torch.tensor(table, dtype=torch.int64).view(-1, 3)
            return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict()`; other names in it are passed over."""
        names = sorted(n.removeprefix(_FILE) for n in state if n.startswith(_FILE))
        with self._lock:
            self._files = {name: state[f"{_FILE}{name}"].clone() for name in names}
            self._places = {}
            for key, table in state.items():
                if key.startswith(_PLACES):
                    rows = ((n, (names[file], row)) for n, file, row in table.tolist())
                    self._places[key.removeprefix(_PLACES)] = dict(rows)
            held = (name for places in self._places.values() for name, _ in places.values())
            self._uses = Counter(held)
            self._given_up.clear()
            self._lost.clear()
            self._made.clear()

    def _known(self, kind: str, ids: Sequence[int], x: Tensor) -> tuple[list[str], Tensor]:
        """The files that have examples of a batch, and each one's row in them; -1 for none."""
        places = self._places.get(kind, {})
        firsts: dict[str, int] = {}
        rows, total = [], 0
        for number in ids:
            name, row = places.get(number, ("", 0))
            file = self._files.get(name)
            if file is None or file.dtype != x.dtype or file.shape[1:] != x.shape[1:]:
                rows.append(-1)
                continue
            if name not in firsts:
                firsts[name] = total
                total += len(file)
            rows.append(firsts[name] + row)
        return [*firsts], torch.tensor(rows, dtype=torch.int32)

    def _leave(self, names: Iterable[str]) -> None:
        """Count uses of files that have ended."""
        for name in names:
            self._uses[name] -= 1
            if self._uses[name] <= 0:
                del self._uses[name]
                self._files.pop(name, None)
                self._lost.discard(name)
                self._given_up[name] = None


def _change(
    kind: str,
    ids: Sequence[int],
    x: Tensor,
    place: int,
    codec: Codec,
    files: Mapping[str, Tensor],
    rows: Tensor,
) -> Change:
    """What of a tensor travels, given the files that its rows begin from."""
    adds = bool(codec.values)
    delta = Delta(
        place=place,
        codec=CODEC,
        dtype=str(x.dtype).removeprefix("torch."),
        shape=tuple(x.shape),
        strides=tuple(x.stride()),
        references=tuple(files),
        rows=rows,
        sent=torch.zeros(len(x), dtype=torch.bool),
        adds=False,
        keeps=True,
    )
    base = x.new_zeros(x.shape)
    if files:
        base = restored(x.new_zeros(0, *x.shape[1:]), delta, files.get)
    difference = x - base if adds else x
    moves = difference != 0 if adds else _bits(x) != _bits(base)
    delta = replace(delta, adds=adds, sent=moves.flatten(1).any(dim=1) | (rows < 0))
    payload = difference[delta.sent].contiguous()
    inner = codec.of_new if bool((rows < 0).any()) else codec.of_changes
    made = None if inner is None or not len(payload) else encode(payload, inner, place)
    decoded = restored(payload if made is None else decode(*made), delta, files.get)
    sent, coded = (payload, None) if made is None else made
    source = name_of(x) if adds else ""
    return Change(kind, ids, source, sent, coded, delta, decoded, *distance(x, decoded))


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers: zeros have two signs, and no NaN equals itself."""
    return tensor.contiguous().view(_INTEGERS[tensor.itemsize])
