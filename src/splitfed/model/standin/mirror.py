"""The mirror of a part that was cut out: a stand-in for each of its modules, under its own name.

The half and the body are one model, and the half, its loops and its tools ask things of the part
that went: `isinstance`, settings, modes, methods, a loop over `modules()`. So the cut point holds
the skeleton of its part (`standin`), with copies of its plain attributes, and an `Absent` in place
of each tensor. Objects that the half holds too, such as a config, are the half's own.

What is changed here travels with each call, by module and attribute: `training` flags that aren't
those of the mode, and plain values that aren't what the part was cut with. The server applies them
for the run, and records them, so a replay is exact. What can't travel is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import AbsentError
from splitfed.model.skeleton import Template, unwrap
from splitfed.model.standin import recording
from splitfed.model.standin.assigning import OF_TORCH, class_of, give_up, is_read
from splitfed.model.standin.modules import AbsentModule, become, empty
from splitfed.model.standin.tensors import (
    MUTABLE,
    Absent,
    Holding,
    Ledger,
    Place,
    changed,
    is_plain,
    requires_grad_error,
    set_error,
    shell_of,
)

_OWN = frozenset(name for name in vars(AbsentModule) if not name.startswith("__"))


class Mirror:
    """The stand-ins of one part, the cut point first."""

    __slots__ = ("_by_name", "_found", "_held", "members")

    def __init__(self, members: Sequence[AbsentModule]) -> None:
        self.members = members
        self._by_name = {_place(member).name: member for member in reversed(members)}
        self._found: tuple[int, bool, Mapping[str, Any]] | None = None
        self._held: tuple[int, list[tuple[Place, Holding]]] | None = None

    def settings(self, training: bool) -> Mapping[str, Any]:
        """What is changed of the part.

        Args:
            training: The mode that the server sets the body to.

        Raises:
            AbsentError: what is changed can't travel, or a call would give less than is asked for.
        """
        ledger = _place(self.members[0]).ledger
        if ledger.recorded:
            recording.check(ledger.recorded)
        if ledger.frozen and torch.is_grad_enabled():
            raise requires_grad_error(next(iter(ledger.frozen.values())))
        moved = self._changed_holdings(ledger)
        found = self._found
        if found is None or moved or found[0] != ledger.moves or found[1] != training:
            settings = self._flags(ledger, training) | self._attributes()
            for place, holding in moved:
                settings |= self._travelling(place, holding)
            # What a list has become isn't counted, so it is looked at again.
            found = self._found = (-1 if moved else ledger.moves, training, settings)
        return found[2]

    def note_written(self, names: Sequence[str]) -> None:
        """Take note of the attributes that the part's forward sets, by their names in the body."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            member = self._by_name.get(owner)
            if member is not None:
                give_up(member, leaf)

    def restore(self, part: nn.Module) -> None:
        """Put modes and attributes into the part itself, as far as it has the same modules."""
        modules = dict(part.named_modules(remove_duplicate=False))
        for member in self.members:
            module = modules.get(_place(member).path)
            if module is None:
                continue
            module.training = member.training
            for name in _place(member).originals.keys() & vars(member).keys():
                setattr(module, name, copy.deepcopy(vars(member)[name]))

    def _flags(self, ledger: Ledger, training: bool) -> dict[str, Any]:
        modes = ledger.template.modes[training]
        found: dict[str, Any] = {}
        for member in self.members:
            place = _place(member)
            if member.training != modes[place.index]:
                found[place.key("training")] = member.training
        return found

    def _attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for member in self.members:
            place = _place(member)
            for name, original in place.originals.items():
                value = vars(member).get(name, original)
                # What the forward sets has no value here, until it is set again.
                if value is original or (name in place.written and name not in vars(member)):
                    continue
                if type(value) is not type(original) or value != original:
                    found[place.key(name)] = copy.deepcopy(value)
        return found

    def _changed_holdings(self, ledger: Ledger) -> list[tuple[Place, Holding]]:
        if self._held is None or self._held[0] != ledger.moves:
            places = [_place(member) for member in self.members]
            unique = {id(held.value): (place, held) for place in places for held in place.held}
            self._held = (ledger.moves, list(unique.values()))
        return changed(self._held[1])

    def _travelling(self, place: Place, holding: Holding) -> dict[str, Any]:
        """What has changed without being assigned."""
        found: dict[str, Any] = {}
        classes = [class_of(member) for member in self.members]
        for name, value in holding.changes():
            path, _, leaf = name.rpartition(".")
            if path and not is_read(leaf, classes):
                continue
            if path:
                raise _held_error(place.at(name))
            if not is_plain(value):
                raise set_error(place.at(name), value)
            found[place.key(name)] = copy.deepcopy(value)
        return found


def reflect(
    half: nn.Module, body: nn.Module, template: Template, points: Mapping[str, AbsentModule]
) -> dict[str, Mirror]:
    """Make cut points the skeletons of their parts.

    Args:
        half: The half, in which the cut points are.
        body: What was cut out of it.
        template: Its template.
        points: The cut points by the name of their part in the body.

    Returns:
        The mirrors by the same names.
    """
    body = unwrap(body)
    ledger = Ledger(template)
    # A deep copy takes what its memo has in place of an original: stand-ins, and the half's own.
    memo: dict[int, Any] = {id(value): value for owner in half.modules() for value in _held(owner)}
    ledger.shared = frozenset(memo)
    indices = {id(module): i for i, module in enumerate(body.modules())}
    made: dict[int, tuple[nn.Module, AbsentModule]] = {}
    mirrors: dict[str, Mirror] = {}
    for name, point in points.items():
        members = []
        for path, module in body.get_submodule(name).named_modules():
            if id(module) not in made:
                twin = empty(AbsentModule, _kind(module)) if path else point
                place = Place(
                    f"{name}.{path}".strip("."), path, indices[id(module)], ledger, twin is half
                )
                _begin(twin, module, place, memo)
                made[id(module)] = (module, twin)
            members.append(made[id(module)][1])
        mirrors[name] = Mirror(members)
    for module, twin in made.values():
        _fill(twin, module, memo)
    return mirrors


def identify(point: AbsentModule, part: nn.Module) -> None:
    """Make a cut point an instance of its part's class, too."""
    become(point, _kind(unwrap(part)))


def _held_error(name: str) -> AbsentError:
    return AbsentError(
        f"{name!r} has changed since split(), and the part that was cut out reads it: what is "
        "within an object doesn't travel with a call. Put it back, or change it before split() "
        "and in the server's body"
    )


def _place(member: nn.Module) -> Place:
    place: Place = vars(member)["_absent_place"]
    return place


def _kind(module: nn.Module) -> type:
    """The class of a module; of one that stands in for others itself, none that says anything."""
    return nn.Module if "client_half" in vars(module) else type(module)


def _begin(twin: AbsentModule, module: nn.Module, place: Place, memo: dict[int, Any]) -> None:
    """Note what stands for a module and its tensors, before what holds some is copied."""
    memo[id(module)] = twin
    for members, absents in (
        (module._parameters, place.parameters),
        (module._buffers, place.buffers),
    ):
        for name, tensor in members.items():
            absents[name] = None
            if tensor is not None:
                place.device = tensor.device
                absents[name] = _stand_for(tensor, place.at(name), place, memo)
    vars(twin)["_absent_place"] = place


def _fill(twin: AbsentModule, module: nn.Module, memo: dict[int, Any]) -> None:
    """Give a stand-in the mode, the children and the attributes of its module."""
    place = _place(twin)
    own = vars(twin)
    own["training"] = bool(module.training)
    for name, child in module._modules.items():
        own["_modules"][name] = None if child is None else memo[id(child)]
    # A container's methods change it past any assignment.
    if hasattr(module, "__setitem__"):
        place.hold("_modules", own["_modules"])
    # Tiers: a body may hold a client, whose affairs are its own.
    if isinstance(module, AbsentModule) or "client_half" in vars(module):
        return
    for name, value in vars(module).items():
        if name not in OF_TORCH and name not in _OWN and name not in own:
            _stand_for_tensors(value, place.at(name), place, memo)
            own[name] = copy.deepcopy(value, memo)
            place.hold(name, own[name])


def _stand_for(tensor: Tensor, name: str, place: Place, memo: dict[int, Any]) -> Absent:
    absent: Absent = memo.setdefault(id(tensor), Absent(shell_of(tensor), name, place))
    return absent


def _stand_for_tensors(value: Any, name: str, place: Place, memo: dict[int, Any]) -> None:
    """Note what stands for a tensor that is a plain attribute, or in a container that is one."""
    inner: Any = ()
    if isinstance(value, Tensor):
        _stand_for(value, name, place, memo)
    elif isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple | set):
        inner = enumerate(value)
    for key, item in inner:
        _stand_for_tensors(item, f"{name}[{key!r}]", place, memo)


def _held(module: nn.Module) -> Iterator[Any]:
    """What a module holds as plain attributes, and could be changed."""
    for name, value in vars(module).items():
        if name in OF_TORCH or isinstance(value, AbsentModule):
            continue
        if isinstance(value, MUTABLE) or not is_plain(value):
            yield value
