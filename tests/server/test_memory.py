"""The memory of a server: what calls may hold at once, and tensors that are larger than what was sent."""

from __future__ import annotations

import threading
import uuid

import pytest
import torch
from harness_requests import Site, ahead, back
from torch import Tensor, nn

from splitfed.errors import BusyError, InputError, TooLargeError
from splitfed.model.rng import compute_lock
from splitfed.server.memory import EXPANSION, EXPANSION_BYTES, Memory, extent, held_by
from splitfed.service.limits import MessageLimits

MIB = 1 << 20


def some(num_bytes: int) -> tuple[Tensor, ...]:
    """A tensor of so many bytes."""
    return (torch.empty(num_bytes, dtype=torch.uint8),)


def test_limits_are_of_at_least_one() -> None:
    """The message names the wrong one."""
    for wrong in ({"total": 0}, {"client": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Memory(**wrong)


def test_a_client_has_one_call_of_any_size_and_others_within_its_limit() -> None:
    """Of a limit of 100 bytes each call takes twice its inputs: one of 400 alone; beside one of 20 another of 20."""
    memory = Memory(total=1000, client=100)
    with memory.claim("a", some(200)):
        with pytest.raises(BusyError, match=r"client 'a' has calls of 401 bytes under way, and another one of 3 "):
            memory.claim("a", some(1))
        with memory.claim("b", some(200)):  # others go on
            assert memory.under_way == 802
    with memory.claim("a", some(20)), memory.claim("a", some(20)), pytest.raises(BusyError):
        memory.claim("a", some(20))
    assert memory.under_way == 0


def test_all_together_have_a_limit_but_for_the_first_call_of_each() -> None:
    """Compute is one at a time, so each client may have one that waits."""
    memory = Memory(total=100, client=100)
    with memory.claim("a", some(40)), memory.claim("b", some(40)), pytest.raises(BusyError):
        memory.claim("b", some(1))


def test_a_tensor_may_be_expanded_like_a_mask_and_not_like_a_bomb() -> None:
    """64 times what was sent and 4 MiB: just so much, and not a row more."""
    memory = Memory()
    row = torch.ones(1, 1024)  # 4 KiB
    most = (EXPANSION_BYTES + EXPANSION * row.nbytes) // row.nbytes + 1
    with memory.claim("a", (row.expand(most, 1024),)):
        pass
    with pytest.raises(TooLargeError, match=r"4096 as they were sent: this server takes 64 times.*contiguous"):
        memory.claim("a", (row.expand(most + 1, 1024),))
    with memory.claim("a", (row.expand(most + 1, 1024), torch.ones(1024))):  # other tensors were sent along
        pass


def test_within_a_claim_it_is_known_what_was_sent() -> None:
    """A row of 16 bytes that is expanded to 64 was sent as 16, with which its client is charged."""
    with Memory().claim("a", (torch.ones(1, 4).expand(4, 4),)) as sent:
        assert sent == 16


def test_extents_by_hand() -> None:
    """2 × 3 floats whole, transposed, expanded in one dimension, and of none at all."""
    x = torch.ones(2, 3)
    cases = {(24, 24): x, (24, 24, 0): x.t(), (240, 24): x.expand(10, 2, 3), (0, 0): x[:0], (4, 4): torch.tensor(1.0)}
    for expected, tensor in cases.items():
        assert extent([tensor]) == expected[:2]
    assert extent([x, x.expand(5, 2, 3)]) == (144, 48)


def test_what_a_graph_holds_is_counted_by_its_operations() -> None:
    """32 rows through 8 → 16, ReLU, → 4: (16 + 16 + 4) floats a row; views and parameters are none."""
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    outputs = net(torch.ones(32, 8, requires_grad=True))
    assert held_by([outputs]) == 32 * (16 + 16 + 4) * 4
    assert held_by([outputs.view(4, 32)]) == held_by([outputs, outputs])
    assert held_by([outputs.detach()]) == outputs.nbytes


def test_the_next_call_is_taken_to_grow_like_those_before() -> None:
    """A body of one product: the copy that enters it, and outputs of the same size."""
    site = Site(f"memory://{uuid.uuid4()}")
    growth = site.cached.memory.growth
    assert growth.of("") == 1.0
    site.forward(site.cached)
    assert growth.of("") == 2.0
    growth.see("wide", 10, type("Run", (), {"tensors": [torch.ones(50)]})())  # type: ignore[arg-type]
    assert growth.of("wide") == 20.0


def test_a_second_call_of_a_client_is_refused_before_it_is_computed_and_another_client_isnt() -> None:
    """While one call of it computes; the refused one has left nothing in the store."""
    site = Site(f"memory://{uuid.uuid4()}", memory=Memory(total=MIB, client=40))
    server = site.server
    inside, go = threading.Event(), threading.Event()
    run = server._lines.of("a").runner.run_newest

    def wait(request: object) -> object:
        inside.set()
        assert go.wait(60)
        return run(request)  # type: ignore[arg-type]

    server._lines.of("a").runner.run_newest = wait  # type: ignore[method-assign, assignment]
    first = threading.Thread(target=lambda: server.forward(ahead()))
    first.start()
    assert inside.wait(60)
    server._lines.of("a").runner.run_newest = run  # type: ignore[method-assign]
    before = site.store.blobs.list("body/forward")
    with pytest.raises(BusyError, match="client 'a' has calls of"):
        server.forward(ahead(incarnation=1, call=1))
    assert site.store.blobs.list("body/forward") == before
    server.forward(ahead(client_id="b"))
    go.set()
    first.join()
    server.forward(ahead(incarnation=1, call=2))
    assert server.backward(back()).status == "stored"


def test_a_service_sets_only_what_the_server_was_not_given() -> None:
    """One's own limits stay."""
    limits = MessageLimits(memory=2 * MIB, client_memory=MIB)
    own, open_ = Memory(client=5), Memory()
    for memory in (own, open_):
        limits.govern(type("Server", (), {"memory": memory})())
    assert (own.total, own.client, open_.total, open_.client) == (2 * MIB, 5, 2 * MIB, MIB)
    limits.govern(object())
    assert not compute_lock._is_owned()  # type: ignore[attr-defined]
