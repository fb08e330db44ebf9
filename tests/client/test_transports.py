"""A URL or a server object: one door for both."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness_requests import Site
from torch import nn

import splitfed
from splitfed.client.transports import as_transport, open_transport
from splitfed.errors import InputError


def half() -> nn.Module:
    """A bottom and its cut."""
    return nn.Sequential(nn.Linear(2, 2), splitfed.CutPoint())


def test_http_and_https_lead_to_the_http_transport() -> None:
    """With its options; nothing is sent."""
    for url in ("http://127.0.0.1:1", "HTTPS://host:8000"):
        found = open_transport(url, client_id="a", token="sf_x", timeout=3.0, patience=1.0)
        assert repr(found) == f"HttpTransport({url!r})"


def test_any_other_scheme_leads_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the client's id, which its keys need."""
    given: list[Any] = []
    module = ModuleType("splitfed.service.mailbox.client")
    module.connect = lambda url, **options: given.append((url, options)) or "it"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "splitfed.service.mailbox.client", module)
    assert open_transport("s3://bucket/run", client_id="a", timeout=1.0) == "it"
    assert given == [("s3://bucket/run", {"client_id": "a", "token": None, "timeout": 1.0})]


@pytest.mark.parametrize("server", ["host:8000", "", "://", 8000, None])
def test_what_is_neither_is_refused(server: Any) -> None:
    """With what is expected."""
    with pytest.raises(InputError, match="expected a"):
        splitfed.SplitClient(half(), server, "a")


def test_options_that_don_t_fit_are_told() -> None:
    """Of a URL by name; for a server object there are none."""
    with pytest.raises(InputError, match="timeot"):
        splitfed.SplitClient(half(), "http://host", "a", timeot=3)
    site = Site("memory://transports")
    with pytest.raises(InputError, match="only a server given as a URL takes options"):
        splitfed.SplitClient(half(), site.server, "a", token="sf_x")
    assert as_transport(site.server, "a", None, {}) is site.server


def test_what_isn_t_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how to get it."""
    monkeypatch.setitem(sys.modules, "urllib3", None)
    monkeypatch.delitem(sys.modules, "splitfed.service.http.client", raising=False)
    with pytest.raises(InputError, match=r'needs urllib3: pip install "\.\[http\]" in a clone'):
        open_transport("http://host", client_id="a")


def test_a_path_is_not_a_url(tmp_path: Path) -> None:
    """A folder is a store only as file://."""
    with pytest.raises(InputError, match="or a URL such as"):
        splitfed.SplitClient(half(), str(tmp_path), "a")
