"""The way to a service: proxies of the environment, private authorities, and the wrong one of http and https."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness_http import answer, running, scripted
from harness_requests import Site
from proxy import proxying
from urllib3.util import parse_url

from splitfed.cli.command import main
from splitfed.errors import InputError, UnreachableError
from splitfed.protocol.messages import PullRequest
from splitfed.service.http.app import make_app
from splitfed.service.http.client import HttpTransport
from splitfed.service.http.route import proxy_of

ASK = PullRequest("a")
openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl, for a certificate")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and authorities of the machine's."""
    for kind in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{kind}_proxy", raising=False)
        monkeypatch.delenv(f"{kind}_proxy".upper(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SPLITFED_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The files of a private authority's certificate for this machine and `split.inside`, and of its key."""
    place = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:split.inside,DNS:localhost,IP:127.0.0.1"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=split", "-addext", names),
            *("-keyout", str(place / "key.pem"), "-out", str(place / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return str(place / "cert.pem"), str(place / "key.pem")


@pytest.fixture
def plain() -> Iterator[int]:
    """The port of a service over HTTP."""
    with running(make_app(Site("memory://plain").server)) as service:
        yield service.address[1]


@pytest.fixture
def secure(certificate: tuple[str, str]) -> Iterator[int]:
    """The port of a service over HTTPS."""
    chain, key = certificate
    with running(make_app(Site("memory://secure").server), ssl_certfile=chain, ssl_keyfile=key) as service:
        yield service.address[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "split.inside"])
def test_http_goes_through_the_proxy_of_the_environment(plain: int, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request names the whole URL, and the name is the proxy's to resolve; the connection is kept open."""
    with proxying() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        transport = HttpTransport(f"http://{host}:{plain}")
        for _ in range(2):
            assert transport.pull(ASK).version == -1
        transport.close()
        assert transport.status()["lineages"]
        assert proxy.line() == f"POST http://{host}:{plain}/v1/pull HTTP/1.1 False"
        assert proxy.line() == f"GET http://{host}:{plain}/v1/status HTTP/1.1 False"


@openssl
def test_https_goes_through_a_tunnel(
    secure: int, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy is asked for a host and port, and learns its password and nothing else."""
    with proxying(password=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"site:secret@127.0.0.1:{proxy.port}")
        transport = HttpTransport(f"https://split.inside:{secure}", ca_certs=Path(certificate[0]))
        assert transport.pull(ASK).version == -1
        assert transport.ready()["status"] == "ready"
        assert re.fullmatch(rf"CONNECT split.inside:{secure} HTTP/1.[01] True", proxy.line())


@openssl
def test_a_proxy_that_refuses_is_named_and_its_password_is_not(
    plain: int, secure: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, with the variable, and what to do: a password, or NO_PROXY."""
    with proxying(password=True) as proxy:
        for kind, port in (("HTTP", plain), ("HTTPS", secure)):
            monkeypatch.setenv(f"{kind}_PROXY", f"http://site:wrong@127.0.0.1:{proxy.port}")
            with pytest.raises(UnreachableError, match=rf"407.*{kind}_PROXY.*user:password@") as caught:
                HttpTransport(f"{kind.lower()}://127.0.0.1:{port}").pull(ASK)
            assert "wrong" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_told_at_once(plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And NO_PROXY goes past it."""
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match=r"127.0.0.1:9 \(ALL_PROXY\).*NO_PROXY=127.0.0.1 goes there"):
        HttpTransport(f"http://127.0.0.1:{plain}").pull(ASK)
    assert time.monotonic() - begun < 30
    monkeypatch.setenv("NO_PROXY", "other.host, 127.0.0.0/8")
    assert HttpTransport(f"http://127.0.0.1:{plain}").pull(ASK).version == -1


@pytest.mark.parametrize(
    ("url", "exempt", "proxied"),
    [
        ("http://far.example:8000", "", True),
        ("http://far.example:8000", "example", False),
        ("http://far.example:8000", "near.example", True),
        ("http://far.example:8000", "far.example:8000", False),
        ("http://10.1.2.3", "10.0.0.0/8", False),
        ("http://10.1.2.3", "not/a/network", True),
        ("http://[fd00::1]:80", "fd00::/8", False),
        ("http://far.example", "*", False),
        ("https://far.example", "", False),
        # Its own loopback is what a proxy elsewhere would reach.
        ("http://localhost:8000", "", False),
        ("http://127.0.0.1:8000", "", False),
    ],
)
def test_which_hosts_a_proxy_is_for(url: str, exempt: str, proxied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scheme of the service, and by NO_PROXY: names with all beneath them, ports, networks."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", exempt)
    found = proxy_of(parse_url(url))
    assert (found is not None) == proxied
    assert found is None or str(found) == "the proxy http://proxy.example:3128 (HTTP_PROXY)"


@pytest.mark.parametrize("value", ["ftp://x:1", "http://", "http://[", "http://x:port"])
def test_a_variable_that_names_no_proxy_is_told(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, when the client is made."""
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(InputError, match=r"HTTP_PROXY isn't the URL of a proxy.*NO_PROXY=far.example"):
        HttpTransport("http://far.example")


def test_a_socks_proxy_is_told_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, that NO_PROXY ends."""
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1080")
    with pytest.warns(UserWarning, match="SOCKS.*NO_PROXY=far.example"):
        assert proxy_of(parse_url("http://far.example")) is None
    monkeypatch.setenv("NO_PROXY", "far.example")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert proxy_of(parse_url("http://far.example")) is None


@openssl
def test_a_private_authority(secure: int, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by `ca_certs` or SSL_CERT_FILE; without, the error says so."""
    url = f"https://127.0.0.1:{secure}"
    with pytest.raises(UnreachableError, match=r"CERTIFICATE_VERIFY_FAILED.*ca_certs=.*SSL_CERT_FILE"):
        HttpTransport(url).pull(ASK)
    assert HttpTransport(url, ca_certs=certificate[0]).pull(ASK).version == -1
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    assert HttpTransport(url).pull(ASK).version == -1


@openssl
def test_authorities_of_a_directory(secure: int, certificate: tuple[str, str], tmp_path: Path) -> None:
    """By hash, as OpenSSL has them."""
    shutil.copy(certificate[0], tmp_path / "one.pem")
    subprocess.run(["openssl", "rehash", str(tmp_path)], check=True, capture_output=True)
    assert HttpTransport(f"https://127.0.0.1:{secure}", ca_certs=tmp_path).pull(ASK).version == -1


def test_authorities_that_are_none_are_told(tmp_path: Path) -> None:
    """When the client is made, not at its first request."""
    (tmp_path / "empty.pem").write_text("no certificate")
    for name in ("absent.pem", "empty.pem"):
        with pytest.raises(InputError, match=rf"ca_certs='.*{name}' can't be used.*PEM"):
            HttpTransport("https://far.example", ca_certs=str(tmp_path / name))


@openssl
@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_plain_http_at_a_port_of_tls(secure: int, patience: float) -> None:
    """The error says https, whether it was tried once or a minute could be waited."""
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match=rf"speaks TLS: expected https://127.0.0.1:{secure}$"):
        HttpTransport(f"http://127.0.0.1:{secure}", patience=patience).pull(ASK)
    assert time.monotonic() - begun < 30


@openssl
def test_doctor_says_https(secure: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As the transport does."""
    assert main(["doctor", "--server", f"http://127.0.0.1:{secure}"]) == 1
    assert f"expected https://127.0.0.1:{secure}" in capsys.readouterr().out


def test_tls_at_a_port_of_plain_http(plain: int) -> None:
    """The error says http."""
    with pytest.raises(UnreachableError, match=rf"doesn't speak TLS: expected http://127.0.0.1:{plain}$"):
        HttpTransport(f"https://127.0.0.1:{plain}").pull(ASK)


def test_an_answer_of_400_that_is_not_about_tls() -> None:
    """It is another service: nothing is said of TLS."""
    script = scripted(answer(400, b"<html>bad</html>"))
    with script as (url, _), pytest.raises(UnreachableError, match=r"answered 400.*is the URL right"):
        HttpTransport(url).pull(ASK)
