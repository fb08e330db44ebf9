"""What must hold after processes were killed, whichever store they shared."""

from __future__ import annotations

from pathlib import Path

from harness_store import adam, again, check_counted_once, commits, drain, halving
from processes import AT, Outcome, model, new_accumulator, replay, versions

from splitfed.diagnostics.garbage import collect
from splitfed.diagnostics.replay import replay as from_record
from splitfed.model.cut import split
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
    if store.lineage().durability == "log":
        check_log(store, batches)


def check_log(store: GradientStore, batches: int) -> None:
    """Each version follows from its record, groups included, and nothing is left of sums and questions."""
    found = from_record(split(model(), AT)[1], store, optimizer=adam, lr_scheduler=halving)
    assert found.ok, [version for version in found.versions if not version.ok][:3]
    record = commits(store)
    groups = [group for commit in record for group in commit.groups]
    print(f"{len(groups)} sums of {sum(map(len, groups))} batches")
    assert groups or batches < 100, "servers have added something up"
    for commit in record:
        added = [batch for group in commit.groups for batch in group]
        assert len(set(added)) == len(added)
        assert set(commit.folded).issuperset(added)
    collect(store)  # who was killed last couldn't
    assert [store.blobs.list(f"body/{kind}") for kind in ("sum", "ask")] == [[], []]
