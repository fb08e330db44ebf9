"""Programs in processes of their own that needn't import torch first, which takes two seconds of CPU each time.

They are forked from the fork server of `processes`, which has imported torch and most of the package. What the shell
gives a program is given to them too: arguments, folder, environment, standard output and errors, warnings as errors,
an exit status. The interpreter alone isn't new; a test that is about its start, or about what an import brings, starts
one.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from processes import CONTEXT

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Ended:
    """What a program leaves, by the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """One that runs.

    Args:
        process: Its process.
        stdout: What it prints.
        errors: The file of its standard error.
    """

    def __init__(self, process: Any, stdout: Connection, errors: Path) -> None:
        self._process = process
        self._errors = errors
        self.stdout = os.fdopen(os.dup(stdout.fileno()))

    @property
    def pid(self) -> int:
        """The number of its process."""
        return int(self._process.pid)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> Ended:
        """Wait until it has ended, so many seconds at most once it prints no more."""
        printed = self.stdout.read()
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it didn't end in {timeout} seconds"
        return Ended(self._process.exitcode, printed, self._errors.read_text())

    def end(self) -> None:
        """Kill it, if it still runs."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()
        self.stdout.close()


@contextmanager
def program(
    main: Callable[..., Any],
    *arguments: Any,
    folder: Path | None = None,
    environment: Mapping[str, str] = NOTHING,
    strict: bool = False,
) -> Iterator[Program]:
    """Run a function as the main function of a process until the end of the block.

    Args:
        main: The function; what it returns is the exit status, as it is of `sys.exit`.
        arguments: Its arguments.
        folder: The folder that the process is in; that of the test if it isn't given.
        environment: Variables that it has besides those of the test.
        strict: Whether warnings are errors.
    """
    own = Path(tempfile.mkdtemp(prefix="sf"))
    reading, writing = CONTEXT.Pipe(duplex=False)
    place = os.fspath(folder or Path.cwd())
    variables = {**os.environ, **environment}
    process = CONTEXT.Process(target=_become, args=(writing, own / "errors", place, variables, strict, main, arguments))
    try:
        process.start()
        writing.close()
        running = Program(process, reading, own / "errors")
        try:
            yield running
        finally:
            running.end()
    finally:
        reading.close()
        shutil.rmtree(own)


def run(main: Callable[..., Any], *arguments: Any, **settings: Any) -> Ended:
    """Run a function as the main function of a process, to its end; arguments as of `program`."""
    with program(main, *arguments, **settings) as running:
        return running.communicate()


def script(path: Path, *arguments: object) -> None:
    """The main function of a process that runs a script, as `python PATH ARGUMENTS` does.

    Coverage counts no lines in it: that would take half of its time, and other tests count those of the package.
    """
    counter = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    if counter is not None:
        counter.stop()
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def code(text: str, without: Sequence[str] = ()) -> None:
    """The main function of a process that runs code, as `python -c` does.

    Args:
        text: The code.
        without: Packages that aren't imported yet, whatever the fork server has.
    """
    for name in list(sys.modules):
        if name.partition(".")[0] in without:
            del sys.modules[name]
    sys.argv = ["-c"]
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def command(*words: object) -> int:
    """The main function of a process that is one of our commands."""
    from splitfed.cli.command import main

    sys.argv = ["splitfed", *map(str, words)]
    return main(list(map(str, words)))


def _become(
    writing: Connection,
    errors: Path,
    folder: str,
    variables: Mapping[str, str],
    strict: bool,
    main: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """What a shell and an interpreter do before a program begins."""
    os.dup2(writing.fileno(), 1)
    writing.close()
    with open(errors, "wb") as file:
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    with warnings.catch_warnings():  # for the program alone: what measures it may warn behind its end
        if strict:
            warnings.simplefilter("error")
        status = main(*arguments)
    raise SystemExit(status)
