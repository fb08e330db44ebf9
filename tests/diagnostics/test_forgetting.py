"""`forget`: nothing of a client's data is left, nothing of others' is touched, and it may come back."""

from __future__ import annotations

import json
import uuid

import pytest
import torch
from harness_store import again, bits
from toy import AT, model

from splitfed.accumulator.accumulator import Accumulator
from splitfed.cli.command import main
from splitfed.client.client import SplitClient
from splitfed.diagnostics.forgetting import forget
from splitfed.diagnostics.integrity import verify
from splitfed.errors import MissingError, SupersededError
from splitfed.federation.per_client import PerClient
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

X = torch.ones(2, 4)


def begun(*, per_client: bool = False) -> tuple[GradientStore, dict[str, SplitClient], Accumulator | PerClient]:
    """Two clients: a batch each that is counted, one that waits, and a call under way."""
    store = GradientStore(f"memory://{uuid.uuid4()}", keep_forwards=True)
    _, body = split(model(), AT)
    kind = PerClient if per_client else Accumulator
    accumulator = kind(body, store, torch.optim.SGD)
    server = SplitServer(body, store, per_client=per_client)
    clients = {name: SplitClient(split(model(), AT)[0], server, name) for name in "ab"}
    for client in clients.values():
        client(X).mean().backward()
    accumulator.step()
    for client in clients.values():
        client(X).mean().backward()
        client(X)
    return store, clients, accumulator


def of(store: GradientStore, client_id: str) -> list[str]:
    """The files of a client, but for the numbers of its processes."""
    return [key for key in store.blobs.list("") if f"/{client_id}/" in key and not key.startswith("clients/")]


def test_nothing_is_left_of_it_and_nothing_of_others_is_touched() -> None:
    """Calls, pending and kept files go; the pending number is closed; the other client's batch counts."""
    store, clients, accumulator = begun()
    others = of(store, "b")
    assert forget(store, "a", dry_run=True).keys == of(store, "a")
    done = forget(store, "a")
    assert (len(done.closed), done.num_folded) == (1, 1)
    assert of(store, "b") == others
    assert len(of(store, "a")) == 1  # what closes the number of its pending batch
    assert [commit.client_id for commit in again(store).waiting()] == ["a", "b"]
    commit = accumulator.step()
    assert commit is not None
    assert not isinstance(commit, list)
    assert (commit.num_batches, commit.num_skipped) == (1, 1)
    assert of(store, "a") == []
    with pytest.raises(SupersededError):
        clients["a"](X).mean().backward()
    back = SplitClient(split(model(), AT)[0], SplitServer(split(model(), AT)[1], store), "a")
    back(X).mean().backward()
    accumulator.step()
    assert verify(store).ok
    assert forget(store, "a").closed == []


def test_a_body_of_its_own_begins_again_from_the_average() -> None:
    """And what it trained alone is gone, while its batches still count once."""
    store, _, accumulator = begun(per_client=True)
    assert isinstance(accumulator, PerClient)
    own = bits(store.load_weights(lineage="body@a"))
    done = forget(store, "a")
    assert done.restarted == ["body@a"]
    assert bits(again(store).load_weights(lineage="body@a")) == bits(store.load_weights()) != own
    accumulator.average()
    back = SplitClient(split(model(), AT)[0], SplitServer(split(model(), AT)[1], store, per_client=True), "a")
    back(X).mean().backward()
    commit = accumulator.average()
    assert commit is not None
    assert commit.num_batches == 1
    assert verify(store).ok


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """As text and JSON; an unknown client is no success."""
    store, _, _ = begun()
    assert main(["forget", "a", "--store", store.url, "--dry-run"]) == 0
    assert "would be gone" in capsys.readouterr().out
    assert main(["forget", "a", "--store", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_folded"] == 1
    with pytest.raises(MissingError, match="no client 'z'"):
        forget(store, "z")
    assert main(["forget", "../z", "--store", store.url]) == 2
