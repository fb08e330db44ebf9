"""The shape of a module without its weights: what a version's tensors are put into.

A template is a deep copy whose parameters and persistent buffers are on the meta device, so it costs no memory and
can't be changed from outside. Building an instance is a deep copy again, with each distinct tensor assigned once:
tied names share by construction. (`load_state_dict(assign=True)` would untie them, with silently wrong gradients.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from splitfed.errors import ArchitectureError, UnsupportedError
from splitfed.model.copying import deep_copy

Fingerprint = dict[str, dict[str, Any]]


class Template:
    """Names, shapes, dtypes, ties and structure of a module.

    Args:
        module: The body, or a client half. It isn't kept and isn't changed.
        without: Names that are left out of all but the structure: what is personal to a client.

    Raises:
        UnsupportedError: the module is wrapped (DataParallel), lazy, holds extra state, or can't be copied.
    """

    def __init__(self, module: nn.Module, without: Collection[str] = ()) -> None:
        module = unwrap(module)
        self.names: dict[str, str] = {}
        """Every name of `state_dict()`, in its order, with the first name of the same tensor."""
        self.parameters: dict[str, nn.Parameter] = {}
        """Distinct parameters by first name, on the meta device; `requires_grad` tells who trains."""
        self.buffers: dict[str, Tensor] = {}
        """Distinct persistent buffers by first name, on the meta device."""
        first: dict[int, str] = {}
        memo: dict[int, Any] = {}
        for name, tensor in named_state(module):
            mine = name not in without
            if mine:
                self.names[name] = first.setdefault(id(tensor), name)
            if id(tensor) in memo:
                continue
            memo[id(tensor)] = shell = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = parameter = nn.Parameter(shell, requires_grad=tensor.requires_grad and mine)
                self.parameters |= {name: parameter} if mine else {}
            elif mine:
                self.buffers[name] = shell
        self.blueprint = deep_copy(module, memo)
        self.modes = _modes(deep_copy(self.blueprint))
        """For train and eval mode, the `training` flag of each submodule in `modules()` order."""

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
        print_: Fingerprint = {}
        for name, owner in self.names.items():
            tensor = self.parameters.get(owner, self.buffers.get(owner))
            if tensor is None or owner != name:
                print_[name] = {"tied": owner}
                continue
            role = "buffer" if name in self.buffers else "trainable" if tensor.requires_grad else "frozen"
            dtype = str(tensor.dtype).removeprefix("torch.")
            print_[name] = {"role": role, "shape": list(tensor.shape), "dtype": dtype}
        return print_

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """The distinct tensors of a module of this architecture, by first name, detached."""
        return {name: tensor.detach() for name, tensor in named_state(unwrap(module)) if self.names.get(name) == name}

    def expand(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` under all its names, tied ones included, in `state_dict()` order."""
        return {name: state[owner] for name, owner in self.names.items()}

    def build(self, state: Mapping[str, Tensor], device: torch.device | None = None) -> nn.Module:
        """A module with these tensors (by first name) in it, moved to `device`; tensors there already aren't copied.

        Raises:
            UnsupportedError: it is scripted.
        """
        memo: dict[int, Any] = {}
        for name, shell in self.parameters.items():
            memo[id(shell)] = nn.Parameter(state[name].to(device or state[name].device), shell.requires_grad)
        for name, buffer in self.buffers.items():
            memo[id(buffer)] = state[name].to(device or state[name].device)
        if any(isinstance(part, torch.jit.ScriptModule) for part in self.blueprint.modules()):
            raise UnsupportedError(
                "a part of the body was made by torch.jit.script, whose parameters can't be exchanged for a version's: "
                "give the module that it was made from"
            )
        module = deep_copy(self.blueprint, memo)
        if device is not None:
            for owner, leaf in transient_buffers(module):
                kept = owner._buffers[leaf]
                owner._buffers[leaf] = kept if kept is None else kept.to(device)
        return module


def compare(expected: Fingerprint, got: Fingerprint, what: str) -> None:
    """Check a module's fingerprint against the store's.

    Raises:
        ArchitectureError: they differ; the message names the tensors.
    """
    names = [
        name for name in [*expected, *(n for n in got if n not in expected)] if expected.get(name) != got.get(name)
    ]
    if not names:
        return
    shown = "; ".join(f"{n}: the store has {_entry(expected, n)}, got {_entry(got, n)}" for n in names[:8])
    more = f"; and {len(names) - 8} more" if len(names) > 8 else ""
    raise ArchitectureError(
        f"{what} isn't the one that this store was begun with: {len(names)} of "
        f"{len({*expected, *got})} tensors differ: "
        f"{shown}{more}. "
        "Use the same architecture, dtype and frozen parameters, or another store"
    )


def is_entry(entry: object) -> bool:
    """Whether this is what a fingerprint says of one tensor."""
    if not isinstance(entry, dict):
        return False
    return set(entry) in ({"tied"}, {"role", "shape", "dtype"}) and all(
        isinstance(value, list if key == "shape" else str) for key, value in entry.items()
    )


def check_whole(fingerprint: object, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are all those of a fingerprint, and that it is one: either may come from anywhere.

    Raises:
        ArchitectureError: they aren't.
    """
    if not isinstance(fingerprint, dict) or not fingerprint or not all(map(is_entry, fingerprint.values())):
        raise ArchitectureError("this isn't a fingerprint: expected an object for each tensor")
    own = {name: entry for name, entry in fingerprint.items() if "tied" not in entry}
    if (
        any(entry["tied"] not in own for entry in fingerprint.values() if "tied" in entry)
        or own.keys() != tensors.keys()
    ):
        raise ArchitectureError(
            f"the tensors aren't those of the fingerprint: {sorted(own.keys() ^ tensors.keys())[:8]}"
        )
    for name, tensor in tensors.items():
        if own[name]["role"] not in ("trainable", "frozen", "buffer"):
            raise ArchitectureError(f"tensor {name[:80]!r} has the unknown role {own[name]['role'][:20]!r}")
        check_tensors(fingerprint, {name: tensor}, own[name]["role"])


def check_tensors(fingerprint: Fingerprint, tensors: Mapping[str, Tensor], role: str) -> None:
    """Check that tensors are those of a fingerprint in one role ('trainable' or 'buffer').

    Raises:
        ArchitectureError: a name, shape or dtype that isn't.
    """
    for name, tensor in tensors.items():
        got = {"role": role, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if fingerprint.get(name) != got:
            raise ArchitectureError(
                f"tensor {name[:80]!r} doesn't fit the store: it has {_entry(fingerprint, name)}, got "
                f"{_entry({name: got}, name)}"
            )


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of `torch.compile`'s wrapper.

    Raises:
        UnsupportedError: it is wrapped for data parallelism.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedError(f"expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedError(f"{type(module).__name__} can't be served: pass its `.module` and run several replicas")
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers in `state_dict()` order, tied names included, compile's prefixes left out.

    Raises:
        UnsupportedError: a lazy parameter, or a submodule with extra state.
    """
    for prefix, owner in module.named_modules(remove_duplicate=False):
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedError(
                f"{prefix or 'the module'} ({type(owner).__name__}) keeps extra state, which isn't made of "
                "tensors by name: "
                "register what must be kept as buffers"
            )
        kept = {n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set}
        for leaf, tensor in [*owner._parameters.items(), *kept.items()]:
            if tensor is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            if is_lazy(tensor):
                raise UnsupportedError(
                    f"parameter {name!r} is lazy (uninitialised): run the model once on real input first"
                )
            yield name.replace("_orig_mod.", ""), tensor


def device_of(state: Mapping[str, Tensor], device: torch.device | str | None = None) -> torch.device:
    """The device that was asked for, or the one that a module's tensors are on."""
    first = next((tensor.device for tensor in state.values()), torch.device("cpu"))
    return first if device is None else torch.device(device)


def transient_buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the buffers are that `state_dict()` leaves out, as (owner, name in it)."""
    owners = list(module.modules())
    return [(owner, leaf) for owner in owners for leaf in owner._buffers if leaf in owner._non_persistent_buffers_set]


def _modes(module: nn.Module) -> dict[bool, list[bool]]:
    """Its own mode keeps the flags it was given (a frozen BatchNorm stays so); the other is what `train()` sets."""
    found = {module.training: [m.training for m in module.modules()]}
    module.train(not module.training)
    found[module.training] = [m.training for m in module.modules()]
    return found


def _entry(fingerprint: Fingerprint, name: str) -> str:
    entry = fingerprint.get(name)
    if entry is None:
        return "nothing"
    if "tied" in entry:
        return f"a name of {entry['tied']!r}"
    return f"{entry['role']} {entry['dtype']} {tuple(entry['shape'])}"
