"""The way to a service: the proxy in between, the authorities to trust, and what a failure means.

A proxy is taken from the environment, as other tools take it: HTTP_PROXY or HTTPS_PROXY by the
service's scheme, else ALL_PROXY, unless NO_PROXY names the host. https goes through a tunnel, in
which the proxy sees no request; of http it sees all, the token included.

The traps: a proxy's URL may hold a password, so no message shows more than its host. And a proxy of
another machine can't reach this one's loopback, whatever the variables say: it would reach its own.
"""

from __future__ import annotations

import os
import socket
import ssl
import urllib.request
import warnings
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import unquote

import urllib3
from urllib3.exceptions import LocationParseError, ProxyError, SSLError
from urllib3.util import Url, make_headers, parse_url

from splitfed.errors import InputError

_PROBE_SECONDS = 1.5
# What OpenSSL says of an answer that isn't TLS, by its version.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy on the way to a service."""

    url: str
    """Without credentials."""
    variable: str
    """Where it was found."""
    headers: dict[str, str]
    """Its credentials, if it needs some."""

    def __str__(self) -> str:
        return f"the proxy {self.url} ({self.variable})"


def proxy_of(url: Url) -> Proxy | None:
    """The proxy on the way to a service, by the environment; `None` for a direct way.

    Raises:
        InputError: a variable doesn't hold the URL of a proxy.
    """
    host = (url.host or "").strip("[]")
    scheme = url.scheme or "http"
    known = urllib.request.getproxies()
    kind = scheme if scheme in known else "all"
    variable = f"{kind.upper()}_PROXY"
    if kind not in known or _is_exempt(url, host):
        return None
    given = known[kind] if "://" in known[kind] else f"http://{known[kind]}"
    try:
        found = parse_url(given)
    except LocationParseError:
        found = Url()
    if found.scheme is not None and found.scheme.startswith("socks"):
        warnings.warn(
            f"{variable} names a SOCKS proxy, which isn't supported: {host} is reached directly. "
            f"Set NO_PROXY={host} to say that this is meant",
            stacklevel=2,
        )
        return None
    if found.scheme not in ("http", "https") or not found.host:
        raise InputError(
            f"{variable} isn't the URL of a proxy: expected one such as http://proxy:3128, "
            f"or NO_PROXY={host} for a direct way"
        )
    if _is_loopback(host) and not _is_loopback(found.host.strip("[]")):
        return None
    headers = {}
    if found.auth:
        headers = dict(make_headers(proxy_basic_auth=unquote(found.auth)))
    return Proxy(found._replace(auth=None).url, variable, headers)


def _is_exempt(url: Url, host: str) -> bool:
    """Whether NO_PROXY, or what the system has in its place, names a host."""
    place = f"{host}:{url.port}" if url.port and ":" not in host else host
    if urllib.request.proxy_bypass(place):
        return True
    # Networks, which Python's own rule leaves out.
    for entry in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(","):
        with suppress(ValueError):
            if ip_address(host) in ip_network(entry.strip().strip("[]"), strict=False):
                return True
    return False


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def trusted(ca_certs: str | os.PathLike[str] | None) -> dict[str, str]:
    """The authorities to trust, as urllib3 takes them: a file, or a directory by hash.

    Raises:
        InputError: there is no such thing, or no certificate in it.
    """
    if ca_certs is None:
        return {}
    path = os.fspath(ca_certs)
    is_directory = os.path.isdir(path)
    if not is_directory:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except OSError as error:  # ssl.SSLError is one
            raise InputError(
                f"ca_certs={path!r} can't be used: expected a file with the certificates of the "
                f"authorities to trust (PEM), got {error}"
            ) from error
    return {"ca_cert_dir" if is_directory else "ca_certs": path}


def pool_of(url: str, proxy: Proxy | None, size: int, trust: dict[str, str]) -> Any:
    """The pool of connections to a service."""
    options: dict[str, Any] = dict(trust) if url.lower().startswith("https") else {}
    if proxy is None:
        return urllib3.connection_from_url(url, maxsize=size, **options)
    manager = urllib3.ProxyManager(
        proxy.url, proxy_headers=proxy.headers, maxsize=size, **(trust or options)
    )
    return manager.connection_from_url(url)


# ----------------------------------------------------------------------------- what a failure means


def advice(error: BaseException, url: Url, proxy: Proxy | None) -> str:
    """What to do about a failure to reach a service, to be put behind its message; or nothing."""
    if isinstance(error, ProxyError):
        text = f"; NO_PROXY={url.host} goes there without {proxy}"
        if "407" in str(error):
            text += "; it asks who you are: http://user:password@host:port"
        return text
    if not isinstance(error, SSLError):
        return ""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate" in text.lower():
        return (
            "; if a private authority has signed it, name its file by ca_certs=..., "
            "or in SSL_CERT_FILE"
        )
    if any(sign in text.upper().replace(" ", "_") for sign in _NO_TLS):
        return f"; that port doesn't speak TLS: expected http://{url.netloc}"
    return f"; if that port doesn't speak TLS: http://{url.netloc}"


def speaks_tls(url: Url) -> bool:
    """Whether a service that was asked by plain HTTP, and didn't answer it, speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host = (url.host or "").strip("[]")
    try:
        place = (host, url.port or 80)
        with (
            socket.create_connection(place, _PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except ssl.SSLError as error:
        # An alert is an answer in TLS: it may want another version, or a certificate of ours.
        return "ALERT" in str(error).upper()
    except (OSError, ValueError):
        return False
