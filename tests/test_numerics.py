"""The numerics class: what two processes must share to compute the same bits."""

from __future__ import annotations

import json

import pytest
import torch

from splitfed.numerics import class_id, numerics_class

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
