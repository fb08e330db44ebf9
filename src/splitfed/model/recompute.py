"""Recomputes: whether what runs now is run by a checkpoint, or inside of a backward pass.

`torch.utils.checkpoint` runs a part of the model again inside of the backward pass. It doesn't say
so to what it runs.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch


def in_backward() -> bool:
    """Whether autograd is in a backward pass, in this thread."""
    return torch._C._current_graph_task_id() != -1


def checkpoint_frames() -> list[str]:
    """The functions of torch's checkpoint that are on the stack.

    Without grad that is a reentrant one, which runs its function again, with grad, at the backward.
    Nothing else tells it from `no_grad` around an evaluation.
    """
    module = sys.modules.get("torch.utils.checkpoint")
    found: list[str] = []
    frame: FrameType | None = sys._getframe() if module is not None else None
    while frame is not None:
        if frame.f_code.co_filename == module.__file__:  # type: ignore[union-attr]
            found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found
