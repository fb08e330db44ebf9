"""The crew of worker processes of this machine.

A worker executes one task at a time until its pipe is closed. It is started afresh (spawn) and not
forked: a fork copies torch's thread pools in whatever state they are. Its setup is sent once it
says that it is there: it may be large, and workers would be started one after another.

The trap: a script that starts worker processes is imported by each of them, so its own work must
stand below `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from splitfed.simulation.engines.host import Host
from splitfed.simulation.engines.pool import Death

SHUTDOWN_SECONDS = 10.0
"""How long a worker process may take to end by itself."""
_HELLO = b"setup?"
"""What a worker process says first; no answer is these bytes."""


class ProcessCrew:
    """Worker processes, as a `Crew`.

    Args:
        workers: How many.
    """

    def __init__(self, workers: int) -> None:
        self._size = workers
        self._setup = b""
        self._running: dict[int, tuple[BaseProcess, Connection]] = {}
        self._unheard: set[int] = set()
        """Those that have said nothing yet."""

    def open(self, setup: bytes) -> int:
        """Get ready to start workers with this setup; returns how many there may be."""
        self._setup = setup
        return self._size

    def start(self, number: int) -> None:
        """Start a worker."""
        context = multiprocessing.get_context("spawn")
        pipe, far_end = context.Pipe()
        process = context.Process(
            target=worker_main, args=(far_end,), daemon=True, name=f"splitfed-worker-{number}"
        )
        process.start()
        # Were it left open here, this process would never read the end of a worker that dies.
        far_end.close()
        self._running[number] = (process, pipe)
        self._unheard.add(number)

    def give(self, number: int, task: bytes) -> None:
        """Give a worker a task."""
        with contextlib.suppress(OSError):
            self._running[number][1].send_bytes(task)

    def take(self) -> list[tuple[int, bytes | Death]]:
        """Wait for answers and deaths."""
        numbers = {pipe: number for number, (_, pipe) in self._running.items()}
        found: list[tuple[int, bytes | Death]] = []
        for pipe in wait(list(numbers)):
            number = numbers[pipe]  # type: ignore[index]
            try:
                answer = self._running[number][1].recv_bytes()
            except (EOFError, OSError):
                found.append((number, self._death(number)))
                continue
            self._unheard.discard(number)
            if answer == _HELLO:
                self.give(number, self._setup)
            else:
                found.append((number, answer))
        return found

    def stop(self) -> None:
        """End the processes: first by closing their pipes, then by a signal."""
        for _, pipe in self._running.values():
            pipe.close()
        for process, _ in self._running.values():
            process.join(SHUTDOWN_SECONDS)
            process.terminate()
            process.join()
        self._running.clear()

    def _death(self, number: int) -> Death:
        """How a process has died whose pipe has closed."""
        process, pipe = self._running.pop(number)
        pipe.close()
        # Its pipe closes a moment before there is an exit code.
        process.join(SHUTDOWN_SECONDS)
        code = process.exitcode
        if number in self._unheard and code is not None and code > 0:
            return Death(
                f"exit code {code}: the script's own work must stand below "
                '`if __name__ == "__main__":`',
                is_final=True,
            )
        return Death(f"exit code {code}")


def worker_main(pipe: Connection) -> None:
    """The loop of a worker process: receive the setup, then execute tasks until the pipe closes."""
    # Bytes, and not what `Connection.send` makes: once torch is imported, that passes tensors in
    # shared memory, of which a container may have little.
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(_HELLO)
        host = Host(pipe.recv_bytes())
        pipe.send_bytes(host.begin())
        while True:
            pipe.send_bytes(host.execute(pipe.recv_bytes()))
