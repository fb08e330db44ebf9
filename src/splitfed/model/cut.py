"""Cutting a model in two, and putting it together again.

A cut takes the named submodule out and puts a `CutPoint` in its hole; the rest of the model, its own code included,
stays as it is. (Tracing would lose control flow and dropout modes; swapping was bit-identical on every architecture
tried.) A slice of an `nn.Sequential` leaves `nn.Identity` in its other positions, so that all names stay what they
were.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from splitfed.errors import (
    ArchitectureError,
    CutError,
    SharedParameterError,
    UnknownCutError,
    UnsupportedError,
)
from splitfed.model.copying import check_hooks, deep_copy
from splitfed.model.cutpoint import CutPoint, Origin
from splitfed.model.skeleton import Template, unwrap


class CutBody(nn.Module):
    """The parts cut out at several places, under their original qualified names: one lineage, one version."""

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
            "a body with several cuts isn't called as a whole: call its client half through a SplitClient"
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
        return [f"{self.owner}.{p}".lstrip(".") for p in self.positions] or [self.owner]


def split(model: nn.Module, at: str | Sequence[str]) -> tuple[nn.Module, nn.Module]:
    """Cut `model` into a client half and a body; both are deep copies and `model` isn't changed.

    Args:
        model: Any module that can be deep-copied.
        at: The name of a submodule at any depth (`"encoder.layer.1"`), a slice of an `nn.Sequential` (`"2:5"`,
            `"features.3:8"`), or a list of such cuts, which gives one body.

    Returns:
        The client half, with a `CutPoint` in each hole, and the body: the submodule itself, the slice with its original
        positions as names, or for a list of cuts one module with the original qualified names.

    Raises:
        UnknownCutError: there is no such submodule; the message lists the nearest names.
        SharedParameterError: a parameter or buffer would be on both sides.
        CutError: the cuts overlap or are empty.
        UnsupportedError: lazy parameters, hooks on tensors, a data-parallel wrapper, or what can't be copied.
    """
    check_hooks(unwrap(model))
    half = whole = deep_copy(unwrap(model))
    for name, parameter in whole.named_parameters():
        if is_lazy(parameter):
            raise UnsupportedError(
                f"parameter {name!r} is lazy (uninitialised): run the model once on real input first"
            )
    cuts = find_cuts(whole, at)
    parts = {name: whole.get_submodule(name) for cut in cuts for name in cut.parts}
    if not isinstance(at, str):
        body: nn.Module = CutBody(parts)
        body.training = any(whole.get_submodule(cut.owner).training for cut in cuts)
    elif cuts[0].positions:
        body = nn.Sequential(OrderedDict(zip(cuts[0].positions, parts.values(), strict=True)))
        body.training = whole.get_submodule(cuts[0].owner).training
    else:
        body = parts[cuts[0].owner]
    points = []
    for cut in cuts:
        points.append(CutPoint("" if isinstance(at, str) else ",".join(cut.parts)))
        points[-1].training = whole.get_submodule(cut.owner).training
        half = _swap(half, cut, points[-1])
    _check_apart(half, body)
    template = Template(body)
    for cut, point in zip(cuts, points, strict=True):
        names = (cut.positions or ("",)) if isinstance(at, str) else tuple(cut.parts)
        point.origin = Origin(
            template, tuple(zip(cut.positions or ("",), names, strict=True)), point.training
        )
    return half, body


def join(client_half: nn.Module, weights: Mapping[str, Tensor] | nn.Module) -> nn.Module:
    """The whole model again, with its original keys; `split` and then `join` is the identity.

    Args:
        client_half: What `split` returned, or a `SplitClient` around it. It isn't changed.
        weights: The body's weights, as `store.load_weights(version)` returns them; or the body itself, which is the
            only way for cut points that were placed by hand.

    Raises:
        ArchitectureError: the weights aren't those of the body that was cut out.
        CutError: there is no cut point, or one placed by hand and no body to put there.
    """
    whole = deep_copy(getattr(client_half, "client_half", client_half))
    points = [module for module in whole.modules() if isinstance(module, CutPoint)]
    if not points:
        raise CutError(
            f"{type(whole).__name__} has no CutPoint: expected the client half that split() returned"
        )
    body = deep_copy(unwrap(weights)) if isinstance(weights, nn.Module) else _build(points, weights)
    for point in points:
        spots = list(_places(whole, point))
        for position, name in point.origin.places if point.origin else (("", point.name),):
            part = body.get_submodule(name)
            if point.training != (point.origin.training if point.origin else part.training):
                part.train(point.training)
            for owner, leaf in spots:
                owner._modules[position or leaf] = part
            whole = part if whole is point else whole
    return whole


def find_cuts(model: nn.Module, at: str | Sequence[str]) -> list[Cut]:
    """Resolve the names of cuts.

    Raises:
        UnknownCutError: there is no such submodule or slice.
        CutError: two cuts overlap, or there are none.
    """
    wanted: list[Any] = list(at) if isinstance(at, list | tuple) else [at]
    if not wanted or not all(isinstance(name, str) for name in wanted) or wanted == [""] != [at]:
        raise CutError(
            f"no cut was named: expected the name of a submodule, such as 'encoder', or several, got {at!r}"
        )
    cuts = [_find(model, name) for name in wanted]
    names = [name for cut in cuts for name in cut.parts]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") or "" in (a, b):
                raise CutError(
                    f"the cuts {a!r} and {b!r} overlap: name parts that don't contain each other"
                )
    return cuts


def _find(model: nn.Module, at: str) -> Cut:
    owner, _, last = at.rpartition(".")
    name = owner if ":" in last else at
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        near = difflib.get_close_matches(name, [m for m in modules if m], n=5, cutoff=0.3)
        hint = f"the nearest are {near}" if near else f"there are {[m for m in modules if m][:10]}"
        raise UnknownCutError(f"{type(model).__name__} has no submodule {name!r}: {hint}")
    module = modules[name]
    kind = type(module).__name__
    if name == at:
        if getattr(type(module), "forward", None) is nn.Module.forward and "forward" not in vars(
            module
        ):
            hint = f"its members {[f'{at}.{leaf}' for leaf in module._modules][:8]}, or the module that uses it"
            raise CutError(f"{at!r} is a {kind}, which isn't called itself: cut at {hint}")
        return Cut(at, ())
    if not isinstance(module, nn.Sequential):
        raise UnknownCutError(
            f"{at!r} slices {name or 'the model'!r}, which is a {kind}: only an nn.Sequential has slices"
        )
    if type(module).forward is not nn.Sequential.forward:
        raise CutError(
            f"{at!r} slices a {kind}, whose forward is its own: its layers may not run one after another"
        )
    start, _, stop = last.partition(":")
    try:
        positions = tuple(module._modules)[
            slice(int(start) if start else None, int(stop) if stop else None)
        ]
    except ValueError:
        raise UnknownCutError(
            f"{at!r} isn't a slice: expected two positions, such as '2:5'"
        ) from None
    if not positions:
        raise UnknownCutError(
            f"the slice {at!r} is empty: {name or 'the model'!r} has {len(module)} positions"
        )
    return Cut(name, positions)


def _swap(half: nn.Module, cut: Cut, point: CutPoint) -> nn.Module:
    """Put `point` wherever the cut's module is registered, and identities in the other positions of a slice."""
    if cut.positions:
        owner = half.get_submodule(cut.owner)
        for position in cut.positions:
            owner._modules[position] = point if position == cut.positions[0] else nn.Identity()
        return half
    gone = half.get_submodule(cut.owner)
    for owner, leaf in list(_places(half, gone)):
        owner._modules[leaf] = point
    return point if gone is half else half


def _places(model: nn.Module, child: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for owner in model.modules():
        yield from ((owner, leaf) for leaf, module in owner._modules.items() if module is child)


def _check_apart(half: nn.Module, body: nn.Module) -> None:
    """Refuse tensors and modules that both sides reach, registered or as plain attributes."""
    for side, other, what in ((half, body, "the client half"), (body, half, "the body")):
        held = {
            id(tensor): name for name, tensor in [*other.named_parameters(), *other.named_buffers()]
        }
        held |= {
            id(m): name or "it all"
            for name, m in other.named_modules()
            if not isinstance(m, CutPoint)
        }
        for prefix, owner in side.named_modules():
            hidden = {
                k: v
                for k, v in vars(owner).items()
                if k not in ("_modules", "_parameters", "_buffers")
            }
            for leaf, value in _reached({**owner._parameters, **owner._buffers, **hidden}):
                if id(value) in held:
                    raise SharedParameterError(
                        f"{held[id(value)]!r} of the other side of the cut is also reached from {what} as "
                        f"{f'{prefix}.{leaf}'.lstrip('.')!r}: move the cut so that both uses are on one side, "
                        "or untie them"
                    )


def _reached(values: Mapping[str, Any], depth: int = 4) -> Iterator[tuple[str, Any]]:
    """What a module's attributes hold, directly or in containers."""
    for name, value in values.items():
        yield name, value
        inner: Any = value if isinstance(value, dict) else {}
        if isinstance(value, list | tuple | set):
            inner = {str(i): item for i, item in enumerate(value)}
        if depth:
            yield from ((f"{name}.{step}", item) for step, item in _reached(inner, depth - 1))


def _build(points: Sequence[CutPoint], weights: Mapping[str, Tensor]) -> nn.Module:
    template = points[0].origin.template if points[0].origin else None
    if template is None:
        raise CutError(
            "this cut point was placed by hand, so its body isn't known: join(client_half, body) with the module"
        )
    needed = {**template.parameters, **template.buffers}
    like = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    wrong = [
        name for name, tensor in needed.items() if like.get(name) != (tensor.shape, tensor.dtype)
    ]
    extra = [n for n in weights if n not in template.names]
    if wrong or extra:
        raise ArchitectureError(
            f"these aren't the weights of the body cut out here: missing or different {wrong[:8]}, unknown {extra[:8]}"
        )
    return template.build({name: weights[name].detach().clone() for name in needed})
