"""What a client remembers of its examples: what of them travels, and which files it gives up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from splitfed.protocol.coding import Codec, decode
from splitfed.protocol.deltas import kept_rows, name_of, restored
from splitfed.protocol.examples import Change, Examples


class Ends:
    """A client's memory, and the files that a server would have."""

    def __init__(self, codec: str) -> None:
        self.examples = Examples()
        self.codec = Codec.of(codec)
        self.files: dict[str, Tensor] = {}

    def change(self, ids: Sequence[int], x: Tensor) -> Change:
        """What travels, not sent yet."""
        return self.examples.change("a|x", ids, x, 0, self.codec)

    def send(self, ids: Sequence[int], x: Tensor) -> tuple[Change, Tensor]:
        """What has travelled, and what the server has made of it."""
        made = self.change(ids, x)
        payload = made.payload if made.coded is None else decode(made.payload, made.coded)
        found = restored(payload, made.delta, self.files.get)
        for rows in kept_rows([found], [made.delta]):
            self.files[name_of(rows)] = rows
        self.examples.moved(made)
        self.examples.ended(made)
        given_up = self.examples.given_up()
        for name in given_up:
            del self.files[name]
        self.examples.told(given_up)
        return made, found


def rows(*shape: int, seed: int = 0) -> Tensor:
    """A tensor of normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_hasn_t_changed_doesn_t_travel() -> None:
    """Whatever batch it comes in; and a zero that changed its sign has changed."""
    ends = Ends("delta")
    x = rows(8, 64)
    ends.send(range(4), x[:4])
    ends.send(range(4, 8), x[4:])
    order = [6, 1, 4, 3]
    made, found = ends.send(order, x[order])
    assert made.payload.numel() == 0
    assert torch.equal(found, x[order])
    x[1, 0] = 0.0
    ends.send([1], x[1:2])
    x[1, 0] = -0.0
    made, found = ends.send(order, x[order])
    assert made.delta.sent.tolist() == [False, True, False, False]
    assert torch.equal(torch.signbit(found), torch.signbit(x[order]))


@pytest.mark.parametrize("codec", ["delta+int8", "delta+bfloat16", "delta+topk:0.1"])
def test_both_ends_have_the_same_and_the_error_falls_with_the_change(codec: str) -> None:
    """What is left out of one change is part of the next: examples that stay are soon exact."""
    ends = Ends(codec)
    x = rows(64, 128)
    errors = []
    for epoch in range(4):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).tolist()
        moved = x + (0.01 * rows(64, 128, seed=9) if epoch else 0)
        for ids in (order[:32], order[32:]):
            made, found = ends.send(ids, moved[ids])
            assert torch.equal(found, made.decoded)
        errors.append(made.squared_error / made.squared_norm)
    assert errors[3] < errors[1] < 1e-4


def test_a_file_is_given_up_once_nothing_refers_to_it() -> None:
    """No example has its newest row in it; the server has as many rows as there are examples, at most twice."""
    ends = Ends("delta+int8")
    x = rows(64, 128)
    for epoch in range(5):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).tolist()
        for first in range(0, 64, 8):
            ids = order[first : first + 8]
            ends.send(ids, x[ids] + epoch)
        assert len(ends.files) <= 16
    ends.send(range(64), x)
    assert len(ends.files) == 1


def test_a_request_that_fails_moves_nothing() -> None:
    """Its next try begins from the same rows, and a file that one under way refers to stays."""
    ends = Ends("delta+int8")
    x = rows(8, 128)
    first, _ = ends.send(range(8), x)
    failed = ends.change(range(8), x + 1)
    _, found = ends.send(range(8), x + 2)
    assert len(ends.files) == 2
    torch.testing.assert_close(found, x + 2, rtol=0, atol=0.05)
    assert failed.delta.references == (name_of(first.decoded),)
    ends.examples.ended(failed)
    assert ends.examples.given_up() == failed.delta.references


def test_what_is_lost_is_sent_whole_with_the_same_value() -> None:
    """Nobody can tell from what is decoded how it has travelled; then it is new."""
    ends = Ends("delta+int8")
    x = rows(8, 128)
    ends.send(range(8), x)
    ends.files.clear()
    change = ends.change(range(8), x + 0.01)
    ends.examples.lost(change)
    whole = change.whole()
    assert torch.equal(restored(whole.payload, whole.delta, ends.files.get), change.decoded)
    ends.examples.ended(change)
    # What was lost is still what its examples change from, and nothing refers to it.
    again = ends.change([3], x[3:4])
    assert again.delta.references == ()
    assert float((again.decoded - x[3:4]).abs().max()) < 0.001


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 60000.0])
def test_what_isn_t_finite_spoils_nothing_after_it(value: float) -> None:
    """It travels whole, as does what differs by more than halves can hold; then changes are of finite values again."""
    ends = Ends("delta+int8")
    x = rows(8, 256).half()
    x[2, 3] = -60000.0
    ends.send(range(8), x)
    odd = x.clone()
    odd[2, 3] = value
    for sent in (odd, x, x, x):
        made, found = ends.send(range(8), sent)
        same = torch.isfinite(sent)
        assert torch.equal(torch.isfinite(found), same)
        error = (found.double() - sent.double())[same].norm() / sent.double()[same].norm()
        assert error < 0.02
    assert made.delta.references


def test_a_mixed_batch_of_new_and_known_examples() -> None:
    """Also one that comes twice in a batch, and rows of another shape."""
    ends = Ends("delta")
    x = rows(6, 64)
    ends.send(range(3), x[:3])
    made, found = ends.send([1, 4, 4], x[[1, 4, 4]])
    assert made.delta.sent.tolist() == [False, True, True]
    assert torch.equal(found, x[[1, 4, 4]])
    made, found = ends.send([4, 1], rows(2, 32))
    assert made.delta.references == ()
    assert torch.equal(found, rows(2, 32))


def test_a_checkpoint_goes_on_with_the_same_bytes() -> None:
    """Files and rows survive a state dict."""
    ends, other = Ends("delta+int8"), Ends("delta+int8")
    x = rows(16, 128)
    for ids in (range(8), range(8, 16), [3, 12]):
        ends.send([*ids], x[[*ids]])
    state = ends.examples.state_dict()
    other.examples.load_state_dict(state)
    other.files = dict(ends.files)
    ids = [2, 3, 12, 9]
    one, again = (end.send(ids, x[ids] + 0.1) for end in (ends, other))
    assert one[0].delta.references == again[0].delta.references
    assert torch.equal(one[1], again[1])
    assert ends.files.keys() == other.files.keys()
