"""Adding gradients up: which products are exact, and sums that go on."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from splitfed.model import adding
from splitfed.model.adding import _is_exact, add_products


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1.0, -3.0, 32.0, 2.0**29 - 1, 0.375, 2.0**-100, 2.0**29 + 1, 0.1, 1 / 3, 0.0])
def test_a_factor_that_is_taken_for_exact_is(dtype: torch.dtype, factor: float) -> None:
    """With the longest, largest and smallest numbers of a dtype, the product in float64 is that of fractions."""
    if not _is_exact(dtype, factor):
        assert factor in (2.0**29 + 1, 0.1, 1 / 3, 0.0)
        return
    limits = torch.finfo(dtype)
    longest = 2.0 - limits.eps
    for value in (longest, -longest, limits.max, limits.tiny, limits.smallest_normal * limits.eps):
        wide = float(torch.tensor(value, dtype=dtype))
        assert Fraction(wide * factor) == Fraction(wide) * Fraction(factor)


def test_no_factor_of_a_float64_is_taken_for_exact() -> None:
    """Its products have digits to round, whatever they are multiplied with."""
    assert not any(_is_exact(dtype, 3.0) for dtype in (torch.float64, torch.float8_e5m2))


@pytest.mark.parametrize("chunk", [1 << 15, 7])
def test_sums_go_on_in_the_order_in_which_gradients_are_given(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call or in several; a name begins with its first product, in whichever order its memory is."""
    monkeypatch.setattr(adding, "CHUNK", chunk)
    made = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    given = [{"w": made[0].t()}, {"w": made[1].t(), "v": made[1]}, {"v": made[2]}, {"w": made[3].view(4, 5)}]
    factors = [3.0, 0.1, 1 / 3, 7.0]
    once: dict[str, torch.Tensor] = {}
    add_products(once, given, factors)
    several: dict[str, torch.Tensor] = {}
    for gradients, factor in zip(given, factors, strict=True):
        add_products(several, [gradients], [factor])
    expected = {
        "w": made[0].t().double() * 3.0 + made[1].t().double() * 0.1 + made[3].view(4, 5).double() * 7.0,
        "v": made[1].double() * 0.1 + made[2].double() * (1 / 3),
    }
    for name, value in expected.items():
        assert torch.equal(once[name], value)
        assert torch.equal(several[name], value)
