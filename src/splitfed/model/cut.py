"""Cutting a model in two, and joining the two again.

A cut takes the named submodule out and puts a `CutPoint` in its hole; the rest of the model, its
own code included, stays as it is. (Tracing would lose control flow and dropout modes; swapping was
bit-identical on every architecture tried.) For a slice of an `nn.Sequential` there is one in each
of its positions, so that all names stay what they were, and the slice is run as one (`slices`). So
there is for a run of layers in an `nn.ModuleList`, which the model calls in a loop of its own: what
it calls is collected, and sent as one (`runs`).

The trap: a module or tensor may be reached by several ways, under two names, in a list, as a plain
attribute or out of a function. A module under two names is cut under both; what would be on both
sides of the cut is refused, since each side would train a copy of its own (`apart`).
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from splitfed.errors import ArchitectureError, CutError, UnknownCutError
from splitfed.model.apart import Originals, check_apart
from splitfed.model.copying import check_hooks, deep_copy
from splitfed.model.cutpoint import CutPoint, Origin, call_as_one, hole_of
from splitfed.model.layers import Layer
from splitfed.model.skeleton import Template, check_copyable, check_initialised, unwrap
from splitfed.model.slices import Slice, join_names, restore_forward, run_as_one
from splitfed.model.stamp import make_stamp, put_stamp, remove_stamps
from splitfed.model.standin.mirror import identify, reflect
from splitfed.model.standin.modules import AbsentModule


class CutBody(nn.Module):
    """The parts cut out at several places, or a run of layers: one lineage, one version."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.add_module(leaf, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the cut points say which part is called.

        Raises:
            CutError: always.
        """
        raise CutError(
            "a body of several cuts, or of a run of layers, isn't called as a whole: "
            "call its client half through a SplitClient"
        )


Holes = dict[int, tuple[CutPoint, str]]
"""By the id of a module that goes: what stands in its places, and its name in the body."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut, resolved on a model: one submodule, or some positions of a container."""

    owner: str
    positions: tuple[str, ...]
    """Children of `owner` that go; none if `owner` goes itself."""
    run: str | None = None
    """Its name, if they are a run of layers that the model calls one by one."""

    @property
    def is_run(self) -> bool:
        """Whether the model calls its positions one by one, each with arguments of its own."""
        return self.run is not None

    @property
    def layers(self) -> list[Layer]:
        """The places of the layers of a run."""
        last = len(self.positions) - 1
        return [
            Layer(self.run or "", name, index, index == last)
            for index, name in enumerate(self.parts)
        ]

    @property
    def parts(self) -> list[str]:
        """Qualified names of the submodules that go to the body."""
        if not self.positions:
            return [self.owner]
        return [f"{self.owner}.{position}".lstrip(".") for position in self.positions]

    def names(self, *, alone: bool) -> list[str]:
        """Their names in the body.

        Args:
            alone: Whether the body is this cut only: then it has its own names, else the model's.
        """
        return list(self.positions or ("",)) if alone else self.parts


def split(model: nn.Module, at: str | Sequence[str]) -> tuple[nn.Module, nn.Module]:
    """Cut `model` into a client half and a body; both are deep copies and `model` isn't changed.

    Args:
        model: Any module that can be deep-copied.
        at: The name of a submodule at any depth (`"encoder.layer.1"`), a slice of an
            `nn.Sequential` (`"2:5"`, `"features.3:8"`, open or negative as in Python, but within
            its length), a run of layers in an `nn.ModuleList` (`"model.layers.4:28"`), which the
            model calls one by one, or a list of such cuts, which gives one body.

    Returns:
        The client half, with a `CutPoint` in each hole (for a slice in each position, which the
        model may call itself; for a run in that of each layer, and all calls of a loop over them
        are one request), and the body: the submodule itself, the slice or the run with its
        original positions as names, or for a list of cuts one module with the original qualified
        names.
        Both bear a stamp by which a server knows a half of another cut.

    Raises:
        UnknownCutError: there is no such submodule, or a slice or run goes past the end; the
            message lists the nearest names, or the number of positions.
        SharedParameterError: a parameter, buffer or module would be on both sides, also by way of
            a function that holds it: a hook, a method, a patched forward.
        CutError: the cuts overlap or are empty.
        UnsupportedError: lazy parameters, hooks on tensors, a data-parallel wrapper, what can't be
            copied, or a function that a copy would share with `model`.
    """
    model = unwrap(model)
    # Asked of the original, as a copy has lost them already.
    check_hooks(model)
    check_copyable(model)
    whole = deep_copy(model)
    for name, parameter in whole.named_parameters():
        check_initialised(name, parameter)
    cuts = find_cuts(whole, at)
    alone = isinstance(at, str)
    originals = Originals(model, whole, [part for cut in cuts for part in cut.parts])
    # All that is read from the whole model comes before the first hole is made in it.
    body = _body(whole, cuts, alone)
    holes = _holes(whole, cuts, alone)
    sequentials = [whole.get_submodule(cut.owner) for cut in cuts]
    for cut, owner in zip(cuts, sequentials, strict=True):
        if cut.positions and not cut.is_run:
            run_as_one(owner, _slice(owner, cut, holes, alone), call_as_one)
    half = _with_points(whole, holes)
    check_apart(half, body, originals)
    template = Template(body)
    stamp = make_stamp(at, [part for cut in cuts for part in cut.parts], template)
    mirrors = reflect(half, body, template, {name: point for point, name in holes.values()})
    for point, name in holes.values():
        hole = hole_of(point)
        part = unwrap(body).get_submodule(name)
        hole.origin = Origin(template, name, part.training)
        hole.part = stamp
        hole.mirror = mirrors[name]
        identify(point, part)
    put_stamp(body, stamp)
    return half, body


def join(client_half: nn.Module, weights: Mapping[str, Tensor] | nn.Module) -> nn.Module:
    """The whole model again, with its original keys; `split` and then `join` is the identity.

    Args:
        client_half: What `split` returned, or a `SplitClient` around it. It isn't changed.
        weights: The body's weights, as `store.load_weights(version)` returns them; or the body
            itself, which is the only way for cut points that were placed by hand.

    Raises:
        ArchitectureError: the weights aren't those of the body that was cut out.
        CutError: there is no cut point, or one placed by hand and no body to put there.
    """
    whole = deep_copy(getattr(client_half, "client_half", client_half))
    points = [module for module in whole.modules() if isinstance(module, CutPoint)]
    if not points:
        raise CutError(
            f"{type(whole).__name__} has no CutPoint: "
            "expected the client half that split() returned"
        )
    if isinstance(weights, nn.Module):
        body = deep_copy(unwrap(weights))
    else:
        body = _built_body(points, weights)
    for point in points:
        whole = _filled(whole, point, body)
    restore_forward(whole)
    remove_stamps(whole)
    return whole


def find_cuts(model: nn.Module, at: str | Sequence[str]) -> list[Cut]:
    """Resolve the names of cuts.

    Raises:
        UnknownCutError: there is no such submodule or slice.
        CutError: two cuts overlap, or there are none.
    """
    wanted: list[Any] = list(at) if isinstance(at, list | tuple) else [at]
    named = bool(wanted) and all(isinstance(name, str) for name in wanted)
    # The name '' is the whole model, which can be cut out, but not as one of a list.
    if not named or (wanted == [""] and at != ""):
        raise CutError(
            "no cut was named: expected the name of a submodule, such as 'encoder', or several, "
            f"got {at!r}"
        )
    cuts = [_find_cut(model, name) for name in wanted]
    _check_disjoint([name for cut in cuts for name in cut.parts])
    return cuts


def _check_disjoint(names: Sequence[str]) -> None:
    """Refuse parts that contain each other; '' contains all."""
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            nested = f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
            if nested or "" in (one, other):
                raise CutError(
                    f"the cuts {one!r} and {other!r} overlap: "
                    "name parts that don't contain each other"
                )


def _find_cut(model: nn.Module, at: str) -> Cut:
    """The cut that a name stands for: a submodule, or a slice if its last step has a colon."""
    owner, _, last = at.rpartition(".")
    # The keys of an nn.ModuleDict may have a colon, too.
    if ":" in last and at not in dict(model.named_modules(remove_duplicate=False)):
        module = _submodule(model, owner)
        positions = _slice_positions(module, at)
        if isinstance(module, nn.ModuleList):
            for position in positions:
                _check_called(f"{owner}.{position}".lstrip("."), module._modules[position])
        return Cut(owner, positions, at if isinstance(module, nn.ModuleList) else None)
    module = _submodule(model, at)
    _check_called(at, module)
    return Cut(at, ())


def _check_called(at: str, module: Any) -> None:
    """Refuse what a model never calls, as there would be no call to send to the server."""
    # Scripted modules have their forward elsewhere than in the class.
    forward = getattr(type(module), "forward", None)
    if forward is nn.Module.forward and "forward" not in vars(module):
        members = [f"{at}.{leaf}" for leaf in module._modules][:8]
        slices = ""
        if isinstance(module, nn.ModuleList):
            slices = f", a run of them such as '{at}.0:{len(module)}'"
        raise CutError(
            f"{at!r} is a {type(module).__name__}, which isn't called itself: "
            f"cut at its members {members}{slices}, or the module that uses it"
        )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        if isinstance(modules[name], AbsentModule) and not isinstance(modules[name], CutPoint):
            raise CutError(f"{name!r} is within a part that was cut out already: cut the model")
        return modules[name]
    known = [known for known in modules if known]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
    hint = f"the nearest are {near}" if near else f"there are {known[:10]}"
    raise UnknownCutError(f"{type(model).__name__} has no submodule {name!r}: {hint}")


def _slice_positions(module: nn.Module, at: str) -> tuple[str, ...]:
    """The positions in a Sequential or ModuleList that a slice of it names."""
    name = at.rpartition(".")[0]
    kind = type(module).__name__
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        raise UnknownCutError(
            f"{at!r} slices {name or 'the model'!r}, which is a {kind}: "
            "only an nn.Sequential has slices, and an nn.ModuleList runs of layers"
        )
    if isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward:
        raise CutError(
            f"{at!r} slices a {kind}, whose forward is its own: "
            "its layers may not run one after another"
        )
    bounds = _bounds(at, len(module), name or "the model")
    positions = tuple(module._modules)[bounds]
    if not positions:
        raise UnknownCutError(
            f"the slice {at!r} is empty: {name or 'the model'!r} has {len(module)} positions"
        )
    return positions


def _bounds(at: str, count: int, owner: str) -> slice:
    """The two ends of a slice of `count` positions."""
    texts = at.rpartition(".")[2].split(":")
    if len(texts) > 2:
        raise UnknownCutError(
            f"{at!r} isn't a slice without gaps, such as '2:5': it has a step. Name several "
            "cuts in a list"
        )
    try:
        start, stop = [int(text) if text else None for text in texts]
    except ValueError:
        raise UnknownCutError(
            f"{at!r} isn't a slice: expected two positions, such as '2:5'"
        ) from None
    # Python would take what is there and say nothing, of what was meant as a longer model.
    if any(end is not None and not -count <= end <= count for end in (start, stop)):
        raise UnknownCutError(
            f"the slice {at!r} goes past the end: {owner!r} has {count} positions, "
            f"so its bounds are from 0 to {count}, or open, such as '2:'"
        )
    return slice(start, stop)


def _body(whole: nn.Module, cuts: Sequence[Cut], alone: bool) -> nn.Module:
    """The parts that are cut out, as one module in the mode of the places that they come from."""
    if alone and not cuts[0].positions:
        return whole.get_submodule(cuts[0].owner)
    named = OrderedDict(
        (name, whole.get_submodule(part))
        for cut in cuts
        for name, part in zip(cut.names(alone=alone), cut.parts, strict=True)
    )
    body = nn.Sequential(named) if alone and not cuts[0].is_run else CutBody(named)
    # A ModuleList is never called, so its own mode says nothing.
    callers = [name for cut in cuts for name in (cut.parts if cut.is_run else [cut.owner])]
    body.training = any(whole.get_submodule(name).training for name in callers)
    return body


def _holes(whole: nn.Module, cuts: Sequence[Cut], alone: bool) -> Holes:
    """A cut point for each module that goes, in the mode of the place that it is for."""
    holes: Holes = {}
    for cut in cuts:
        # Of the owner, which isn't always the mode of a slice's layer: that may be frozen.
        owner = whole.get_submodule(cut.owner)
        layers = dict(zip(cut.parts, cut.layers, strict=True)) if cut.is_run else {}
        for part, name in zip(cut.parts, cut.names(alone=alone), strict=True):
            training = whole.get_submodule(part).training if cut.is_run else owner.training
            # One for a module that is there several times, such as an activation.
            point, _ = holes.setdefault(
                id(whole.get_submodule(part)), (CutPoint(join_names([name])), name)
            )
            point.training = training
            # The last place of a layer that is there several times: calls before it are earlier.
            hole_of(point).layer = layers.get(part)
    return holes


def _slice(owner: nn.Module, cut: Cut, holes: Holes, alone: bool) -> Slice:
    """What a slice is run by as one call."""
    modules = [owner.get_submodule(position) for position in cut.positions]
    members = tuple(holes[id(module)][0] for module in modules)
    return Slice(cut.positions, members, "" if alone else join_names(cut.parts))


def _with_points(whole: nn.Module, holes: Holes) -> nn.Module:
    """The half: the cut points are in all places of what goes, but for those that go with it."""
    if id(whole) in holes:
        return holes[id(whole)][0]
    seen: set[int] = set()
    waiting = [whole]
    while waiting:
        owner = waiting.pop()
        for leaf, child in owner._modules.items():
            if id(child) in holes:
                owner._modules[leaf] = holes[id(child)][0]
            elif child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return whole


def _filled(whole: nn.Module, point: CutPoint, body: nn.Module) -> nn.Module:
    """The model with parts of the body in the place of a cut point."""
    hole = hole_of(point)
    part = body.get_submodule(hole.origin.name if hole.origin else hole.name)
    # In the mode of the cut, parts keep their own modes: one of them may be frozen. The half may
    # have been set to the other mode since, and then the parts are, too.
    mode_of_parts = hole.origin.training if hole.origin else part.training
    if point.training != mode_of_parts:
        part.train(point.training)
    if hole.mirror is not None:
        hole.mirror.restore(part)
    for owner, leaf in _registrations(whole, point):
        owner._modules[leaf] = part
    return part if whole is point else whole


def _registrations(model: nn.Module, child: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a module is registered, as (owner, name in it): a module may have several names."""
    return [
        (owner, leaf)
        for owner in model.modules()
        for leaf, module in owner._modules.items()
        if module is child
    ]


def _built_body(points: Sequence[CutPoint], weights: Mapping[str, Tensor]) -> nn.Module:
    """The body that the cut points were cut from, with these weights in it."""
    origin = hole_of(points[0]).origin
    if origin is None:
        raise CutError(
            "this cut point was placed by hand, so its body isn't known: "
            "join(client_half, body) with the module"
        )
    template = origin.template
    needed: dict[str, Tensor] = {**template.parameters, **template.buffers}
    wrong = [name for name, tensor in needed.items() if not _is_like(tensor, weights.get(name))]
    unknown = [name for name in weights if name not in template.names]
    if wrong or unknown:
        raise ArchitectureError(
            "these aren't the weights of the body cut out here: "
            f"missing or different {wrong[:8]}, unknown {unknown[:8]}"
        )
    return template.build({name: weights[name].detach().clone() for name in needed})


def _is_like(expected: Tensor, got: Tensor | None) -> bool:
    return got is not None and got.shape == expected.shape and got.dtype == expected.dtype
