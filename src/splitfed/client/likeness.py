"""What a client looks like to tools that examine a model: its class, and the methods of its kind.

Hugging Face's Trainer reads the signature of `type(model).forward` to find the labels, without
which there is no `eval_loss`, and looks for "QuestionAnswering" in the name of the class. Loops
index and iterate a Sequential, which Python looks up in the class too. So each client is of a class
of its own kind of half: a subclass of `SplitClient` made on demand, once for each kind.

The trap: a model that PEFT wraps without a task forwards `*args, **kwargs`, and trainers look
through it; so is it here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from splitfed.model.tracing import refuse_tracing

_OF_A_CONTAINER = (
    "__len__",
    "__iter__",
    "__reversed__",
    "__contains__",
    "__getitem__",
    "__setitem__",
    "__delitem__",
)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def shown(half: nn.Module) -> nn.Module:
    """The module of a half whose name and signature trainers ask for."""
    inner = getattr(half, "_orig_mod", half)
    base = getattr(inner, "get_base_model", None)
    if callable(base) and _takes_anything(type(inner)):
        inner = base()
    return inner if isinstance(inner, nn.Module) else half


def class_like(client_class: type, half: nn.Module) -> type:
    """The subclass of a client's class that looks like a half's class."""
    plain = client_class.__dict__.get("_made_from", client_class)
    kind: Any = type(half)
    model: Any = type(shown(half))
    made: type = _class_like(plain, kind, model)
    return made


@functools.lru_cache(64)
def _class_like(client_class: Any, half_class: Any, model: Any) -> Any:
    members: dict[str, Any] = {
        "__doc__": client_class.__doc__,
        "__module__": client_class.__module__,
        "_made_from": client_class,
    }
    for name in _OF_A_CONTAINER:
        if hasattr(half_class, name) and not hasattr(client_class, name):
            members[name] = _of_the_half(name)
    members["_forward_of_the_class"] = staticmethod(forward_with(_signature(model)))
    return type(f"{client_class.__name__}[{model.__name__}]", (client_class,), members)


def forward_with(signature: inspect.Signature | None) -> Callable[..., Any]:
    """A plain function that calls its first argument's `forward`, and shows a signature."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # torch.fx runs this with a placeholder for all arguments, which no call could unpack.
        refuse_tracing()
        return self.forward(*args, **kwargs)

    if signature is not None:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _of_the_half(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(self.client_half, name)(*args)

    method.__name__ = name
    return method


def _signature(model: type) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # a forward made in C, or none
        return None


def _takes_anything(model: type) -> bool:
    signature = _signature(model)
    if signature is None:
        return True
    own = list(signature.parameters.values())[1:]
    return all(parameter.kind in _VARIADIC for parameter in own)
