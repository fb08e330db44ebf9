"""A stand-in for a module of the part that was cut out: of its class, with its settings.

Each is an instance of a class that is made for it, a subclass of `AbsentModule` and of the module's
own. So `isinstance`, properties, methods, indexing and `len` are the part's, and run on the
stand-in. What it keeps of its own begins with `_absent`, and its methods come first.

The traps: a stand-in has no parameters in its registry, so that those of the half stay the half's.
So asked directly, `parameters()` answers from elsewhere; but not while `client.modules()` is at it,
as tools (DDP, Opacus, groups of weight decay) then collect what `client.parameters()` has. And a
property that raises AttributeError, as ours are, is asked for again as if it were missing.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

from splitfed.errors import AbsentError
from splitfed.model.standin import recording
from splitfed.model.standin.assigning import (
    assign,
    class_attribute,
    class_of,
    computed,
    is_local,
    place_of,
    written_error,
)
from splitfed.model.standin.tensors import Absent, Place, absent_error, set_error
from splitfed.model.tracing import UNBROKEN

Self = TypeVar("Self", bound="AbsentModule")
_FRAMES = 5
"""So near is a tool that asks for parameters: torch's own functions are between."""


class AbsentModule(nn.Module):
    """Stands for a module of the part that was cut out."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Not the part's own, which may enter its subclasses in a list."""

    # ------------------------------------------------------------------------------- attributes

    def __getattr__(self, name: str) -> Any:
        place = place_of(self)
        if place is None:
            return super().__getattr__(name)
        if name in place.written:
            raise written_error(place, name)
        for members in (place.parameters, place.buffers, vars(self)["_modules"]):
            if name in members:
                return members[name]
        found = class_attribute(type(self), name)
        if hasattr(type(found), "__get__"):
            return computed(self, place, name, found)
        try:
            return super().__getattr__(name)
        except AbsentError:
            raise
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise AbsentError(
                f"the part that was cut out here has no {place.at(name)!r}: {error}"
            ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        place = place_of(self)
        if place is None:
            super().__setattr__(name, value)
        elif hasattr(type(class_attribute(type(self), name)), "__set__"):
            object.__setattr__(self, name, value)
        elif name == "training":
            vars(self)["training"] = bool(value)
            place.ledger.moves += 1
        elif is_local(self, place, name):
            place.local.add(name)
            vars(self)[name] = value
        else:
            assign(self, place, name, value)

    def __delattr__(self, name: str) -> None:
        place = place_of(self)
        if place is not None and name not in place.local:
            raise AbsentError(
                f"the client half deletes {place.at(name)!r} of the part that was cut out: "
                "make this change before split(), or in the server's body"
            )
        super().__delattr__(name)

    # ---------------------------------------------------------------------- tensors and modules

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Those of the part, without their values; none while a loop over the half is here."""
        return _named_members(self, "parameters", prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """As `named_parameters`."""
        return _named_members(self, "buffers", prefix, recurse, remove_duplicate)

    def get_parameter(self, target: str) -> Any:
        """A parameter of the part, without its values."""
        found = self if target == "" else _member(self, target)
        return found if isinstance(found, Absent) else nn.Module.get_parameter(self, target)

    def get_buffer(self, target: str) -> Any:
        """A buffer of the part, without its values."""
        found = self if target == "" else _member(self, target)
        return found if isinstance(found, Absent) else nn.Module.get_buffer(self, target)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The stand-ins, this one first."""
        place = place_of(self)
        found = _walk(self, set() if memo is None else memo, prefix, remove_duplicate)
        if memo is None or place is None:
            yield from found
            return
        for name, module in found:
            # For as long as the loop over the half, which has passed its memo, is at this one.
            place.ledger.visited = module
            try:
                yield name, module
            finally:
                place.ledger.visited = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing, as a part of the half's.

        Raises:
            AbsentError: asked for by itself.
        """
        place = place_of(self)
        if place is None or place.is_half:
            return nn.Module.state_dict(self, *args, **kwargs)
        destination = kwargs.get("destination", args[0] if args else None)
        if destination is None:
            raise AbsentError(
                f"state_dict() of {_said(place)}, which was cut out: its weights are in the store, "
                "store.load_weights(); those of the half are client.state_dict()"
            )
        if hasattr(destination, "_metadata") and not place.path:
            destination._metadata[kwargs.get("prefix", "")[:-1]] = {"version": self._version}
        return destination

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, unless it was placed by hand.

        Raises:
            AbsentError: as said.
        """
        place = place_of(self)
        if place is None or place.is_half:
            return nn.Module.load_state_dict(self, *args, **kwargs)
        raise AbsentError(
            f"load_state_dict() of {_said(place)}, which was cut out: load weights into the model "
            "before split(), or give the server a body that has them"
        )

    parameters = nn.Module.parameters
    buffers = nn.Module.buffers
    _load_from_state_dict = nn.Module._load_from_state_dict
    _save_to_state_dict = nn.Module._save_to_state_dict
    _version = nn.Module._version

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        """Note where the half goes, and in which dtypes."""
        place = place_of(self)
        if place is None:
            nn.Module._apply(self, fn, recurse)
            return self
        place.move(fn)
        for module in self.children() if recurse else ():
            module._apply(fn)
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Itself, if all of it is so already.

        Raises:
            AbsentError: it isn't.
        """
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing, for the part: the server keeps no gradient between two batches."""
        if place_of(self) is None:
            nn.Module.zero_grad(self, set_to_none)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuse to take in what the server's part hasn't."""
        _refuse_member(self, name, module)
        nn.Module.add_module(self, name, module)

    register_module = add_module

    def register_parameter(self, name: str, param: Any) -> None:
        """Refuse to take in what the server's part hasn't."""
        _refuse_member(self, name, param)
        nn.Module.register_parameter(self, name, param)

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Refuse to take in what the server's part hasn't."""
        _refuse_member(self, name, tensor)
        nn.Module.register_buffer(self, name, tensor, persistent)

    # ------------------------------------------------------------------------------------ calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: it runs on the server, as a part of what was cut out."""
        raise absent_error(vars(self)["_absent_place"].path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: it runs on the server, as a part of what was cut out."""
        raise absent_error(vars(self)["_absent_place"].path)

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> Any:
        """Take a hook, or only note the flag that it serves.

        Raises:
            AbsentError: this is within the part, where a hook would never be called.
        """
        place = place_of(self)
        flag = recording.flag_of(hook)
        if place is None or not place.path or flag is None:
            _refuse_hook(self)
            return nn.Module.register_forward_hook(self, hook, **kwargs)
        place.ledger.recorded.setdefault(flag, place.path)
        return torch.utils.hooks.RemovableHandle(OrderedDict())

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        """As `register_forward_hook`."""
        _refuse_hook(self)
        return nn.Module.register_forward_pre_hook(self, hook, **kwargs)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> Any:
        """As `register_forward_hook`."""
        _refuse_hook(self)
        return nn.Module.register_full_backward_hook(self, hook, prepend)

    def register_full_backward_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """As `register_forward_hook`."""
        _refuse_hook(self)
        return nn.Module.register_full_backward_pre_hook(self, hook, prepend)

    def register_backward_hook(self, hook: Any) -> Any:
        """As `register_forward_hook`."""
        _refuse_hook(self)
        return nn.Module.register_backward_hook(self, hook)

    # ------------------------------------------------------------------------- names and copies

    def __repr__(self) -> str:
        place: Place = vars(self)["_absent_place"]
        return f"<{_said(place)}, {class_of(self).__name__} on the other side of the cut>"

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = object.__new__(type(self))
        for name, value in self.__getstate__().items():
            vars(twin)[name] = copy.deepcopy(value, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        kind = cls.__bases__[0] if "_absent_class" in vars(cls) else cls
        return empty, (kind, class_of(self)), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        state.pop("_compiled_call_impl", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _named_members(
    module: nn.Module, kind: str, prefix: str, recurse: bool, remove_duplicate: bool
) -> Iterator[tuple[str, Any]]:
    """The 'parameters' or 'buffers' of the part, or of the half."""
    found: Iterator[tuple[str, Any]]
    if _place_to_ask(module) is None:
        found = getattr(nn.Module, f"named_{kind}")(module, prefix, recurse, remove_duplicate)
        return found
    found = nn.Module._named_members(
        module,
        lambda member: getattr(vars(member)["_absent_place"], kind).items(),
        prefix=prefix,
        recurse=recurse,
        remove_duplicate=remove_duplicate,
    )
    return found


def _place_to_ask(module: nn.Module) -> Place | None:
    """The same, but `None` for whoever asks for the tensors of the half, which it has none of."""
    place = place_of(module)
    if place is None or place.is_half or place.ledger.visited is module or _collects_own():
        return None
    return place


def _collects_own() -> bool:
    """Whether a tool asks that works on what the half has of its own, module by module.

    Opacus hangs hooks on each module with parameters, and gradients of each example on those.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__")).startswith("opacus."):
            return True
        frame = frame.f_back
    return False


def _member(module: nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None)


def _refuse_member(module: AbsentModule, name: str, value: Any) -> None:
    place = place_of(module)
    if place is not None:
        raise set_error(place.at(name), value)


def _refuse_hook(module: AbsentModule) -> None:
    place = place_of(module)
    if place is not None and place.path:
        raise AbsentError(
            f"a hook on {place.path!r}, which is within the part that was cut out, would never be "
            "called: register it on the cut layer itself, on a module of the half, or in the "
            "server's body"
        )


def _said(place: Place) -> str:
    return repr(place.path) if place.path else "the part"


def _walk(
    module: nn.Module, memo: set[nn.Module], prefix: str, remove_duplicate: bool
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without the mark of a visit."""
    if module in memo:
        return
    if remove_duplicate:
        memo.add(module)
    yield prefix, module
    for leaf, child in module._modules.items():
        name = f"{prefix}.{leaf}" if prefix else leaf
        if isinstance(child, AbsentModule):
            yield from _walk(child, memo, name, remove_duplicate)
        elif child is not None:
            yield from child.named_modules(memo, name, remove_duplicate)


# ------------------------------------------------------------------------------ a stand-in's class


def empty(kind: type[AbsentModule], part: type) -> AbsentModule:
    """A stand-in in which there is nothing yet."""
    # Any, as mypy takes a class that has an __eq__ in its metaclass for one that has no hash.
    cls: Any = kind
    twin: AbsentModule = object.__new__(_stand_in_class(cls, part))
    vars(twin).update(vars(nn.Module()))
    return twin


def become(point: AbsentModule, part: type) -> None:
    """Make a cut point an instance of the class of its part, too."""
    # Past the property that answers the part's class.
    cls: Any = type(point)
    vars(object)["__class__"].__set__(point, _stand_in_class(cls, part))


class Likeness(type):
    """The class of stand-ins' classes: each equals the class that it stands for.

    So `type(layer) == Layer` and a table by types find it, where `is` can't.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is vars(cls).get("_absent_class", cls)

    def __hash__(cls) -> int:
        return hash(vars(cls).get("_absent_class"))


@lru_cache(maxsize=1024)
def _stand_in_class(kind: Any, part: Any) -> Any:
    """A subclass of `kind` and of the class of a module.

    Made past what a class runs when it gets a subclass, which may enter that in a list. A class
    that can have none, or isn't Python's own (a scripted module), is left out.
    """
    if part is nn.Module or issubclass(part, AbsentModule | torch.jit.ScriptModule):
        return kind
    namespace: dict[str, Any] = {
        "__class__": property(lambda self: part),
        "__doc__": part.__doc__,
        "__module__": part.__module__,
        "__qualname__": part.__qualname__,
        "_absent_class": part,
        "forward": _forward_like(kind, part),
    }
    if hasattr(part, "__getitem__"):
        namespace["__getitem__"] = _item
    if hasattr(part, "__del__"):
        namespace["__del__"] = lambda self: None
    meta: Any = Likeness if type(part) is type else type(part)
    made = kind
    with suppress(TypeError):
        made = type.__new__(meta, part.__name__, (kind, part), namespace)
    return made


def _forward_like(kind: type[AbsentModule], part: Any) -> Any:
    """The forward of a stand-in, with the signature of the part's."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    # The graph of torch.compile breaks here, as in what this calls.
    forward._torchdynamo_disable = True  # type: ignore[attr-defined]
    forward._torchdynamo_disable_msg = UNBROKEN  # type: ignore[attr-defined]
    with suppress(TypeError, ValueError):
        forward.__signature__ = inspect.signature(part.forward)  # type: ignore[attr-defined]
    return forward


def _item(module: Any, key: Any) -> Any:
    """`module[key]`, as the part's class has it: a slice of absent modules is absent, too."""
    found = class_of(module).__getitem__(module, key)
    if not isinstance(found, nn.Module) or isinstance(found, AbsentModule):
        return found
    outer: Place = vars(module)["_absent_place"]
    twin = empty(AbsentModule, type(found))
    vars(twin)["_modules"].update(found._modules)
    vars(twin)["training"] = module.training
    path = f"{outer.path}[{key!r}]"
    place = Place(outer.name, path, outer.index, outer.ledger, device=outer.device)
    vars(twin)["_absent_place"] = place
    return twin
