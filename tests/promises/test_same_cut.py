"""A half meets the body that it was cut from: any other one refuses it at its first call, and nothing is stored."""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import Calls, sandwich
from harness import sgd
from harness_http import running
from harness_post import transport
from torch import nn

import splitfed
from splitfed.errors import ArchitectureError
from splitfed.service.http.app import make_app
from splitfed.service.mailbox.worker import Worker

X = torch.ones(2, 6)


def line() -> nn.Sequential:
    """Layers of one shape."""
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])


def deeper() -> nn.Sequential:
    """Another model, whose layers of that shape are elsewhere."""
    return nn.Sequential(nn.Flatten(), *line())


OTHERS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], nn.Module], Any]] = {
    "part_of_the_slice": (line, "3:5", line, "1:5"),
    "another_layer": (line, "2", line, "1"),
    "a_slice_further_on": (line, "2:4", line, "1:3"),
    "one_of_several": (line, ["1", "3"], line, ["1", "4"]),
    "another_model": (deeper, "2:4", line, "2:5"),
    "the_same_place_of_another_model": (lambda: sandwich(nn.Linear(8, 8)), "body", lambda: sandwich(line()), "body"),
}


def direct(server: splitfed.SplitServer) -> Any:
    """The server itself as the way to it."""
    return contextmanager(lambda: iter((server,)))()


@contextmanager
def mailbox(server: splitfed.SplitServer) -> Iterator[Any]:
    """Its store."""
    worker = Worker(server, server.store)
    thread = threading.Thread(target=worker.run, kwargs={"poll": 0.01})
    thread.start()
    try:
        yield transport(server.store.url)
    finally:
        worker.stop()
        thread.join(60)


@contextmanager
def http(server: splitfed.SplitServer) -> Iterator[Any]:
    """A service."""
    with running(make_app(server)) as service:
        yield service.url


@pytest.mark.parametrize("way", [direct, http, mailbox], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", OTHERS)
def test_a_half_of_another_cut_is_refused_at_its_first_call(
    name: str, way: Callable[[splitfed.SplitServer], Any], tmp_path: Path
) -> None:
    """With what both were cut at; no process is opened, and neither a forward nor a gradient is on file."""
    model, at, other, other_at = OTHERS[name]
    half, _ = splitfed.split(model(), at)
    _, body = splitfed.split(other(), other_at)
    store = splitfed.GradientStore(str(tmp_path), sync="process")
    with way(splitfed.SplitServer(body, store, loss_fn=nn.functional.mse_loss)) as server:
        begun = [*store.blobs.list("body"), *store.blobs.list("clients")]
        client = splitfed.SplitClient(half, server, "a")
        with pytest.raises(ArchitectureError, match=r"client 'a' was cut at .* by the same split") as caught:
            client(X)
        with torch.no_grad(), pytest.raises(ArchitectureError):
            client(X)
    asked = ",".join(at) if isinstance(at, list) else at
    assert f"cut at {asked!r}" in str(caught.value)
    assert [*store.blobs.list("body"), *store.blobs.list("clients")] == begun


@pytest.mark.parametrize("per_client", [False, True], ids=["one_line", "lines"])
def test_a_loss_on_the_server_is_refused_too(per_client: bool) -> None:
    """`client.loss` has the stamp of its cut as well, and leaves no line of the client's behind."""
    half, _ = splitfed.split(line()[:3], "2")
    _, body = splitfed.split(line()[:3], "1")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    server = splitfed.SplitServer(body, store, per_client=per_client, loss_fn=nn.functional.mse_loss)
    with pytest.raises(ArchitectureError, match="cut at '2' and the body here at '1'"):
        splitfed.SplitClient(half, server, "a").loss(X, X)
    assert not list(store.blobs.list("clients"))
    assert not list(store.blobs.list("body@a"))


def adapted(body: nn.Module) -> nn.Module:
    """Wrapped, as an adapter would."""
    return Calls(lambda m, x: m.inner(x) + m.low(x), inner=body, low=nn.Linear(6, 6))


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copied": copy.deepcopy,
    "cast": lambda body: body.to(torch.float64).to(torch.float32),
    "frozen": lambda body: body.requires_grad_(False),
    "wrapped": adapted,
    "with_new_values": lambda body: nn.Module.load_state_dict(body, body.state_dict()) and body,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_body_that_was_changed_after_the_cut_is_still_the_one(name: str) -> None:
    """A copy, a cast, a freeze or an adapter around it."""
    half, body = splitfed.split(line(), "1:3")
    other, _ = splitfed.split(line(), "2:4")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    server = splitfed.SplitServer(CHANGES[name](body), store)
    assert splitfed.SplitClient(half, server, "a")(X).shape == (2, 6)
    with pytest.raises(ArchitectureError):
        splitfed.SplitClient(other, server, "b")(X)


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16], ids=str)
def test_what_one_side_casts_or_freezes_before_the_cut_is_no_other_cut(cast: torch.dtype) -> None:
    """Names, shapes and places are compared, and nothing else; an open slice is the one that it comes to."""
    half, _ = splitfed.split(line(), "2:")
    _, body = splitfed.split(line().to(cast).requires_grad_(False), "2:6")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    client = splitfed.SplitClient(half.to(cast), splitfed.SplitServer(body, store), "a")
    assert client(X.to(cast)).dtype is cast


def test_layers_without_parameters_are_no_other_cut() -> None:
    """A half that was cut from the model without its dropout belongs to the body that has one."""
    half, _ = splitfed.split(sandwich(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), "body")
    _, body = splitfed.split(sandwich(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))), "body")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    assert splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")(X).shape == (2, 3)


def test_a_side_that_was_made_by_hand_fits_any() -> None:
    """A cut point or a body without a stamp is taken as it is."""
    half, body = splitfed.split(line(), "2")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    by_hand = nn.Sequential(nn.Identity(), splitfed.CutPoint())
    assert splitfed.SplitClient(by_hand, splitfed.SplitServer(body, store), "a")(X).shape == (2, 6)
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    assert splitfed.SplitClient(half, splitfed.SplitServer(nn.Linear(6, 6), store), "a")(X).shape == (2, 6)


@pytest.mark.parametrize("other", [("2", "1"), ("3:5", "1:3")], ids=["layer", "slice"])
def test_a_store_keeps_to_the_cut_that_it_began_with(other: tuple[str, str]) -> None:
    """A server or an accumulator with a body of the same shapes from another place is refused."""
    at, begun = other
    bodies = {name: splitfed.split(line(), name)[1] for name in other}
    if ":" in at:
        bodies[at] = nn.Sequential(*bodies[at])  # under the names of the other
        bodies[begun] = nn.Sequential(*bodies[begun])
        for name, body in bodies.items():
            body.__dict__["_splitfed_part"] = splitfed.split(line(), name)[1].__dict__["_splitfed_part"]
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    splitfed.SplitServer(bodies[begun], store)
    splitfed.Accumulator(bodies[begun], store, sgd)
    for make in (lambda: splitfed.SplitServer(bodies[at], store), lambda: splitfed.Accumulator(bodies[at], store, sgd)):
        with pytest.raises(ArchitectureError, match=f"this body was cut at {at!r} and the one that 'body' began with"):
            make()
    assert store.lineage().commit(0).part.startswith(f"{begun}/")  # type: ignore[union-attr]


def test_the_mark_is_in_no_state_and_no_joined_model() -> None:
    """It is an attribute of the body, and of nothing that is made of it."""
    half, body = splitfed.split(line(), "1:3")
    mark = body.__dict__["_splitfed_part"]
    assert mark.startswith("1:3/")
    assert list(body.state_dict()) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    for given in (body, body.state_dict()):
        whole = splitfed.join(half, given)
        assert not any("_splitfed_part" in vars(module) for module in whole.modules())
    assert body.__dict__["_splitfed_part"] == mark
