"""A log has the bits of gradients on file: what is computed again from recipes, and what servers have added up.

And the promises hold in a log as they do elsewhere: `make soak PART=log` runs their tests once more in stores that are
logs.
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from harness import Split, assert_same, step

from splitfed.protocol.messages import GradientRecord
from splitfed.store import holder as holders

TESTS = Path(__file__).resolve().parents[1]
STEPS = 3


def trained(case: Case, durability: str, keep_graphs: int) -> Split:
    """Three batches that wait for one commit."""
    url = f"memory://{uuid.uuid4()}"
    split = Split(case.model(), case.at, url, keep_graphs=keep_graphs, durability=durability)
    torch.manual_seed(7)
    for _ in range(STEPS):
        step(split.client, case.inputs(), dict)
    return split


def assert_records(got: GradientRecord, expected: GradientRecord) -> None:
    """Two records of one batch have the same bits."""
    for name in ("kind", "base_version", "num_samples", "loss_scale", "digest", "numerics"):
        assert getattr(got, name) == getattr(expected, name), name
    assert_same(got.gradients, expected.gradients, "gradient of")
    assert len(got.buffers) == len(expected.buffers)
    for own, other in zip(got.buffers, expected.buffers, strict=True):
        assert own.num_samples == other.num_samples
        assert_same(own.values, other.values, "buffer")
        assert_same(own.bases, other.bases, "base of")


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_what_is_computed_again_and_added_up_is_what_is_written_elsewhere(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gradient and every change of the buffers; and the version that comes of them, by way of a sum."""
    monkeypatch.setattr(holders, "LEAST", 1)
    monkeypatch.setattr(holders, "BYTES", 0)
    case, keep_graphs = CASES[number], 8 * (number % 2)  # some from kept graphs, some from recomputes
    log, gradient = (trained(case, durability, keep_graphs) for durability in ("log", "gradient"))
    assert all(not log.store.pile().read(batch).gradients for batch in log.store.waiting())
    headers = [log.store.pile().peek(batch) for batch in log.store.waiting()]
    is_held = all(header is not None and header["holder"] for header in headers)  # not of several calls
    derived, written = log.waiting(), gradient.waiting()
    assert len(derived) == len(written) == STEPS
    for own, other in zip(derived, written, strict=True):
        assert_records(own, other)
    one, two = log.accumulator.step(), gradient.accumulator.step()
    assert one is not None
    assert two is not None
    assert one.files == two.files
    # The newest stays as it is until another comes, or until the server writes its sum unasked: on a slow machine.
    assert [len(group) in (STEPS - 1, STEPS) for group in one.groups] == [True] * is_held


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["sums", "derive"])
def test_the_promises_hold_in_a_log(how: str) -> None:
    """The ten invariants and the transparency suite, in stores that are logs: with sums, and where all are lost."""
    files = [*sorted(TESTS.glob("promises/test_invariant_*.py")), TESTS / "promises/test_transparency.py"]
    command = [sys.executable, "-m", "pytest", "-q", f"--log={how}", *map(str, files)]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4_000:]
