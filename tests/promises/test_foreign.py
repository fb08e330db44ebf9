"""Foreign batches: replicas of several numerics classes serve one run; other bits are counted, and said."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_store import sgd
from torch import Tensor, nn

from splitfed import Accumulator, GradientStore, ReplayError, SplitClient, SplitServer, split
from splitfed.diagnostics.replay import replay
from splitfed.model.numerics import class_id, numerics_class
from splitfed.protocol.messages import BackwardAnswer, BackwardRequest
from splitfed.protocol.packing import pack

# What libraries of x86 CPUs take as the machine's: they choose the code that another vendor's CPU would run.
ELSEWHERE = {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
REPLICA = """
import sys, warnings
import torch
from splitfed import GradientStore, SplitServer
from splitfed.model import numerics
from splitfed.model.numerics import class_id, numerics_class
from splitfed.protocol.messages import BackwardRequest
from splitfed.protocol.packing import unpack
from test_foreign import X, large
print(numerics._kernels.cache_info().currsize)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    server = SplitServer(large()[1], GradientStore(sys.argv[1], sync="process"))
    answer = server.backward(unpack(BackwardRequest, sys.stdin.buffer.read()))
print(class_id(numerics_class(torch.device("cpu"))), large()[1](X).double().sum().item().hex(), answer.status)
print([str(warning.message)[:60] for warning in told])
"""
X = torch.linspace(-1, 1, 7 * 513).reshape(7, 513).sin()
SMALL = torch.linspace(-1, 1, 24).reshape(4, 6)


def large() -> tuple[nn.Module, nn.Module]:
    """Half and body, whose sums are long enough to round: the same on each machine."""
    model = nn.Sequential(nn.Identity(), nn.Linear(513, 3))
    for parameter in model.parameters():
        parameter.data = ((torch.arange(parameter.numel()) % 101) / 101 - 0.5).reshape(parameter.shape)
    return split(model, "1")


def packed(message: Any) -> bytes:
    """A message as it travels."""
    return b"".join(pack(message))


def test_a_replica_on_another_machine_serves_a_backward(tmp_path: Path) -> None:
    """A process whose libraries take another CPU's code: of another class where its bits are others, and counted."""
    half, body = large()
    store = GradientStore(str(tmp_path / "run"), sync="process")
    server = SplitServer(body, store)
    said: list[str] = []

    def backward(request: BackwardRequest) -> BackwardAnswer:
        there = subprocess.run(
            [sys.executable, "-c", REPLICA, str(tmp_path / "run")],
            env={**os.environ, **ELSEWHERE, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
            input=packed(request),
            capture_output=True,
            timeout=100,
            check=False,
        )
        assert there.returncode == 0, there.stderr.decode()
        said.extend(there.stdout.decode().splitlines())
        return BackwardAnswer((), "stored")

    server.backward = backward  # type: ignore[method-assign,assignment]
    SplitClient(half, server, "a")(X).sum().backward()
    commit = Accumulator(body, store, sgd()).step()
    assert commit is not None
    assert commit.num_batches == 1
    nothing_yet, (there, value, status), told = said[0], said[1].split(), said[2]
    assert (nothing_yet, status) == ("0", "stored")
    is_foreign = there != class_id(numerics_class(torch.device("cpu")))
    assert commit.num_foreign == is_foreign
    assert ("another numerics class" in told) == is_foreign
    if value != body(X).double().sum().item().hex():
        assert is_foreign
        assert "recomputing a forward gave other outputs" in told


class Site:
    """A run with a replica here, and one whose class is made another by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layer: Callable[[], nn.Module], **settings: Any) -> None:
        half, body = split(nn.Sequential(nn.Identity(), layer()), "1")
        self.body = body
        self.store = GradientStore(f"memory://{uuid.uuid4()}", keep_forwards=True)
        self.here = SplitServer(body, self.store, **settings)
        other = split(nn.Sequential(nn.Identity(), layer()), "1")[1]
        other.load_state_dict(body.state_dict())
        for module in other.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-3  # stands for a kernel that rounds otherwise
        with monkeypatch.context() as patch:
            patch.setattr("splitfed.store.store.class_id", lambda numerics: "another")
            self.there = SplitServer(other, self.store, **settings)
        self.accumulator = Accumulator(body, self.store, sgd())
        self.client = SplitClient(half, self.here, "a")

    def move(self) -> None:
        """From now on backwards go to the other replica."""
        self.here.backward = self.there.backward  # type: ignore[method-assign]


def normal() -> nn.Module:
    """A layer whose bits differ between the two."""
    return nn.LayerNorm(6)


def num_foreign(site: Site) -> tuple[int, int, int]:
    """Of the next commit: batches, foreign ones, rejected ones."""
    commit = site.accumulator.step()
    assert commit is not None
    return commit.num_batches, commit.num_foreign, commit.num_rejected


@pytest.mark.parametrize("durability", ["gradient", "log"])
def test_a_backward_elsewhere_counts_as_foreign(monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    """Its forward has other bits there, which between two classes is rounding: said, and counted."""
    site = Site(monkeypatch, normal, durability=durability)
    loss = site.client(SMALL).square().sum()
    site.move()
    with pytest.warns(UserWarning, match="recomputing a forward gave other outputs than in the numerics class"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # in a log, the accumulator says it once more
        assert num_foreign(site) == (1, 1, 0)


def test_a_replay_says_that_a_batch_was_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a version differs which was computed with another machine's bits."""
    site = Site(monkeypatch, normal)
    loss = site.client(SMALL).square().sum()
    site.move()
    with pytest.warns(UserWarning, match="recomputing a forward"):
        loss.backward()
    assert num_foreign(site) == (1, 1, 0)
    _, version = replay(site.body, site.store).versions
    assert version.verdict == "differs"
    assert version.what.endswith("(batches of another numerics class: 1)")


def test_a_batch_is_foreign_if_a_part_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls in one pass: the first has its backward elsewhere, and the batch is closed here."""
    site = Site(monkeypatch, normal)
    native, parts = site.here.backward, []

    def backward(request: BackwardRequest) -> BackwardAnswer:
        parts.append(request.part)
        return (site.there.backward if len(parts) == 1 else native)(request)

    site.here.backward = backward  # type: ignore[method-assign]
    loss = site.client(SMALL).square().sum() + site.client(SMALL + 1).square().sum()
    with pytest.warns(UserWarning, match="recomputing a forward"):
        loss.backward()
    assert len(parts) > 1
    assert num_foreign(site) == (1, 1, 0)


class Draws(nn.Module):
    """Draws past torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Other outputs each time."""
        return self.linear(x) * random.random()


def test_a_body_that_cant_be_repeated_is_found_in_any_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from run to run on one replica isn't rounding."""
    site = Site(monkeypatch, Draws)
    loss = site.client(SMALL).sum()
    site.move()
    with pytest.raises(ReplayError, match="must not keep state in Python"):
        loss.backward()


def test_another_dtype_isnt_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of another kind than on record are refused in any class."""
    site = Site(monkeypatch, normal)
    loss = site.client(SMALL).sum()
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: nn.functional.layer_norm(x, (6,)).double())
    site.move()
    with pytest.raises(ReplayError, match="another numerics class"):
        loss.backward()
