"""Running the app: a socket, one process or several, and an end without a lost request.

The socket is bound here, before anything else is started, so that a port that is taken is told at once and port 0 has
a number. It is made with its protocol named: asyncio turns Nagle's algorithm off only then, and with it on each answer
waits 40 ms for an acknowledgement.

SIGTERM and SIGINT stop the listening and let what is under way end, for `drain_seconds` at most. A thread that still
computes then can't be ended, and Python waits for it at its own end: so the process leaves without, as it would by
SIGKILL, and the call is repeated elsewhere. With several workers one that dies is started anew.

The trap is a signal that comes before uvicorn takes signals itself: from before anybody is told the URL, one of ours
tells its server to end as soon as it has begun.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import uvicorn

from splitfed.errors import BusyError, InputError
from splitfed.service.http.guard import GuardedConfig
from splitfed.service.http.limits import Limits

_BACKLOG = 2048
_TICK, _QUICK, _GRACE = 0.2, 5.0, 10.0  # seconds
_log = logging.getLogger("splitfed.http")


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how to listen."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any that is free."""
    certificate: str | None = None
    """File with the certificate chain: then it is HTTPS."""
    key: str | None = None
    workers: int = 1
    drain_seconds: int = 30
    """How long requests under way may take to end after SIGTERM."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(make: Callable[[], Any], limits: Limits, place: Place, listening: Callable[[str], None]) -> int:
    """Serve until a signal ends it.

    Args:
        make: Makes the ASGI app; called once in each process, so for several workers it must be picklable.
        limits: What connections keep.
        place: Where to listen.
        listening: Called with the URL once requests are taken in.

    Returns:
        How many threads of this process still compute; its caller has nothing to wait for (`leave`).

    Raises:
        InputError: the address can't be used, or the certificate can't.
        BusyError: workers died as soon as they were started, again and again.
    """
    bound = _bind(place.host, place.port)
    try:
        if place.certificate is not None:
            _check_certificate(place.certificate, place.key)
        bound.listen(_BACKLOG)
        host = f"[{place.host}]" if ":" in place.host else place.host
        scheme = "http" if place.certificate is None else "https"
        ready = functools.partial(listening, f"{scheme}://{host}:{bound.getsockname()[1]}")
        if place.workers == 1:
            return _work(make, limits, place, bound, ready)
        _supervise(make, limits, place, bound, ready)
        return 0
    finally:
        bound.close()


def leave() -> NoReturn:
    """End this process with status 0, and whatever its threads compute."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _work(
    make: Callable[[], Any], limits: Limits, place: Place, bound: socket.socket, ready: Callable[[], None]
) -> int:
    """Serve in this process; how many threads still compute afterwards."""
    config = GuardedConfig(
        make,
        limits,
        factory=True,
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=place.drain_seconds,
        ssl_certfile=place.certificate,
        ssl_keyfile=place.key,
        server_header=False,
    )
    server = uvicorn.Server(config)

    def stop(number: int) -> None:
        server.should_exit = True

    with _signals(stop):  # uvicorn raises the signal once more when it has drained: that isn't a failure
        ready()
        server.run([bound])
    return _computing()


def _computing() -> int:
    """The app's threads that go on; those with nothing to do end at once."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith("splitfed")]
    until = time.monotonic() + _TICK
    for thread in found:
        thread.join(max(0.0, until - time.monotonic()))
    return sum(thread.is_alive() for thread in found)


def _be_worker(make: Callable[[], Any], limits: Limits, place: Place, bound: socket.socket) -> None:
    """Serve as one of several processes, no longer than the one that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if _work(make, limits, place, bound, lambda: None):
        leave()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _supervise(
    make: Callable[[], Any], limits: Limits, place: Place, bound: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve in processes of their own; one that dies is started anew.

    uvicorn's supervisor isn't used: it kills a worker that doesn't answer within seconds, as one does that loads torch
    on a busy machine.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[int, tuple[BaseProcess, float]] = {}
    told: list[int] = []
    quick = 0

    with _signals(told.append):
        ready()
        while not told:
            for number in range(place.workers):
                if number not in workers:
                    worker: BaseProcess = context.Process(target=_be_worker, args=(make, limits, place, bound))
                    worker.start()
                    workers[number] = worker, time.monotonic()
            wait([worker.sentinel for worker, _ in workers.values()], timeout=_TICK)
            for number, (worker, began) in list(workers.items()):
                if worker.is_alive() or told:
                    continue
                del workers[number]
                quick = quick + 1 if time.monotonic() - began < _QUICK else 0
                _log.warning("worker %s ended with %s: another one begins", worker.pid, worker.exitcode)
            if quick > 2 * place.workers:
                told.append(0)
        _end([worker for worker, _ in workers.values()], place.drain_seconds + _GRACE)
    if told == [0]:
        raise BusyError("the workers end as soon as they have begun: their log says why")


def _end(workers: list[BaseProcess], seconds: float) -> None:
    """Tell processes to end, and kill those that haven't in time."""
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        if worker.is_alive():
            _log.error("worker %s doesn't end: it is killed", worker.pid)
            worker.kill()
            worker.join()


@contextmanager
def _signals(note: Callable[[int], object]) -> Iterator[None]:
    """Note SIGTERM and SIGINT instead of dying of them."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: note(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:  # getaddrinfo would take the rest of it
        raise InputError(f"can't listen at port {port}: expected one from 0 (any that is free) to 65535")
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
        if sys.platform != "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        raise InputError(f"can't listen at {host!r}, port {port}: {error}") from error
    bound.set_inheritable(True)
    return bound


def _check_certificate(certificate: str, key: str | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(f"the certificate {certificate} or its key can't be used: {error}") from error
