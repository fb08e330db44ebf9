"""A body at one version, ready to run.

Every run starts from the version's own buffers, in memory of its own, so a model that is kept for many runs is as good
as a new one, and a recompute never counts BatchNorm twice. What a run may not touch are the parameters: they share
memory with the version, and a body that writes to them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from splitfed.errors import UnsupportedError
from splitfed.model.boundary import fresh
from splitfed.model.skeleton import Template, transient_buffers


class Model:
    """A body at one version, ready to run; immutable in effect, since every run starts from the version's buffers.

    Args:
        template: The body's structure.
        state: Its tensors by first name; they aren't copied.
        version: What they are the state of.
        device: Where it computes.
    """

    def __init__(self, template: Template, state: Mapping[str, Tensor], version: int, device: torch.device) -> None:
        self.version = version
        self.device = device
        self.module = template.build(state, device)
        named = {name.replace("_orig_mod.", ""): p for name, p in self.module.named_parameters()}
        self.parameters = {name: named[name] for name in template.trainable}
        self.buffers: dict[str, Tensor] = {}
        self._slots: list[tuple[str, nn.Module, str]] = []
        for prefix, owner in self.module.named_modules(remove_duplicate=False):
            for leaf, buffer in owner._buffers.items():
                name = f"{prefix}.{leaf}".lstrip(".").replace("_orig_mod.", "")
                if buffer is not None and name in template.names:
                    self.buffers.setdefault(template.names[name], buffer)
                    self._slots.append((template.names[name], owner, leaf))
        pristine = template.blueprint
        self._transient = [
            (owner, leaf, owner._buffers[leaf], source._buffers[leaf])
            for (owner, leaf), (source, _) in zip(
                transient_buffers(self.module), transient_buffers(pristine), strict=True
            )
        ]
        self._held = [
            (owner._parameters, leaf, parameter, parameter._version)
            for owner in self.module.modules()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self._transient_versions = [None if t[2] is None else t[2]._version for t in self._transient]
        self._modes = template.modes

    def prepare(self, training: bool, buffers: Mapping[str, Tensor] | None) -> None:
        """Set the mode and give the coming run buffers of its own."""
        for module, mode in zip(self.module.modules(), self._modes[training], strict=True):
            module.training = mode
        own = {
            name: fresh((buffers or self.buffers).get(name, base), self.device) for name, base in self.buffers.items()
        }
        for name, owner, leaf in self._slots:
            owner._buffers[leaf] = own[name]
        for i, (owner, leaf, kept, source) in enumerate(self._transient):
            if owner._buffers.get(leaf) is not kept or (
                kept is not None and kept._version != self._transient_versions[i]
            ):
                renewed = None if source is None else fresh(source, self.device)
                owner._buffers[leaf] = renewed
                self._transient[i] = (owner, leaf, renewed, source)
                self._transient_versions[i] = None if renewed is None else renewed._version

    def end_buffers(self) -> dict[str, Tensor]:
        """The buffers as the last run left them.

        Raises:
            UnsupportedError: the body took one away.
        """
        found: dict[str, Tensor] = {}
        for name, owner, leaf in self._slots:
            buffer = owner._buffers.get(leaf)
            if buffer is None:
                raise UnsupportedError(
                    f"the body takes its buffer {name!r} away in forward: it must have a value at the end"
                )
            found[name] = buffer.detach()
        return found

    def is_spoilt(self) -> bool:
        """Whether the body wrote to its own parameters."""
        return any(held.get(leaf) is not p or p._version != version for held, leaf, p, version in self._held)

    def check_parameters(self) -> None:
        """Refuse a body that wrote to its own parameters.

        Raises:
            UnsupportedError: it did.
        """
        if self.is_spoilt():
            raise UnsupportedError("the body changes its own parameters in forward: keep what it changes in buffers")
