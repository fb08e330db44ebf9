"""Stores of many kinds: no false alarm over a healthy one, and no dead end after one file is lost, cut or flipped."""

from __future__ import annotations

import os
import random
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import healthy
import pytest
from harness_store import again
from healthy import Healthy

from splitfed.diagnostics.integrity import read_records, verify
from splitfed.diagnostics.repair import repair
from splitfed.errors import CorruptedError, FormatError, SplitFedError
from splitfed.store import layout
from splitfed.store.layout import Keys
from splitfed.store.store import GradientStore

FEW, MANY = 6, int(os.environ.get("DAMAGE_STORES", "1000"))
DAMAGED_EACH = 2
"""Files of a store that are damaged, one at a time."""
FLIPS, FLIPS_EACH = 100, 8
"""Of each kind of file, and of those at most in one store."""
BY_MODEL = re.compile(r"format.json$|/fingerprint.json$|/frozen-")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_few_stores(tmp_path: Path) -> None:
    """Some of what the soak makes a thousand of."""
    counts = Counter[str]()
    for number in range(FEW):
        check_store(number, random.Random(number), tmp_path / str(number), DAMAGED_EACH, counts)


@pytest.mark.soak
def test_many_stores(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Row 5: no false alarm in a thousand healthy stores, also while commits are under way; and no dead end."""
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    counts = Counter[str]()
    for number in range(MANY):
        check_store(number, random.Random(f"{seed}-{number}"), tmp_path / str(number), DAMAGED_EACH, counts)
    print(dict(counts))
    for name, count in counts.items():
        record_property(name, count)


@pytest.mark.soak
def test_many_flips(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Row 4: a hundred flips in each kind of file: none is silent, and each error names the key and the cure."""
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    left: Counter[str] = Counter()
    for number in range(200):
        if number > 40 and not any(left.values()):
            break
        made = healthy.make(chance, tmp_path / str(number), kind="rounds" if number % 2 else "memory")
        files = contents(made.store)
        for kind in {kind_of(key): None for key in files}:
            left.setdefault(kind, FLIPS)
            keys = [key for key in files if kind_of(key) == kind]
            for _ in range(min(FLIPS_EACH, left[kind])):
                check_flip(files, chance.choice(keys), chance)
                left[kind] -= 1
    done = {kind: FLIPS - count for kind, count in left.items()}
    print(done)
    record_property("flips", sum(done.values()))
    record_property("kinds of files", len(done))
    assert min(done.values()) == FLIPS


def kind_of(key: str) -> str:
    """The kind of a file: a folder of a lineage or of the store, or a name."""
    first, _, rest = key.partition("/")
    if first in (layout.CLIENTS, layout.HISTORY, layout.POST, "rounds"):
        ending = key.rpartition("/")[2]
        names = {layout.CLIENTS: "", layout.HISTORY: ""}
        return f"{first} {names.get(first, ending.partition('.')[2] if first == layout.POST else ending)}".strip()
    if not rest:
        return key
    kind = rest.partition("/")[0]
    return "frozen" if kind.startswith("frozen-") else kind


def check_store(number: int, chance: random.Random, folder: Path, damaged: int, counts: Counter[str]) -> None:
    """One healthy store, and copies of it with a damaged file."""

    def look(store: GradientStore) -> None:
        counts["looks during commits"] += 1
        found = verify(store).damages
        assert not found, f"store {number}: a false alarm during a commit: {found}"

    made = healthy.make(chance, folder, look)
    found = verify(made.store).damages
    assert not found, f"store {number}, {made.kind}: a false alarm: {found}"
    counts["healthy stores"] += 1
    if made.kind != "format 1":
        files = contents(made.store)
        for key in chance.sample([*files], min(damaged, len(files))):
            how = chance.choice(("lost", "cut", "flipped"))
            try:
                check_damage(made, files, key, how, chance)
            except (AssertionError, SplitFedError) as error:
                raise AssertionError(f"store {number}, {made.kind}: {how} {key}: {error!r}") from error
            counts[f"files {how}"] += 1
    healthy.remove(folder)


def contents(store: GradientStore) -> dict[str, bytes]:
    """All files of a store."""
    found = {key: store.blobs.raw.get(key) for key in store.blobs.list("")}
    return {key: bytes(data) for key, data in found.items() if data is not None}


def copied(files: dict[str, bytes]) -> GradientStore:
    """A store with these, in memory; empty files are left empty."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    for key, data in files.items():
        store.blobs.raw._content.store(key, data)
    return again(store)


def damaged_bytes(data: bytes, how: str, chance: random.Random) -> bytes:
    """A file that was cut or of which a bit has flipped."""
    if how == "cut":
        return data[: chance.choice((0, chance.randrange(len(data))))]
    made = bytearray(data)
    made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
    return bytes(made)


def check_damage(made: Healthy, files: dict[str, bytes], key: str, how: str, chance: random.Random) -> None:
    """`verify` finds it; after `repair` no batch is lost that is on file elsewhere, and the run goes on."""
    known, needed = acknowledged(made.store), how != "lost" or is_needed(made.store, key)
    if how == "lost":
        store = copied({name: data for name, data in files.items() if name != key})
    else:
        store = copied({**files, key: damaged_bytes(files[key], how, chance)})
    found = [damage.key for damage in verify(store).damages]
    assert key in found or not needed, f"not found, but {found}"
    done = repair(again(store))
    assert done.left == [], done.left
    # What follows from the model is written again by who has it.
    assert all(damage.kind == "missing" and BY_MODEL.search(damage.key) for damage in verify(again(store)).damages)
    gone = known - acknowledged(again(store)) - set(done.lost)
    if how == "lost" and "/grad/" in key:
        gone -= {found for found in gone if key == key_of(found, key)}
    if "/commit/" in key and "its content is lost" in str(done.actions):
        gone -= closed_by(made.store, key)  # in the weights; which ones they were, nothing else says
    assert not gone, f"lost: {gone}, {done}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made.go_on(again(store))
    assert verify(again(store)).damages == []


def key_of(batch: str, key: str) -> str:
    """The key of a batch in the lineage of another key."""
    client, incarnation, seq = batch.split("/")
    return f"{key.partition('/')[0]}/grad/{client}/{int(incarnation):08d}-{int(seq):010d}"


def closed_by(store: GradientStore, key: str) -> set[str]:
    """The batches that a commit record closes."""
    name, _, version = key.removesuffix(".json").partition("/commit/")
    return {str(batch) for batch in store.lineage(name).commit(int(version)).verdict}


def lineages(store: GradientStore) -> Iterator[str]:
    """The lineages that have begun."""
    roots = {key.partition("/")[0] for key in store.blobs.list("")}
    return (root for root in sorted(roots) if root in ("body", "client") or root.startswith("body@"))


def acknowledged(store: GradientStore) -> set[str]:
    """The batches that are closed or pending."""
    found = set[str]()
    for name in lineages(store):
        lineage = store.lineage(name)
        if lineage.head() >= 0:
            found |= {str(batch) for batch in lineage.counted()}
        found |= {str(batch) for batch in store.pile(name).waiting()}
    return found


def is_needed(store: GradientStore, key: str) -> bool:
    """Whether a run can't do without a file."""
    if key.startswith("clients/") and key.rpartition("/")[2].isdecimal():
        _, client, number = key.split("/")
        batches = [one.split("/") for one in acknowledged(store)]
        newer = [name for name in store.blobs.list(f"clients/{client}") if name > key and name[-1].isdecimal()]
        return not newer and max((int(own) for name, own, _ in batches if name == client), default=0) == int(number)
    if key == layout.FORMAT or key.endswith("/fingerprint.json") or "/commit/" in key or "/frozen-" in key:
        return True
    name = key.partition("/")[0]
    if name not in lineages(store) or store.lineage(name).head() < 0:
        return False
    lineage, keys = store.lineage(name), Keys(name)
    head = lineage.commit(lineage.head())
    records = read_records(store, keys, head.version)
    own = [keys.versioned(kind, head.version, head.nonce) for kind in head.files if kind != "applied"]
    return key in (*own, keys.versioned("applied", head.base, records[head.base].nonce))


def check_flip(files: dict[str, bytes], key: str, chance: random.Random) -> None:
    """One flipped bit: whoever reads the file gets an error with its key and the cure, and `verify` lists it."""
    store = copied({**files, key: damaged_bytes(files[key], "flipped", chance)})
    with pytest.raises((CorruptedError, FormatError)) as caught:
        store.blobs.get(key)
    assert key in str(caught.value), caught.value
    assert "splitfed repair" in str(caught.value), caught.value
    assert key in [damage.key for damage in verify(again(store)).damages]
