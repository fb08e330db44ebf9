"""The transport over HTTP: one URL, connections that are kept open, and retries.

Every request may be repeated, since the server answers a repeated one as the first. So a transient
failure is retried until `patience` is spent: a replica that dies under a request, a busy one,
a load balancer without one. Two things aren't retried: what the server refuses by one of our
errors, and a wrong URL. The latter shows as a first contact that finds nobody, or as an answer that
isn't ours, whatever its status (a captive portal says 200).

The trap is a redirect. It isn't followed: a token goes to the host that it was given for.
"""

from __future__ import annotations

import json
import os
import re
import threading
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, ProtocolError
from urllib3.util import Retry, Timeout, parse_url

from splitfed._version import __version__
from splitfed.checks import positive
from splitfed.errors import FormatError, InputError, UnreachableError
from splitfed.protocol.backoff import Backoff, growing
from splitfed.protocol.packing import pack, unpack
from splitfed.protocol.transport import VERBS, Sender
from splitfed.service.http.affinity import Affinity
from splitfed.service.http.connection import (
    Answer,
    Body,
    PlainExchange,
    SecureExchange,
    is_transient,
    reason,
    retry_after,
)
from splitfed.service.http.contract import AFFINITY, BINARY, PREFIX, RETRIED, decode_error
from splitfed.service.http.route import advice, pool_of, proxy_of, speaks_tls, trusted

VARIABLE = "SPLITFED_TOKEN"
_TOKEN = re.compile(r"[\x21-\x7e]+")
_ONCE = Retry(False, redirect=False)  # urllib3 tries once: `_request` retries, with our judgement
_FIRST_PAUSE = 0.05  # seconds, as are all of these
_LAST_PAUSE = 5.0
_CONNECT_SECONDS = 10.0
_CONNECTIONS = 16
_ABORTED = 3  # first requests that were cut off, after which TLS is tried: a hint, so not at once


def connect(url: str, *, client_id: str, token: str | None = None, **options: Any) -> HttpTransport:
    """Return the transport to a service, for `transports.open_transport`.

    The client's id isn't used here: each request has it already.
    """
    return HttpTransport(url, token=token, **options)


class HttpTransport(Sender):
    """A `Transport` to a service over HTTP. Threads may share it, and a fork may use it further.

    Args:
        url: Scheme, host, port of the service, and any path that a gateway puts in front.
        token: The client's token, if the service needs one; by default that in the environment
            variable SPLITFED_TOKEN.
        timeout: Longest silence while waiting for an answer, in seconds.
        patience: How long a request is retried after transient failures, in seconds.
        ca_certs: File with the certificates of the authorities to trust, or a directory of such
            files by hash, instead of the system's and those in the environment variable
            SSL_CERT_FILE.

    A proxy is taken from HTTPS_PROXY or HTTP_PROXY, by the URL's scheme, unless NO_PROXY names the
    host (`route`).

    Raises:
        InputError: the URL isn't a service's, the token can't be part of a header, a time isn't
            a number of seconds, or there are no certificates in `ca_certs`.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 300.0,
        patience: float = 60.0,
        ca_certs: str | os.PathLike[str] | None = None,
    ) -> None:
        self.url = _checked_url(url)
        parsed = parse_url(self.url)
        self._place = parsed
        self._proxy = proxy_of(parsed)
        self._path = parsed.path or ""
        if self._proxy is not None and parsed.scheme == "http":
            # A proxy is asked for the whole URL; only through a tunnel the path is enough.
            self._path = self.url
        self._headers = {
            # The zone of an IPv6 address names an interface of this machine: gateways refuse it.
            "host": re.sub(r"%[^\]]*", "", parsed.netloc or ""),
            "accept-encoding": "identity",
            "user-agent": f"splitfed/{__version__}",
            "content-type": BINARY,
        }
        token = os.environ.get(VARIABLE) if token is None else token
        if token is not None:
            self._headers["authorization"] = f"Bearer {_checked_token(token)}"
        positive("timeout", timeout)
        # This form also refuses NaN, with which the tries would never end.
        if not isinstance(patience, int | float) or not patience >= 0:
            raise InputError(f"patience is {patience!r}: expected seconds, 0 for a single try")
        self._timeout = Timeout(connect=min(_CONNECT_SECONDS, timeout), read=timeout)
        self._patience = patience
        self._trusted = trusted(ca_certs)
        self._affinity = Affinity()
        self._lock = threading.Lock()
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._process = 0
        self._met = False

    def __repr__(self) -> str:
        return f"HttpTransport({self.url!r})"

    def status(self) -> dict[str, Any]:
        """Return the status of the run, read from the service's store.

        Raises:
            SplitFedError: what the server raised.
        """
        return self._json(self._request("GET", f"{PREFIX}/status", None, self._patience).memory)

    def ready(self) -> dict[str, Any]:
        """Return what the service says of its readiness; one try.

        Raises:
            UnreachableError: nobody answers, or something else does.
            StoreError: its store doesn't answer.
        """
        return self._json(self._request("GET", "/readyz", None, 0.0).memory)

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    def send(self, verb: str, request: Any, /) -> Any:
        """Return the answer to a request, after as many tries as the patience allows."""
        path, parts = f"{PREFIX}/{verb}", pack(request)
        key = self._affinity.key(verb, request)
        answer = self._request("POST", path, parts, self._patience, key)
        self._affinity.note(verb, request, answer.headers.get(AFFINITY))
        try:
            return unpack(VERBS[verb][1], answer.memory)
        except FormatError as error:
            raise UnreachableError(
                f"{self.url}{PREFIX}/{verb} answered what isn't a splitfed server's: "
                f"is the URL right? ({error})"
            ) from error

    def _json(self, data: memoryview) -> dict[str, Any]:
        try:
            found = json.loads(bytes(data))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UnreachableError(
                f"what answers at {self.url} isn't a splitfed server: is the URL right?"
            )
        return found

    def _request(
        self,
        method: str,
        path: str,
        parts: Body | None,
        patience: float,
        key: str | None = None,
    ) -> Answer:
        """Return the answer, after as many tries as the patience allows."""
        tries = Backoff(growing(_FIRST_PAUSE, 2.0), most=_LAST_PAUSE, within=patience, jitter=True)
        aborted = 0
        while True:
            asked: float | None = None
            try:
                answer = self._exchange(method, path, parts, key)
            except (HTTPError, OSError) as error:
                aborted += isinstance(error, ProtocolError) and not self._met
                if aborted == _ABORTED and self._speaks_tls():
                    raise self._wants_tls() from error
                failure: Exception = self._unreached(error)
                if not is_transient(error, met=self._met):
                    raise failure from error
            else:
                self._met = True
                if answer.status == 200:
                    self._check_encoding(path, answer)
                    return answer
                failure = self._failure(path, answer)
                if answer.status not in RETRIED:
                    raise failure
                asked = retry_after(answer.headers.get("retry-after"))
            if not tries.wait(asked):
                if 0 < aborted < _ABORTED and self._speaks_tls():
                    raise self._wants_tls()
                raise failure
            key = None  # the replica that it leads to may be the one that failed

    def _failure(self, path: str, answer: Answer) -> Exception:
        """The error in an answer; one without an error of ours comes from something else."""
        found = decode_error(bytes(answer.memory))
        if found is not None:
            return found
        text = f"{self.url}{path} answered {answer.status} without being a splitfed server"
        if answer.status == 407 and self._proxy is not None:
            return UnreachableError(
                f"{text}: {self._proxy} asks who you are: http://user:password@host:port"
            )
        if answer.status == 400 and self._speaks_tls():
            return self._wants_tls()
        through = "" if self._proxy is None else f" (it was asked through {self._proxy})"
        return UnreachableError(f"{text}: is the URL right?{through}")

    def _unreached(self, error: Exception) -> UnreachableError:
        """The error of a request that nobody has answered."""
        through = "" if self._proxy is None else f" through {self._proxy}"
        more = advice(error, self._place, self._proxy)
        return UnreachableError(f"{self.url} can't be reached{through}: {reason(error)}{more}")

    def _speaks_tls(self) -> bool:
        """Whether TLS is spoken where plain HTTP wasn't understood."""
        is_plain = self._proxy is None and self._place.scheme == "http"
        return is_plain and speaks_tls(self._place)

    def _wants_tls(self) -> UnreachableError:
        return UnreachableError(
            f"{self.url} doesn't answer plain HTTP, and speaks TLS: "
            f"expected https{self.url[len('http') :]}"
        )

    def _check_encoding(self, path: str, answer: Answer) -> None:
        encoding = answer.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise UnreachableError(
                f"{self.url}{path} answered with content-encoding {encoding!r}, "
                "expected 'identity' as it was asked for: "
                "a proxy in between compresses; turn that off for this path"
            )

    def _exchange(self, method: str, path: str, parts: Body | None, key: str | None) -> Answer:
        """Send a request once and receive its answer."""
        headers = self._headers
        if parts is not None:
            headers = {**headers, "content-length": str(sum(map(len, parts)))}
        if key is not None:
            headers = {**headers, AFFINITY: key}
        # urllib3's types don't know that it passes on whatever body its connections take, and
        # returns whatever answer they give.
        body: Any = parts
        answer: Answer = self._connections().urlopen(  # type: ignore[assignment]
            method,
            self._path + path,
            body=body,
            headers=headers,
            timeout=self._timeout,
            retries=_ONCE,
            redirect=False,
            release_conn=True,
            assert_same_host=False,  # that of a proxy's pool is the proxy
        )
        return answer

    def _connections(self) -> urllib3.HTTPConnectionPool:
        """The pool of this process: a forked child must not write into its parent's sockets."""
        with self._lock:
            if self._pool is None or self._process != os.getpid():
                pool = pool_of(self.url, self._proxy, _CONNECTIONS, self._trusted)
                secure = isinstance(pool, urllib3.HTTPSConnectionPool)
                pool.ConnectionCls = SecureExchange if secure else PlainExchange
                self._pool = pool
                self._process = os.getpid()
            return self._pool


def _checked_token(token: str) -> str:
    # A line end in it could add a header of its own.
    if not _TOKEN.fullmatch(token):
        raise InputError(
            "the token has characters that no token has: expected what 'splitfed token new' printed"
        )
    return token


def _checked_url(url: str) -> str:
    try:
        found = parse_url(url)
    except LocationParseError as error:
        raise InputError(
            f"{url!r} isn't a URL: expected one such as 'https://host:8000'"
        ) from error
    if found.scheme not in ("http", "https") or not found.host or found.query or found.fragment:
        raise InputError(f"{url!r} isn't a service's URL: expected one such as 'https://host:8000'")
    if found.auth:
        # The message leaves out the URL, which has the password.
        raise InputError(
            f"the URL of {found.host} holds a password: "
            "give the token by SplitClient(..., token=...)"
        )
    return url.rstrip("/")
