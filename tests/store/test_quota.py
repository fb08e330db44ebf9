"""What one client may have open in the store."""

from __future__ import annotations

import uuid

import pytest
from harness_requests import Site, ahead, back
from harness_store import batch, record

from splitfed.errors import BusyError, InputError
from splitfed.protocol.messages import Housekeeping
from splitfed.store.quota import Ledger, Quota
from splitfed.store.store import GradientStore


def test_a_quota_is_of_at_least_one() -> None:
    """The message names it."""
    for wrong in ({"calls": 0}, {"disk": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Quota(**wrong)


def test_calls_of_one_client_are_counted_until_they_are_answered(store_url: str) -> None:
    """Two are taken, the third isn't; of another client it is; once one is gone, there is room again."""
    store = GradientStore(store_url, sync="process")
    seconds = [0.0]
    ledger, keys = Ledger(store.pile(), Quota(calls=2), lambda: seconds[0]), store.pile().keys
    for call in range(2):
        ledger.charge("a", 10, calls=1)
        store.blobs.create(keys.forward(0, "a", 1, call), [bytes(10)])
    store.blobs.create(keys.forward(0, "ab", 1, 0), [bytes(10)])
    with pytest.raises(BusyError, match=r"client 'a' has 2 open calls and 20 bytes .* takes 2 calls"):
        ledger.charge("a", 10, calls=1)
    ledger.charge("b", 10, calls=1)
    store.blobs.delete(keys.forward(0, "a", 1, 0))
    with pytest.raises(BusyError):  # the store isn't listed for each that is refused
        ledger.charge("a", 10, calls=1)
    seconds[0] = 1.0
    ledger.charge("a", 10, calls=1)


def test_pending_batches_count_by_their_bytes(store_url: str) -> None:
    """Of the client alone, and with its shares and pins."""
    store = GradientStore(store_url, sync="process")
    pile = store.pile()
    for seq in range(3):
        pile.create(batch(seq), record())
    pile.create(batch(0, "b"), record())
    pile.pin(batch(7), 3)
    pile.put_part(0, batch(8), 1, record(kind="part"))
    calls, num_bytes = Ledger(pile, Quota()).look("a")
    sizes = {key: size for key, size in store.blobs.sizes("body").items() if "/a/" in key}
    assert (calls, num_bytes, len(sizes)) == (2, sum(sizes.values()), 5)
    with pytest.raises(BusyError, match="raise the quota"):
        Ledger(pile, Quota(disk=num_bytes)).charge("a", 2 * num_bytes)


def test_a_server_refuses_a_forward_before_it_computes_it() -> None:
    """The next request that frees one lets the client go on; what is evaluated isn't on record."""
    site = Site(f"memory://{uuid.uuid4()}", quota=Quota(calls=2))
    for call in range(2):
        site.server.forward(ahead(incarnation=None if call == 0 else 1, call=call))
    with pytest.raises(BusyError, match="open calls"):
        site.server.forward(ahead(incarnation=1, call=2))
    site.server.forward(ahead(incarnation=1, call=3, grad=False))
    assert site.server.backward(back()).status == "stored"
    notes = Housekeeping(released=((0, 0),))
    site.other.forward(ahead(incarnation=1, call=4, housekeeping=notes))
    assert len(site.store.blobs.list("body/forward")) == 2
