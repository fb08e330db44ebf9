"""`client.batch(...)` blocks: what they say of the calls within, and the passes that they sum.

A block with settings says them of the forwards within, wherever their backward comes. A block
without any holds the batch open: all passes that end within are summed, as torch accumulates
gradients, and sealed at its end.

Accelerate (and so Hugging Face's Trainer) has such a block of its own, around the batches of one
optimizer step: while it accumulates, the passes of a client that it has prepared are held open
likewise. It keeps that in one state for the whole process.
"""

from __future__ import annotations

import sys
from typing import Any


class Scope:
    """What the innermost `client.batch(...)` blocks say.

    Args:
        num_samples: What the calls within count together.
        loss_scale: In place of the client's own; by default as around the block.
        count: Whether the passes count; by default as around the block.
        outer: The blocks around it.
    """

    def __init__(
        self,
        num_samples: float | None,
        loss_scale: float | None,
        count: bool | None,
        outer: Scope | None,
    ) -> None:
        self.said = 0.0 if num_samples is None else num_samples
        """What the calls within count together, if this block says it."""
        self.weigher: Scope | None = None if num_samples is None else self
        """The block that says what calls count, if any does."""
        self.loss_scale = loss_scale
        self.count = count
        if outer is not None:
            self.weigher = self.weigher or outer.weigher
            self.loss_scale = outer.loss_scale if loss_scale is None else loss_scale
            self.count = outer.count if count is None else count


class Sum:
    """A batch that is held open over several passes.

    Args:
        batch: What it adds up in.
        automatic: Whether a trainer accumulates, and no block says so.
    """

    def __init__(self, batch: Any, *, automatic: bool) -> None:
        self.batch = batch
        self.automatic = automatic
        self.num_passes = 0
        """Those that have ended."""
        self.is_broken = False
        """Whether a pass has failed after others had ended: nothing of it may count."""
        self.has_loss = False
        """Whether a `client.loss(...)` within has counted by itself."""
        self.num_steps = 0
        """Steps of the half's optimizer within."""

    @property
    def is_held(self) -> bool:
        """Whether further passes may come."""
        return not self.automatic or is_accumulating()


def is_accumulating() -> bool:
    """Whether Accelerate is between the batches of one optimizer step."""
    module = sys.modules.get("accelerate.state")
    state: dict[str, Any] = getattr(getattr(module, "GradientState", None), "_shared_state", {})
    return not state.get("sync_gradients", True)
