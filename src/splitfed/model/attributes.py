"""What a body keeps in Python between two calls: found, named, and put back.

A version says what parameters and persistent buffers are. All else that a forward may write to, its
plain attributes and the buffers that `state_dict()` leaves out, is nobody's: another replica
doesn't have it, and another client's call must never compute on it. So a module begins each run as
it was built, and whatever a run has changed is put back.

The look at each run (`Model.is_as_built`) is cheap, about 1 µs for a submodule: attributes by
identity, elements of plain containers, version counters of tensors. Objects that change from within
(a cache with an `update()`) are found by a walk through them, at the first runs and then ever more
seldom; a body that was found to have one is built anew after each run.

The trap: what a run left may be a part of its graph. So nothing is put back in place but the
elements of containers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.model.boundary import fresh
from splitfed.model.skeleton import Template, transient_buffers
from splitfed.model.walk import Walk, is_atom, of_content, of_identity

_CONTAINERS = frozenset((list, dict, set, deque, OrderedDict, defaultdict, Counter))
_MANY = 1_000
"""A container with more elements is looked at by its length, and by the walks."""
_GONE = object()


class Habits:
    """What the forwards of a body were seen to do; one for all its models."""

    def __init__(self) -> None:
        self.written: set[str] = set()
        """The attributes that they set, by module and name."""
        self.within: set[str] = set()
        """Those whose object stays and changes from within, where no cheap look finds it."""
        self.late: set[str] = set()
        """Those that were found otherwise before a run: hooks set them in the backward before."""
        self.spoils = False
        """Whether one wrote to parameters where only a walk finds it."""
        self.runs = 0
        """How many there were."""


class Attributes:
    """What the submodules of a built module hold besides what its version says.

    Args:
        module: As it was built.
        blueprint: The template's module, which it was built from.
        modes: For train and eval mode, the `training` flag of each submodule.
    """

    def __init__(
        self, module: nn.Module, blueprint: nn.Module, modes: Mapping[bool, Sequence[bool]]
    ) -> None:
        self.owners = {
            name.replace("_orig_mod.", ""): owner for name, owner in module.named_modules()
        }
        """The submodules by name."""
        self._tables = [
            _Table(name, now, now.copy())
            for name, owner in self.owners.items()
            for now in (owner.__dict__, owner._modules, owner._parameters)
        ]
        self.now = [table.now for table in self._tables]
        """The tables of all submodules: attributes, submodules and parameters by name."""
        self._modes = modes
        self._set: dict[tuple[int, str], Any] = {}
        """What the call has set in the tables, by table and name."""
        self.buffers = [owner._buffers for owner in self.owners.values()]
        """The buffers of each submodule."""
        self.counts = list(map(len, self.buffers))
        """How many there are."""
        self._transient = _transient_slots(self.owners, blueprint)
        self._empty = [
            (name, owner._buffers, leaf)
            for name, owner in self.owners.items()
            for leaf, buffer in owner._buffers.items()
            if buffer is None and leaf not in owner._non_persistent_buffers_set
        ]
        """Places of persistent buffers that are `None`: no version has a value for them."""
        self._containers: list[_Container] = []
        self._tensors: list[tuple[str, Tensor, int]] = []
        seen: set[int] = set()
        for path, value in self._plain():
            self._note(path, value, seen)
        self.has_more = bool(self._transient or self._empty or self._containers or self._tensors)
        """Whether a look at the tables alone isn't enough."""

    def begin(self, changed: Iterable[nn.Module]) -> None:
        """Note how a run begins: with something set on these submodules."""
        for owner in changed:
            now = owner.__dict__
            built = next(table.built for table in self._tables if table.now is now)
            for leaf in {**built, **now}:
                if now.get(leaf, _GONE) is not built.get(leaf, _GONE):
                    self._set[id(now), leaf] = now.get(leaf, _GONE)

    def left(self) -> list[str]:
        """The names of those that aren't as they were built: what a backward's hooks have left."""
        self._set = {}
        return self.changed()

    def changed(self) -> list[str]:
        """The names of those that aren't as the run began, by module and attribute."""
        found = {path for table in self._tables for path in table.changed(self._set)}
        for name, held, count in zip(self.owners, self.buffers, self.counts, strict=True):
            found.update(path_of(name, leaf) for leaf in list(held)[count:])
        found.update(
            path_of(name, leaf) for name, held, leaf in self._empty if held.get(leaf) is not None
        )
        found.update(path for path, tensor, version in self._tensors if tensor._version != version)
        found.update(held.path for held in self._containers if held.is_changed())
        found.update(slot.path for slot in self._transient if slot.is_changed())
        return sorted(found)

    def restore(self, device: torch.device) -> bool:
        """Put back what isn't as it was built, but for the mode, which each run sets.

        Returns:
            Whether that was possible; if not, the module has to be built anew.
        """
        self._set = {}
        if any(tensor._version != version for _, tensor, version in self._tensors):
            return False
        for table in self._tables:
            table.restore()
        for held, count in zip(self.buffers, self.counts, strict=True):
            for leaf in list(held)[count:]:
                del held[leaf]
        for _, held, leaf in self._empty:
            held[leaf] = None
        for slot in self._transient:
            slot.restore(device)
        return all(held.restore() for held in self._containers)

    def is_quiet(self) -> bool:
        """Whether nothing changed that a look at the tables doesn't show."""
        return not (
            any(held.get(leaf) is not None for _, held, leaf in self._empty)
            or any(tensor._version != version for _, tensor, version in self._tensors)
            or any(held.is_changed() for held in self._containers)
            or any(slot.is_changed() for slot in self._transient)
        )

    def walk(self) -> dict[str, list[Any]]:
        """What can change from within, by name: equal as long as nothing in it was changed.

        Parameters too, as what is written through their `.data` moves no version counter.
        """
        found = Walk(of_identity, self.owners.values()).through(self._plain())
        for name, owner in self.owners.items():
            for leaf, parameter in owner._parameters.items():
                if parameter is not None:
                    found[path_of(name, leaf)] = [of_content(parameter)]
        return found

    def values(self, paths: Iterable[str]) -> dict[str, list[Any]]:
        """What attributes hold now: equal if two runs have left the same."""
        named = ((path, self._find(path)) for path in paths)
        return Walk(of_content, self.owners.values()).through(named)

    def _find(self, path: str) -> Any:
        prefix, _, leaf = path.rpartition(".")
        owner = self.owners[prefix]
        tables = (owner.__dict__, owner._buffers, owner._modules, owner._parameters)
        return next((table[leaf] for table in tables if leaf in table), None)

    def built(self, mode: bool) -> list[Any]:
        """All values of all tables as they were built, in a mode."""
        found: list[Any] = []
        for number, table in enumerate(self._tables):
            values = table.built
            if number % 3 == 0 and "training" in values:  # the first of its module
                values = {**values, "training": self._modes[mode][number // 3]}
            found += values.values()
        return found

    def _plain(self) -> Iterator[tuple[str, Any]]:
        """The attributes that could change from within, by name."""
        every = of_every_module()
        for name, owner in self.owners.items():
            for leaf, value in owner.__dict__.items():
                if leaf not in every and not is_atom(value):
                    yield path_of(name, leaf), value

    def _note(self, path: str, value: Any, seen: set[int]) -> None:
        """Take down the tensors and containers that an attribute holds."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_inference():
                self._tensors.append((path, value, value._version))
        elif type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            container = _Container(path, value)
            self._containers.append(container)
            for held in container.contents or ():
                self._note(path, held, seen)


class _Table:
    """A table of a submodule: its `__dict__`, or its submodules or parameters by name."""

    __slots__ = ("built", "name", "now")

    def __init__(self, name: str, now: dict[str, Any], built: dict[str, Any]) -> None:
        self.name = name
        self.now = now
        self.built = built

    def changed(self, settings: Mapping[tuple[int, str], Any]) -> Iterator[str]:
        """The names of what isn't as it was built, or set for the run."""
        for leaf in {**self.built, **self.now}:
            expected = settings.get((id(self.now), leaf), self.built.get(leaf, _GONE))
            if leaf != "training" and self.now.get(leaf, _GONE) is not expected:
                yield path_of(self.name, leaf)

    def restore(self) -> None:
        """Put back what was built."""
        values = self.now.values()
        if len(values) == len(self.built) and all(map(is_, values, self.built.values())):
            return
        mode = self.now.get("training")
        # Anew and not one by one: the next look expects them in the order of before.
        self.now.clear()
        self.now.update(self.built)
        if "training" in self.built and mode is not None:
            self.now["training"] = mode


class _Container:
    """A plain container that an attribute holds, and what was in it."""

    __slots__ = ("_held", "_keys", "_size", "contents", "path")

    def __init__(self, path: str, held: Any) -> None:
        self.path = path
        self._held = held
        self._size = len(held)
        self._keys: list[Any] | None = None
        self.contents: list[Any] | None = None
        """Its elements, if there aren't too many."""
        if self._size <= _MANY:
            self._keys = list(held) if isinstance(held, dict) else None
            self.contents = list(self._elements())

    def is_changed(self) -> bool:
        """Whether it holds other elements, or more or fewer."""
        if len(self._held) != self._size:
            return True
        return self.contents is not None and not all(map(is_, self._elements(), self.contents))

    def restore(self) -> bool:
        """Put its elements back; whether that was possible."""
        if not self.is_changed():
            return True
        if self.contents is None:
            return False
        self._held.clear()
        if self._keys is not None:
            # One by one, as the update of a Counter would count the pairs.
            for key, value in zip(self._keys, self.contents, strict=True):
                self._held[key] = value
        elif isinstance(self._held, set):
            self._held.update(self.contents)
        else:
            self._held.extend(self.contents)
        return True

    def _elements(self) -> Iterable[Any]:
        elements: Iterable[Any] = self._held
        return self._held.values() if isinstance(self._held, dict) else elements


@dataclass(slots=True, eq=False)
class _TransientSlot:
    """The place of a buffer that `state_dict()` leaves out, so that no version has it."""

    path: str
    owner: nn.Module
    leaf: str
    pristine: Tensor | None
    """What was there when the template was made."""
    buffer: Tensor | None
    """What the next run should find there: equal to `pristine`."""
    counter: int | None
    """The version counter of `buffer` as long as nobody writes to it."""

    def is_changed(self) -> bool:
        """Whether a run has changed or exchanged it."""
        found = self.owner._buffers.get(self.leaf)
        if found is not self.buffer:
            return True
        return found is not None and found._version != self.counter

    def restore(self, device: torch.device) -> None:
        """Put a copy of the pristine buffer there, if a run has changed or exchanged it."""
        if self.is_changed():
            self.buffer = None if self.pristine is None else fresh(self.pristine, device)
            self.counter = None if self.buffer is None else self.buffer._version
            self.owner._buffers[self.leaf] = self.buffer


@cache
def of_every_module() -> frozenset[str]:
    """The attributes that torch itself gives each module."""
    return frozenset(nn.Module().__dict__)


def path_of(module: str, attribute: str) -> str:
    """The name of an attribute within a body."""
    return f"{module}.{attribute}".lstrip(".")


def buffer_slots(module: nn.Module, template: Template) -> list[tuple[str, nn.Module, str]]:
    """Where the persistent buffers are: (first name, owner, name in it), tied ones repeated."""
    slots = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, buffer in owner._buffers.items():
            name = f"{prefix}.{leaf}".lstrip(".").replace("_orig_mod.", "")
            if buffer is not None and name in template.names:
                slots.append((template.names[name], owner, leaf))
    return slots


def _transient_slots(owners: Mapping[str, nn.Module], blueprint: nn.Module) -> list[_TransientSlot]:
    """The transient buffers of a module that was built from a blueprint."""
    built = [
        (name, owner, leaf)
        for name, owner in owners.items()
        for leaf in owner._buffers
        if leaf in owner._non_persistent_buffers_set
    ]
    slots: list[_TransientSlot] = []
    if not built:
        return slots
    for (name, owner, leaf), (original, _) in zip(built, transient_buffers(blueprint), strict=True):
        buffer = owner._buffers[leaf]
        counter = None if buffer is None else buffer._version
        path = path_of(name, leaf)
        slots.append(_TransientSlot(path, owner, leaf, original._buffers[leaf], buffer, counter))
    return slots
