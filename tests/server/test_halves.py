"""Client halves at the server: what may begin their lineage, what may be pushed to it, and pushes that are repeated."""

from __future__ import annotations

import math
import uuid
from typing import Any

import pytest
import torch
from harness import Wire
from torch import nn

import splitfed
from splitfed.errors import InputError, SplitFedError, StoreError
from splitfed.model.skeleton import Template
from splitfed.protocol.messages import PullRequest, PushAnswer, PushRequest


class Lossy(Wire):
    """Loses the reply to a push when told to."""

    lose = False

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Pass it on."""
        answer = self.send("push", request)
        if self.lose:
            self.lose = False
            raise StoreError("the reply was lost")
        return answer


def half(value: float = 0.0) -> nn.Module:
    """One weight before the cut."""
    made = nn.Sequential(nn.Linear(1, 1, bias=False), splitfed.CutPoint())
    with torch.no_grad():
        made[0].weight.fill_(value)
    return made


class Site:
    """A server, and one client that has pulled the weight 1."""

    def __init__(self) -> None:
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
        self.server = splitfed.SplitServer(nn.Linear(1, 1), self.store)
        self.wire = Lossy(self.server)
        self.client = splitfed.SplitClient(half(1.0), self.wire, "a")

    def pulled(self) -> Site:
        """After the first pull."""
        self.client.pull()
        return self

    def learn(self, step: float) -> None:
        """Move the client's weight."""
        with torch.no_grad():
            self.client.client_half[0].weight.add_(step)

    def average(self) -> tuple[int, float]:
        """Commit; how many batches were folded, and the weight that came of it."""
        commit = splitfed.Accumulator(half(), self.store, lambda p: torch.optim.SGD(p, lr=1.0), lineage="client").step()
        assert commit is not None
        return commit.num_batches, self.store.load_weights(lineage="client")["0.weight"].item()

    def lost_push(self) -> None:
        """A push that arrives and whose reply doesn't."""
        self.wire.lose = True
        with pytest.raises(StoreError, match="reply was lost"):
            self.client.push(1)


def test_a_push_whose_reply_was_lost_counts_once() -> None:
    """The user calls push() again: one batch of one sample, not two that would weigh double."""
    site = Site().pulled()
    site.learn(2.0)
    site.lost_push()
    site.client.push(1)
    assert site.average() == (1, 3.0)


def test_what_was_learned_after_a_lost_push_isnt_lost_with_it() -> None:
    """+2 is pushed and its reply lost, +4 is learned and pushed: both count once, 1 + (2 + 4)/2 = 4."""
    site = Site().pulled()
    site.learn(2.0)
    site.lost_push()
    site.learn(4.0)
    site.client.push(1)
    assert site.average() == (2, 4.0)


def test_a_pull_after_a_lost_push_begins_anew() -> None:
    """The next round: +2 is averaged into 3, pulled, and +4 from there pushed: 7, the lost push not again."""
    site = Site().pulled()
    site.learn(2.0)
    site.lost_push()
    assert site.average() == (1, 3.0)
    site.client.pull()
    site.learn(4.0)
    site.client.push(1)
    assert site.average() == (1, 7.0)


@pytest.mark.parametrize("samples", [math.inf, -1], ids=str)
def test_a_push_that_was_refused_isnt_repeated(samples: float) -> None:
    """The next one stands for itself."""
    site = Site().pulled()
    site.learn(2.0)
    with pytest.raises(InputError, match="samples"):
        site.client.push(samples)
    site.client.push(1)
    assert site.average() == (1, 3.0)


@pytest.mark.parametrize("base", [0.5, True, "0", 7, None, -2], ids=repr)
def test_an_update_starts_from_a_version_that_exists(base: Any) -> None:
    """A whole number up to the newest: what a commit records of it must be readable ever after."""
    site = Site().pulled()
    site.client.push(1)
    site.average()
    site.client._sync.version = base
    with pytest.raises(SplitFedError):
        site.client.push(1)
    assert site.store.waiting("client") == []
    assert splitfed.GradientStore(site.store.url).latest_version("client") == 1


@pytest.mark.parametrize("seq", [0.5, True, "0", None, -2], ids=repr)
def test_an_update_has_a_number(seq: Any) -> None:
    """Another is refused in words of ours, before it is compared with those that are counted."""
    site = Site().pulled()
    site.client.push(1)
    site.average()
    site.client._connection.number = lambda kind: seq  # type: ignore[method-assign]
    with pytest.raises(SplitFedError):
        site.client.push(1)
    assert site.store.waiting("client") == []


GOOD = Template(half()).fingerprint()
WEIGHTS = {"0.weight": torch.ones(1, 1)}
BAD: dict[str, tuple[Any, Any]] = {
    "no_fingerprint": (None, WEIGHTS),
    "list": ([], WEIGHTS),
    "entry": ({"0.weight": 3}, WEIGHTS),
    "role": ({"0.weight": {"role": "x", "shape": [1, 1], "dtype": "float32"}}, WEIGHTS),
    "shape": ({"0.weight": {"role": "trainable", "shape": "1", "dtype": "float32"}}, WEIGHTS),
    "tie": ({"0.weight": {"tied": "nowhere"}}, WEIGHTS),
    "weights_missing": (GOOD, {}),
    "weights_more": (GOOD, {**WEIGHTS, "more": torch.ones(1)}),
    "weights_shape": (GOOD, {"0.weight": torch.ones(2, 1)}),
    "weights_dtype": (GOOD, {"0.weight": torch.ones(1, 1).double()}),
}


@pytest.mark.parametrize(("fingerprint", "weights"), BAD.values(), ids=BAD)
def test_a_lineage_begins_with_a_whole_half(fingerprint: Any, weights: Any) -> None:
    """What isn't one is refused before anything is stored, so that nobody is locked out of the lineage for ever."""
    site = Site()
    with pytest.raises(SplitFedError):
        site.server.push(PushRequest("a", None, "first", 0, -1, fingerprint, weights, {}, {}, 1.0, 1.0))
    assert site.store.blobs.list("client") == []
    assert site.pulled().client.version == 0


@pytest.mark.parametrize("version", [9, -1, "0", 0.5], ids=repr)
def test_a_version_that_isnt_there_cant_be_pulled(version: Any) -> None:
    """Our own error."""
    site = Site().pulled()
    with pytest.raises(SplitFedError):
        site.server.pull(PullRequest("a", version))
