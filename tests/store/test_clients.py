"""The registry of clients: each process has a number, and only the newest counts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from harness_store import Nth, again, hooked

from splitfed.errors import IdError, InputError, ProtocolError, SupersededError
from splitfed.store.clients import Clients
from splitfed.store.store import GradientStore


@pytest.fixture
def store(store_url: str) -> GradientStore:
    """An empty store."""
    return GradientStore(store_url, sync="process")


def test_a_repeated_request_opens_nothing_new(store: GradientStore) -> None:
    """A process is known by what it calls itself, also after a newer one began."""
    assert [store.open_client("a", "p"), store.open_client("a", "p")] == [1, 1]
    assert store.open_client("a", "q") == 2
    assert again(store).open_client("a", "p") == 1


def test_who_joined_is_known_and_has_no_process(store: GradientStore) -> None:
    """A client that has only pulled can be sampled; nothing of it can count yet."""
    store.join_client("b")
    store.open_client("a")
    assert again(store).clients() == ["a", "b"]
    with pytest.raises(SupersededError, match="never opened"):
        store.check_client("b", 1)


def test_each_process_of_a_client_gets_a_number_and_only_the_newest_counts(store: GradientStore) -> None:
    """1, 2, 3; a request of an older one is SupersededError, and so is one of a process that was never opened."""
    assert [store.open_client("a"), store.open_client("a"), store.open_client("b")] == [1, 2, 1]
    store.check_client("a", 2)
    store.check_client("b", 1)
    with pytest.raises(SupersededError, match="newer process than its number 1"):
        store.check_client("a", 1)
    with pytest.raises(SupersededError, match="never opened"):
        store.check_client("b", 2)
    with pytest.raises(SupersededError):
        store.check_client("nobody", 1)


def test_a_process_is_superseded_for_a_store_that_knew_it(store: GradientStore) -> None:
    """What a replica remembers of a client doesn't hide that another replica opened a newer process."""
    number = store.open_client("a")
    store.check_client("a", number)
    again(store).open_client("a")
    with pytest.raises(SupersededError):
        store.check_client("a", number)


def test_eight_threads_open_eight_processes(store: GradientStore) -> None:
    """Numbers are created once: nobody shares one."""
    together, numbers = threading.Barrier(8), []

    def open_client() -> None:
        together.wait()
        numbers.append(store.open_client("a"))

    threads = [threading.Thread(target=open_client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_foreign_names_among_the_clients_are_ignored(store: GradientStore) -> None:
    """A note that somebody left in the folder doesn't keep a client out."""
    store.open_client("a")
    store.blobs.create("clients/a/notes.txt", [b"x"])
    assert store.open_client("a") == 2


def test_the_301st_process_of_a_client_costs_few_reads(store_url: str) -> None:
    """One listing, and a handful of single keys; and what older ones have left is deleted, but for milestones."""
    hook = Nth()
    store = hooked(store_url, hook)
    registry = store.registry()
    for number in range(1, 301):
        assert registry.open("a", f"p{number}") == number
    with hook.armed():
        assert registry.open("a", "p301") == 301
    operations = [operation for operation, _ in hook.log]
    assert (operations.count("get"), operations.count("list"), operations.count("create")) == (8, 1, 1)
    assert registry.open("a", "p301") == 301
    for number in range(302, 600):
        registry.open("a", f"p{number}")
    kept = [int(key[-8:]) for key in store.blobs.list("clients/a")]
    assert kept == [256, *range(512, 600)]
    registry.check("a", 599)
    with pytest.raises(SupersededError, match="newer process"):
        registry.check("a", 598)
    for number in (1, 255, 256, 300):
        with pytest.raises(SupersededError):
            registry.check("a", number)


def test_an_opener_that_slept_takes_no_number_whose_file_is_gone(store: GradientStore) -> None:
    """Its listing is from before hundreds of others: it creates number 1 once more, sees a milestone, and moves on."""
    for number in range(1, 300):
        store.open_client("a", f"p{number}")
    assert store.blobs.get("clients/a/00000001") is None
    registry = Clients(Stale(store.blobs))
    assert registry.open("a", "sleeper") == 300
    assert store.blobs.get("clients/a/00000001") is None
    assert store.open_client("a", "sleeper") == 300


class Stale:
    """Blobs whose listings are from before anything was there."""

    def __init__(self, blobs: Any) -> None:
        self._blobs = blobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)

    def list(self, prefix: str) -> list[str]:
        """Nothing."""
        return []


def test_a_process_that_was_superseded_long_ago_is_refused_though_all_files_are_gone(
    store: GradientStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that has seen it looks for its file again, after a few seconds."""
    seconds = [0.0]
    monkeypatch.setattr("splitfed.store.clients.time.monotonic", lambda: seconds[0])
    store.open_client("a", "old")
    store.check_client("a", 1)
    for number in range(300):
        again(store).open_client("a", f"p{number}")
    seconds[0] = 6.0
    with pytest.raises(SupersededError, match="many newer ones"):
        store.check_client("a", 1)


def test_a_process_with_a_name_of_megabytes_is_refused(store: GradientStore) -> None:
    """It would be a file of that size."""
    with pytest.raises(InputError, match="calls itself by 1000 characters: expected at most 256"):
        store.open_client("a", "x" * 1000)
    assert store.clients() == []


@pytest.mark.parametrize("client_id", ["..", "a/b", "a\0", "*", "x" * 300, ""])
def test_hostile_client_ids_are_refused(store: GradientStore, client_id: str) -> None:
    """Ids can't escape the store's root."""
    for act in (store.open_client, lambda id_: store.check_client(id_, 1)):
        with pytest.raises(IdError):
            act(client_id)
    assert store.blobs.list("") == []


def test_who_resumes_names_a_process_of_this_store(store: GradientStore) -> None:
    """By number and by what it called itself; a position of another run begins nothing."""
    store.open_client("a", "p")
    store.registry().check_resumed("a", 1, "p")
    for incarnation, process in ((1, "q"), (2, "p"), (2, "q")):
        with pytest.raises(ProtocolError, match="from a position of another run"):
            again(store).registry().check_resumed("a", incarnation, process)
    store.open_client("a", "q")
    with pytest.raises(SupersededError, match="has begun a newer process"):
        again(store).registry().check_resumed("a", 1, "p")
