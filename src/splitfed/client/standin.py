"""A module that stands in for a client half: nothing is copied, and what it lacks the half has.

The trap: nn.Module keeps its tensors in dicts of the instance, and `nn.Module.__init__` sets
attributes before there is anything to stand in for; hence the shared dicts, and a `training` that
may be asked for too early.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Self = TypeVar("Self", bound="StandIn")
SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""What it has in common with the half: the dicts that hold tensors and children."""


class StandIn(nn.Module):
    """A module with the tensors, the mode and the attributes of a client half.

    Args:
        client_half: What it stands in for.
    """

    client_half: nn.Module

    def __init__(self, client_half: nn.Module) -> None:
        super().__init__()
        self.__dict__["client_half"] = client_half
        for name in SHARED:
            self.__dict__[name] = client_half.__dict__[name]

    @property
    def training(self) -> bool:
        """The half's own mode."""
        half = self.__dict__.get("client_half")
        return True if half is None else half.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "client_half" in self.__dict__:
            self.client_half.training = mode

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The half's own state_dict."""
        return self.client_half.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the half."""
        return self.client_half.load_state_dict(*args, **kwargs)

    def train(self: Self, mode: bool = True) -> Self:
        """Set the half's mode, and with it the mode that the body runs in."""
        self.client_half.train(mode)
        return self

    def _apply(self: Self, *args: Any, **kwargs: Any) -> Self:
        self.client_half._apply(*args, **kwargs)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or "client_half" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.client_half, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name.startswith("_"):
            super().__delattr__(name)
        else:
            delattr(self.client_half, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            half = self.__dict__.get("client_half")
            if half is None:
                raise
            return getattr(half, name)
