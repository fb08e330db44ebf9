"""All of the example on one machine: splitfed's server and accumulator, Flower's SuperLink and SuperNodes, and a run.

    python run.py
    python run.py --at-least 0.85    # as CI does: fails where the last round is below

Nothing that it starts is left behind, and Flower's own settings (~/.flwr) aren't touched.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SECONDS = 600.0
CONNECTION = """\
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def running(log: Path, environment: dict[str, str], *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of this environment, with all that it starts, until the end of the block."""
    with log.open("wb") as file:
        program = [str(BIN / words[0]), *words[1:]]
        process = subprocess.Popen(program, cwd=HERE, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            os.killpg(process.pid, signal.SIGKILL)  # what it has started may still run
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once a URL answers.

    Raises:
        RuntimeError: the process has ended, or it takes too long; with the end of its log.
    """
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"nothing answers at {url}: {log.read_text(errors='replace')[-3000:]}")


def run(folder: Path, owners: int) -> str:
    """Train by Flower, and return what the app has printed."""
    served, linked, *nodes = free_ports(2 + owners)
    home = folder / "flower"
    home.mkdir()
    (home / "config.toml").write_text(CONNECTION.format(port=linked))
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    body = ("split_digits.task:body", "--store", str(folder / "store"), "--sync", "process")
    accumulate = ("--optimizer", "Adam", "--lr", "0.005", "--min-batches", "2", "--max-batches", "2", "--poll", "0.05")
    link = ("--insecure", "--disable-runtime-dependency-installation", "--port", str(linked))
    with ExitStack() as stack:
        log = folder / "accumulate.log"
        stack.enter_context(running(log, environment, "splitfed", "accumulate", *body, *accumulate))
        log = folder / "serve.log"
        server = stack.enter_context(running(log, environment, "splitfed", "serve", *body, "--port", str(served)))
        wait_for(f"http://127.0.0.1:{served}/readyz", server, log)
        log = folder / "superlink.log"
        superlink = stack.enter_context(running(log, environment, "flower-superlink", *link))
        wait_for(f"http://127.0.0.1:{linked}/health", superlink, log)
        for number, port in enumerate(nodes):
            which = ("--node-config", f"partition-id={number} num-partitions={owners}", "--port", str(port))
            at = ("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{linked}")
            stack.enter_context(running(folder / f"supernode-{number}.log", environment, *at, *which))
        words = [str(BIN / "flwr"), "run", ".", "--stream", "--run-config", f'server="http://127.0.0.1:{served}"']
        done = subprocess.run(
            words, cwd=HERE, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    return done.stdout + done.stderr


def main() -> None:
    """Read the arguments, run, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, default=3, help="data owners, of whom Flower samples some (default: 3)")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="X", help="accuracy after the last round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        printed = run(Path(folder), arguments.owners)
    lines = [line for line in printed.splitlines() if re.match(r"round \d+: accuracy ", line)]
    print("\n".join(lines or [printed]))
    if not lines or float(lines[-1].split()[-1]) < arguments.at_least:
        sys.exit(f"{printed}\nexpected an accuracy of at least {arguments.at_least} after the last round")


if __name__ == "__main__":
    main()
