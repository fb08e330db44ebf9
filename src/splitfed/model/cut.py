"""Cutting a model in two, and joining the two again.

A cut takes the named submodule out and puts a `CutPoint` in its hole; the rest of the model, its
own code included, stays as it is. (Tracing would lose control flow and dropout modes; swapping was
bit-identical on every architecture tried.) A slice of an `nn.Sequential` leaves `nn.Identity` in
its other positions, so that all names stay what they were.

The trap: a module or tensor may be reached by several ways, under two names, in a list or as a
plain attribute. A module under two names is cut under both; what would be on both sides of the cut
is refused, since each side would train a copy of its own.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from splitfed.errors import ArchitectureError, CutError, SharedParameterError, UnknownCutError
from splitfed.model.copying import check_hooks, deep_copy
from splitfed.model.cutpoint import CutPoint, Origin, hole_of
from splitfed.model.mirror import identify, reflect
from splitfed.model.skeleton import Template, check_copyable, check_initialised, unwrap
from splitfed.model.standin import AbsentModule


class CutBody(nn.Module):
    """The parts cut out at several places, under their own names: one lineage, one version."""

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
            "a body with several cuts isn't called as a whole: "
            "call its client half through a SplitClient"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut, resolved on a model: one submodule, or some positions of an `nn.Sequential`."""

    owner: str
    positions: tuple[str, ...]
    """Children of `owner` that go; none if `owner` goes itself."""

    @property
    def parts(self) -> list[str]:
        """Qualified names of the submodules that go to the body."""
        if not self.positions:
            return [self.owner]
        return [f"{self.owner}.{position}".lstrip(".") for position in self.positions]

    def places(self, *, alone: bool) -> tuple[tuple[str, str], ...]:
        """For each part, its position in `owner` ('' for `owner` itself) and its name in the body.

        Args:
            alone: Whether the body is this cut only: then it has its own names, else the model's.
        """
        positions = self.positions or ("",)
        return tuple(zip(positions, positions if alone else self.parts, strict=True))


def split(model: nn.Module, at: str | Sequence[str]) -> tuple[nn.Module, nn.Module]:
    """Cut `model` into a client half and a body; both are deep copies and `model` isn't changed.

    Args:
        model: Any module that can be deep-copied.
        at: The name of a submodule at any depth (`"encoder.layer.1"`), a slice of an
            `nn.Sequential` (`"2:5"`, `"features.3:8"`), or a list of such cuts, which gives one
            body.

    Returns:
        The client half, with a `CutPoint` in each hole, and the body: the submodule itself, the
        slice with its original positions as names, or for a list of cuts one module with the
        original qualified names.

    Raises:
        UnknownCutError: there is no such submodule; the message lists the nearest names.
        SharedParameterError: a parameter or buffer would be on both sides.
        CutError: the cuts overlap or are empty.
        UnsupportedError: lazy parameters, hooks on tensors, a data-parallel wrapper, or what can't
            be copied.
    """
    # Asked of the original, as a copy has lost them already.
    check_hooks(unwrap(model))
    check_copyable(unwrap(model))
    whole = deep_copy(unwrap(model))
    for name, parameter in whole.named_parameters():
        check_initialised(name, parameter)
    cuts = find_cuts(whole, at)
    alone = isinstance(at, str)
    # All that is read from the whole model comes before the first hole is made in it.
    body = _body(whole, cuts, alone)
    points = [_cut_point(whole, cut, alone) for cut in cuts]
    half = whole
    for cut, point in zip(cuts, points, strict=True):
        half = _with_hole(half, cut, point)
    _check_apart(half, body)
    template = Template(body)
    places = [cut.places(alone=alone) for cut in cuts]
    modes = [point.training for point in points]
    parts = {own[0][1]: point for own, point in zip(places, points, strict=True)}
    mirrors = reflect(half, body, template, parts)
    for own, point, training in zip(places, points, modes, strict=True):
        name = own[0][1]
        hole = hole_of(point)
        hole.origin = Origin(template, own, training)
        point.training = training
        hole.mirror = mirrors[name]
        if hole.is_of_one_part():
            identify(point, unwrap(body).get_submodule(name))
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
    if ":" in last:
        module = _submodule(model, owner)
        return Cut(owner, _slice_positions(module, at))
    module = _submodule(model, at)
    # A container without a forward (nn.ModuleList) is never called, so there would be no call to
    # send to the server. Scripted modules have their forward elsewhere than in the class.
    forward = getattr(type(module), "forward", None)
    if forward is nn.Module.forward and "forward" not in vars(module):
        members = [f"{at}.{leaf}" for leaf in module._modules][:8]
        raise CutError(
            f"{at!r} is a {type(module).__name__}, which isn't called itself: "
            f"cut at its members {members}, or the module that uses it"
        )
    return Cut(at, ())


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
    """The positions in a Sequential that a slice of it names."""
    name, _, last = at.rpartition(".")
    kind = type(module).__name__
    if not isinstance(module, nn.Sequential):
        raise UnknownCutError(
            f"{at!r} slices {name or 'the model'!r}, which is a {kind}: "
            "only an nn.Sequential has slices"
        )
    if type(module).forward is not nn.Sequential.forward:
        raise CutError(
            f"{at!r} slices a {kind}, whose forward is its own: "
            "its layers may not run one after another"
        )
    start, _, stop = last.partition(":")
    try:
        bounds = slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError:
        raise UnknownCutError(
            f"{at!r} isn't a slice: expected two positions, such as '2:5'"
        ) from None
    positions = tuple(module._modules)[bounds]
    if not positions:
        raise UnknownCutError(
            f"the slice {at!r} is empty: {name or 'the model'!r} has {len(module)} positions"
        )
    return positions


def _body(whole: nn.Module, cuts: Sequence[Cut], alone: bool) -> nn.Module:
    """The parts that are cut out, as one module in the mode of the places that they come from."""
    if alone and not cuts[0].positions:
        return whole.get_submodule(cuts[0].owner)
    places = [place for cut in cuts for place in cut.places(alone=alone)]
    parts = [whole.get_submodule(name) for cut in cuts for name in cut.parts]
    named = OrderedDict((name, part) for (_, name), part in zip(places, parts, strict=True))
    body = nn.Sequential(named) if alone else CutBody(named)
    body.training = any(whole.get_submodule(cut.owner).training for cut in cuts)
    return body


def _cut_point(whole: nn.Module, cut: Cut, alone: bool) -> CutPoint:
    """The cut point for a cut, in the mode of the place that it is for."""
    point = CutPoint("" if alone else ",".join(cut.parts))
    # Of the owner, which isn't always the mode of a slice's first layer: that may be frozen.
    point.training = whole.get_submodule(cut.owner).training
    return point


def _with_hole(half: nn.Module, cut: Cut, point: CutPoint) -> nn.Module:
    """The half with `point` in place of the cut's module, or of the first position of a slice."""
    if cut.positions:
        owner = half.get_submodule(cut.owner)
        for position in cut.positions:
            owner._modules[position] = nn.Identity()
        owner._modules[cut.positions[0]] = point
        return half
    gone = half.get_submodule(cut.owner)
    for owner, leaf in _registrations(half, gone):
        owner._modules[leaf] = point
    return point if gone is half else half


def _filled(whole: nn.Module, point: CutPoint, body: nn.Module) -> nn.Module:
    """The model with parts of the body in the place of a cut point."""
    registrations = _registrations(whole, point)
    hole = hole_of(point)
    places = hole.origin.places if hole.origin else (("", hole.name),)
    for position, name in places:
        part = body.get_submodule(name)
        # In the mode of the cut, parts keep their own modes: one of them may be frozen. The half
        # may have been set to the other mode since, and then the parts are, too.
        mode_of_parts = hole.origin.training if hole.origin else part.training
        if point.training != mode_of_parts:
            part.train(point.training)
        if hole.mirror is not None and name == places[0][1]:
            hole.mirror.restore(part, alone=hole.is_of_one_part())
        for owner, leaf in registrations:
            owner._modules[position or leaf] = part
        if whole is point:
            whole = part
    return whole


def _registrations(model: nn.Module, child: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a module is registered, as (owner, name in it): a module may have several names."""
    return [
        (owner, leaf)
        for owner in model.modules()
        for leaf, module in owner._modules.items()
        if module is child
    ]


def _check_apart(half: nn.Module, body: nn.Module) -> None:
    """Refuse tensors and modules that both sides reach, registered or as plain attributes."""
    _check_unreached(half, "the client half", body)
    _check_unreached(body, "the body", half)


def _check_unreached(side: nn.Module, side_name: str, other: nn.Module) -> None:
    held: dict[int, str] = {id(tensor): name for name, tensor in other.named_parameters()}
    held |= {id(tensor): name for name, tensor in other.named_buffers()}
    for name, module in other.named_modules():
        if not isinstance(module, CutPoint):
            held[id(module)] = name or "it all"
    for prefix, owner in side.named_modules():
        for leaf, value in _attributes(owner):
            if id(value) in held:
                place = f"{prefix}.{leaf}".lstrip(".")
                raise SharedParameterError(
                    f"{held[id(value)]!r} of the other side of the cut is also reached from "
                    f"{side_name} as {place!r}: "
                    "move the cut so that both uses are on one side, or untie them"
                )


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's tensors and plain attributes by name, those in containers included."""
    registries = ("_modules", "_parameters", "_buffers")
    plain = {name: value for name, value in vars(module).items() if name not in registries}
    return _contents({**module._parameters, **module._buffers, **plain})


def _contents(values: Mapping[str, Any], depth: int = 4) -> Iterator[tuple[str, Any]]:
    """Values, and those that they contain, down to some depth: a container may contain itself."""
    for name, value in values.items():
        yield name, value
        inner: Mapping[Any, Any] = {}
        if isinstance(value, dict):
            inner = value
        elif isinstance(value, list | tuple | set):
            inner = dict(enumerate(value))
        if depth:
            for step, item in _contents(inner, depth - 1):
                yield f"{name}.{step}", item


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
