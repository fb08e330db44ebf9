"""Tokens: hashed at rest, checked as bytes, bound to a client, revoked without a restart."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splitfed.errors import AccessError, IdError, InputError, TokenError
from splitfed.service.http import auth
from splitfed.service.http.auth import Tokens, check_owner, clients, new_token, revoke


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a token file may be made."""
    return tmp_path / "tokens"


def test_a_token_is_its_client_s(file: Path) -> None:
    """Several clients, several tokens of one: each leads to its own."""
    made = {new_token(file, name): name for name in ("a", "b", "a")}
    assert len(made) == 3
    tokens = Tokens(file)
    for token, name in made.items():
        assert tokens.owner(f"Bearer {token}".encode()) == name
        assert tokens.owner(f"bearer  {token} ".encode()) == name
    assert clients(file) == ["a", "b"]


def test_the_file_has_hashes_and_is_the_owner_s_alone(file: Path) -> None:
    """Who reads it learns no token."""
    token = new_token(file, "a")
    text = file.read_text()
    assert token not in text
    assert text.splitlines()[-1] == f"a {hashlib.sha256(token.encode()).hexdigest()}"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "sent",
    [None, b"", b"Bearer", b"Bearer ", b"Basic YTpi", b"Bearer x", "Bearer kö".encode(), b"Bearer \xff\x00", b"\xff"],
)
def test_what_isn_t_a_token_is_a_token_error(file: Path, sent: bytes | None) -> None:
    """Bytes of any kind: nothing raises but that."""
    new_token(file, "a")
    with pytest.raises(TokenError):
        Tokens(file).owner(sent)


def test_every_line_is_compared_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three as well as none: three comparisons, on bytes."""
    first, _, _ = (new_token(file, name) for name in ("a", "b", "c"))
    tokens, compared, compare = Tokens(file), list[bool](), hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(type(one) is type(other) is bytes)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    assert tokens.owner(f"Bearer {first}".encode()) == "a"
    with pytest.raises(TokenError):
        tokens.owner(b"Bearer wrong")
    assert compared == [True] * 6


def test_a_running_server_sees_new_and_revoked_tokens(file: Path) -> None:
    """At its next request."""
    token = new_token(file, "a")
    tokens = Tokens(file)
    other = new_token(file, "b")
    assert tokens.owner(f"Bearer {other}".encode()) == "b"
    assert revoke(file, "a") == 1
    with pytest.raises(TokenError):
        tokens.owner(f"Bearer {token}".encode())
    assert tokens.owner(f"Bearer {other}".encode()) == "b"
    assert revoke(file, "a") == 0
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_breaks_leaves_the_last_good_tokens_and_says_so_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An edit that isn't finished locks nobody out; when it is, it counts."""
    token = new_token(file, "a")
    good, tokens = file.read_text(), Tokens(file)
    file.write_text("nonsense")
    for _ in range(3):
        assert tokens.owner(f"Bearer {token}".encode()) == "a"
    file.unlink()
    assert tokens.owner(f"Bearer {token}".encode()) == "a"
    assert caplog.text.count("still count") == 2
    file.write_text(good)
    other = new_token(file, "b")
    assert tokens.owner(f"Bearer {other}".encode()) == "b"


@pytest.mark.parametrize("text", ["a", "a 123", "a " + "g" * 64, "../a " + "0" * 64, "\ud800"])
def test_a_file_of_something_else_is_refused(file: Path, text: str) -> None:
    """Neither read nor added to."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError):
        Tokens(file)
    with pytest.raises(InputError):
        new_token(file, "a")
    assert file.read_bytes() == text.encode("utf-8", "surrogatepass")


def test_a_file_that_isn_t_there_or_can_t_be_written_is_told(tmp_path: Path) -> None:
    """With its path."""
    for call in (Tokens, clients, lambda path: revoke(path, "a")):
        with pytest.raises(InputError, match="nowhere"):
            call(tmp_path / "nowhere" / "tokens")  # type: ignore[operator]
    with pytest.raises(InputError, match="can't be written"):
        new_token(tmp_path / "nowhere" / "tokens", "a")
    with pytest.raises(IdError):
        new_token(tmp_path / "tokens", "../a")
    assert not os.listdir(tmp_path)


def test_comments_and_empty_lines_are_skipped(file: Path) -> None:
    """As people write them."""
    token = new_token(file, "a")
    file.write_text("# ours\n\n" + file.read_text() + "\n# end\n")
    assert Tokens(file).owner(f"Bearer {token}".encode()) == "a"


def test_a_client_touches_its_own_ids_only() -> None:
    """Without tokens anybody may; ids of any kind are compared."""
    check_owner(None, "b")
    check_owner("a", "a")
    for other in ("b", "A", None, 3, ["a"]):
        with pytest.raises(AccessError, match="client 'a'"):
            check_owner("a", other)


def test_revoking_keeps_mode_comments_and_other_lines(file: Path) -> None:
    """A server of the file's group reads it as before, and sees what was revoked."""
    new_token(file, "a")
    other = new_token(file, "b")
    file.write_text("# ours\n\n" + file.read_text() + "# end\n")
    lines = file.read_text().splitlines()
    file.chmod(0o640)
    assert revoke(file, "a") == 1
    assert file.stat().st_mode & 0o777 == 0o640
    assert file.read_text().splitlines() == [line for line in lines if not line.startswith("a ")]
    assert Tokens(file).owner(f"Bearer {other}".encode()) == "b"


def test_revoking_keeps_the_owner_or_revokes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root revokes in a server's file; who may not leave it to the server is told so, and the file stays."""
    new_token(file, "a")
    before, found = file.read_bytes(), list[tuple[int, int]]()
    mine, true = file.stat(), os.fstat

    def made(descriptor: int) -> os.stat_result:
        result = list(true(descriptor))
        result[stat.ST_UID] = mine.st_uid + 1
        return os.stat_result(result)

    def refuse(descriptor: int, user: int, group: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fstat", made)
    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(InputError, match="nothing was revoked: run this as the file's owner"):
        revoke(file, "a")
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
    monkeypatch.setattr(os, "fchown", lambda descriptor, user, group: found.append((user, group)))
    assert revoke(file, "a") == 1
    assert found == [(mine.st_uid, mine.st_gid)]


def test_a_token_goes_on_a_line_of_its_own(file: Path) -> None:
    """Also where an editor has left the last line without an end."""
    first = new_token(file, "a")
    file.write_text(file.read_text().rstrip("\n"))
    second = new_token(file, "b")
    tokens = Tokens(file)
    assert [tokens.owner(f"Bearer {token}".encode()) for token in (first, second)] == ["a", "b"]
    assert file.read_text().count("\n") == 3


@pytest.mark.skipif(os.name == "nt", reason="files have no such locks there")
def test_commands_at_once_undo_nothing_of_each_other(file: Path) -> None:
    """Of eight clients half are revoked and others added, all at the same time: each has happened."""
    for name in "abcdefgh":
        new_token(file, name)
    together = threading.Barrier(8)

    def change(name: str) -> None:
        together.wait(60)
        if name in "abcd":
            revoke(file, name)
        else:
            new_token(file, name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, "abcdwxyz"))
    assert clients(file) == list("efghwxyz")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_that_vanishes_under_a_revocation_is_not_made_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one would tell a running server that nobody may come in."""
    new_token(file, "a")
    monkeypatch.setattr(auth, "_read", lambda path: path.unlink())
    with pytest.raises(InputError, match="can't be read"):
        revoke(file, "a")
    assert not file.exists()
