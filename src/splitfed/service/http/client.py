"""The transport over HTTP: one URL, kept connections, and patience.

Every request may be repeated, since the server answers a repeated one as the first. So whatever may pass is tried again
until `patience` is spent: a replica that dies under a request, a busy one, a load balancer without one. Two things are
not: what the server refuses by one of our errors, and a wrong URL: a first contact that finds nobody, or an answer that
isn't ours, whatever its status (a portal says 200). Redirects aren't followed: a token goes to the host that it was
given for.
"""

from __future__ import annotations

import json
import os
import re
import threading
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Retry, Timeout, parse_url

from splitfed._version import __version__
from splitfed.checks import positive
from splitfed.errors import FormatError, InputError, UnreachableError
from splitfed.protocol.backoff import Backoff, growing
from splitfed.protocol.packing import pack, unpack
from splitfed.protocol.transport import VERBS, Sender
from splitfed.service.http.connection import Answer, Body, PlainExchange, SecureExchange
from splitfed.service.http.contract import BINARY, PREFIX, RETRIED, decode_error
from splitfed.service.http.retry import asked_for, passes, reason

VARIABLE = "SPLITFED_TOKEN"
_FIRST_PAUSE = 0.05  # seconds
_LAST_PAUSE = 5.0
_TOKEN = re.compile(r"[\x21-\x7e]+")
_ONCE = Retry(False, redirect=False)  # it is for `_send` to try again


def connect(url: str, *, client_id: str, token: str | None = None, **options: Any) -> HttpTransport:
    """The transport to a service, for `transports.open_transport`; the client's id is in each request already."""
    return HttpTransport(url, token=token, **options)


class HttpTransport(Sender):
    """A `Transport` to a service over HTTP. It may be shared between threads, and used after a fork.

    Args:
        url: Of the service: scheme, host, port and any path that a gateway puts in front.
        token: What the service asks for; the environment variable SPLITFED_TOKEN if not given.
        timeout: Longest silence while waiting for an answer, in seconds.
        patience: How long a request that fails by what may pass is repeated, in seconds.
        ca_certs: File with the certificates to trust, instead of the system's.

    Raises:
        InputError: it isn't such a URL, the token can't stand in a header, or a time isn't one.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 300.0,
        patience: float = 60.0,
        ca_certs: str | None = None,
    ) -> None:
        self.url = _checked(url)
        parsed = parse_url(self.url)
        self._path = parsed.path or ""
        token = os.environ.get(VARIABLE) if token is None else token
        if token is not None and not _TOKEN.fullmatch(token):
            raise InputError("the token has characters that no token has: expected what 'splitfed token new' printed")
        self._headers = {
            "host": re.sub(r"%[^\]]*", "", parsed.netloc or ""),  # the zone of an IPv6 address is this machine's affair
            "accept-encoding": "identity",
            "user-agent": f"splitfed/{__version__}",
            "content-type": BINARY,
        }
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"
        positive("timeout", timeout)
        if not isinstance(patience, int | float) or not patience >= 0:
            raise InputError(f"patience is {patience!r}: expected seconds, 0 for a single try")
        self._timeout = Timeout(connect=min(10.0, timeout), read=timeout)
        self._patience = patience
        self._ca_certs = ca_certs
        self._lock = threading.Lock()
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._process = 0
        self._met = False

    def __repr__(self) -> str:
        return f"HttpTransport({self.url!r})"

    def status(self) -> dict[str, Any]:
        """The run, as the service's store has it.

        Raises:
            SplitFedError: what the server raised.
        """
        return self._json(self._request("GET", f"{PREFIX}/status", None, self._patience))

    def ready(self) -> dict[str, Any]:
        """Whether the service can serve: one try.

        Raises:
            UnreachableError: nobody answers, or something else does.
            StoreError: its store doesn't answer.
        """
        return self._json(self._request("GET", "/readyz", None, 0.0))

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    def send(self, verb: str, request: Any, /) -> Any:
        """The answer to a request, after as many tries as the patience allows."""
        data = self._request("POST", f"{PREFIX}/{verb}", pack(request), self._patience)
        try:
            return unpack(VERBS[verb][1], data)
        except FormatError as error:
            raise UnreachableError(
                f"{self.url}{PREFIX}/{verb} answered what isn't a splitfed server's: is the URL right? ({error})"
            ) from error

    def _json(self, data: memoryview) -> dict[str, Any]:
        try:
            found = json.loads(bytes(data))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UnreachableError(f"what answers at {self.url} isn't a splitfed server: is the URL right?")
        return found

    def _request(self, method: str, path: str, parts: Body | None, patience: float) -> memoryview:
        """The body of the answer, after as many tries as it takes."""
        tries = Backoff(growing(_FIRST_PAUSE, 2.0), most=_LAST_PAUSE, within=patience, jitter=True)
        while True:
            asked: float | None = None
            try:
                answer = self._once(method, path, parts)
            except (HTTPError, OSError) as error:
                failure: Exception = UnreachableError(f"{self.url} can't be reached: {reason(error)}")
                if not passes(error, met=self._met):
                    raise failure from error
            else:
                self._met = True
                if answer.status == 200:
                    self._check_encoding(path, answer)
                    return answer.memory
                failure = decode_error(bytes(answer.memory)) or UnreachableError(
                    f"{self.url}{path} answered {answer.status} without being a splitfed server: is the URL right?"
                )
                if answer.status not in RETRIED:
                    raise failure
                asked = asked_for(answer.headers.get("retry-after"))
            if not tries.wait(asked):
                raise failure

    def _check_encoding(self, path: str, answer: Answer) -> None:
        encoding = answer.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise UnreachableError(
                f"{self.url}{path} answered with content-encoding {encoding!r}, expected 'identity' as it was asked "
                "for: a proxy in between compresses; turn that off for this path"
            )

    def _once(self, method: str, path: str, parts: Body | None) -> Answer:
        """One try."""
        headers = self._headers
        if parts is not None:
            headers = {**headers, "content-length": str(sum(map(len, parts)))}
        body: Any = parts  # urllib3's types don't know that it passes on whatever its connections take
        answer: Answer = self._connections().urlopen(  # type: ignore[assignment] # of the connections' own class
            method,
            self._path + path,
            body=body,
            headers=headers,
            timeout=self._timeout,
            retries=_ONCE,
            redirect=False,
            release_conn=True,
        )
        return answer

    def _connections(self) -> urllib3.HTTPConnectionPool:
        with self._lock:
            if self._pool is None or self._process != os.getpid():  # a child must not write into its parent's sockets
                secure = self.url.lower().startswith("https")
                options = {"ca_certs": self._ca_certs} if secure else {}
                self._pool = urllib3.connection_from_url(self.url, maxsize=16, **options)
                self._pool.ConnectionCls = SecureExchange if secure else PlainExchange
                self._process = os.getpid()
            return self._pool


def _checked(url: str) -> str:
    try:
        found = parse_url(url)
    except LocationParseError as error:
        raise InputError(f"{url!r} isn't a URL: expected one such as 'https://host:8000'") from error
    if found.scheme not in ("http", "https") or not found.host or found.query or found.fragment:
        raise InputError(f"{url!r} isn't a service's URL: expected one such as 'https://host:8000'")
    if found.auth:
        raise InputError(f"the URL of {found.host} holds a password: give the token by SplitClient(..., token=...)")
    return url.rstrip("/")
