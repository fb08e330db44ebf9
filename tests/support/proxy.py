"""A forward proxy, as a site's only way out: a process that tunnels by CONNECT and forwards plain HTTP.

Run as a script it prints its port, and then a line for each request: its request line, and whether it had a password.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

USER = b"c2l0ZTpzZWNyZXQ="  # site:secret
REFUSED = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Proxy:
    """A proxy's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = int(self.line())

    def line(self) -> str:
        """The next line that it has printed."""
        assert self._process.stdout
        return self._process.stdout.readline().strip()


@contextmanager
def proxying(*, password: bool = False) -> Iterator[Proxy]:
    """A proxy while the block runs, one that asks for a password or not."""
    command = [sys.executable, "-S", __file__, *(["password"] if password else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Proxy(process)
        finally:
            process.kill()


def _relay(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _serve(stream: socket.socket, password: bool) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += stream.recv(1 << 16)
    line = data.split(b"\r\n")[0].decode()
    known = USER in data
    sys.stdout.write(f"{line} {known}\n")
    sys.stdout.flush()
    if password and not known:
        stream.sendall(REFUSED)
        stream.close()
        return
    method, target, _ = line.split()
    host, port = re.fullmatch(r"(?:http://)?([^:/]+):(\d+).*", target).groups()  # type: ignore[union-attr]
    # Only the proxy knows this name, as that of a network behind it.
    place = ("127.0.0.1" if host == "split.inside" else host, int(port))
    with socket.create_connection(place) as upstream:
        if method == "CONNECT":
            stream.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            upstream.sendall(data.replace(f"http://{host}:{port}".encode(), b"", 1))
        back = threading.Thread(target=_relay, args=(upstream, stream))
        back.start()
        _relay(stream, upstream)
        back.join()


def _main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        print(bound.getsockname()[1], flush=True)
        while True:
            stream, _ = bound.accept()
            threading.Thread(target=_serve, args=(stream, "password" in sys.argv), daemon=True).start()


if __name__ == "__main__":
    _main()
