"""The hole in a client half.

A cut point knows no server. The binding lives in the call: whoever calls the half (a `SplitClient`) is the active
caller of that context, and the cut point hands its arguments over. So one half may serve many clients. Only a
recompute, as `torch.utils.checkpoint` does one inside of a backward pass, comes without a caller; for it the last
few are remembered.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from splitfed.errors import AbsentError, NotConnectedError, UnsupportedError
from splitfed.model.absent import told
from splitfed.model.skeleton import Template

REMEMBERED = 32


class Caller(Protocol):
    """One `client(...)` call under way."""

    def call(self, point: CutPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the cut point."""
        ...

    def recompute(
        self, point: CutPoint, args: tuple[Any, ...], kwargs: dict[str, Any], earlier: Sequence[Caller], alone: bool
    ) -> Any:
        """Answer a call made again inside of a backward pass, for whichever caller made it first.

        `NotImplemented` if nobody did, and it isn't `alone` but has a caller of its own.
        """
        ...


active_caller: ContextVar[Caller | None] = ContextVar("splitfed_active_caller", default=None)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a cut point's body came from, so that `join` can put it back."""

    template: Template
    places: tuple[tuple[str, str], ...]
    """(position in the `nn.Sequential`, or '' for the cut point's own place; name of the part in the body)."""
    training: bool
    """The mode that the cut was in; in that mode its parts keep modes of their own."""


class CutPoint(nn.Module):
    """Stands in the client half where the body was; calling it sends the call to the server.

    Args:
        name: Which part of the body belongs here: '' for the body itself, else the name of a submodule of it.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.origin: Origin | None = None
        self._callers: deque[Caller] = deque(maxlen=REMEMBERED)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the body returns for this call.

        Raises:
            NotConnectedError: the half wasn't called through a `SplitClient`.
            UnsupportedError: called inside of a functorch transform.
        """
        return _eager(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            origin: Origin | None = self.__dict__.get("origin")
            if origin is None:
                raise AbsentError(
                    f"the client half asks its cut point for {name!r}, and this one was placed by hand: set that "
                    "attribute on it, as the body has it"
                ) from error
        return told(origin.template.blueprint.get_submodule(origin.places[0][1]), name)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(
                "a cut point can't run inside of torch.func transforms (vmap, grad, jvp ...): its gradients "
                "cross a file. "
                "Use loss.backward() or torch.autograd.grad"
            )
        caller = active_caller.get()
        if torch._C._current_graph_task_id() != -1 and self._callers:
            found = self._callers[-1].recompute(self, args, kwargs, list(reversed(self._callers)), caller is None)
            if found is not NotImplemented:
                return found
        if caller is not None:
            if caller not in self._callers:
                self._callers.append(caller)
            return caller.call(self, args, kwargs)
        raise NotConnectedError(
            "this client half was called by itself, so its cut point has no server: wrap it, "
            "client = SplitClient(client_half, server, client_id=...), and call client(...); "
            "under nn.DataParallel, or in a thread of the model's own, it can't be reached"
        )

    def extra_repr(self) -> str:
        """The name of the part, if it has one."""
        return repr(self.name) if self.name else ""

    def __getstate__(self) -> dict[str, Any]:
        """Without the callers: a copy has made no calls."""
        return {**self.__dict__, "_callers": deque(maxlen=REMEMBERED)}


def _eager(point: CutPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a cut point outside of `torch.compile`: the graph breaks here, and nothing beneath is traced."""
    dynamo = sys.modules.get("torch._dynamo")
    call = CutPoint._call if dynamo is None else dynamo.disable(CutPoint._call)
    return call(point, args, kwargs)


_eager._torchdynamo_disable = True  # type: ignore[attr-defined]
