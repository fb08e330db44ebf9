"""`splitfed token`: made once, listed, revoked."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfed.cli.command import main
from splitfed.service.http.auth import Tokens


def test_a_token_goes_to_standard_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a shell can take it; the file knows whose it is."""
    file = str(tmp_path / "tokens")
    assert main(["token", "new", "hospital-a", "--tokens", file]) == 0
    out, err = capsys.readouterr()
    assert Tokens(file).owner(f"Bearer {out.strip()}".encode()) == "hospital-a"
    assert out.count("\n") == 1
    assert "hospital-a" in err
    assert out.strip() not in err


def test_clients_are_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One client's tokens go, the others' stay; who has none is told."""
    file = str(tmp_path / "tokens")
    for name in ("b", "a", "b"):
        main(["token", "new", name, "--tokens", file])
    capsys.readouterr()
    assert main(["token", "list", "--tokens", file]) == 0
    assert capsys.readouterr().out == "a\nb\n"
    assert main(["token", "revoke", "b", "--tokens", file]) == 0
    assert "2 of client 'b' revoked" in capsys.readouterr().err
    assert main(["token", "revoke", "b", "--tokens", file]) == 2
    assert "has no token" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["new", "../a"], ["new"], [], ["revoke", "a"], ["list"]])
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Exit status 2."""
    given = ["--tokens", str(tmp_path / "tokens")] if arguments else []
    assert main(["token", *arguments, *given]) == 2
    assert capsys.readouterr().err.count("\n") == 1
