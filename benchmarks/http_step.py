"""Over HTTP on loopback: the tiny body beside what else could be done with its tensors, and a step of ResNet-18.

Variants of the tiny body, taken alternately in one run, each against one server process of its own:

    splitfed       our service: safetensors bytes, files written (sync="process"), nothing held in between
    plain urllib3  the same, with urllib3's own connections at the client (`service.http.connection` left out)
    executor       the same, with `loop.run_in_executor` at the server (`service.http.threads` left out)
    echoes         the bytes of those two requests and answers, echoed raw: what HTTP itself costs
    JSON lists     the study's protocol: tensors as nested JSON lists, the graph held in memory in between

All use urllib3's pool with connection reuse, and uvicorn. A step is the two requests; the bottom, the loss and the
optimizer, which are the same everywhere, are left out.

Of ResNet-18 a whole training step is taken, alternately unsplit in this process and with the body in another one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import urllib3
from torch import Tensor, nn
from urllib3.connection import HTTPConnection

import splitfed
from benchmarks import rounds
from benchmarks.models import resnet18, tiny
from benchmarks.rounds import Step
from benchmarks.split_step import training
from splitfed.protocol.messages import BackwardRequest, Chain, ForwardRequest, Seal
from splitfed.protocol.packing import pack
from splitfed.protocol.safetensors import aligned
from splitfed.service.http.app import make_app
from splitfed.service.http.client import HttpTransport
from splitfed.service.http.connection import Answer
from splitfed.service.http.limits import Limits
from splitfed.service.http.serve import Place, _serve_here
from splitfed.service.http.threads import Threads

Serve = Callable[[socket.socket, str], None]
_BINARY = {"content-type": "application/octet-stream"}


def run(seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each variant of the tiny body: minimum, median, and the median of its ratio to splitfed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def at(serve: Serve, name: str = "") -> str:
            return stack.enter_context(server(serve, str(folder / name)))

        steps = {
            "splitfed": splitfed_step(HttpTransport(at(serve_splitfed, "run"))),
            "plain urllib3": splitfed_step(Plain(at(serve_splitfed, "plain"))),
            "executor": splitfed_step(HttpTransport(at(_serve_executor, "executor"))),
            "echoes": echo_step(at(_serve_echo)),
            "JSON lists": json_step(at(_serve_json)),
        }
        return rounds.ratios(rounds.in_turns(steps, seconds, warm=20), "splitfed")


def run_resnet(seconds: float) -> dict[str, dict[str, float]]:
    """A training step of ResNet-18, unsplit and over HTTP."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
        model = resnet18()
        url = stack.enter_context(server(_serve_resnet, str(folder / "run"), torch.get_num_threads()))
        client = splitfed.SplitClient(splitfed.split(model, "2:7")[0], url, "a")
        steps = {"unsplit": training(model, model, x, y), "over HTTP": training(client, client, x, y)}
        return rounds.ratios(rounds.in_turns(steps, seconds), "unsplit")


class Plain(HttpTransport):
    """Our transport with urllib3's own connections."""

    def _exchange(self, method: str, path: str, parts: Any, key: str | None) -> Answer:
        pool = self._connections()
        pool.ConnectionCls = HTTPConnection
        body = None if parts is None else b"".join(parts)
        answer = pool.urlopen(method, path, body=body, headers=self._headers, retries=False)
        memory = aligned(len(answer.data))
        memory[:] = answer.data
        return Answer(answer.status, answer.headers, memory)


def splitfed_step(transport: HttpTransport) -> Step:
    """Our two requests, by a transport of ours."""
    x, gradient = torch.randn(64, 64), torch.randn(64, 64)
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
def server(serve: Serve, folder: str, threads: int = 1) -> Iterator[str]:
    """A process that serves at a free port, until the block ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(64)
        context = multiprocessing.get_context("spawn")
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=_begin, args=(serve, bound, folder, threads, writing), daemon=True)
        process.start()
        reading.recv()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            process.kill()
            process.join()


def _begin(serve: Serve, bound: socket.socket, folder: str, threads: int, ready: Connection) -> None:
    torch.set_num_threads(threads)
    ready.send(None)  # requests wait in the backlog from here on
    serve(bound, folder)


def _run(app: Any, bound: socket.socket) -> None:
    import uvicorn

    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run([bound])


def _service(body: nn.Module, folder: str) -> Any:
    return make_app(splitfed.SplitServer(body, splitfed.GradientStore(folder, sync="process")))


def _serve_app(app: Any, bound: socket.socket) -> None:
    """As `splitfed serve` does."""
    _serve_here(lambda: app, Limits(), Place(), bound, lambda: None)


def serve_splitfed(bound: socket.socket, folder: str) -> None:
    """Serve the tiny body as `splitfed serve` does."""
    _serve_app(_service(splitfed.split(tiny(), "2")[1], folder), bound)


def _serve_executor(bound: socket.socket, folder: str) -> None:
    # As many threads for each operation as in those of ours: another count has other times.
    pool = ThreadPoolExecutor(32, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))

    async def run(self: Threads, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    Threads.run = run  # type: ignore[method-assign]
    serve_splitfed(bound, folder)


def _serve_resnet(bound: socket.socket, folder: str) -> None:
    _serve_app(_service(splitfed.split(resnet18(), "2:7")[1], folder), bound)


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
