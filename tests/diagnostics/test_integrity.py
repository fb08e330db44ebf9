"""`verify` and `repair`: any single file of a store may be lost, cut or flipped, and the run goes on."""

from __future__ import annotations

import json
import threading
import uuid
from functools import cache

import pytest
import torch
from harness_store import Crash, Nth, Point, again, batch, bits, crash, drain, hooked, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs.memory import _REGISTRY
from splitfed.cli.command import main
from splitfed.client.client import SplitClient
from splitfed.diagnostics.integrity import verify
from splitfed.diagnostics.repair import repair
from splitfed.errors import SplitFedError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore
from splitfed.store.table import LEAST_RECORDS

COMMITS = LEAST_RECORDS + 4
WINDOW = 4


def momentum(params):  # type: ignore[no-untyped-def]
    """Has a state, so that versions have optimizer files."""
    return torch.optim.SGD(params, lr=1.0, momentum=0.5)


@cache
def objects() -> dict[str, bytes]:
    """A run with two tables, a pending batch, an open call, a frozen parameter and a client half."""
    url = f"memory://{uuid.uuid4()}"
    store = GradientStore(url)
    body = Point(frozen=torch.ones(2))
    accumulator = Accumulator(body, store, momentum, keep_versions=WINDOW)
    assert store.open_client(batch(0).client_id) == batch(0).incarnation
    half, _ = split(torch.nn.Sequential(torch.nn.Linear(2, 2), Point(frozen=torch.ones(2))), "1")
    client = SplitClient(half, SplitServer(body, store), "c")
    client.pull()
    for seq in range(COMMITS):
        store.pile().create(batch(seq), record(base_version=store.latest_version()))
        accumulator.step()
    client(torch.ones(1, 2)).sum().backward()
    client(torch.ones(1, 2))
    return dict(_REGISTRY[url.removeprefix("memory://")].objects)


def copy(without: str = "", **changed: bytes) -> GradientStore:
    """A store with these files, in the memory of this process."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    for key, data in {**objects(), **changed}.items():
        if key != without:
            store.blobs.raw.create(key, [data])
    return store


def files() -> list[str]:
    """One file of each kind and place: the newest, one before, the first."""
    keys = sorted(objects())
    found = [key for key in keys if key.count("/") < 2 or "/commit/" not in key]
    commits = [key for key in keys if "body/commit/" in key]
    return [*found, *(commits[place] for place in (0, 1, LEAST_RECORDS, -2, -1))]


def acknowledged() -> set[str]:
    """The batches whose effect is on file in the undamaged store."""
    store = copy()
    counted = {str(one) for one in store.lineage().counted()}
    return counted | {str(one) for one in store.waiting()}


def goes_on(store: GradientStore) -> set[str]:
    """Fold what waits and one batch more; the batches that are closed then."""
    fresh = again(store)
    before = fresh.latest_version()
    fresh.pile().create(batch(1_000), record(base_version=before))
    body = Point(frozen=torch.ones(2))
    commits = drain(Accumulator(body, fresh, momentum, keep_versions=WINDOW))
    half, _ = split(torch.nn.Sequential(torch.nn.Linear(2, 2), body), "1")
    assert SplitClient(half, SplitServer(body, fresh), "d").pull() == 0
    assert [commit.version for commit in commits] == [before + 1]
    assert batch(1_000) in commits[-1].folded
    return {str(one) for one in fresh.lineage().counted()} - {str(batch(1_000))}


def test_a_whole_store_is_whole() -> None:
    """No false alarm, and nothing to repair."""
    store = copy()
    assert verify(store).damages == []
    done = repair(store)
    assert (done.actions, done.aside, done.lost, done.left) == ([], [], [], [])


def only_for_replay(store: GradientStore) -> bool:
    """Whether all is well, but for settings that were lost and that no accumulator has written again."""
    return all(damage.kind == "missing" and "/settings-" in damage.key for damage in verify(store).damages)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_any_damaged_file_is_found_and_repaired(how: str) -> None:
    """One flipped bit or a file cut in half: it is named, set aside, and the run goes on without a loss."""
    for name in files():
        data = bytearray(objects()[name])
        if how == "cut":
            data = data[: len(data) // 2]
        else:
            data[len(data) // 3] ^= 4
        store = copy(**{name: bytes(data)})
        assert [damage.key for damage in verify(store).damages][:1] == [name]
        done = repair(store)
        assert done.left == [], done
        assert bytes(store.blobs.raw.get(done.aside[0]) or b"") == bytes(data)
        lost = acknowledged() - goes_on(store)
        assert lost <= set(done.lost), (lost, done)
        assert only_for_replay(store), verify(store)
        is_gone_for_good = "/grad/" in name or f"weights/{COMMITS:010d}" in name or f"optimizer/{COMMITS:010d}" in name
        assert bool(done.lost) == is_gone_for_good, done


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_file_that_is_lost_is_no_dead_end() -> None:
    """Deleted: what a run needs is found to be missing, and rebuilt."""
    for name in files():
        store = copy(without=name)
        done = repair(store)
        assert done.left == [], done
        expected = acknowledged() - set(done.lost)
        if "/grad/" in name:  # nothing else says that it was there
            expected -= {str(again(copy()).waiting()[0])}
        assert expected <= goes_on(store) | {str(one) for one in again(store).waiting()}
        assert only_for_replay(store), verify(store)


def test_a_lost_record_is_written_again_with_the_same_bytes() -> None:
    """The newest is in the hint, too."""
    name = [key for key in objects() if "body/commit/" in key][-1]
    store = copy(without=name)
    with pytest.raises(SplitFedError, match="splitfed repair"):
        again(store).latest_version()
    done = repair(store)
    assert done.lost == []
    assert bytes(store.blobs.raw.get(name) or b"") == objects()[name]
    assert again(store).latest_version() == COMMITS


def test_a_lost_file_of_a_clients_process_is_found() -> None:
    """The next process would bear its number, and its batches be taken for those that are counted."""
    name = f"clients/a/{batch(0).incarnation:08d}"
    store = copy(without=name)
    assert [(damage.key, damage.kind) for damage in verify(store).damages] == [(name, "missing")]
    assert repair(store).left == []
    assert verify(store).ok
    assert again(store).open_client("a", "another") == batch(0).incarnation + 1


@pytest.mark.parametrize("name", ["format.json", "body/head", "body/fingerprint.json"])
def test_an_empty_file_is_repaired(name: str) -> None:
    """As a power cut may leave it: there are no bytes to be set aside."""
    store = copy(without=name)
    store.blobs.raw._content.store(name, b"")
    assert [damage.key for damage in verify(store).damages] == [name]
    assert repair(store).left == []
    goes_on(store)
    assert verify(store).ok


def test_a_lost_record_of_version_0_closes_nothing() -> None:
    """Its table says so, and the frozen parameters are those of the others."""
    name = "body/commit/0000000000.json"
    store = copy(without=name)
    assert repair(store).left == []
    first = again(store).lineage().commit(0)
    assert (len(first.folded), first.frozen) == (0, copy().lineage().commit(0).frozen)


def test_a_lost_record_that_wrote_a_table_is_found_in_it() -> None:
    """Which batches it closed is in no other record, but in its own table."""
    url = f"memory://{uuid.uuid4()}"
    store = GradientStore(url)
    accumulator = Accumulator(Point(), store, sgd())
    for version in range(LEAST_RECORDS + 1):
        one = batch(0, client=f"c{version}")
        store.open_client(one.client_id)
        store.pile().create(one, record(base_version=version))
        accumulator.step()
    expected = again(store).lineage().counted().to_json()
    store.blobs.raw.delete(f"body/commit/{LEAST_RECORDS:010d}.json")
    assert repair(again(store)).left == []
    assert again(store).lineage().counted().to_json() == expected


def test_no_gradient_is_deleted_before_its_record_has_a_copy() -> None:
    """The hint is the copy: whoever deletes what a killed accumulator has left moves it first."""
    hook = Nth(0, crash, at="put body/head")
    url = f"memory://{uuid.uuid4()}"
    killed = Accumulator(Point(), hooked(url, hook), sgd())
    store = GradientStore(url)
    store.open_client("a")
    store.pile().create(batch(0), record())
    hook.arm()
    with pytest.raises(Crash):
        killed.step()
    assert Accumulator(Point(), again(store), sgd()).step() is None  # nothing to fold: it deletes what is counted
    assert again(store).pile().waiting() == []
    store.blobs.raw.delete("body/commit/0000000001.json")
    assert repair(again(store)).left == []
    assert batch(0) in again(store).lineage().counted()


def test_a_lost_table_is_written_again_with_the_same_bytes() -> None:
    """It is the sum of the records."""
    name = max(key for key in objects() if "body/applied/" in key)
    store = copy(without=name)
    repair(store)
    assert bytes(store.blobs.raw.get(name) or b"") == objects()[name]


def test_lost_weights_of_the_newest_version_are_rolled_back() -> None:
    """To the newest that is whole; the batches of the lost one are listed."""
    name = max(key for key in objects() if "body/weights/" in key)
    store = copy(without=name)
    done = repair(store)
    assert done.lost == [str(batch(COMMITS - 1))]
    assert again(store).latest_version() == COMMITS + 1
    weights = copy().lineage().weights(COMMITS - 1)
    assert bits(again(store).load_weights()) == bits(weights)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_false_alarm_over_a_live_store(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """While batches come and are folded, and versions expire."""
    store = GradientStore(tmp_path / "store", sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    store.open_client(batch(0).client_id)
    stop = threading.Event()

    def work() -> None:
        seq = 0
        while not stop.is_set():
            store.pile().create(batch(seq), record(base_version=store.latest_version()))
            accumulator.step()
            seq += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(15):
            assert verify(again(store)).damages == []
    finally:
        stop.set()
        thread.join()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """0 for a whole store, 1 for a damaged one, 2 where none is; and what was found as text or JSON."""
    name = max(key for key in objects() if "body/applied/" in key)
    store = copy(**{name: objects()[name][:-3]})
    assert main(["verify", "--store", store.url]) == 1
    assert name in capsys.readouterr().out
    assert main(["verify", "--store", store.url, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damages"][0]["key"] == name
    assert main(["repair", "--store", store.url]) == 0
    assert "written again" in capsys.readouterr().out
    assert main(["verify", "--store", store.url]) == 0
    assert "health" in capsys.readouterr().out
    assert main(["repair", "--store", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["actions"] == []
    nothing = f"memory://{uuid.uuid4()}"
    for verb in ("verify", "repair"):
        assert main([verb, "--store", nothing]) == 2
        assert "no run was begun" in capsys.readouterr().out
    store.blobs.put("format.json", [b'{"format":99,"numerics":{}}'])
    assert main(["verify", "--store", store.url]) == 2
    assert "format 99" in capsys.readouterr().err


def test_repair_refuses_while_an_accumulator_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would write the next version."""
    monkeypatch.setattr("splitfed.store.store.LOCK_SECONDS", 0.1)
    store = copy()
    with store.blobs.lock(store.lineage().keys.lock, 1.0) as held:
        assert held
        assert main(["repair", "--store", store.url]) == 2
    assert "an accumulator is at work" in capsys.readouterr().out
