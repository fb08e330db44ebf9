"""The quickstart over HTTP differs from the one in a process in one argument, and in no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_same
from harness_http import running
from pages import ROOT, blocks, run

import splitfed
from splitfed.service.http.app import make_app

PAGE = ROOT / "docs" / "quickstart.md"
((_, DIFF),) = blocks(ROOT / "docs" / "http.md", "diff")
BEFORE, AFTER = (next(line[1:] for line in DIFF.splitlines() if line[0] == sign) for sign in "-+")


def test_the_page_changes_one_argument() -> None:
    """The line of the quickstart, and the same line with a URL where the server was."""
    assert BEFORE in PAGE.read_text("utf-8")
    assert BEFORE.replace("server", '"http://127.0.0.1:8000"') == AFTER


def test_the_quickstart_over_http_has_the_bits_of_the_one_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways it trains to the same half and the same body."""

    def follow(folder: str, server: str | None) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        code = list(blocks(PAGE, "python"))
        at = next(i for i, (_, text) in enumerate(code) if BEFORE in text)
        for line, text in code[:at]:
            run(text, str(PAGE), line, namespace)
        if server is None:
            for line, text in code[at:]:
                run(text, str(PAGE), line, namespace)
            return namespace
        body, store = namespace["body"], splitfed.GradientStore("runs/quickstart")
        with running(make_app(splitfed.SplitServer(body, store))) as service:
            changed = AFTER.replace(server, service.url)
            for line, text in code[at:]:
                run(text.replace(BEFORE, changed), str(PAGE), line, namespace)
        return namespace

    here, there = follow("process", None), follow("http", "http://127.0.0.1:8000")
    assert type(there["client"]._connection.transport).__name__ == "HttpTransport"
    assert_same(there["client"].state_dict(), here["client"].state_dict())
    assert_same(there["store"].load_weights(), here["store"].load_weights())
    assert there["store"].latest_version() == here["store"].latest_version() > 0
    assert torch.is_grad_enabled()
