"""What a client half may still ask of the part that was cut out of it.

Models read settings of their parts: `layers[0].self_attn.batch_first` in nn.TransformerEncoder, `layer.attention_type`,
`projection.weight.dtype`. Those are structure, which the template of the body has, so the cut point answers them.
Values and computation are the server's: they are refused by name.

The trap: the template's tensors are on the meta device, and torch computes garbage with some of those instead of
raising. So none is ever handed out; an `Absent` in its place tells its dtype and shape, and refuses all else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor, nn

from splitfed.errors import AbsentError

_OF_TENSORS = frozenset("dtype shape ndim layout requires_grad size dim numel is_floating_point is_complex".split())


class Absent:
    """Stands for a submodule or tensor on the other side of the cut: says what it is like, and computes nothing."""

    __slots__ = ("_place", "_what")

    def __init__(self, what: Any, place: str) -> None:
        self._what = what
        self._place = place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python's own look-ups, and torch.compile's of one that isn't initialised yet
            raise AttributeError(name)
        return told(self._what, name, self._place)

    def __getitem__(self, key: Any) -> Any:
        return _shown(self._what[key], f"{self._place}[{key!r}]")

    def __len__(self) -> int:
        return len(self._what)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: it runs on the server, as a part of what was cut out."""
        raise _refused(self._place)

    def __repr__(self) -> str:
        return f"<{self._place}, {type(self._what).__name__} on the other side of the cut>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse to be computed with."""
        places = [value._place for value in args if isinstance(value, Absent)]
        raise _refused(places[0] if places else "a tensor of it")


def told(what: Any, name: str, place: str = "") -> Any:
    """What `what`, a part that was cut out, has under `name`.

    Raises:
        AbsentError: it has no such attribute, or one that only the server has.
    """
    place = f"{place}.{name}".lstrip(".")
    if isinstance(what, Tensor) and name not in _OF_TENSORS:
        raise _refused(place)
    try:
        value = getattr(what, name)
    except Exception as error:
        raise AbsentError(f"the part that was cut out here has no {place!r}: {error}") from error
    if inspect.ismethod(value) and isinstance(value.__self__, nn.Module):
        raise _refused(place)
    return _shown(value, place)


def _shown(value: Any, place: str) -> Any:
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if _is_sequence(value) else ()
    if isinstance(value, Tensor | nn.Module) or any(isinstance(v, Tensor | nn.Module) for v in inner):
        return Absent(value, place)
    return value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple | set)


def _refused(place: str) -> AbsentError:
    return AbsentError(
        f"the client half uses {place!r} of the part that was cut out: only its settings, dtypes and shapes are here, "
        "its values and methods are the server's. Cut at a module that has this use within, or beside this part"
    )
