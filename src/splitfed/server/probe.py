"""Trials of a body that sets attributes of its own: do its answers depend on what a call has left?

Many bodies set attributes and never read them again: attention maps, `self.kl`, tables that are
built at need. Others go on from them: hidden states, step counters, what was cached of the first
batch. A server can't keep such state, since any replica may run the next call; each run starts from
the body as it was built. So that the second kind isn't answered otherwise than the unsplit model
would, a call that leaves something is run again on what it left, and so is the next call of the
same client: at first, and then ever more seldom. If outputs or gradients differ, the body is
refused.

The trap: a trial must change nothing. It runs after the call, under the lock and the call's seed,
and its graph isn't kept.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import SplitFedError, UnsupportedError
from splitfed.model import execution
from splitfed.model.execution import Model, Run
from splitfed.model.numerics import is_repeatable, same_bits
from splitfed.model.rng import compute_lock, seeded
from splitfed.protocol.messages import ForwardRecord
from splitfed.store.cache import Bounded

_KINDS = 256
"""Of so many kinds of calls it is counted how often they came."""
_CLIENTS = 4
"""Of so many clients an earlier call is kept for a trial."""
_SHOWN = 5

Mode = tuple[str, bool, bool]
"""(cut, train mode, grad mode)"""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call that can be run once more."""

    record: ForwardRecord
    grad: bool
    finish: Callable[[Any], Any] | None = None

    @property
    def mode(self) -> Mode:
        """What decides which way it takes through the body."""
        return self.record.cut, self.record.training, self.grad

    def run(self, model: Model, *, afresh: bool = True) -> Run:
        """Run it, and leave the attributes as it leaves them."""
        return execution.run(
            model, self.record, grad=self.grad, finish=self.finish, afresh=afresh, leave=True
        )


class Probe:
    """Finds bodies that depend on what earlier calls left; one for all models of a server."""

    def __init__(self) -> None:
        self.is_waiting = False
        """Whether the coming calls are to be examined though they set nothing."""
        self._counts: Counter[tuple[Mode, tuple[str, ...]]] = Counter()
        self._earlier: Bounded[str, Call] = Bounded(_CLIENTS)
        self._refused: dict[Mode, str] = {}
        self._warned: set[str] = set()

    def examine(self, model: Model, call: Call, done: Run, client_id: str) -> None:
        """Try a call that has run, if it is time to.

        Raises:
            UnsupportedError: the body's answers depend on what earlier calls left.
        """
        if call.mode in self._refused:
            raise UnsupportedError(self._refused[call.mode])
        is_due = bool(done.written) and self._is_due(call, done)
        earlier = self._earlier.pop(client_id)
        if not is_due and earlier is None:
            return
        if not is_repeatable(model.device):
            return
        with compute_lock:
            try:
                if is_due:
                    self._try(model, call, call, done)
                    self._earlier.put(client_id, call)
                    self.is_waiting = True
                if earlier is not None:
                    self._try(model, earlier, call, done)
            finally:
                model.restore()

    def _is_due(self, call: Call, done: Run) -> bool:
        kind = (call.mode, done.written)
        if kind not in self._counts and len(self._counts) >= _KINDS:
            return False
        self._counts[kind] += 1
        return self._counts[kind] & (self._counts[kind] - 1) == 0  # 1, 2, 4, 8 and so on

    def _try(self, model: Model, first: Call, second: Call, done: Run) -> None:
        """Run `second` on what `first` leaves, and compare with what was answered."""
        try:
            expected = _outcome(second, model)
            before = expected if first is second else _outcome(first, model)
        except SplitFedError:  # it can't be run again, so nothing can be said
            return
        if expected.crcs != done.crcs:  # it depends on something else: a replay will tell
            return
        names = sorted({*before.written, *model.habits.within, *model.habits.late})
        left = model.attributes.values(names)
        try:
            found = _outcome(second, model, afresh=False)
            is_same = found.equals(expected)
        except SplitFedError:  # as the backward through a graph that is gone
            is_same = False
        if not is_same:
            self.is_waiting = True
            self._refused[second.mode] = _refusal(model, names)
            raise UnsupportedError(self._refused[second.mode])
        if first is second:
            self._warn_counting(model, second, left)

    def _warn_counting(self, model: Model, call: Call, left: dict[str, list[Any]]) -> None:
        """Warn of attributes that go on from call to call, though no answer shows it."""
        now = model.attributes.values(left)
        counting = [name for name in left if now[name] != left[name]]
        if set(counting) <= self._warned:
            return
        # What is another value each time, as the time is, counts nothing.
        call.run(model)
        again = model.attributes.values(left)
        counting = [name for name in counting if again[name] == left[name]]
        new = [name for name in counting if name not in self._warned]
        self._warned.update(new)
        if new:
            warnings.warn(
                f"the body's forward counts on from call to call in {_shown(model, new)}, and each "
                "call starts with the first value, since any replica may run it. If answers are to "
                "depend on it, keep it in a registered buffer (register_buffer)",
                stacklevel=2,
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """What a trial gave."""

    crcs: tuple[int, ...]
    gradients: list[Tensor | None]
    written: tuple[str, ...]

    def equals(self, other: _Outcome) -> bool:
        """Whether outputs and gradients are the same, bit for bit."""
        if self.crcs != other.crcs:
            return False
        return same_gradients(self.gradients, other.gradients)


def _outcome(call: Call, model: Model, *, afresh: bool = True) -> _Outcome:
    done = call.run(model, afresh=afresh)
    gradients: list[Tensor | None] = []
    if call.grad:
        grads = [_uneven(tensor) if tensor.requires_grad else None for tensor in done.tensors]
        gradients = seeded_backward(call.record, done, model.device, grads)[0]
    return _Outcome(done.crcs, gradients, done.written)


def seeded_backward(
    record: ForwardRecord, done: Run, device: torch.device, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], bool]:
    """The gradients of inputs and parameters, and whether the backward drew random numbers."""
    # The lock first: what runs in another thread must neither draw under this seed nor go on from
    # the state that is put back.
    with compute_lock, seeded(record.seed, () if device.type == "cpu" else (device,)) as draws:
        of_inputs, of_parameters = execution.backward(done, grads)
    return [*of_inputs, *(of_parameters.get(name) for name in done.parameters)], draws.drew


def same_gradients(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether gradients are the same, bit for bit."""
    for one, other in zip(some, others, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif not same_bits(one, other):
            return False
    return True


def _uneven(tensor: Tensor) -> Tensor:
    """A gradient for an output, with values that differ: of equal ones a softmax makes none."""
    values = torch.arange(tensor.numel(), device=tensor.device) % 7 + 1
    return values.reshape(tensor.shape).to(tensor.dtype)


def _refusal(model: Model, names: Sequence[str]) -> str:
    return (
        f"the body's answers depend on what an earlier call left in {_shown(model, names)}: "
        "on a server each call starts with the body as it was built, since any replica may run it. "
        "Keep this state in a registered buffer (register_buffer), which is a part of the version, "
        "or let the client half pass it in and take it back"
    )


def _shown(model: Model, names: Iterable[str]) -> str:
    """Attributes for a message, with the class of their module."""
    listed = list(names)
    shown = []
    for name in listed[:_SHOWN]:
        owner = model.attributes.owners.get(name.rpartition(".")[0])
        shown.append(f"{name!r} ({type(owner).__name__})")
    rest = len(listed) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
