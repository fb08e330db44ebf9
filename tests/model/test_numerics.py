"""The numerics class: what two processes must share to compute the same bits. And what is finite."""

from __future__ import annotations

import json
import math

import pytest
import torch
from bodies import sample

from splitfed.model.numerics import all_finite, class_id, numerics_class
from splitfed.protocol.header import DTYPES

CPU = torch.device("cpu")


def test_a_class_is_plain_json() -> None:
    """It is written into the store's format.json and read by whoever comes later."""
    found = numerics_class(CPU)
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert (found["device"], found["threads"], found["default_dtype"]) == ("cpu", 1, "torch.float32")


def test_the_same_settings_are_the_same_class() -> None:
    """Whatever the order in which its fields are written."""
    found = numerics_class(CPU)
    assert numerics_class(CPU) == found
    assert class_id(dict(reversed(found.items()))) == class_id(found)
    assert len(class_id(found)) == 16


@pytest.mark.parametrize("what", ["threads", "matmul", "default_dtype", "mkldnn"])
def test_what_changes_bits_changes_the_class(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, the precision of matrix products, the default dtype, oneDNN: in the field of that name alone."""
    before = numerics_class(CPU)
    matmul = torch.get_float32_matmul_precision()
    try:
        if what == "threads":
            torch.set_num_threads(2)
        elif what == "matmul":
            torch.set_float32_matmul_precision("medium")
        elif what == "default_dtype":
            torch.set_default_dtype(torch.float64)
        else:
            monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: not before["mkldnn"])
            torch.backends.mkldnn.enabled = True
        after = numerics_class(CPU)
    finally:
        torch.set_float32_matmul_precision(matmul)
    assert {key for key in before if before[key] != after[key]} == {what}
    assert class_id(after) != class_id(before)


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point or dtype.is_complex], ids=str
)
def test_all_finite(dtype: torch.dtype) -> None:
    """One NaN or infinity is found in any dtype that has one; large finite numbers whose sum overflows are finite."""
    good = sample(dtype)
    assert all_finite(good)
    assert all_finite(good[:0])
    if not dtype.is_complex:
        assert all_finite(torch.full((100,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype))
    for value in (math.nan, math.inf, -math.inf):
        bad = good.to(torch.float32 if not dtype.is_complex else dtype)
        bad[1, 2, 3] = value
        bad = bad.to(dtype)
        assert all_finite(bad) == bool(bad.to(torch.complex64).isfinite().all())
    assert not all_finite(bad) or "8" in str(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint64, torch.int64], ids=str)
def test_integers_are_finite(dtype: torch.dtype) -> None:
    """Integers and booleans have no infinity."""
    assert all_finite(sample(dtype))


def test_infinities_of_both_signs_are_not_finite() -> None:
    """Infinities don't cancel."""
    assert not all_finite(torch.tensor([math.inf, -math.inf]))
    assert not all_finite(torch.tensor([complex(0, math.inf)]))
