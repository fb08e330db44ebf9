"""What must hold after processes were killed, whichever store they shared."""

from __future__ import annotations

from pathlib import Path

from harness_store import again, check_counted_once, commits, drain
from processes import Outcome, new_accumulator, replay, versions

from splitfed.store.store import GradientStore


def check(url: str, outcome: Outcome, batches: int) -> None:
    """Each acknowledged batch counts once, and the bits are those of a serial replay of the schedule on record."""
    store = GradientStore(url, sync="process")
    drain(new_accumulator(store))
    assert len(outcome.acknowledged) == batches
    check_counted_once(store, outcome.acknowledged)
    record = commits(store)
    print(f"{len(record) - 1} commits")
    assert sum(len(commit.folded) for commit in record) == batches, "and all of them were folded"
    assert versions(store) == outcome.acknowledged, "the record says of each batch the version that its owner saw"
    replayed, owners = replay(store, f"memory://{Path(url).name}-{id(outcome)}")
    for commit, expected in zip(record, commits(replayed), strict=True):
        same = [commit.files.get(kind) == expected.files.get(kind) for kind in ("weights", "optimizer")]
        assert all(same), f"version {commit.version} differs from its replay in weights or optimizer: {same}"
    assert {name: owner.bits() for name, owner in owners.items()} == outcome.halves
    assert again(store).blobs.list("body/grad") == []
