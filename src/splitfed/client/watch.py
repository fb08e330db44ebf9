"""What the half and the optimizers around it do, for warnings of what differs from one model.

Nothing of it is asked of the user's loop: torch calls hooks around each optimizer's step, which are
installed when a client first trains. Warnings are given at a step, never at a pass: passes alone
may mean anything, and a step says what they were for.

The trap: the hooks are one process's, the clients many, and a step is most often another client's.
So only clients that have passed since their half's last step are asked.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from splitfed.checks import warn_once
from splitfed.client.blocks import Sum
from splitfed.client.buffers import Continuation

MANY_BATCHES = 100
"""So many batches of one version, and nobody to commit them, are taken for an oversight."""

MANY_UNUSED = 20
"""So many forwards in train mode in a row, without a backward, gather statistics."""

_FRAMES = 8
"""So near is the GradScaler that calls a step: torch's own wrappers are between."""

_armed: dict[int, weakref.ref[Watch]] = {}
"""By id, those that a step is told to."""
_hooks: list[Any] = []
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
"""Those of all clients here: an optimizer of one is no other's mistake."""


@dataclass(slots=True)
class _Since:
    """What has happened since the half's last step."""

    passes: int = 0
    """Those that count."""
    batches: int = 0
    uncounted: int = 0
    """Passes that would have counted, had they accumulated parameter gradients."""
    in_eval: int = 0
    """Passes in eval mode, of which nothing counts."""
    passes_before: int = 0
    """Passes before the step under way."""
    says_scale: bool = False
    has_moved: bool = False
    """Whether parameters moved between two passes."""


class Watch:
    """What one client's half is used for.

    Args:
        half: The client half.
        client_id: Its client, for messages.
        is_alone: Whether nobody in this process commits what is stored.
    """

    def __init__(
        self,
        half: nn.Module,
        client_id: str,
        is_alone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settle: Callable[[], Callable[[], None] | None] = lambda: None
        """A weak reference to what is called before a step of the half."""
        self.block: Sum | None = None
        """The `client.batch()` that is open."""
        self.is_frozen = False
        """Whether `client.requires_grad_(False)` was said last."""
        self._half = half
        self._client_id = client_id
        self._is_alone = is_alone
        self._since = _Since()
        self._told: set[str] = set()
        self._holds: dict[int, tuple[weakref.ref[Any], int, bool]] = {}
        """By the id of each optimizer: itself, its number of groups, and whether it has any."""
        key = id(self)
        self._reference = weakref.ref(self, lambda _: _armed.pop(key, None))
        _watches.add(self)
        self._has_stepped = False
        self._sample: nn.Parameter | None = None
        self._sampled: tuple[int, int] | None = None
        self._scale: float | None = None
        self._stored = (-1, 0)
        self._num_summed = 0
        self._is_in_rounds = False
        self._unmoved = 0
        self._lost = 0
        self._scaler_checks = 4
        """So many first steps are looked at for a GradScaler: a loop with one begins with it."""
        self._dropped: tuple[Tensor, int] | None = None
        """A gradient of the half that holds what a block has dropped, and its version then."""
        self._trained_when_made = self._trains_now()
        self._has_trained = False

    # ------------------------------------------------------------------------------------- frozen

    def trains(self, *, since_made: bool = True) -> bool:
        """Whether a pass over a call that is made now may count: not if the half has been frozen.

        A half that never had parameters to train is no frozen one: the body trains beneath it.

        Args:
            since_made: Whether it is enough that it had some when the client was made.
        """
        if self.is_frozen and not all(p.requires_grad for p in self._half.parameters()):
            return False  # said of the whole model: a head that trains again doesn't unsay it
        if self._trains_now():
            self._has_trained = True
            return True
        had = self._has_trained or (since_made and self._trained_when_made)
        return not (self.is_frozen or had)

    def _trains_now(self) -> bool:
        if self._sample is not None and self._sample.requires_grad:
            return True
        self._sample = next((p for p in self._half.parameters() if p.requires_grad), None)
        return self._sample is not None

    # ---------------------------------------------------------------------------- what passes tell

    def note_pass(self, scale: float) -> None:
        """A pass has begun that counts, of a loss with that scale."""
        self._arm()
        if scale != self._scale:
            # A step was due in between: GradScaler has skipped it, and taken another scale.
            self._since = _Since()
            self._scale = scale
        if self._sample is not None:
            moved = (self._sample._version, self._sample.data_ptr())
            if self._since.passes and self._sampled not in (None, moved):
                self._since.has_moved = True
            self._sampled = moved
        self._since.passes += 1

    def note_uncounted(self) -> None:
        """A pass has reached a call in train mode, and doesn't count."""
        self._arm()
        self._since.uncounted += 1

    def note_eval(self) -> None:
        """A pass has reached a call in eval mode."""
        self._arm()
        self._since.in_eval += 1

    def note_dropped(self) -> None:
        """A block has dropped its passes; the half's gradients still hold them."""
        self._arm()
        held = next((p.grad for p in self._half.parameters() if p.grad is not None), None)
        self._dropped = None if held is None else (held, held._version)

    def note_batch(self, status: str, version: int, *, says_scale: bool) -> None:
        """A batch is closed."""
        self._since.says_scale = self._since.says_scale or says_scale
        if status == "stored":
            self._since.batches += 1
            before, count = self._stored
            self._stored = (version, count + 1 if version == before else 1)

    def note_without_grad(self) -> None:
        """A forward in train mode, under no_grad, would have moved the body's statistics."""
        self._unmoved += 1
        if self._unmoved > 1:
            self._tell_unmoved()
        else:
            self._arm()

    def note_buffers(self, buffers: Continuation) -> None:
        """A call has moved statistics; some before it may count in no batch."""
        self._lost = buffers.lost
        if self._lost:
            self._arm()
        if buffers.num_unused >= MANY_UNUSED and not self._since.uncounted:
            self._tell_unmoved()

    def note_pull(self) -> None:
        """The half was loaded: that its parameters have moved means nothing."""
        self._sampled = None
        self._is_in_rounds = True

    def _arm(self) -> None:
        _armed[id(self)] = self._reference
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before))
            _hooks.append(register_optimizer_step_post_hook(_after))

    # -------------------------------------------------------------------------------- what steps do

    def before(self, optimizer: Any) -> None:
        """An optimizer is about to step."""
        if self._held_by(optimizer):
            settle = self.settle()
            if settle is not None:
                settle()
            self._since.passes_before = self._since.passes
            if self._since.batches and self._scale == 1 and self._scaler_checks:
                self._scaler_checks -= 1
                if _is_scaled():
                    self._tell("scaler", _SCALER)
            if self._dropped is not None:
                self._check_dropped(*self._dropped)

    def after(self, optimizer: Any) -> None:
        """An optimizer has stepped."""
        if not self._held_by(optimizer):
            self._check_foreign(optimizer)
            return
        since, self._since = self._since, _Since()
        self._sampled = None
        self._has_stepped = True
        _armed.pop(id(self), None)
        if self.block is not None and since.passes:
            self.block.num_steps += 1
            if self.block.num_steps == 2:
                self._tell("block", _BLOCK)
        self._check_passes(since)
        if self._unmoved or self._lost:
            self._tell_unmoved()
        if self._stored[1] >= MANY_BATCHES and self._is_alone():
            self._tell("commits", _COMMITS.format(count=self._stored[1]))

    def _check_dropped(self, gradient: Tensor, version: int) -> None:
        self._dropped = None
        held = any(p.grad is gradient for p in self._half.parameters())
        if held and gradient._version == version:
            self._tell("dropped", _DROPPED)

    def _check_passes(self, since: _Since) -> None:
        within = since.passes - since.passes_before
        if not since.passes:
            if since.uncounted:
                self._tell("uncounted", _UNCOUNTED)
            elif since.in_eval:
                self._tell("eval", _EVAL)
        elif within > 1:
            self._tell("closure", _CLOSURE.format(count=within))
        elif since.has_moved and not since.says_scale:
            self._tell("moved", _MOVED)
        elif since.batches > 1 and not since.says_scale:
            self._num_summed += 1
            # A round may end between a pass and its step: once is no habit there.
            if self._num_summed > self._is_in_rounds:
                self._tell("passes", _PASSES.format(count=since.batches))

    def _check_foreign(self, optimizer: Any) -> None:
        """Warn of an optimizer that steps in place of the half's own: of the model it came from."""
        # In rounds halves are averaged: by an optimizer too, which may have no gradient.
        if self._has_stepped or self._is_in_rounds or not self._since.batches:
            return
        groups = optimizer.param_groups
        if any(p.grad is not None for group in groups for p in group["params"]):
            return
        own = Counter(p.shape for p in self._half.parameters() if p.grad is not None)
        others = Counter(p.shape for group in groups for p in group["params"])
        is_a_clients = any(watch._held_by(optimizer) for watch in tuple(_watches))
        if own and own <= others and not is_a_clients:
            kind = type(optimizer).__name__
            self._tell("optimizer", _OPTIMIZER.format(kind=kind))

    def _held_by(self, optimizer: Any) -> bool:
        """Whether an optimizer has parameters of the half."""
        known = self._holds.get(id(optimizer))
        groups = optimizer.param_groups
        if known is None or known[0]() is not optimizer or known[1] != len(groups):
            own = {id(parameter) for parameter in self._half.parameters()}
            holds = any(id(p) in own for group in groups for p in group["params"])
            self._holds = {key: one for key, one in self._holds.items() if one[0]() is not None}
            known = self._holds[id(optimizer)] = (weakref.ref(optimizer), len(groups), holds)
        return known[2]

    def _tell_unmoved(self) -> None:
        self._unmoved = 0
        self._tell("statistics", _STATISTICS)

    def _tell(self, kind: str, text: str) -> None:
        warn_once(self._told, kind, f"client {self._client_id!r}: {text}", 6)


def _is_scaled() -> bool:
    """Whether a GradScaler that scales is what steps."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return False
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler.is_enabled() and scaler.get_scale() != 1
        frame = frame.f_back
    return False


def _before(optimizer: Any, args: Any, kwargs: Any) -> None:
    for reference in tuple(_armed.values()):
        watch = reference()
        if watch is not None:
            watch.before(optimizer)


def _after(optimizer: Any, args: Any, kwargs: Any) -> None:
    for reference in tuple(_armed.values()):
        watch = reference()
        if watch is not None:
            watch.after(optimizer)


_PASSES = (
    "{count} batches were stored since the last step of its optimizer. The half steps by the sum "
    "of their gradients, the body by their mean, also where zero_grad() has dropped one. "
    "Put the passes of one step into one `with client.batch():`, which sums them; say "
    "`with client.batch(count=False):` around those that mustn't train this client; or give the "
    "factor that the losses were multiplied by as loss_scale, 1 / k for k batches in a commit"
)
_CLOSURE = (
    "the loss was evaluated {count} times within one step of its optimizer, as LBFGS does, and "
    "each backward counts for the body. Use an optimizer that evaluates it once, or put those "
    "that mustn't count into `with client.batch(count=False):`"
)
_MOVED = (
    "its parameters moved between two passes of one step of its optimizer, as sharpness-aware "
    "minimization does it, and both passes count for the body. Put the pass whose gradients are "
    "dropped into `with client.batch(count=False):`"
)
_UNCOUNTED = (
    "its optimizer has stepped, and no pass has counted for the body: the half is frozen, or the "
    "passes were of torch.autograd.grad() or backward(inputs=...), which accumulate no gradients "
    "of the body's parameters. Call loss.backward(), or say `with client.batch(count=True):`"
)
_EVAL = (
    "its optimizer has stepped, and the client is in eval mode, in which nothing counts for the "
    "body: the half trains alone. Call client.train() first; a part that is to stay in eval mode, "
    "such as a frozen BatchNorm, may be set so after that"
)
_SCALER = (
    "its optimizer steps by a GradScaler, and the loss scale wasn't said, so the body's gradient "
    "is too large by that factor: SplitClient(..., loss_scale=scaler.get_scale)"
)
_DROPPED = (
    "its optimizer has stepped by gradients of passes that an exception in client.batch() has "
    "dropped: nothing of them counts for the body. Call zero_grad() after such an exception"
)
_BLOCK = (
    "its optimizer has stepped twice within one `with client.batch():`, which makes one batch of "
    "all passes within: begin a block for each step"
)
_OPTIMIZER = (
    "{kind} has stepped without any gradient, and the half, whose parameters have some, by no "
    "optimizer: was it made of the whole model's parameters? Give it client.parameters()"
)
_COMMITS = (
    "{count} batches wait at one version of the body, and no accumulator of this process commits "
    "them: call accumulator.step() in the loop, or run one (`splitfed accumulate`)"
)
_STATISTICS = (
    "forwards in train mode without a backward that counts move the statistics of the unsplit "
    "model (BatchNorm's), and not those of the body. Where they should, as for a second view, "
    "call client(...) with grad enabled, detach() what it returns, and let a backward follow that "
    "counts; gather statistics anew (update_bn) on the joined model; else call client.eval() first"
)
