"""Running the app: a socket, one process or several, and an end that loses no request.

The socket is bound here, before anything else is started, so that a port in use is reported at once
and port 0 has a number.

SIGTERM and SIGINT stop the listening and let requests under way end, for `drain_seconds` at most.
A thread that still computes then can't be ended, and Python would wait for it at its own end. So
the process leaves without, as if it were killed, and the call is repeated elsewhere. With several
workers, one that dies is replaced.

The trap is a signal that comes before uvicorn handles signals itself. So from before the URL is
known to anybody, a handler of ours tells its server to end as soon as it has begun.
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
import tempfile
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
from splitfed.service.metrics import FOLDER, forget_process

_BACKLOG = 2048  # connections that wait to be accepted
_TICK = 0.2  # seconds, as are all of these
_QUICK = 5.0
_GRACE = 10.0
_KEEP_ALIVE = 75
# A thread that computes gives way to the event loop, and to others' requests, after so long. By
# Python's 5 ms each of the six steps of a request would wait so long for a client that is busy.
_SWITCH = 0.0005
_log = logging.getLogger("splitfed.http")


@dataclass(frozen=True, slots=True)
class Place:
    """Address to listen at, and how."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any that is free."""
    certificate: str | None = None
    """File with the certificate chain; with one, the service is HTTPS."""
    key: str | None = None
    """File with the certificate's key."""
    workers: int = 1
    """Number of processes."""
    drain_seconds: int = 30
    """How long requests under way may take to end after SIGTERM."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    make: Callable[[], Any], limits: Limits, place: Place, listening: Callable[[str], None]
) -> int:
    """Serve until a signal ends it.

    Args:
        make: Makes the ASGI app. It is called once in each process, so with several workers it must
            be picklable.
        limits: Limits that connections keep.
        place: Address to listen at.
        listening: Called with the URL as soon as requests are accepted.

    Returns:
        How many threads of this process still compute; the caller should not wait for them
        (`leave`).

    Raises:
        InputError: the address or the certificate can't be used.
        BusyError: workers died as soon as they were started, again and again.
    """
    bound = _bind(place.host, place.port)
    try:
        if place.certificate is not None:
            _check_certificate(place.certificate, place.key)
        bound.listen(_BACKLOG)
        ready = functools.partial(listening, _url(place, bound.getsockname()[1]))
        if place.workers == 1:
            return _serve_here(make, limits, place, bound, ready)
        _supervise(make, limits, place, bound, ready)
        return 0
    finally:
        bound.close()


def leave() -> NoReturn:
    """End this process with status 0, without waiting for its threads."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _url(place: Place, port: int) -> str:
    scheme = "http" if place.certificate is None else "https"
    host = f"[{place.host}]" if ":" in place.host else place.host
    return f"{scheme}://{host}:{port}"


# ------------------------------------------------------------------------------------- one process


def _serve_here(
    make: Callable[[], Any],
    limits: Limits,
    place: Place,
    bound: socket.socket,
    ready: Callable[[], None],
) -> int:
    """Serve in this process; return how many threads still compute afterwards."""
    config = GuardedConfig(
        make,
        limits,
        factory=True,
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=place.drain_seconds,
        ssl_certfile=place.certificate,
        ssl_keyfile=place.key,
        server_header=False,
    )
    server = uvicorn.Server(config)

    def stop(number: int) -> None:
        server.should_exit = True

    # Around all of `run`: uvicorn raises the signal once more when it has drained, and without a
    # handler the process would die of it.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        with _signals(stop):
            ready()
            server.run([bound])
    finally:
        sys.setswitchinterval(interval)
    return _num_computing()


def _num_computing() -> int:
    """How many of the app's threads still compute; those without work end within a moment."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith("splitfed")]
    until = time.monotonic() + _TICK
    for thread in found:
        thread.join(max(0.0, until - time.monotonic()))
    return sum(thread.is_alive() for thread in found)


# --------------------------------------------------------------------------------------- processes


class _Workers:
    """The processes of a service; one that has ended is replaced.

    uvicorn's supervisor isn't used: it kills a worker that doesn't answer within seconds, which a
    worker that loads torch on a busy machine doesn't.

    Args:
        number: How many there are.
        arguments: Of `_worker_main`, in each.
    """

    def __init__(self, number: int, arguments: tuple[Any, ...]) -> None:
        self._number = number
        self._arguments = arguments
        # "spawn": a fork of a process that has run torch's threads may hang.
        self._context = multiprocessing.get_context("spawn")
        self._folder = os.environ[FOLDER]
        self._running: dict[BaseProcess, float] = {}
        """When each was started."""
        self._num_quick = 0

    @property
    def are_failing(self) -> bool:
        """Whether so many in a row died as soon as they were started that each would."""
        return self._num_quick > 2 * self._number

    def start(self) -> None:
        """Start those that are missing."""
        while len(self._running) < self._number:
            worker: BaseProcess = self._context.Process(target=_worker_main, args=self._arguments)
            worker.start()
            self._running[worker] = time.monotonic()

    def wait(self) -> None:
        """Wait until one ends, or for a moment."""
        wait([worker.sentinel for worker in self._running], timeout=_TICK)

    def remove_ended(self) -> None:
        """Forget those that have ended."""
        for worker, began in list(self._running.items()):
            if worker.is_alive():
                continue
            del self._running[worker]
            forget_process(worker.pid, self._folder)
            if time.monotonic() - began < _QUICK:
                self._num_quick += 1
            else:
                self._num_quick = 0
            _log.warning("worker %s ended with %s: another one begins", worker.pid, worker.exitcode)

    def end(self, seconds: float) -> None:
        """End all of them, within so many seconds."""
        _end_processes(list(self._running), seconds)


def _supervise(
    make: Callable[[], Any],
    limits: Limits,
    place: Place,
    bound: socket.socket,
    ready: Callable[[], None],
) -> None:
    """Serve in processes of their own, until a signal comes."""
    signals: list[int] = []
    with _counting_together(), _signals(signals.append):
        workers = _Workers(place.workers, (make, limits, place, bound))
        ready()
        while not signals and not workers.are_failing:
            workers.start()
            workers.wait()
            # Ctrl-C reaches the workers too: that they end by it is nothing to warn of.
            if not signals:
                workers.remove_ended()
        workers.end(place.drain_seconds + _GRACE)
    if not signals:
        raise BusyError("the workers end as soon as they have begun: their log says why")


def _worker_main(
    make: Callable[[], Any], limits: Limits, place: Place, bound: socket.socket
) -> None:
    """Serve as one of several processes, no longer than the one that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        watcher = threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True)
        watcher.start()
    if _serve_here(make, limits, place, bound, lambda: None):
        leave()


def _end_after(sentinel: int) -> None:
    """End this process once another one has ended, even if that one was killed."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _end_processes(workers: list[BaseProcess], seconds: float) -> None:
    """Ask processes to end, and kill those that haven't ended in time."""
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        if worker.is_alive():
            _log.error("worker %s doesn't end: it is killed", worker.pid)
            worker.kill()
            worker.join()


# ------------------------------------------------------------------------------------- environment


@contextmanager
def _counting_together() -> Iterator[None]:
    """Within this context processes that are started count in files of one folder (`metrics`).

    The folder is the user's own if the environment names one. It must be named before a process
    imports prometheus_client.
    """
    if os.environ.get(FOLDER):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="splitfed-metrics-") as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]


@contextmanager
def _signals(note: Callable[[int], object]) -> Iterator[None]:
    """Within this context SIGTERM and SIGINT are noted, and don't end the process."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {
        number: signal.signal(number, lambda number, frame: note(number)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    # getaddrinfo would take a larger port modulo 65536.
    if not 0 <= port <= 65_535:
        raise InputError(
            f"can't listen at port {port}: expected one from 0 (any that is free) to 65535"
        )
    bound: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        # With the protocol named: asyncio turns Nagle's algorithm off only then, and with it on,
        # each answer waits 40 ms for an acknowledgement.
        bound = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
        if sys.platform != "win32":
            # A restart can use the port at once. On Windows it would let others use it too.
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
        raise InputError(
            f"the certificate {certificate} or its key can't be used: {error}"
        ) from error
