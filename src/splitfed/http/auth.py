"""Tokens: who a request is from, and that it touches that client's own ids only.

A token is 32 random bytes, so a plain SHA-256 of it can't be guessed back: the file has a line per token, with the
client's id and that hash, and whoever reads it learns no token. Comparison is in constant time, on bytes (on text it
raises for what isn't ASCII), over all lines, so that time tells neither how much of a token nor whose was right.

A running server sees a changed file at the next request. One that can't be read in the middle of an edit changes
nothing: the last good one counts, and the log says so. So a revoked token would live on if whoever revokes it made the
file unreadable for the server: the new file has the mode and the owner of the old one, or there is none.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitfed.errors import AccessError, InputError, TokenError
from splitfed.ids import check_client_id

if sys.platform != "win32":
    import fcntl

_HASH = re.compile(r"[0-9a-f]{64}")
_HEAD = "# splitfed tokens: a client's id and the SHA-256 of its token, a line each\n"
_log = logging.getLogger("splitfed.http")

Stamp = tuple[int, int, int]


class Tokens:
    """The clients of a token file, by their tokens.

    Args:
        path: The file.

    Raises:
        InputError: it can't be read, or a line isn't one of ours.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._stamp: Stamp | None = _stamp(self._path)
        self._hashes = _read(self._path)

    def owner(self, authorization: bytes | None) -> str:
        """The client whose token an Authorization header bears.

        Raises:
            TokenError: there is none, or nobody has it.
        """
        self._refresh()
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise TokenError(
                "this server needs a token: SplitClient(..., token=...), or the environment variable SPLITFED_TOKEN"
            )
        sent = hashlib.sha256(token.strip()).hexdigest().encode()
        found: str | None = None
        for client_id, known in self._hashes:
            if hmac.compare_digest(sent, known):
                found = client_id
        if found is None:
            raise TokenError("this server doesn't know the token: was it revoked, or made for another server?")
        return found

    def _refresh(self) -> None:
        try:
            stamp = _stamp(self._path)
        except InputError as error:
            if self._stamp is not None:
                _log.error("%s: the tokens read before still count", error)
            self._stamp = None
            return
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._hashes = _read(self._path)
            except InputError as error:
                _log.error("%s: the tokens read before still count", error)


def check_owner(owner: str | None, client_id: object) -> None:
    """Let a client touch only its own ids.

    Args:
        owner: Whose token it is; `None` where tokens aren't used.
        client_id: Whom the request is about.

    Raises:
        AccessError: that is somebody else.
    """
    if owner is not None and client_id != owner:
        raise AccessError(f"this token is client {owner!r}'s: it may not act as {str(client_id)[:80]!r}")


def new_token(path: Path, client_id: str) -> str:
    """Make a token for a client and add its hash to the file, which is begun if it isn't there (mode 0600).

    Raises:
        IdError: the id may not become a key.
        InputError: the file can't be written, or isn't one of tokens.
    """
    check_client_id(client_id)
    token = "sf_" + secrets.token_urlsafe(32)
    line = f"{client_id} {hashlib.sha256(token.encode()).hexdigest()}\n"
    try:
        if path.exists():
            _read(path)
        with _alone(path):
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                head = _HEAD
                if os.fstat(descriptor).st_size:
                    os.lseek(descriptor, -1, os.SEEK_END)
                    head = "" if os.read(descriptor, 1) == b"\n" else "\n"  # an editor may have left that line open
                os.write(descriptor, (head + line).encode())  # one write: two commands at once add two whole lines
            finally:
                os.close(descriptor)
    except OSError as error:
        raise InputError(f"the token file {path} can't be written: {error.strerror}") from error
    return token


def revoke(path: Path, client_id: str) -> int:
    """Remove all tokens of a client from the file, which is replaced as a whole; everything else in it stays.

    Returns:
        How many there were.

    Raises:
        InputError: the file can't be read or written, or the new one can't have the owner of the old one.
    """
    _read(path)
    with _alone(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.startswith("#") or line.strip().partition(" ")[0] != client_id]
        if len(kept) < len(lines):
            _replace(path, "".join(f"{line}\n" for line in kept))
    return len(lines) - len(kept)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one command at a time change a token file; nobody waits on Windows, which has no such locks.

    Without it, of two that revoke at once each would keep the other's line, and what is added meanwhile would be lost.
    """
    if sys.platform == "win32":
        yield
        return
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
        try:
            with suppress(OSError):  # not every file system has it
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # else it was replaced while we waited
                yield
                return
        finally:
            os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Put a new file in the place of one, with its mode and owner."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            was, made = path.stat(), os.fstat(file.fileno())
            if (was.st_uid, was.st_gid) != (made.st_uid, made.st_gid):
                os.fchown(file.fileno(), was.st_uid, was.st_gid)
            if sys.platform != "win32":
                os.fchmod(file.fileno(), stat.S_IMODE(was.st_mode))
            file.write(text)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(
            f"the token file {path} can't be replaced by one of the same owner and mode: {error.strerror}; nothing was "
            "revoked: run this as the file's owner"
        ) from error


def clients(path: Path) -> list[str]:
    """The clients that have a token, in order.

    Raises:
        InputError: the file can't be read.
    """
    return sorted({name for name, _ in _read(path)})


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"the token file {path} can't be read: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> list[tuple[str, bytes]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token file {path} can't be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, known = line.strip().partition(" ")
        if not _HASH.fullmatch(known.strip()):
            raise InputError(
                f"line {number} of the token file {path} isn't a client's id and a SHA-256: make lines by "
                f"'splitfed token new CLIENT --tokens {path}'"
            )
        found.append((check_client_id(name), known.strip().encode()))
    return found
