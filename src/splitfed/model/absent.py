"""A tensor on the other side of the cut: its name, shape and dtype are here, its values aren't.

The parameters and buffers of the part that was cut out are asked for in many ways: to count them,
for a device or dtype, to freeze them, for a penalty. What is structure is answered. Whatever needs
values raises an error that names the tensor: an operator, a method, a function of torch.

The trap: torch computes garbage with some tensors on the meta device instead of raising, so none is
ever handed out. And an `Absent` can't pass for a `Tensor`: what `isinstance` takes for one, torch
reads as one, and there is no memory to read.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from splitfed.errors import AbsentError, UnsupportedError

if TYPE_CHECKING:
    from splitfed.model.places import Place

_ANSWERED = frozenset(
    "dtype shape ndim layout requires_grad is_leaf grad_fn is_sparse is_quantized itemsize nbytes "
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
        """Itself, if it is so already.

        Raises:
            AbsentError: the server trains it, and would go on, or the other way round.
        """
        if bool(requires_grad) != self.like.requires_grad:
            raise AbsentError(
                f"requires_grad of {self._name!r} can't be changed here, as it belongs to the part "
                "that was cut out: freeze or unfreeze it before split(). For passes that train "
                "nothing of it, use client.batch(count=False), or client.requires_grad_(False)"
            )
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
        kind = "parameter" if isinstance(self.like, torch.nn.Parameter) else "tensor"
        return f"<{self._name}, {kind} {tuple(self.shape)} on the other side of the cut>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(vars(self), _place=copy.deepcopy(self._place, memo))
        return twin

    def _now(self) -> Tensor:
        """A tensor on the meta device of its shape, and of the dtype that `to()` has given it."""
        dtype = self._place.dtypes.get(self.like.dtype, self.like.dtype)
        like = self.like
        return like if like.dtype == dtype else like.to(dtype).requires_grad_(like.requires_grad)

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
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(shell, tensor.requires_grad)
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
