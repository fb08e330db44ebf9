"""Trials: what a layer returns is found by running its skeleton, before anybody has computed it.

The skeleton has no weights, so it runs on the meta device, where tensors have no values; if its
path through the code depends on values, as in mixtures of experts, on zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.model.copying import deep_copy
from splitfed.model.layers import Member
from splitfed.protocol import pytree


def try_call(member: Member, spec: Any, leaves: Sequence[Tensor]) -> Any:
    """What a layer returns on tensors without values, or else on zeros."""
    try:
        return _try_on("meta", member, spec, leaves)
    except Exception:  # noqa: BLE001 -- whatever the user's code makes of tensors without values
        return _try_on("cpu", member, spec, leaves)


def _try_on(device: str, member: Member, spec: Any, leaves: Sequence[Tensor]) -> Any:
    def moved(tensor: Tensor) -> Tensor:
        if device == "meta" or not tensor.is_meta:
            return tensor.detach().to(device, copy=True)
        # Zeros that nobody has written to take no memory.
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    with torch.no_grad(), torch.random.fork_rng(devices=()), torch.device(device):
        module, call = member.trial()
        # What they return is of the same kind, and torch loads for seconds to drop on meta.
        for part in module.modules():
            part.training = part.training and not isinstance(part, nn.modules.dropout._DropoutNd)
        args, kwargs = pytree.unflatten(spec, list(map(moved, leaves)))
        return call(module._apply(moved), *args, **kwargs)


def skeleton_of(module: nn.Module) -> nn.Module:
    """A copy of a module without the values of its tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    shells: dict[int, Any] = {}
    for tensor in tensors:
        shell = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        shells[id(tensor)] = nn.Parameter(shell, tensor.requires_grad) if is_parameter else shell
    return deep_copy(module, shells)
