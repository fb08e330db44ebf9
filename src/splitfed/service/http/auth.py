"""Tokens: which client a request is from, and the check that it touches only that client's ids.

A token is 32 random bytes, so it can't be guessed from its plain SHA-256. The token file has a line
per token, with the client's id and that hash: whoever reads the file learns no token. Comparison is
in constant time over all lines, so that the time tells neither how much of a token was right nor
whose it was; and on bytes, since on text it raises for what isn't ASCII.

A running server sees a changed file at the next request. If it can't be read, in the middle of an
edit for instance, the tokens read before stay valid, and the log says so.

The trap follows from that: a revoked token would stay valid if whoever revokes it made the file
unreadable for the server. So the new file has the mode and the owner of the old one, or nothing is
revoked.
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
from splitfed.protocol.ids import check_client_id

if sys.platform != "win32":
    import fcntl

_HASH = re.compile(r"[0-9a-f]{64}")
_HEAD = "# splitfed tokens: a client's id and the SHA-256 of its token, a line each\n"
_log = logging.getLogger("splitfed.http")

Stamp = tuple[int, int, int]
"""Time of the last change, size and inode: a file with another one is read again."""


class Tokens:
    """The token file of a server.

    Args:
        path: The file.

    Raises:
        InputError: it can't be read, or a line isn't a client's id and a hash.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        # Before the content: if the file changes in between, it is read again.
        self._stamp: Stamp | None = _stamp(self._path)
        self._hashes = _read(self._path)

    def owner(self, authorization: bytes | None) -> str:
        """Return the client whose token an Authorization header has.

        Raises:
            TokenError: it has no token, or one that isn't in the file.
        """
        self._refresh()
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise TokenError(
                "this server needs a token: SplitClient(..., token=...), "
                "or the environment variable SPLITFED_TOKEN"
            )
        sent = hashlib.sha256(token.strip()).hexdigest().encode()
        found: str | None = None
        # Through all lines, also after the right one: the time must not tell which it was.
        for client_id, known in self._hashes:
            if hmac.compare_digest(sent, known):
                found = client_id
        if found is None:
            raise TokenError(
                "this server doesn't know the token: was it revoked, or made for another server?"
            )
        return found

    def _refresh(self) -> None:
        """Read the file again if it has changed."""
        try:
            stamp = _stamp(self._path)
        except InputError as error:
            if self._stamp is not None:  # logged once, not at each request
                _log.error("%s: the tokens read before still count", error)
            self._stamp = None
            return
        if stamp != self._stamp:
            # Set also when reading fails, so that a broken file is logged once.
            self._stamp = stamp
            try:
                self._hashes = _read(self._path)
            except InputError as error:
                _log.error("%s: the tokens read before still count", error)


def check_owner(owner: str | None, client_id: object) -> None:
    """Check that a client touches only its own ids.

    Args:
        owner: The client that the token belongs to; `None` where tokens aren't used.
        client_id: The client that the request is about.

    Raises:
        AccessError: they differ.
    """
    if owner is not None and client_id != owner:
        raise AccessError(
            f"this token is client {owner!r}'s: it may not act as {str(client_id)[:80]!r}"
        )


def new_token(path: Path, client_id: str) -> str:
    """Make a token for a client, and add its hash to the file.

    A file that doesn't exist is created, with mode 0600.

    Raises:
        IdError: the id can't be part of a key.
        InputError: the file can't be written, or isn't a token file.
    """
    check_client_id(client_id)
    token = "sf_" + secrets.token_urlsafe(32)
    line = f"{client_id} {hashlib.sha256(token.encode()).hexdigest()}\n"
    try:
        if path.exists():
            _read(path)
        with _locked(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as descriptor:
            # One write: two commands at the same time append two whole lines.
            os.write(descriptor, (_beginning(descriptor) + line).encode())
    except OSError as error:
        raise InputError(f"the token file {path} can't be written: {error.strerror}") from error
    return token


def _beginning(descriptor: int) -> str:
    """What goes in front of a new line: the file's head, the end of its last line, or nothing."""
    if not os.fstat(descriptor).st_size:
        return _HEAD
    os.lseek(descriptor, -1, os.SEEK_END)
    if os.read(descriptor, 1) == b"\n":
        return ""
    return "\n"  # an editor may leave the last line without an end


def revoke(path: Path, client_id: str) -> int:
    """Remove all tokens of a client from the file, and keep everything else that is in it.

    Returns:
        Number of tokens removed.

    Raises:
        InputError: the file can't be read or written, or the new one can't have the owner of the
            old one.
    """
    _read(path)
    # NFS locks only what is open for writing; but whoever may replace a file needn't be able to.
    flags = os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY
    try:
        with _locked(path, flags):
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.startswith("#") or _client_of(line) != client_id]
            if len(kept) < len(lines):
                _replace(path, "".join(f"{line}\n" for line in kept))
    except OSError as error:
        raise InputError(f"the token file {path} can't be read: {error.strerror}") from error
    return len(lines) - len(kept)


def clients(path: Path) -> list[str]:
    """Return the clients that have a token, sorted.

    Raises:
        InputError: the file can't be read.
    """
    return sorted({name for name, _ in _read(path)})


def _client_of(line: str) -> str:
    return line.strip().partition(" ")[0]


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """Open a token file for one command at a time; Windows has no such locks.

    Without it, of two commands that revoke at once each would keep the other's line, and what is
    added meanwhile would be lost.
    """
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            if sys.platform != "win32":
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Another command may have replaced the file meanwhile: this lock is on the old one.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Replace a file by a new one of the same mode and owner, in one step."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            old_stat = path.stat()
            new_stat = os.fstat(file.fileno())
            # Only root may give a file away, so this isn't attempted where it isn't needed.
            if (old_stat.st_uid, old_stat.st_gid) != (new_stat.st_uid, new_stat.st_gid):
                os.fchown(file.fileno(), old_stat.st_uid, old_stat.st_gid)
            if sys.platform != "win32":
                os.fchmod(file.fileno(), stat.S_IMODE(old_stat.st_mode))
            file.write(text)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise InputError(
            f"the token file {path} can't be replaced by one of the same owner and mode: "
            f"{error.strerror}; nothing was revoked: run this as the file's owner"
        ) from error


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"the token file {path} can't be read: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> list[tuple[str, bytes]]:
    """The clients and hashes of a token file, a line each; a client may have several."""
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
                f"line {number} of the token file {path} isn't a client's id and a SHA-256: "
                f"make lines by 'splitfed token new CLIENT --tokens {path}'"
            )
        found.append((check_client_id(name), known.strip().encode()))
    return found
