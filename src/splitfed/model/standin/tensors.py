"""What is absent: a tensor of the part that was cut out, and what is known of the module it is in.

Parameters and buffers are asked for in many ways: to count them,
for a device or dtype, to freeze them, for a penalty. What is structure is answered. Whatever needs
values raises an error that names the tensor: an operator, a method, a function of torch.

Plain attributes are noticed as they are assigned. A list, a dict or an object such as a config can
change without that, so it is compared before each call with a copy of what it had. An object that
the half holds too is the same object in both, as in the unsplit model: whoever changes it, changes
it for the part.

The trap: torch computes garbage with some tensors on the meta device instead of raising, so none is
ever handed out. And an `Absent` can't pass for a `Tensor`: what `isinstance` takes for one, torch
reads as one, and there is no memory to read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from splitfed.checks import warn_once
from splitfed.errors import AbsentError, UnsupportedError
from splitfed.model.skeleton import Template

MISSING = object()
_ATOMS = (type(None), bool, int, float, str)
MUTABLE = (list, dict, set)
_ANSWERED = frozenset(
    "dtype shape ndim layout is_leaf grad_fn is_sparse is_quantized itemsize nbytes "
    "size dim ndimension numel nelement stride storage_offset is_contiguous element_size "
    "is_floating_point is_complex is_signed".split()
)
"""What the shape and dtype alone say."""
_REFUSED = [
    f"__{prefix}{name}__"
    for name in "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()
    for prefix in ("", "r", "i")
] + [
    f"__{name}__"
    for name in "neg pos abs invert lt le gt ge bool int float complex index iter "
    "getitem setitem contains array round trunc divmod rdivmod".split()
]


def absent_error(place: str) -> AbsentError:
    """The error for a use of what only the server has."""
    return AbsentError(
        f"the client half uses {place!r} of the part that was cut out: only its settings, dtypes "
        "and shapes are here, its values and what computes with them are the server's. "
        "Cut at a module that has this use within, or beside this part"
    )


def requires_grad_error(name: str) -> AbsentError:
    """The error for a `requires_grad` that isn't the server's."""
    return AbsentError(
        f"requires_grad of {name!r} can't be changed for calls with gradients, as it belongs to "
        "the part that was cut out: freeze or unfreeze it before split(). For passes that train "
        "nothing of the part, use client.batch(count=False), or client.requires_grad_(False)"
    )


class Absent:
    """Stands for a parameter or buffer of the part that was cut out: has all but its values.

    Args:
        like: A tensor on the meta device with its shape, strides and dtype.
        name: Its name in the part, for messages.
        place: The module that has it.
    """

    like: Tensor
    _name: str
    _place: Place

    def __init__(self, like: Tensor, name: str, place: Place) -> None:
        vars(self).update(like=like, _name=name, _place=place)

    @property
    def device(self) -> torch.device:
        """Where the half has been moved to: the unsplit model would have moved it there, too."""
        return self._place.device

    def __getattr__(self, name: str) -> Any:
        if name == "__qualname__":
            # Asked for by torch alone, to say what is wrong with something that is no tensor.
            raise _not_a_tensor(self._name)
        # Python looks such names up itself, and torch.compile traces an instance of its own, which
        # is empty still: answered, they would come here for ever.
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "requires_grad":
            return self.like.requires_grad != (self in self._place.ledger.frozen)
        if name in _ANSWERED:
            return getattr(self._now(), name)
        if name in ("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu"):
            return self.device.type == name.removeprefix("is_")
        if name == "data":
            return self
        raise absent_error(f"{self._name}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        elif name == "grad" and value is None:
            pass  # There is none: the server keeps no gradient between two batches.
        elif name.startswith("_"):
            vars(self)[name] = value  # a tool's own mark
        else:
            raise absent_error(f"{self._name}.{name}")

    def detach(self) -> Absent:
        """Itself: nothing can be computed with it anyway."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Absent:
        """Itself, if it is so already, or for calls without gradients, to which it is all one.

        Raises:
            AbsentError: the server trains it, and would go on, or the other way round.
        """
        frozen = self._place.ledger.frozen
        frozen.pop(self, None)
        if bool(requires_grad) != self.like.requires_grad:
            if torch.is_grad_enabled():
                raise requires_grad_error(self._name)
            frozen[self] = self._name
        return self

    def __len__(self) -> int:
        return len(self.like)

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Tensor | Absent | int | float | complex):
            raise absent_error(f"{self._name}.__eq__")
        return NotImplemented

    def __ne__(self, other: object) -> Any:
        return self.__eq__(other)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        kind = "parameter" if isinstance(self.like, nn.Parameter) else "tensor"
        return f"<{self._name}, {kind} {tuple(self.shape)} on the other side of the cut>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(vars(self), _place=copy.deepcopy(self._place, memo))
        return twin

    def _now(self) -> Tensor:
        """A tensor on the meta device of its shape, and of the dtype that `to()` has given it."""
        dtype = self._place.dtypes.get(self.like.dtype, self.like.dtype)
        like = self.like
        if like.dtype == dtype:
            return like
        return like.to(dtype).requires_grad_(like.requires_grad)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse to be computed with."""
        places = _names([*args, *(kwargs or {}).values()])
        raise absent_error(places[0] if places else "a tensor of it")


def shell_of(tensor: Tensor) -> Tensor:
    """A tensor on the meta device that has all of one but its values."""
    if tensor.layout is torch.strided:
        shell = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )
    else:
        shell = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shell, tensor.requires_grad)
    return shell.requires_grad_(tensor.requires_grad)


def _names(values: Any, depth: int = 2) -> list[str]:
    """The names of the absent tensors among some values, and in lists of such."""
    found: list[str] = []
    for value in values:
        if isinstance(value, Absent):
            found.append(value._name)
        elif depth and isinstance(value, list | tuple):
            found += _names(value, depth - 1)
    return found


def _not_a_tensor(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name!r} belongs to the part that was cut out, so no optimizer or module of the client's "
        "can take it: give the optimizer client.parameters(). The server's own is the "
        "Accumulator's, with param_groups=... for rates of its own"
    )


def _refuse(operator: str) -> Any:
    def refuse(self: Absent, *args: Any) -> NoReturn:
        raise absent_error(f"{self._name}.{operator}")

    return refuse


for _operator in _REFUSED:
    setattr(Absent, _operator, _refuse(_operator))


# ---------------------------------------------------------------------------- where it is absent


class Ledger:
    """What the stand-ins of one half share."""

    __slots__ = ("frozen", "moves", "recorded", "shared", "template", "told", "visited")

    def __init__(self, template: Template) -> None:
        self.template = template
        self.moves = 0
        """Counts what is set on any of them: what was found holds for as long as it stays."""
        self.visited: nn.Module | None = None
        """The one at which a loop over the half's modules is."""
        self.recorded: dict[str, str] = {}
        """Flags that ask for what a module within a part gives, with the name of that."""
        self.frozen: dict[Absent, str] = {}
        """Parameters with another `requires_grad` than the server's, by name."""
        self.shared: frozenset[int] = frozenset()
        """By their ids, the objects of the half that its parts may hold too."""
        self.told: set[str] = set()

    def tell_once(self, text: str) -> None:
        """Warn of something, the first time."""
        warn_once(self.told, text, text, 4)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        twin = memo[id(self)] = Ledger(self.template)
        twin.recorded = dict(self.recorded)
        twin.frozen = copy.deepcopy(self.frozen, memo)
        return twin


class Holding:
    """Something that changes without being assigned: a list, a dict, a config.

    Args:
        name: The attributes that lead to it.
        value: It.
        before: A copy of what it has.
    """

    __slots__ = ("before", "name", "now", "value")

    def __init__(self, name: str, value: Any, before: Any) -> None:
        self.name = name
        self.value = value
        self.before = before
        self.now = value if isinstance(value, (*MUTABLE, tuple)) else vars(value)

    def __reduce__(self) -> Any:
        return Holding, (self.name, self.value, self.before)

    def changes(self) -> Iterator[tuple[str, Any]]:
        """What has changed, by the attributes that lead to it."""
        if self.now is self.value:
            yield self.name, self.value
            return
        now = vars(self.value)
        for leaf in {**self.before, **now}:
            value = now.get(leaf, MISSING)
            if value is not self.before.get(leaf, MISSING):
                yield f"{self.name}.{leaf}", value


@dataclass(slots=True, eq=False)
class Place:
    """Where the module of a stand-in is, and what that has."""

    name: str
    """Its name in the body."""
    path: str
    """Its name in the part that was cut out, for messages; '' for the part itself."""
    index: int
    """Its number among the body's modules."""
    ledger: Ledger
    is_half: bool = False
    """Whether all of the model was cut out: then the cut point is the half, too."""
    parameters: dict[str, Absent | None] = field(default_factory=dict)
    buffers: dict[str, Absent | None] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtypes: dict[torch.dtype, torch.dtype] = field(default_factory=dict)
    """Those that `to()` has given to tensors of a dtype."""
    originals: dict[str, Any] = field(default_factory=dict)
    """By name, what an attribute was before it was set."""
    held: list[Holding] = field(default_factory=list)
    local: set[str] = field(default_factory=set)
    """Attributes that are a tool's own."""
    written: set[str] = field(default_factory=set)
    """Attributes that the part's forward sets."""

    def at(self, name: str) -> str:
        """The name of an attribute, for messages."""
        return f"{self.path}.{name}".lstrip(".")

    def key(self, name: str) -> str:
        """The name of an attribute, for the server."""
        return f"{self.name}.{name}".lstrip(".")

    def hold(self, name: str, value: Any) -> None:
        """Watch what an attribute has now, if that can change without being assigned."""
        self.held = [held for held in self.held if held.name.partition(".")[0] != name]
        self.held += _holdings(name, value)

    def move(self, fn: Any) -> None:
        """Follow the half to another device or dtype."""
        dtypes = {absent.like.dtype for absent in self._tensors()}
        for dtype in dtypes or {torch.get_default_dtype()}:
            now = self.dtypes.get(dtype, dtype)
            moved = fn(torch.empty(0, dtype=now, device=self.device))
            if dtypes:
                self.dtypes[dtype] = moved.dtype
            # Nothing is ever on the meta device: what has no values there has none anywhere.
            if moved.device.type != "meta":
                self.device = moved.device

    def _tensors(self) -> list[Absent]:
        found = [*self.parameters.values(), *self.buffers.values()]
        return [absent for absent in found if absent is not None]


def changed(held: Sequence[tuple[Place, Holding]]) -> list[tuple[Place, Holding]]:
    """Those that aren't as they were."""
    try:
        # In one go, and before each call: what is still the same object is found equal at once.
        return [pair for pair in held if pair[1].now != pair[1].before]
    except Exception:  # noqa: BLE001 -- whatever an array or another class makes of `!=`
        return [pair for pair in held if not _is_same(pair[1].now, pair[1].before)]


def is_plain(value: Any) -> bool:
    """Whether a value can travel with a call."""
    if type(value) is dict:
        return all(type(key) is str for key in value) and is_plain(list(value.values()))
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    return type(value) in _ATOMS


def set_error(name: str, value: Any) -> AbsentError:
    """The error for an assignment that can't travel."""
    return AbsentError(
        f"the client half sets {name!r} of the part that was cut out to a {type(value).__name__}: "
        "a call carries only attributes that the part has, as plain values (None, bool, int, "
        "float, str, and tuples, lists and dicts of them). "
        "Make this change before split(), or in the server's body"
    )


def _is_same(now: Any, before: Any) -> bool:
    """Whether containers hold the same objects."""
    if isinstance(now, dict):
        return list(map(id, now)) == list(map(id, before)) and _is_same(
            list(now.values()), list(before.values())
        )
    if len(now) != len(before):
        return False
    for one, other in zip(now, before, strict=True):
        if not isinstance(other, (*MUTABLE, tuple)):
            if one is not other:
                return False
        elif type(one) is not type(other) or not _is_same(one, other):
            return False
    return True


def _copied(value: Any) -> Any:
    """A container with copies of the containers in it; what else it holds is itself."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value.copy() if isinstance(value, MUTABLE) else value


def _can_change(value: Any) -> bool:
    return isinstance(value, MUTABLE) or (type(value) is tuple and any(map(_can_change, value)))


def _holdings(name: str, value: Any, depth: int = 2) -> Iterator[Holding]:
    """A value, and what it holds, as far as it can be changed."""
    if _can_change(value):
        yield Holding(name, value, _copied(value))
    elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor):
        before = dict(vars(value))
        yield Holding(name, value, before)
        for leaf, held in before.items() if depth else ():
            yield from _holdings(f"{name}.{leaf}", held, depth - 1)
