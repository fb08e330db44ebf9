"""A client in a forked process: a process of its own, with numbers of its own, and nobody else's gradient."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import gradients
from harness_http import running
from torch import Tensor, nn

import splitfed
from splitfed.service.http.app import make_app

if not hasattr(os, "fork"):
    pytest.skip("no fork here", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def made(folder: Path, **settings: Any) -> tuple[nn.Module, splitfed.SplitClient, splitfed.GradientStore]:
    """A model in one piece, its client, and the store; the client has trained."""
    model = sandwich(nn.Sequential(nn.Linear(8, 8), nn.Tanh())).double()
    half, body = splitfed.split(model, "body")
    store = splitfed.GradientStore(str(folder), sync="process")
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store, **settings), "a")
    client(torch.randn(4, 6).double()).sum().backward()
    client.zero_grad()
    return model, client, store


def in_a_fork(what: Any) -> Any:
    """What a function returns in a forked child."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = repr(what())
        except BaseException as error:  # noqa: BLE001 -- the parent is told of any
            found = repr((type(error).__name__, str(error)))
        os.write(theirs, found.encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return eval(answer)


def error_of_a_pass(model: nn.Module, client: Any, given: Tensor) -> float:
    """How far the gradients of the half are from those of the model in one piece."""
    client.zero_grad()
    model.zero_grad()
    client(given).pow(2).mean().backward()
    model(given).pow(2).mean().backward()
    expected = gradients(model)
    return max(float((g - expected[n]).abs().max()) for n, g in gradients(client).items())


@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_a_fork_goes_on_as_a_process_of_its_own(keep_graphs: int, tmp_path: Path) -> None:
    """Its numbers begin anew under another incarnation; the parent's is superseded, and told of forks."""
    model, client, store = made(tmp_path, keep_graphs=keep_graphs)
    given = torch.randn(4, 6).double()
    assert in_a_fork(lambda: error_of_a_pass(model, client, given)) < 1e-12
    assert [str(batch) for batch in store.waiting()] == ["a/1/0", "a/2/0"]
    with pytest.raises(splitfed.ProtocolError, match=r"newer process than its number 1.*or a forked process this one"):
        error_of_a_pass(model, client, given)


def test_a_fork_that_trains_no_more_leaves_the_parent_alone(tmp_path: Path) -> None:
    """As a DataLoader's workers do, or a process that only evaluates."""
    model, client, store = made(tmp_path)
    given = torch.randn(4, 6).double()

    def evaluate() -> bool:
        with torch.no_grad():
            return torch.equal(client.eval()(given), model(given))

    assert in_a_fork(evaluate)
    assert error_of_a_pass(model, client, given) < 1e-12
    assert [str(batch) for batch in store.waiting()] == ["a/1/0", "a/1/1"]


@pytest.mark.parametrize("in_block", [False, True])
def test_a_forward_before_the_fork_has_no_backward_after_it(in_block: bool, tmp_path: Path) -> None:
    """Its record is the parent's, and so is the number of the batch: the child is told, the parent goes on."""
    _, client, store = made(tmp_path)
    given = torch.randn(4, 6).double()
    with client.batch(num_samples=None if in_block else 4):
        first = client(given).sum()
        first.backward(retain_graph=True)
        name, said = in_a_fork(first.backward)
        assert name == "UnsupportedError"
        assert "before the process was forked" in said
        assert "client_id of its own" in said
        first.backward()
    assert len(store.waiting()) == (2 if in_block else 3)


def hogwild(number: int, model: nn.Module, half: nn.Module, server: Any, found: Any) -> None:
    """One of several processes that train one shared half, each as a client of its own."""
    torch.set_num_threads(1)
    client = splitfed.SplitClient(half, server, f"worker-{number}")
    torch.manual_seed(number)
    found.put(error_of_a_pass(model, client, torch.randn(4, 6).double()))


def test_hogwild_with_a_client_each(tmp_path: Path) -> None:
    """As the message says: every process has a SplitClient of its own id, on the half that all share."""
    model, client, store = made(tmp_path)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    server, half = client._connection.transport, copy_of(client)
    workers = [context.Process(target=hogwild, args=(n, model, half, server, found)) for n in range(2)]
    for worker in workers:
        worker.start()
    assert [found.get(timeout=60) < 1e-12 for _ in workers] == [True, True]
    for worker in workers:
        worker.join()
    assert store.clients() == ["a", "worker-0", "worker-1"]


def copy_of(client: splitfed.SplitClient) -> nn.Module:
    """Its half, in shared memory."""
    return client.client_half.share_memory()


def test_a_pool_of_forked_workers(tmp_path: Path) -> None:
    """An inherited client in a pool: one process after another may train, and each is right or told."""
    model, client, _ = made(tmp_path, keep_graphs=0)
    found = []
    for number in range(2):
        given = torch.randn(4, 6).double() + number
        found.append(in_a_fork(lambda given=given: error_of_a_pass(model, client, given)))
    assert max(found) < 1e-12


def test_a_fork_over_http(tmp_path: Path) -> None:
    """Connections aren't shared either."""
    model = sandwich(nn.Sequential(nn.Linear(8, 8), nn.Tanh())).double()
    half, body = splitfed.split(model, "body")
    store = splitfed.GradientStore(str(tmp_path), sync="process")
    with running(make_app(splitfed.SplitServer(body, store))) as service:
        client = splitfed.SplitClient(half, service.url, "a")
        given = torch.randn(4, 6).double()
        assert error_of_a_pass(model, client, given) < 1e-12
        assert in_a_fork(lambda: error_of_a_pass(model, client, given)) < 1e-12
    assert [str(batch) for batch in store.waiting()] == ["a/1/0", "a/2/0"]


def test_a_pipeline_stays_with_the_process_that_has_begun_it(tmp_path: Path) -> None:
    """Its thread isn't in the child, where nothing is ahead; the parent goes on."""
    _, client, store = made(tmp_path)
    items = [(torch.randn(4, 6).double(), torch.zeros(())) for _ in range(3)]
    pipeline = client.pipeline(items, lambda outputs, _: outputs.sum())
    next(pipeline)
    kind, text = in_a_fork(lambda: next(pipeline))
    assert kind == "UnsupportedError"
    assert "make another one in the child" in text
    assert in_a_fork(lambda: client.position()["batch"]) == 0
    assert [done.number for done in pipeline] == [1, 2]
    assert len(store.waiting()) == 4
