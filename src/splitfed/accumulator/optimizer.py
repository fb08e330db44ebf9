"""The optimizer: how it is built, steps, and keeps its state from one commit to the next.

Module, optimizer and scheduler live in the store between commits. Whoever commits next builds the
optimizer again from the same factory and restores what the last commit captured. What comes of it
must equal an optimizer that never stopped, bit for bit, so state isn't trusted to torch's own
loading alone:

- `Optimizer.load_state_dict` casts floating state to the parameter's dtype: a bfloat16 parameter
  would lose the float32 part of its moments. Every tensor is put back in its own dtype, and with
  its own strides.
- Plain JSON turns the milestones `{2: 1}` of MultiStepLR into `{'2': 1}`, and the rate never drops.
  `capture` returns a tree of exact kinds for `pytree.flatten`, and refuses any other.
- A scheduler sets the rates of its optimizer when it is built: it is restored first, the optimizer
  after it.

Functions (the lambdas of LambdaLR) never become data; they come from the factory again. An
optimizer's settings (its rate, its betas) are part of its state, so the captured values win over
those of a factory that was changed meanwhile. A restart with another rate warns, as the new rate
has no effect.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from splitfed.accumulator.settings import (
    CommitSettings,
    Groups,
    OptimizerFactory,
    SchedulerFactory,
)
from splitfed.errors import InputError, UnsupportedError
from splitfed.model.skeleton import Template, plain_name
from splitfed.protocol import safetensors
from splitfed.store.lineage import Lineage

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_HYPERPARAMETERS = ("lr", "momentum", "betas", "weight_decay")


@dataclass(slots=True, eq=False)
class Live:
    """Module, optimizer and scheduler as one commit left them."""

    nonce: str
    module: nn.Module
    optimizer: Optimizer | None
    """`None` where nothing trains."""
    scheduler: LRScheduler | None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """The buffers by first name, as they are in the store: the module's own may be elsewhere."""


class Stepper:
    """Takes optimizer steps on the state of a lineage.

    What it keeps in memory is a cache: it is used only if the head is the very commit (by nonce)
    that it came from, and it equals what the store would give, bit for bit.

    Args:
        template: The module's structure.
        optimizer: Makes the optimizer.
        settings: Scheduler, parameter groups and clipping.
        device: Where to step; where the weights are if it isn't given.
    """

    def __init__(
        self,
        template: Template,
        optimizer: OptimizerFactory,
        settings: CommitSettings,
        device: torch.device | None,
    ) -> None:
        self._template = template
        self._factories = (optimizer, settings.lr_scheduler, settings.param_groups)
        self._clip_norm = settings.clip_norm
        self._device = device
        self._kept: Live | None = None

    def take(self, lineage: Lineage, head: int) -> Live:
        """The state at the head, for the caller to change: from memory or else from the store."""
        nonce = lineage.commit(head).nonce
        # Taken out of the cache, not looked up: the caller changes it, and if the commit fails
        # halfway, what is left of it equals no version.
        kept, self._kept = self._kept, None
        if kept is not None and kept.nonce == nonce:
            return kept
        stored = lineage.checked_state(head)
        buffers = _as_stored({name: stored[name] for name in self._template.buffers})
        state = {name: tensor.clone() for name, tensor in stored.items()}
        module = self._template.build(state, self._device)
        if not self._template.trainable:
            return Live(nonce, module, None, None, buffers)
        optimizer, scheduler = build(module, *self._factories)
        saved = lineage.optimizer(head)
        if saved is not None:
            given = _hyperparameters(optimizer)
            restore(optimizer, scheduler, saved)
            # A scheduler changes rates by itself, so with one a difference says nothing.
            if scheduler is None and _hyperparameters(optimizer) != given:
                warnings.warn(
                    f"the optimizer goes on with the store's {_hyperparameters(optimizer)}, "
                    f"not with {given} as it was made now: settings are part of its state. "
                    "Make it as before; for rates that change give a lr_scheduler from the "
                    "beginning, or begin a new run from load_weights()",
                    stacklevel=2,
                )
        return Live(nonce, module, optimizer, scheduler, buffers)

    def keep(self, live: Live, nonce: str, buffers: Mapping[str, Tensor]) -> None:
        """Hold on to a state that has been committed, with these buffers."""
        live.nonce = nonce
        changed = {name: now for name, now in buffers.items() if now is not live.buffers[name]}
        live.buffers = {**live.buffers, **_as_stored(changed)}
        self._kept = live

    def step(self, live: Live, mean: Mapping[str, Tensor]) -> None:
        """One step of optimizer and scheduler; a parameter not in `mean` has no gradient."""
        take_step(live, mean, self._clip_norm)


def take_step(live: Live, mean: Mapping[str, Tensor], clip_norm: float | None) -> None:
    """One step of optimizer and scheduler; a parameter not in `mean` has no gradient.

    Args:
        live: Module, optimizer and scheduler.
        mean: The mean gradient by parameter.
        clip_norm: Its largest 2-norm; `None` for any.
    """
    if live.optimizer is None:
        return
    for name, parameter in live.module.named_parameters():
        gradient = mean.get(plain_name(name))
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(live.module.parameters(), clip_norm)
    live.optimizer.step()
    if live.scheduler is not None:
        live.scheduler.step()
    live.optimizer.zero_grad(set_to_none=True)


def _as_stored(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies as the store would give them back, strides included; they hold no file open."""
    if not buffers:
        return {}
    return safetensors.decode(b"".join(safetensors.encode(buffers)))[0]


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, object]]:
    """The settings that people change, by parameter group."""
    found: list[dict[str, object]] = []
    for group in optimizer.param_groups:
        values = {name: group.get(name) for name in _HYPERPARAMETERS}
        found.append({k: v for k, v in values.items() if isinstance(v, float | int | tuple)})
    return found


def build(
    module: nn.Module,
    optimizer: OptimizerFactory,
    lr_scheduler: SchedulerFactory | None = None,
    param_groups: Groups | None = None,
) -> tuple[Optimizer, LRScheduler | None]:
    """Build the optimizer of `module`, and its scheduler if there is one.

    Args:
        module: Whose trainable parameters are optimized.
        optimizer: Makes the optimizer from the list of trainable parameters, in
            `named_parameters()` order and each tied one once, or from what `param_groups` returns.
        lr_scheduler: Makes the scheduler from the optimizer.
        param_groups: Makes parameter groups from the module.

    Raises:
        InputError: nothing to train, or a factory that returns something else.
        UnsupportedError: an optimizer or scheduler that needs what a stored gradient can't give (a
            closure, sparse gradients, a metric), or that holds parameters which aren't trainable
            ones of `module`.
    """
    factories = {
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "param_groups": param_groups,
    }
    for name, factory in factories.items():
        if factory is not None and not callable(factory):
            raise InputError(
                f"{name} is {type(factory).__name__}: expected a function that makes it, such as "
                "lambda params: torch.optim.SGD(params, lr=0.1)"
            )
    # parameters() names a tied parameter once, so that no optimizer steps it twice.
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError(
            "the module has no trainable parameter: "
            "expected one with requires_grad=True to optimize"
        )
    built = optimizer(trainable if param_groups is None else param_groups(module))
    _check_optimizer(built, trainable)
    if lr_scheduler is None:
        return built, None
    scheduler = lr_scheduler(built)
    _check_scheduler(scheduler, built)
    return built, scheduler


def capture(optimizer: Optimizer, scheduler: LRScheduler | None, *, copied: bool = True) -> object:
    """The exact state of both, as a tree of dict, list, tuple, tensors and scalars.

    Args:
        optimizer: The optimizer.
        scheduler: Its scheduler, if there is one.
        copied: Whether it shares no memory with them; else it is good until their next step.

    Raises:
        UnsupportedError: an entry of another kind; the message names it.
    """
    copier = _Copier(copied=copied)
    saved: dict[str, object] = {
        "kind": _kind(optimizer),
        "shapes": _shapes(optimizer),
        "state": copier.copy(optimizer.state_dict(), "optimizer", functions=False),
    }
    schedule = None
    if scheduler is not None:
        state = copier.copy(scheduler.state_dict(), "scheduler", functions=True)
        schedule = {"kind": _kind(scheduler), "state": state}
    return {"optimizer": saved, "scheduler": schedule, "strides": copier.strides}


def restore(optimizer: Optimizer, scheduler: LRScheduler | None, state: object) -> None:
    """Bring a freshly built optimizer and scheduler to a captured state.

    The state is neither changed nor kept.

    Raises:
        InputError: the state is that of another optimizer, scheduler or set of parameters, or no
            such state at all.
    """
    fields: Any = state
    _check_captured(optimizer, scheduler, fields)
    copier = _Copier(fields["strides"])
    # The scheduler first: it changed rates when it was built, and the optimizer's state mends them.
    if scheduler is not None:
        schedule = copier.copy(fields["scheduler"]["state"], "scheduler", functions=False)
        scheduler.load_state_dict(schedule)
    exact = copier.copy(fields["optimizer"]["state"], "optimizer", functions=False)
    # A rate may be a tensor on a device of its own: torch keeps a group's entries as they are
    # loaded.
    for group, loaded in zip(optimizer.param_groups, exact["param_groups"], strict=True):
        for key, value in loaded.items():
            if isinstance(group.get(key), Tensor):
                loaded[key] = _exact(group[key], value)
    optimizer.load_state_dict({**exact})
    # state_dict() names parameters by their index, and hands out the optimizer's own dict for each.
    for key, entries in optimizer.state_dict()["state"].items():
        if isinstance(entries, dict):
            entries.update(_exact(entries, exact["state"][key]))


def _check_captured(optimizer: Optimizer, scheduler: LRScheduler | None, state: Any) -> None:
    try:
        saved = state["optimizer"]
        schedule = state["scheduler"]
        found = saved["kind"], saved["shapes"], schedule and schedule["kind"]
        state["strides"]  # must be there too
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            "this isn't the state of an optimizer: expected what capture() returned"
        ) from error
    expected = _kind(optimizer), _shapes(optimizer), scheduler and _kind(scheduler)
    names = ("optimizer", "parameter shapes", "scheduler")
    for name, wanted, got in zip(names, expected, found, strict=True):
        if wanted != got:
            raise InputError(
                f"the captured state has {name} {got}: expected {wanted}; use the factory of before"
            )


def _check_optimizer(optimizer: object, trainable: list[nn.Parameter]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"the optimizer factory returned {type(optimizer).__name__}: "
            "expected a torch.optim.Optimizer"
        )
    name = type(optimizer).__name__
    if isinstance(optimizer, SparseAdam):
        raise UnsupportedError(
            "SparseAdam needs sparse gradients, and averaged ones are dense: use torch.optim.Adam"
        )
    if not steps_alone(optimizer):
        raise UnsupportedError(
            f"{name}.step() needs arguments, such as a closure that computes the loss again, "
            "and a commit has only gradients: use torch.optim.AdamW or SGD"
        )
    known = {id(parameter) for parameter in trainable}
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UnsupportedError(
                    f"group {i} of {name} holds a parameter of shape {tuple(parameter.shape)} "
                    "that isn't a trainable one of the module: "
                    "use only the parameters that the factory is given"
                )


def _check_scheduler(scheduler: object, optimizer: Optimizer) -> None:
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UnsupportedError(
            "ReduceLROnPlateau needs a metric, and a commit has none: use StepLR, say"
        )
    if not isinstance(scheduler, LRScheduler):
        raise InputError(
            f"the lr_scheduler factory returned {name}: "
            "expected a torch.optim.lr_scheduler.LRScheduler"
        )
    if not steps_alone(scheduler):
        raise UnsupportedError(
            f"{name}.step() needs arguments, and a commit has none: use a schedule over steps alone"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise InputError(
            f"{name} belongs to another optimizer: expected the one that the factory was given"
        )
    for child in getattr(scheduler, "_schedulers", ()):
        _check_scheduler(child, optimizer)


def steps_alone(steps: object) -> bool:
    """Whether `step()` does without arguments."""
    # The class is asked: a scheduler wraps the method of its optimizer.
    try:
        inspect.signature(type(steps).step).bind(steps)  # type: ignore[attr-defined]
    except TypeError:
        return False
    return True


def _kind(thing: object) -> str:
    children = ", ".join(_kind(child) for child in getattr(thing, "_schedulers", ()))
    return type(thing).__name__ + (f"({children})" if children else "")


def _shapes(optimizer: Optimizer) -> list[list[list[int]]]:
    return [
        [list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups
    ]


class _Copier:
    """Deep copies of plain trees that keep strides and identity, whatever a codec in between does.

    `strides` holds those of each tensor that isn't contiguous, by its place: such state would
    otherwise come back contiguous and be computed along another path than its channels_last
    parameter, with other bits.
    """

    def __init__(
        self, strides: dict[str, tuple[int, ...]] | None = None, *, copied: bool = True
    ) -> None:
        self.strides: dict[str, tuple[int, ...]] = {} if strides is None else dict(strides)
        self._copied = copied
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(self, value: Any, place: str, *, functions: bool) -> Any:
        """A copy of a tree.

        Args:
            value: The tree.
            place: Its name in messages and in `strides`.
            functions: Whether entries of dicts that are functions are left out; else they are
                refused.

        Raises:
            UnsupportedError: it holds something that can't be stored exactly.
        """
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if kind in (list, tuple, torch.Size):
            children = enumerate(value)
            return kind(
                [self.copy(child, f"{place}[{i!r}]", functions=functions) for i, child in children]
            )
        if kind in (dict, OrderedDict, Counter):
            return kind(self._entries(value, place, functions=functions))
        return _number(value, place)

    def _entries(self, value: Mapping[Any, Any], place: str, *, functions: bool) -> dict[Any, Any]:
        entries = {}
        for key, child in value.items():
            if not (functions and isinstance(child, _FUNCTIONS)):
                entries[_key(key, place)] = self.copy(
                    child, f"{place}[{key!r}]", functions=functions
                )
        return entries

    def _tensor(self, value: Tensor, place: str) -> Tensor:
        # The original is held beside its copy: else its id could be that of another tensor by now.
        if id(value) not in self._seen:
            self._seen[id(value)] = (value, self._copy_of(value, place))
        return self._seen[id(value)][1]

    def _copy_of(self, value: Tensor, place: str) -> Tensor:
        copy = value.detach()
        # A copy of what has gaps has none: as such it is stored, copied or not.
        if self._copied or torch.empty_like(copy, device="meta").stride() != copy.stride():
            copy = copy.clone()
        if place in self.strides:
            strided = torch.empty_strided(
                copy.shape, self.strides[place], dtype=copy.dtype, device=copy.device
            )
            return strided.copy_(copy)
        if not copy.is_contiguous():
            self.strides[place] = tuple(copy.stride())
        return copy


def _number(value: Any, place: str) -> int | float:
    """Numbers of other types than Python's own, such as NumPy's."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, float):
        return float(value)
    kind = type(value)
    raise UnsupportedError(
        f"{place} is {kind.__module__}.{kind.__qualname__}, which can't be stored exactly: "
        "expected tensors, None, bool, int, float or str in dict, list or tuple"
    )


def _key(key: Any, place: str) -> Any:
    if key is None or type(key) in (bool, int, str):
        return key
    if isinstance(key, float) and math.isfinite(key):
        return float(key)
    if isinstance(key, numbers.Integral):
        return int(key)
    raise UnsupportedError(
        f"a key of {place} is {key!r}, which can't be stored exactly: "
        "expected str, int, bool or None"
    )


def _exact(loaded: Any, saved: Any) -> Any:
    """`saved`, on the devices where torch put `loaded`, as far as both have the same structure."""
    both = (loaded, saved)
    if _all(both, Tensor):
        return saved.to(loaded.device)
    if _all(both, dict):
        return type(saved)({key: _exact(loaded.get(key), value) for key, value in saved.items()})
    if _all(both, (list, tuple)) and len(saved) == len(loaded):
        return type(saved)([_exact(*pair) for pair in zip(loaded, saved, strict=True)])
    return loaded if isinstance(loaded, Tensor) else saved


def _all(values: tuple[Any, ...], kind: type | tuple[type, ...]) -> bool:
    return all(isinstance(value, kind) for value in values)
