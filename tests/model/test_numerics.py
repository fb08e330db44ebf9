"""The numerics class: what two processes must share to compute the same bits. And what is finite."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from bodies import sample

from splitfed.model import kernels
from splitfed.model.kernels import kernels_digest
from splitfed.model.numerics import all_finite, class_id, common_class, numerics_class
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
    """Threads, the precision of matrix products, the default dtype, oneDNN: in the field of that name.

    And in the kernels, where it changes their bits.
    """
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
    assert {key for key in before if before[key] != after[key]} - {"kernels"} == {what}
    assert class_id(after) != class_id(before)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_kernels_digest_is_of_the_device_alone(mode: str) -> None:
    """The same bits each time, in whichever mode the caller is; his generator isn't touched."""
    before, expected = torch.get_rng_state(), kernels_digest(CPU)
    with MODES[mode]():
        assert kernels_digest(CPU) == expected
        assert torch.is_grad_enabled() == (mode not in ("no grad", "inference"))
    torch.set_default_dtype(torch.float64)
    assert kernels_digest(CPU) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kernels_digest_is_the_same_beside_busy_threads() -> None:
    """50 times, while others compute."""
    torch.set_num_threads(2)
    ends = threading.Event()

    def compute() -> None:
        x = torch.ones(64, 64)
        while not ends.is_set():
            x = (x @ x).tanh()

    others = [threading.Thread(target=compute) for _ in range(2)]
    for other in others:
        other.start()
    try:
        assert len({kernels_digest(CPU) for _ in range(50)}) == 1
    finally:
        ends.set()
        for other in others:
            other.join()


def test_a_fork_beside_the_kernels_computes_with_threads() -> None:
    """A pool of OpenMP in the thread that forks would hang the child at its first product."""
    torch.set_num_threads(2)
    kernels_digest(CPU)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's own would wait for Python to go on
        signal.alarm(20)
        kernels_digest(CPU)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_every_kernel_is_there_on_a_cpu() -> None:
    """One that raised would tell nothing."""
    for compute in kernels._computations(partial(kernels._values, CPU)):
        assert kernels._bits(compute)


def test_a_class_within_an_earlier_record_has_its_keys() -> None:
    """Its writer didn't know of kernels: a process here has the short name that it would have had then."""
    record = numerics_class(CPU)
    del record["kernels"]
    assert numerics_class(CPU, record) == record
    assert "kernels" in numerics_class(CPU, {**record, "kernels": "others"})


@pytest.mark.parametrize(
    ("names", "common"), [("aaa", "a"), ("a", "a"), ("ab", "mixed"), (("a", "mixed"), "mixed")], ids=str
)
def test_what_was_computed_in_several_classes_is_of_none(names: Iterable[str], common: str) -> None:
    """So it is counted as foreign wherever it comes."""
    assert common_class(names) == common


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
