"""A forward and backward of the tiny body over HTTP on loopback, beside what else could be done with the same tensors.

Variants, taken alternately in one run, each against one server process of its own:

    splitfed     our service: safetensors bytes, files written (sync="process"), nothing held between the two requests
    echoes       the bytes of those two requests and answers, echoed raw: what HTTP itself costs
    JSON lists   the study's protocol, written afresh: tensors as nested JSON lists, the graph held in memory in between

All three use urllib3's pool with connection reuse, and uvicorn; the other two as anybody would, ours with the reading
and writing of `http/exchange.py`. A step is the two requests; the bottom, the loss and the optimizer, which are the
same everywhere, are left out.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import urllib3
from torch import Tensor, nn

import splitfed
from benchmarks.models import tiny
from splitfed.protocol.messages import BackwardRequest, Chain, ForwardRequest, Seal
from splitfed.protocol.packing import pack
from splitfed.service.http.client import HttpTransport

Step = Callable[[], Any]
_BINARY = {"content-type": "application/octet-stream"}


def run(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each variant: minimum, median, and the median of its ratio to splitfed, round by round."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        steps = {
            "splitfed": splitfed_step(stack.enter_context(server(serve_splitfed, folder))),
            "echoes": echo_step(stack.enter_context(server(_serve_echo, folder))),
            "JSON lists": json_step(stack.enter_context(server(_serve_json, folder))),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for warm in range(rounds + 20):
            for name, step in steps.items():
                begun = time.perf_counter()
                step()
                if warm >= 20:
                    times[name].append(1e3 * (time.perf_counter() - begun))
    base = times["splitfed"]
    return {
        name: {
            "min": min(taken),
            "median": statistics.median(taken),
            "ratio": statistics.median(t / b for t, b in zip(taken, base, strict=True)),
        }
        for name, taken in times.items()
    }


def as_table(found: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| forward and backward over HTTP | min, ms | median, ms | of splitfed's |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {t['min']:.2f} | {t['median']:.2f} | {t['ratio']:.2f} × |" for name, t in found.items()]
    return "\n".join(lines)


def splitfed_step(url: str) -> Step:
    """Our two requests, by our transport."""
    transport, x, gradient = HttpTransport(url), torch.randn(64, 64), torch.randn(64, 64)
    numbers = iter(range(1_000_000_000))
    incarnation: list[int | None] = [None]

    def step() -> None:
        number = next(numbers)
        answer = transport.forward(_ahead(x, incarnation[0], number))
        incarnation[0] = answer.incarnation
        transport.backward(_back(gradient, answer.incarnation or 0, number, answer.version))

    return step


def echo_step(url: str) -> Step:
    """Requests of our sizes, and answers of our sizes, that nobody looks at."""
    pool = urllib3.PoolManager()
    bodies = [
        b"".join(pack(_ahead(torch.randn(64, 64), 1, 1))),
        b"".join(pack(_back(torch.randn(64, 64), 1, 1, 0))),
    ]

    def step() -> None:
        for body in bodies:
            if len(pool.request("POST", url, body=body, headers=_BINARY).data) != len(body):
                raise RuntimeError("the echo is another")

    return step


def json_step(url: str) -> Step:
    """The study's two requests: activations and gradients as nested lists of numbers."""
    pool, x, gradient = urllib3.PoolManager(), torch.randn(64, 64), torch.randn(64, 64)

    def ask(path: str, said: Any) -> Tensor:
        return torch.tensor(pool.request("POST", url + path, json=said).json()["tensor"])

    def step() -> None:
        ask("/forward", {"client": "a", "tensor": x.tolist()})
        ask("/backward", {"client": "a", "tensor": gradient.tolist()})

    return step


def _ahead(x: Tensor, incarnation: int | None, number: int) -> ForwardRequest:
    return ForwardRequest(
        "a", incarnation, "benchmark", number, "", ((x,), {}), (True,), True, True, 7, None, None, 0, None
    )


def _back(gradient: Tensor, incarnation: int, number: int, version: int) -> BackwardRequest:
    seal = Seal((), 64.0, 1.0, (Chain(64.0, 0),))
    return BackwardRequest("a", incarnation, number, 0, version, number, (gradient,), seal)


@contextmanager
def server(serve: Callable[[socket.socket, str], None], folder: str) -> Iterator[str]:
    """A process that serves at a free port, until the block ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(64)
        context = multiprocessing.get_context("spawn")
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=_begin, args=(serve, bound, folder, writing), daemon=True)
        process.start()
        reading.recv()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            process.kill()
            process.join()


def _begin(serve: Callable[[socket.socket, str], None], bound: socket.socket, folder: str, ready: Connection) -> None:
    torch.set_num_threads(1)
    ready.send(None)  # requests wait in the backlog from here on
    serve(bound, folder)


def _run(app: Any, bound: socket.socket) -> None:
    import uvicorn

    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run([bound])


def serve_splitfed(bound: socket.socket, folder: str) -> None:
    """Serve the tiny body from a store in the folder."""
    from splitfed.service.http.app import make_app

    store = splitfed.GradientStore(str(Path(folder) / "run"), sync="process")
    _run(make_app(splitfed.SplitServer(splitfed.split(tiny(), "2")[1], store)), bound)


def _serve_echo(bound: socket.socket, folder: str) -> None:
    _run(_echo, bound)


async def _body(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _answer(send: Any, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await _answer(send, await _body(receive), b"application/octet-stream")


def _serve_json(bound: socket.socket, folder: str) -> None:
    body = nn.Linear(64, 64)
    pending: dict[str, tuple[Tensor, Tensor]] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        said = json.loads(await _body(receive))
        tensor = torch.tensor(said["tensor"])
        if scope["path"] == "/forward":
            inputs = tensor.requires_grad_()
            outputs = body(inputs)
            pending[said["client"]] = inputs, outputs
            found = outputs
        else:
            inputs, outputs = pending.pop(said["client"])
            body.zero_grad()
            outputs.backward(tensor)
            found = inputs.grad
        await _answer(send, json.dumps({"tensor": found.tolist()}).encode(), b"application/json")

    _run(app, bound)
