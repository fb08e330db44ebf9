"""The cut's boundary: what enters is a copy of its own, aligned, with the client's strides, and no leaf."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitfed.model import boundary
from splitfed.protocol.safetensors import ALIGNMENT, canonical, decode, encode

BASE = torch.arange(48.0)
STRIDED = {
    "contiguous": BASE.view(2, 4, 6),
    "transposed": BASE.view(6, 8).t(),
    "channels_last": BASE.view(1, 4, 3, 4).to(memory_format=torch.channels_last),
    "gaps": BASE.view(6, 8)[:, ::2],
    "expanded": BASE[:6].view(6, 1).expand(6, 4),
    "expanded_twice": BASE[:3].view(1, 3, 1).expand(4, 3, 5),
    "misaligned": BASE[1:9],
    "misaligned_transposed": BASE[3:27].view(4, 6).t(),
    "overlapping": BASE.as_strided((3, 3), (1, 1)),
    "scalar": BASE[5],
    "empty": BASE[:0].view(0, 3),
    "bool": BASE > 9,
    "int": BASE.to(torch.int64)[1:5],
    "bfloat16": BASE.to(torch.bfloat16)[2:7],
    "conjugated": torch.view_as_complex(BASE.view(24, 2)).conj(),
}


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Its strides where they mean anything."""
    return tuple(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


@pytest.mark.parametrize("tensor", STRIDED.values(), ids=STRIDED)
def test_a_fresh_copy_is_what_a_round_trip_through_bytes_gives(tensor: Tensor) -> None:
    """Same values, dtype and strides as the codec's, 64-byte aligned: so a replay enters the same kernels."""
    copy = boundary.fresh(tensor)
    stored = decode(b"".join(encode({"x": tensor})))[0]["x"]
    assert torch.equal(copy, tensor)
    assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    assert strides(copy) == strides(stored) == strides(canonical(tensor))
    assert copy.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize(
    "name", [n for n in STRIDED if n not in ("misaligned", "misaligned_transposed", "overlapping")]
)
def test_a_fresh_copy_keeps_the_clients_strides(name: str) -> None:
    """Channels-last stays channels-last, and an expanded tensor stays small."""
    copy = boundary.fresh(STRIDED[name])
    assert strides(copy) == strides(STRIDED[name])
    assert copy.untyped_storage().nbytes() <= max(STRIDED[name].untyped_storage().nbytes(), 1)


@pytest.mark.parametrize("name", [n for n in STRIDED if n != "empty"])
def test_a_fresh_copy_has_memory_of_its_own(name: str) -> None:
    """Changing it in place never reaches the client's tensor."""
    tensor = STRIDED[name]
    copy = boundary.fresh(tensor)
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    before = tensor.clone()
    if not copy.stride().count(0) and name != "bool":
        copy.add_(1)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("through", [boundary.enter, boundary.leave], ids=["enter", "leave"])
@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed", "misaligned"])
def test_crossing_is_the_identity_under_autograd(through: object, name: str) -> None:
    """Not a leaf, so that a body may begin in place; the gradient is the gradient, bit for bit."""
    tensor = STRIDED[name].clone().requires_grad_()
    crossed = through(tensor)  # type: ignore[operator]
    assert not crossed.is_leaf
    assert torch.equal(crossed, tensor)
    given = torch.randn(tensor.shape)
    crossed.mul_(1).backward(given)
    assert torch.equal(tensor.grad, given)  # type: ignore[arg-type]


@pytest.mark.parametrize("through", [boundary.enter, boundary.leave], ids=["enter", "leave"])
def test_crossing_without_a_gradient_is_a_copy(through: object) -> None:
    """Masks, indices and what comes from a frozen bottom."""
    crossed = through(BASE)  # type: ignore[operator]
    assert not crossed.requires_grad
    assert crossed.data_ptr() != BASE.data_ptr()
    with torch.no_grad():
        assert not through(BASE.clone().requires_grad_()).requires_grad  # type: ignore[operator]


def test_a_gradient_leaves_in_the_codecs_layout() -> None:
    """The gradient of a sum is expanded; what goes back has the layout that a server would get."""
    seen: list[Tensor] = []
    tensor = torch.ones(4, 4, requires_grad=True)
    tensor.register_hook(seen.append)
    boundary.leave(tensor)[:, 1:3].sum().backward()
    assert seen[0].data_ptr() % ALIGNMENT == 0
    assert strides(seen[0]) == strides(canonical(seen[0]))


def test_an_alias_adds_up_within_its_call_first() -> None:
    """(1 + 2⁻²⁴) + 2⁻²⁴ isn't 1 + (2⁻²⁴ + 2⁻²⁴) in float32: two uses under one alias are summed before the third."""
    parameter = torch.ones(1, requires_grad=True)
    tiny = 2.0**-24
    alias = boundary.alias(parameter)
    assert alias.data_ptr() == parameter.data_ptr()
    (parameter * 1.0).backward()
    (alias * tiny + alias * tiny).backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 1 + 2 * tiny
    parameter.grad = torch.ones(1)
    (parameter * tiny).backward()
    (parameter * tiny).backward()
    assert parameter.grad.item() == 1


def test_autocasts_cache_stays_on_its_side() -> None:
    """A weight that was cast within is cast anew without, and the other way round."""
    weight = torch.ones(2, 2, requires_grad=True)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = (x @ weight).grad_fn.next_functions[1][0]  # type: ignore[union-attr]
        assert (x @ weight).grad_fn.next_functions[1][0] is outside  # type: ignore[union-attr]
        with boundary.uncached():
            inside = (x @ weight).grad_fn.next_functions[1][0]  # type: ignore[union-attr]
            assert inside is not outside
        assert (x @ weight).grad_fn.next_functions[1][0] is not inside  # type: ignore[union-attr]
