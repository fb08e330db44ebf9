"""The skeleton of a module: its structure without its weights, which a version's tensors fill.

A template is a deep copy whose parameters and persistent buffers are on the meta device, so it
costs no memory and can't be changed from outside. Building an instance is a deep copy again, with
each distinct tensor assigned once: tied names share by construction.
(`load_state_dict(assign=True)` would untie them, with silently wrong gradients.)

The trap: what stands for a tensor in a copy is found by the `id` of the original, which is only
right as long as the original is held. And names are those of `state_dict()` but for the prefixes
of `torch.compile`, so that a compiled module and a plain one share a lineage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from splitfed.errors import UnsupportedError
from splitfed.model.copying import deep_copy
from splitfed.protocol import kinds

Fingerprint = dict[str, dict[str, Any]]
"""By name: role, shape and dtype of a tensor, or the first name of a tied one; plain JSON."""


class Inventory:
    """Names, shapes, dtypes and ties of a module's tensors: all that an exchange of them needs.

    Args:
        module: The body, or a client half. It isn't kept, copied or changed.
        without: Names that are left out: what is personal to a client.

    Raises:
        UnsupportedError: the module is wrapped (DataParallel), lazy, or holds extra state.
    """

    def __init__(self, module: nn.Module, without: Collection[str] = ()) -> None:
        self._take(unwrap(module), without)

    def _take(self, module: nn.Module, without: Collection[str]) -> dict[int, Any]:
        """Note down the tensors of a module; returns what stands for each, by its id."""
        self.names: dict[str, str] = {}
        """Every name of `state_dict()`, in its order, with the first name of the same tensor."""
        self.parameters: dict[str, nn.Parameter] = {}
        """Distinct parameters by first name, on the meta device; `requires_grad` as they train."""
        self.buffers: dict[str, Tensor] = {}
        """Distinct persistent buffers by first name, on the meta device."""
        first_names: dict[int, str] = {}
        shells: dict[int, Any] = {}
        for name, tensor in named_state(module):
            included = name not in without
            if included:
                self.names[name] = first_names.setdefault(id(tensor), name)
            if id(tensor) in shells:
                continue
            # With the strides, as kernels are chosen by them: channels-last weights stay so.
            shell = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            shells[id(tensor)] = shell
            if isinstance(tensor, nn.Parameter):
                parameter = nn.Parameter(shell, requires_grad=tensor.requires_grad and included)
                shells[id(tensor)] = parameter
                if included:
                    self.parameters[name] = parameter
            elif included:
                self.buffers[name] = shell
        return shells

    @property
    def trainable(self) -> list[str]:
        """First names of the parameters that train, in `named_parameters()` order."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    @property
    def frozen(self) -> list[str]:
        """First names of the parameters that never train."""
        return [name for name, parameter in self.parameters.items() if not parameter.requires_grad]

    def fingerprint(self) -> Fingerprint:
        """What two modules must share to be the same architecture, as plain JSON."""
        entries: Fingerprint = {}
        for name, owner in self.names.items():
            tensor = self.parameters.get(owner, self.buffers.get(owner))
            if tensor is None or owner != name:
                entries[name] = {"tied": owner}
                continue
            if name in self.buffers:
                role = "buffer"
            else:
                role = "trainable" if tensor.requires_grad else "frozen"
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries[name] = {"role": role, "shape": list(tensor.shape), "dtype": dtype}
        return entries

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """The distinct tensors of a module of this architecture, by first name, detached."""
        found: dict[str, Tensor] = {}
        for name, tensor in named_state(unwrap(module)):
            if self.names.get(name) == name:
                found[name] = tensor.detach()
        return found


class Template(Inventory):
    """The inventory of a module, and its structure, of which instances can be built.

    Args:
        module: The body, or a client half. It isn't kept and isn't changed.
        without: Names that are left out of all but the structure: what is personal to a client.

    Raises:
        UnsupportedError: the module is wrapped (DataParallel), lazy, holds extra state, or can't
            be copied.
    """

    def __init__(self, module: nn.Module, without: Collection[str] = ()) -> None:
        module = unwrap(module)
        check_copyable(module)
        # A deep copy takes what its memo has in place of an original: here, shells for tensors.
        self.blueprint = deep_copy(module, self._take(module, without))
        # A copy of the copy, since asking for the modes calls train(), the user's own code.
        self.modes = _modes(deep_copy(self.blueprint))
        """For train and eval mode, the `training` flag of each submodule in `modules()` order."""

    def expand(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` under all its names, tied ones included, in `state_dict()` order."""
        return {name: state[owner] for name, owner in self.names.items()}

    def build(self, state: Mapping[str, Tensor], device: torch.device | None = None) -> nn.Module:
        """A module with these tensors (by first name) in it, on `device`.

        Tensors that are there already aren't copied: the module shares their memory.

        Raises:
            UnsupportedError: it is scripted.
        """
        if any(isinstance(part, torch.jit.ScriptModule) for part in self.blueprint.modules()):
            raise UnsupportedError(
                "a part of the body was made by torch.jit.script, "
                "whose parameters can't be exchanged for a version's: "
                "give the module that it was made from"
            )
        tensors: dict[int, Any] = {}
        for name, shell in {**self.parameters, **self.buffers}.items():
            tensor = state[name] if device is None else state[name].to(device)
            if name in self.parameters:
                tensor = nn.Parameter(tensor, shell.requires_grad)
            tensors[id(shell)] = tensor
        module = deep_copy(self.blueprint, tensors)
        if device is not None:
            for owner, leaf in transient_buffers(module):
                buffer = owner._buffers[leaf]
                if buffer is not None:
                    owner._buffers[leaf] = buffer.to(device)
        return module


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of `torch.compile`'s wrapper.

    Raises:
        UnsupportedError: it is wrapped for data parallelism.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedError(f"expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedError(
            f"{type(module).__name__} can't be served: pass its `.module` and run several replicas"
        )
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers in `state_dict()` order, tied names included.

    The prefixes of compiled submodules are left out of the names.

    Raises:
        UnsupportedError: a lazy parameter, or a submodule with extra state.
    """
    for prefix, owner in module.named_modules(remove_duplicate=False):
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedError(
                f"{prefix or 'the module'} ({type(owner).__name__}) keeps extra state, "
                "which isn't made of tensors by name: register what must be kept as buffers"
            )
        # state_dict() has a module's parameters first, then its buffers, in this order.
        transient = owner._non_persistent_buffers_set
        persistent = {n: b for n, b in owner._buffers.items() if n not in transient}
        for leaf, tensor in [*owner._parameters.items(), *persistent.items()]:
            if tensor is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            check_initialised(name, tensor)
            _check_storable(name, tensor)
            yield plain_name(name), tensor


def plain_name(name: str) -> str:
    """A name as the checkpoint has it: a compiled submodule calls its parameters otherwise."""
    return name.replace("_orig_mod.", "")


def check_initialised(name: str, tensor: Tensor) -> None:
    """Refuse a lazy parameter: its shape, hence the architecture, isn't known yet.

    Raises:
        UnsupportedError: it is one.
    """
    if is_lazy(tensor):
        raise UnsupportedError(
            f"parameter {name!r} is lazy (uninitialised): run the model once on real input first"
        )


def check_copyable(module: nn.Module) -> None:
    """Refuse tensors of kinds that can't be copied with their module: sparse but for COO, nested.

    Raises:
        UnsupportedError: there is one, as a parameter, a buffer or an attribute.
    """
    for prefix, owner in module.named_modules():
        members = {**vars(owner), **owner._parameters, **owner._buffers}
        for leaf, tensor in members.items():
            if isinstance(tensor, Tensor) and not _is_copyable(tensor):
                name = f"{prefix}.{leaf}".lstrip(".")
                kind = "nested" if tensor.is_nested else tensor.layout
                raise UnsupportedError(
                    f"{name!r} is a tensor of the kind {kind}, which can't be copied with its "
                    "module: make it dense by .to_dense(), or .to_sparse_coo() and register it by "
                    "register_buffer(..., persistent=False)"
                )


def _is_copyable(tensor: Tensor) -> bool:
    if tensor.is_nested:
        return tensor.layout is torch.jagged
    return tensor.layout in (torch.strided, torch.sparse_coo)


def _check_storable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that no file of weights has a place for."""
    if tensor.is_meta or kinds.fits(tensor):
        return
    why = str(kinds.unfit(tensor, repr(name)))
    if not isinstance(tensor, nn.Parameter):
        why += ". Or leave it out of the weights: register_buffer(..., persistent=False)"
    raise UnsupportedError(why)


def device_of(
    state: Mapping[str, Tensor], device: torch.device | str | None = None
) -> torch.device:
    """The device that was asked for, or the one that a module's tensors are on.

    A module on the meta device is nowhere: its weights come from a store, to the CPU.
    """
    devices = (tensor.device for tensor in state.values() if not tensor.is_meta)
    first = next(devices, torch.device("cpu"))
    return first if device is None else torch.device(device)


def transient_buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the buffers are that `state_dict()` leaves out, as (owner, name in it)."""
    return [
        (owner, leaf)
        for owner in module.modules()
        for leaf in owner._buffers
        if leaf in owner._non_persistent_buffers_set
    ]


def _modes(module: nn.Module) -> dict[bool, list[bool]]:
    """For each mode, the `training` flags of a module and its submodules.

    Its own mode keeps the flags it was given, so that a frozen BatchNorm stays frozen; the other
    mode is what `train()` or `eval()` sets.
    """
    found = {module.training: [part.training for part in module.modules()]}
    module.train(not module.training)
    found[module.training] = [part.training for part in module.modules()]
    return found
