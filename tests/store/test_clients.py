"""The registry of clients: each process has a number, and only the newest counts."""

from __future__ import annotations

import threading

import pytest
from harness_store import again

from splitfed.errors import IdError, ProtocolError, SupersededError
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
