"""Building an optimizer and its schedule, and carrying their state from one commit to the next without losing a bit.

Whoever commits next builds the optimizer anew from the same factory and restores what the last commit captured. What
comes of it must equal an optimizer that never stopped, so state isn't trusted to torch's own loading alone:

- `Optimizer.load_state_dict` casts floating state to the parameter's dtype: a bfloat16 parameter would lose the float32
  part of its moments. Every tensor is put back in its own dtype, and with its own strides.
- Plain JSON turns the milestones `{2: 1}` of MultiStepLR into `{'2': 1}`, and the rate never drops. `capture` returns a
  tree of exact kinds for `trees.flatten`, and refuses any other.
- A scheduler sets the rates of its optimizer when it is built: it is restored first, the optimizer after it.

Functions (the lambdas of LambdaLR) never become data; they come from the factory again. What an optimizer was built
with (its rate, its betas) is part of its state: the captured values win over the factory's.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from splitfed.errors import InputError, UnsupportedError

OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Groups = Callable[[nn.Module], list[dict[str, Any]]]

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


def build(
    module: nn.Module,
    optimizer: OptimizerFactory,
    lr_scheduler: SchedulerFactory | None = None,
    param_groups: Groups | None = None,
) -> tuple[Optimizer, LRScheduler | None]:
    """Build the optimizer of `module`, and its scheduler if there is one.

    Args:
        module: Whose trainable parameters are optimized.
        optimizer: Makes the optimizer from the list of trainable parameters, in `named_parameters()` order and each
            tied one once, or from what `param_groups` returns.
        lr_scheduler: Makes the scheduler from the optimizer.
        param_groups: Makes parameter groups from the module.

    Raises:
        InputError: nothing to train, or a factory that returns something else.
        UnsupportedError: an optimizer or scheduler that needs what a stored gradient can't give (a closure, sparse
            gradients, a metric), or that holds parameters which aren't trainable ones of `module`.
    """
    for name, factory in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler), ("param_groups", param_groups)):
        if factory is not None and not callable(factory):
            raise InputError(
                f"{name} is {type(factory).__name__}: expected a function that makes it, such as "
                "lambda params: torch.optim.SGD(params, lr=0.1)"
            )
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError("the module has no trainable parameter: expected one with requires_grad=True to optimize")
    built = optimizer(trainable if param_groups is None else param_groups(module))
    _check_optimizer(built, trainable)
    if lr_scheduler is None:
        return built, None
    scheduler = lr_scheduler(built)
    _check_scheduler(scheduler, built)
    return built, scheduler


def capture(optimizer: Optimizer, scheduler: LRScheduler | None) -> object:
    """Return the exact state of both as a tree of dict, list, tuple, tensors and scalars; no memory is shared.

    Raises:
        UnsupportedError: an entry of another kind; the message names it.
    """
    copier = _Copier()
    return {
        "optimizer": {
            "kind": _kind(optimizer),
            "shapes": _shapes(optimizer),
            "state": copier.copy(optimizer.state_dict(), "optimizer", functions=False),
        },
        "scheduler": None
        if scheduler is None
        else {"kind": _kind(scheduler), "state": copier.copy(scheduler.state_dict(), "scheduler", functions=True)},
        "strides": copier.strides,
    }


def restore(optimizer: Optimizer, scheduler: LRScheduler | None, state: object) -> None:
    """Bring a freshly built optimizer and scheduler to a captured state, which is neither changed nor kept.

    Raises:
        InputError: the state is that of another optimizer, scheduler or set of parameters, or no such state at all.
    """
    try:
        saved, schedule, strides = (state[key] for key in ("optimizer", "scheduler", "strides"))  # type: ignore[index]
        found = saved["kind"], saved["shapes"], schedule and schedule["kind"]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise InputError("this isn't the state of an optimizer: expected what capture() returned") from error
    expected = _kind(optimizer), _shapes(optimizer), scheduler and _kind(scheduler)
    for what, want, got in zip(("optimizer", "parameter shapes", "scheduler"), expected, found, strict=True):
        if want != got:
            raise InputError(f"the captured state has {what} {got}: expected {want}; use the factory of before")
    copier = _Copier(strides)
    if scheduler is not None:
        scheduler.load_state_dict(copier.copy(schedule["state"], "scheduler", functions=False))
    exact = copier.copy(saved["state"], "optimizer", functions=False)
    for group, new in zip(optimizer.param_groups, exact["param_groups"], strict=True):
        new.update({key: _exact(group[key], value) for key, value in new.items() if isinstance(group.get(key), Tensor)})
    optimizer.load_state_dict({**exact})
    # state_dict() names parameters by their index, and hands out the optimizer's own dict for each.
    for key, loaded in optimizer.state_dict()["state"].items():
        if isinstance(loaded, dict):
            loaded.update(_exact(loaded, exact["state"][key]))


def _check_optimizer(optimizer: object, trainable: list[nn.Parameter]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"the optimizer factory returned {type(optimizer).__name__}: expected a torch.optim.Optimizer")
    name = type(optimizer).__name__
    if isinstance(optimizer, SparseAdam):
        raise UnsupportedError("SparseAdam needs sparse gradients, and averaged ones are dense: use torch.optim.Adam")
    if not steps_alone(optimizer):
        raise UnsupportedError(
            f"{name}.step() needs arguments, such as a closure that computes the loss again, and a commit has only "
            "gradients: use torch.optim.AdamW or SGD"
        )
    known = {id(parameter) for parameter in trainable}
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UnsupportedError(
                    f"group {i} of {name} holds a parameter of shape {tuple(parameter.shape)} that isn't a trainable "
                    "one of the module: use only the parameters that the factory is given"
                )


def _check_scheduler(scheduler: object, optimizer: Optimizer) -> None:
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UnsupportedError("ReduceLROnPlateau needs a metric, and a commit has none: use StepLR, say")
    if not isinstance(scheduler, LRScheduler):
        raise InputError(f"the lr_scheduler factory returned {name}: expected a torch.optim.lr_scheduler.LRScheduler")
    if not steps_alone(scheduler):
        raise UnsupportedError(f"{name}.step() needs arguments, and a commit has none: use a schedule over steps alone")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise InputError(f"{name} belongs to another optimizer: expected the one that the factory was given")
    for child in getattr(scheduler, "_schedulers", ()):
        _check_scheduler(child, optimizer)


def steps_alone(steps: object) -> bool:
    """Whether `step()` does without arguments; asked of the class, since a scheduler wraps its optimizer's own."""
    try:
        inspect.signature(type(steps).step).bind(steps)  # type: ignore[attr-defined]
    except TypeError:
        return False
    return True


def _kind(thing: object) -> str:
    children = ", ".join(_kind(child) for child in getattr(thing, "_schedulers", ()))
    return type(thing).__name__ + (f"({children})" if children else "")


def _shapes(optimizer: Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


class _Copier:
    """Deep copies of plain trees that keep strides and identity, whether or not a codec in between does.

    `strides` holds those of each tensor that isn't contiguous, by its place: such state would otherwise come back
    contiguous and be computed along another path than its channels_last parameter, with other bits.
    """

    def __init__(self, strides: dict[str, tuple[int, ...]] | None = None) -> None:
        self.strides: dict[str, tuple[int, ...]] = {} if strides is None else dict(strides)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(self, value: Any, where: str, *, functions: bool) -> Any:
        """Copy `value`, found at `where`; entries that are functions are left out if `functions`, refused if not."""

        def inner(child: Any, step: object) -> Any:
            return self.copy(child, f"{where}[{step!r}]", functions=functions)

        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            if id(value) not in self._seen:
                self._seen[id(value)] = value, self._tensor(value, where)
            return self._seen[id(value)][1]
        if kind in (list, tuple, torch.Size):
            return kind([inner(child, i) for i, child in enumerate(value)])
        if kind in (dict, OrderedDict, Counter):
            kept = {k: v for k, v in value.items() if not (functions and isinstance(v, _FUNCTIONS))}
            return kind({_key(k, where): inner(v, k) for k, v in kept.items()})
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, float):
            return float(value)
        raise UnsupportedError(
            f"{where} is {kind.__module__}.{kind.__qualname__}, which can't be stored exactly: expected tensors, None, "
            "bool, int, float or str in dict, list or tuple"
        )

    def _tensor(self, value: Tensor, where: str) -> Tensor:
        copy = value.detach().clone()
        if where in self.strides:
            strided = torch.empty_strided(copy.shape, self.strides[where], dtype=copy.dtype, device=copy.device)
            return strided.copy_(copy)
        if not copy.is_contiguous():
            self.strides[where] = tuple(copy.stride())
        return copy


def _key(key: Any, where: str) -> Any:
    if key is None or type(key) in (bool, int, str):
        return key
    if isinstance(key, float) and math.isfinite(key):
        return float(key)
    if isinstance(key, numbers.Integral):
        return int(key)
    raise UnsupportedError(
        f"a key of {where} is {key!r}, which can't be stored exactly: expected str, int, bool or None"
    )


def _exact(loaded: Any, saved: Any) -> Any:
    """`saved`, on the devices where torch put `loaded`, wherever the two have the same structure."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return type(saved)({key: _exact(loaded.get(key), value) for key, value in saved.items()})
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(saved) == len(loaded):
        return type(saved)([_exact(*pair) for pair in zip(loaded, saved, strict=True)])
    return loaded if isinstance(loaded, Tensor) else saved
