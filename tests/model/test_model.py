"""A body at one version: its buffers begin anew with each run, and its parameters are nobody's to write to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness_replay import X, body, call, linear, model
from torch import Tensor, nn

from splitfed.errors import SplitFedError, UnsupportedError
from splitfed.model import execution


@pytest.mark.parametrize("how", ["in_place", "assigned"])
def test_each_run_begins_with_the_versions_buffers(how: str) -> None:
    """A recompute counts nothing again, and runs of one version don't see each other."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if how == "in_place":
            m.count += 1
        else:
            m.count = m.count + 1
        return x + m.count

    holder = body(forward)
    holder.register_buffer("count", torch.tensor(10.0))
    made = model(holder)
    runs = [execution.run(made, call(), grad=True) for _ in range(2)]
    assert [float(done.buffers["count"]) for done in runs] == [11, 11]
    assert [float(done.bases["count"]) for done in runs] == [10, 10]
    handed_on = execution.run(made, call(buffers={"count": torch.tensor(11.0)}), grad=True)
    assert float(handed_on.buffers["count"]) == 12
    assert handed_on.outputs.tolist() == (X + 12).tolist()


@pytest.mark.parametrize("how", ["in_place", "assigned", "removed"])
def test_buffers_that_arent_kept_begin_anew_each_time(how: str) -> None:
    """A scratch buffer holds nothing over from one run to the next."""

    def forward(m: Any, x: Tensor) -> Tensor:
        out = x + m.scratch
        if how == "in_place":
            m.scratch += 1
        else:
            m.scratch = m.scratch + 1 if how == "assigned" else None
        return out

    scratching = body(forward)
    scratching.register_buffer("scratch", torch.zeros(1), persistent=False)
    made = model(scratching)
    assert [execution.run(made, call(), grad=False).outputs.tolist() for _ in range(3)] == [X.tolist()] * 3


def test_a_buffer_that_is_taken_away_is_refused() -> None:
    """It belongs to the version, so it must have a value when the run ends."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.count = None
        return x

    losing = body(forward)
    losing.register_buffer("count", torch.zeros(1))
    with pytest.raises(SplitFedError, match="count"):
        execution.run(model(losing), call(), grad=True)


@pytest.mark.parametrize("how", ["in_place", "assigned"])
def test_a_body_that_writes_to_its_parameters_is_refused(how: str) -> None:
    """What changes in forward belongs in buffers: the message says so."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            if how == "in_place":
                m.layer.weight.mul_(0.5)
            else:
                m.layer.weight = nn.Parameter(m.layer.weight * 0.5)
        return m.layer(x)

    made = model(body(forward, layer=linear()))
    with pytest.raises(
        UnsupportedError, match="changes its own parameters in forward: keep what it changes in buffers"
    ):
        execution.run(made, call(), grad=True)
