"""Keys: made and parsed in one place, sorted as their numbers are, and never outside of the store's root."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfed.blobs.contract import check_key
from splitfed.errors import IdError
from splitfed.protocol.ids import MAX_NUMBER, BatchId
from splitfed.store import layout
from splitfed.store.layout import Keys

KEYS = Keys("body")
CLIENT_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
NUMBERS = st.integers(0, MAX_NUMBER)
SMALL = st.integers(0, 10**8 - 1)
BATCHES = st.builds(BatchId, CLIENT_IDS, SMALL, st.integers(0, 10**10 - 1))
HOSTILE = [
    "",
    ".",
    "..",
    "a/b",
    "/a",
    "a\\b",
    "a\0b",
    "*",
    "a b",
    "?versionId=1",
    "a::b",
    "é",
    "a%00b",
    "~",
    "-a",
    "x" * 300,
]


@given(BATCHES)
def test_a_gradients_key_tells_its_batch(batch: BatchId) -> None:
    """Parsing is the inverse of making, and what is made is a key that storage accepts."""
    key = KEYS.gradient(batch)
    assert KEYS.parse_gradient(check_key(key)) == batch
    assert key.startswith("body/grad/")


@given(st.lists(BATCHES, max_size=20))
def test_listings_sort_as_the_batches_of_a_client_do(batches: list[BatchId]) -> None:
    """Numbers are padded, so that 10 comes after 9."""
    mine = [batch._replace(client_id="a") for batch in batches]
    assert sorted(map(KEYS.gradient, mine)) == [KEYS.gradient(batch) for batch in sorted(mine)]


@given(NUMBERS, st.from_regex(r"[0-9a-f]{16}", fullmatch=True), st.sampled_from(["weights", "optimizer", "applied"]))
def test_a_versions_files_tell_version_and_nonce(version: int, nonce: str, kind: str) -> None:
    """What a sweep finds it can match with a commit."""
    assert KEYS.parse_versioned(check_key(KEYS.versioned(kind, version, nonce))) == (version, nonce)


@given(NUMBERS, CLIENT_IDS, SMALL, NUMBERS)
def test_what_is_transient_tells_its_version(version: int, client: str, incarnation: int, number: int) -> None:
    """Forwards and parts expire by the version in their keys."""
    part = min(number, 999_999)
    assert KEYS.parse_transient(check_key(KEYS.forward(version, client, incarnation, number))) == version
    assert KEYS.parse_transient(check_key(KEYS.part(version, BatchId(client, incarnation, number), part))) == version


@given(NUMBERS)
def test_a_historys_key_tells_its_number(number: int) -> None:
    """Anything else is number 0, which no file has."""
    assert layout.parse_history(check_key(layout.history(number))) == number
    assert layout.parse_history(f"history/{number}.json") == 0


def test_every_key_is_where_the_table_says() -> None:
    """The layout is a contract: a store of today is read by the package of tomorrow."""
    batch = BatchId("hospital-a", 2, 31)
    for made, expected in (
        (layout.FORMAT, "format.json"),
        (layout.history(12), "history/0000000012.jsonl"),
        (layout.client("hospital-a"), "clients/hospital-a"),
        (layout.client("hospital-a", 2), "clients/hospital-a/00000002"),
        (layout.joined("hospital-a"), "clients/hospital-a/joined"),
        (layout.round_file(3, "plan"), "rounds/0000000003/plan.json"),
        (KEYS.fingerprint, "body/fingerprint.json"),
        (KEYS.frozen("ab12"), "body/frozen-ab12.safetensors"),
        (KEYS.forward(7, "hospital-a", 2, 9), "body/forward/hospital-a/0000000007-00000002-0000000009"),
        (KEYS.part(7, batch, 1), "body/part/hospital-a/0000000007-00000002-0000000031-000001"),
        (KEYS.pin(batch), "body/pin/hospital-a/00000002-0000000031"),
        (KEYS.gradient(batch), "body/grad/hospital-a/00000002-0000000031"),
        (KEYS.versioned("weights", 7, "c0"), "body/weights/0000000007-c0.safetensors"),
        (KEYS.versioned("optimizer", 7, "c0"), "body/optimizer/0000000007-c0.safetensors"),
        (KEYS.versioned("applied", 7, "c0"), "body/applied/0000000007-c0.json"),
        (KEYS.commit(7), "body/commit/0000000007.json"),
        (KEYS.head, "body/head"),
    ):
        assert made == expected


@pytest.mark.parametrize("lineage", ["body", "client", "body@hospital-a"])
def test_lineages_lie_apart(lineage: str) -> None:
    """All that a lineage has lies beneath its name, and another lineage doesn't parse it."""
    keys, other = Keys(lineage), Keys("body@other")
    batch = BatchId("a", 1, 0)
    made = [
        keys.fingerprint,
        keys.head,
        keys.lock,
        keys.gradient(batch),
        keys.commit(1),
        keys.versioned("weights", 1, "a"),
    ]
    assert all(check_key(key).startswith(f"{lineage}/") for key in made)
    assert other.parse_gradient(keys.gradient(batch)) is None
    assert other.parse_versioned(keys.versioned("weights", 1, "a")) is None
    assert other.parse_transient(keys.forward(1, "a", 1, 0)) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ids_never_become_keys(name: str) -> None:
    """Each place that an id enters a key refuses it."""
    batch = BatchId(name, 1, 0)
    for make in (
        lambda: layout.client(name),
        lambda: layout.client(name, 1),
        lambda: KEYS.gradient(batch),
        lambda: KEYS.pin(batch),
        lambda: KEYS.part(0, batch, 0),
        lambda: KEYS.forward(0, name, 1, 0),
        lambda: Keys(f"body@{name}"),
        lambda: Keys(name),
    ):
        with pytest.raises(IdError):
            make()


@pytest.mark.parametrize("number", [-1, MAX_NUMBER + 1, 0.5, True, None, "1", "../1"])
def test_hostile_numbers_never_become_keys(number: object) -> None:
    """Versions, incarnations, sequence and call numbers are plain integers of a bounded size."""
    makers = [
        lambda: KEYS.commit(number),  # type: ignore[arg-type]
        lambda: KEYS.gradient(BatchId("a", number, 0)),  # type: ignore[arg-type]
        lambda: KEYS.gradient(BatchId("a", 1, number)),  # type: ignore[arg-type]
        lambda: KEYS.forward(number, "a", 1, 0),  # type: ignore[arg-type]
        lambda: KEYS.forward(0, "a", 1, number),  # type: ignore[arg-type]
        lambda: KEYS.part(number, BatchId("a", 1, 0), 0),  # type: ignore[arg-type]
        lambda: KEYS.part(0, BatchId("a", 1, number), 0),  # type: ignore[arg-type]
        lambda: KEYS.part(0, BatchId("a", 1, 0), number),  # type: ignore[arg-type]
        lambda: KEYS.pin(BatchId("a", 1, number)),  # type: ignore[arg-type]
    ]
    if number is not None:  # without an incarnation it is the folder of all
        makers.append(lambda: layout.client("a", number))  # type: ignore[arg-type]
    for make in makers:
        with pytest.raises(IdError):
            make()


@pytest.mark.parametrize(
    "key",
    [
        "body/grad",
        "body/grad/a",
        "body/grad/a/1-2",
        "body/grad/a/00000001-0000000000.safetensors",
        "body/grad/a/b/00000001-0000000000",
        "body/grad/a/00000001_0000000000",
        "grad/../grad/a/00000001-0000000000",
        "body/grad/a@b/00000001-0000000000",
        "body/grad/a=b/00000001-0000000000",
        "body/grad/a/000000001-0000000000",
        "body/grad/a/00000001-00000000000",
    ],
)
def test_what_isnt_the_key_of_a_batch_isnt_taken_for_one(key: str) -> None:
    """Foreign names, ids that aren't allowed, and a second spelling of a number are ignored: one batch has one key."""
    assert KEYS.parse_gradient(key) is None


@pytest.mark.parametrize(
    "key", ["body/weights", "body/weights/1-a.safetensors", "body/weights/0000000001.safetensors", "body/head"]
)
def test_what_isnt_a_versions_file_isnt_taken_for_one(key: str) -> None:
    """A sweep deletes only what it can name."""
    assert KEYS.parse_versioned(key) is None
