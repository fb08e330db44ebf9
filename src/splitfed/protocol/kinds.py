"""Of what kind each field of a message must be: a request or a record may come from anywhere.

Annotations say it too, but nothing enforces them at run time. What is checked here is the kind alone; whether a number
is in its range, or an id may become a key, is checked where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from splitfed.errors import FormatError
from splitfed.protocol import messages as m

M = TypeVar("M")
Kind = frozenset[type] | Callable[[Any], bool]
"""The classes that a value may have, or a test of it."""


def _is(*kinds: type) -> Kind:
    return frozenset(kinds)


def _maybe(kind: Kind) -> Kind:
    return kind | {type(None)} if isinstance(kind, frozenset) else lambda value: value is None or kind(value)


def _tuple(kind: Kind) -> Kind:
    if isinstance(kind, frozenset):
        return lambda value: isinstance(value, tuple) and kind.issuperset(map(type, value))
    return lambda value: isinstance(value, tuple) and all(map(kind, value))


def _instance(kind: type) -> Kind:
    return lambda value: isinstance(value, kind)


def _tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(type(k) is str and isinstance(v, Tensor) for k, v in value.items())


def _seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _update(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and {"values", "bases", "num_samples"} <= set(value)
        and _tensors(value["values"])
        and _tensors(value["bases"])
    )


def _output(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], tuple) and type(value[1]) is str


def _pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(number) is int for number in value)


def _number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


_INT, _STR, _BOOL, _NUMBER = _is(int), _is(str), _is(bool), _number
_CALL: dict[str, Kind] = {
    "cut": _STR,
    "inputs": lambda value: isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict),
    "requires_grad": _tuple(_BOOL),
    "training": _BOOL,
    "seed": _seed,
    "autocast": _maybe(_STR),
}
KINDS: dict[type, dict[str, Kind]] = {
    m.Housekeeping: {"released": _tuple(_pair), "abandoned": _tuple(_INT), "answered": _tuple(_INT)},
    m.ForwardRequest: _CALL
    | {"incarnation": _maybe(_INT), "process": _STR, "call": _INT, "grad": _BOOL}
    | {"version": _maybe(_INT), "seen": _INT, "previous": _maybe(_INT)}
    | {"housekeeping": _is(m.Housekeeping)},
    m.ForwardRecord: _CALL
    | {"buffers": _maybe(_tensors), "outputs": _tuple(_output), "crcs": _tuple(_INT), "numerics": _STR},
    m.GradientRecord: {
        "kind": _STR,
        "base_version": _INT,
        "num_samples": _NUMBER,
        "loss_scale": _NUMBER,
        "digest": _STR,
        "numerics": _STR,
        "gradients": _tensors,
        "buffers": lambda value: isinstance(value, list | tuple) and all(map(_update, value)),
    },
    m.Chain: {"num_samples": _NUMBER, "last_part": _INT},
    m.Seal: {
        "parts": _tuple(_pair),
        "num_samples": _NUMBER,
        "loss_scale": _NUMBER,
        "chains": _tuple(_is(m.Chain)),
    },
    m.BackwardRequest: {
        "grad_outputs": _tuple(_maybe(_instance(Tensor))),
        "seal": _maybe(_is(m.Seal)),
        "housekeeping": _is(m.Housekeeping),
    },
    m.LossRequest: {"forward": _is(m.ForwardRequest), "num_samples": _NUMBER},
    m.PullRequest: {"version": _maybe(_INT), "weights": _BOOL},
    m.RoundInfo: {"number": _INT, "deadline": _maybe(_NUMBER)}
    | dict.fromkeys(("sampled", "barrier", "arrived", "closed", "finished"), _BOOL),
    m.PullAnswer: {"version": _INT, "weights": _tensors, "round": _maybe(_is(m.RoundInfo))},
    m.PushRequest: {
        "incarnation": _maybe(_INT),
        "process": _STR,
        "base_version": _INT,
        "gradients": _tensors,
        "values": _tensors,
        "bases": _tensors,
        "num_samples": _NUMBER,
        "loss_scale": _NUMBER,
    },
}
NESTED = frozenset(("housekeeping", "seal", "forward", "round", "chains"))


def check_kinds(message: M) -> M:
    """Return a message if each of its fields is of its kind; messages within it are looked into.

    Raises:
        FormatError: one isn't; the message names it.
    """
    for name, kind in KINDS.get(type(message), {}).items():
        value = getattr(message, name)
        if not (type(value) in kind if isinstance(kind, frozenset) else kind(value)):
            shown = (
                f"{value!r:.60}"
                if value is None or isinstance(value, int | float | str)
                else f"a {type(value).__name__}"
            )
            raise FormatError(f"{type(message).__name__}.{name} is {shown}: not of the kind that it must be")
        if name in NESTED and value is not None:
            for inner in value if name == "chains" else (value,):
                check_kinds(inner)
    return message
