"""An input that the body changes in place: views of it too, as flatten and slices make them."""

from __future__ import annotations

import contextvars
import gc
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import Calls
from harness import Split, assert_step
from torch import Tensor, nn

import splitfed
from splitfed.errors import InPlaceError

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.view(4, 2, 4).flatten(1),
    "transposed": lambda h: h.t().reshape(2, 4, 4).flatten(0, 1).t(),
    "every_other": lambda h: h.view(4, 8)[:, ::1],
    "chain": lambda h: h.view(2, 2, 8)[0:2].view(4, 8).view(4, 2, 4).flatten(1),
}


def net(forward: Callable[..., Any]) -> nn.Module:
    """A body that begins in place."""
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
    return Calls(forward, bottom=nn.Linear(6, 8), body=body, head=nn.Linear(8, 3))


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_may_be_changed_in_place(view: str, tmp_path: Path) -> None:
    """A classifier that begins with an in-place layer, after a flatten: the bits of the reference."""
    model = net(lambda m, x: m.head(m.body(VIEWS[view](m.bottom(x)))))
    split, reference = Split(model, "body", tmp_path), splitfed.reference(model, "body")
    assert_step(split, reference, ((torch.randn(4, 6),), {}))


@pytest.mark.parametrize(
    "use",
    [
        lambda cut, h, v: cut(v) + v,
        lambda cut, h, v: cut(v) + h[:, :8],
        lambda cut, h, v: cut(v) + h[:, 8:],
        lambda cut, h, v: cut(v) + h.view(4, 2, 8)[:, 0].detach() * h.sum(),
    ],
    ids=["view", "base", "another_view", "scalar"],
)
def test_no_other_use_of_a_view_counts(use: Any) -> None:
    """Of the view, of its base, or of another view of that base: each would see other values when unsplit."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bottom(x)
        return m.head(use(m.body, h, h[:, :8]))

    model = net(forward)
    model.bottom = nn.Linear(6, 16)
    split = Split(model, "body", f"memory://{uuid.uuid4().hex}")
    with pytest.raises(InPlaceError, match=r"input 0 in place.*clone"):
        split.client(torch.randn(4, 6)).sum().backward()


def test_a_changed_view_can_still_be_asked() -> None:
    """A hook of the user's own on it, set after the cut, neither crashes torch nor sees a gradient."""

    def forward(m: Any, x: Tensor) -> Tensor:
        view = m.bottom(x)[:2]
        out = m.head(m.body(view))
        view.register_hook(seen.append)
        return out

    seen: list[Tensor] = []
    split = Split(net(forward), "body", f"memory://{uuid.uuid4().hex}")
    split.client(torch.randn(4, 6)).sum().backward()
    assert len(split.waiting()) == 1
    assert not seen


def test_one_of_several_views_is_refused() -> None:
    """As in torch: what `chunk` returns may not be changed in place."""
    model = net(lambda m, x: m.head(m.body(m.bottom(x).chunk(2)[0])))
    split = Split(model, "body", f"memory://{uuid.uuid4().hex}")
    with pytest.raises(InPlaceError, match="clone"):
        split.client(torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="multiple views"):
        model(torch.randn(4, 6))


def test_a_view_and_a_detached_part_of_one_tensor_may_both_be_changed(tmp_path: Path) -> None:
    """They share a version counter: the view is guarded before the other's values are copied."""

    def both(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return m.layer(a.mul_(2)) + m.layer(b.mul_(3))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bottom(x)
        return m.head(m.body(h[:2].detach(), h[2:]))

    model = Calls(forward, bottom=nn.Linear(6, 8), body=Calls(both, layer=nn.Linear(8, 8)), head=nn.Linear(8, 3))
    split, reference = Split(model, "body", tmp_path), splitfed.reference(model, "body")
    assert_step(split, reference, ((torch.randn(4, 6),), {}))


def test_a_call_keeps_no_context_alive(tmp_path: Path) -> None:
    """What a task or request had in its context goes with it, though the call is remembered for checkpoints."""
    split = Split(net(lambda m, x: m.head(m.body(m.bottom(x)))), "body", tmp_path)
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("request")

    def handle() -> weakref.ref[Any]:
        held = nn.Module()
        variable.set(held)
        split.client(torch.randn(4, 6))
        return weakref.ref(held)

    gone = contextvars.copy_context().run(handle)
    gc.collect()
    assert gone() is None
