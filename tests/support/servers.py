"""Real object stores as fixtures: each a process of its own on a free port, started when a test first asks for it.

`seaweed` is a real S3 server and `moto` an emulator that honours conditional writes; `ignoring` is moto behind a door
that drops the condition, as some emulators and proxies do; `azurite` is Azure's own emulator, by npm.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from splitfed.store.store import GradientStore

KEY, SECRET, REGION, BUCKET = "splitfed-key", "splitfed-secret", "us-east-1", "splitfed"
START_SECONDS = 60.0
COUNTING = "COVERAGE_PROCESS_CONFIG"
"""Has coverage count lines in each process that inherits it, ours or not."""
# Moto as WSGI, with the header that makes a create conditional left out if so asked. It looks for the key and writes it
# in two steps, so that two of its threads may both win: the lock makes one step of them, as they are on a real server.
EMULATOR = """
import sys
import threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
app = DomainDispatcherApplication(create_backend_app)
one_at_a_time = threading.Lock()
def door(environ, start_response):
    if sys.argv[2] == "ignore":
        environ.pop("HTTP_IF_NONE_MATCH", None)
    with one_at_a_time:
        return app(environ, start_response)
make_server("127.0.0.1", int(sys.argv[1]), door, threaded=True).serve_forever()
"""


_KEPT = ExitStack()
atexit.register(_KEPT.close)


@dataclass(frozen=True)
class Place:
    """An object store under test."""

    endpoint: str
    root: str
    """The URL of its bucket."""
    options: Mapping[str, Any]
    """Keywords for `GradientStore` and `open_blobs`."""
    environment: Mapping[str, str]
    """The same for child processes, which then need no options."""

    def url(self, name: str = "") -> str:
        """The URL of a fresh, empty store."""
        return f"{self.root}/{name or 'run'}-{uuid.uuid4().hex[:12]}"

    def store(self, url: str = "") -> GradientStore:
        """Open a store here: a fresh one unless `url` says which."""
        from splitfed.store.store import (
            GradientStore,  # brings torch, which the process that only deals out tests needn't
        )

        return GradientStore(url or self.url(), **self.options)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on.

    Linux gives them to nobody else while this process lives: a socket that is bound and doesn't listen keeps the port
    from all but who asks for it by its number, as the server does that it is meant for. Else a port would be anybody's
    until that server has started, and a connection on its way out may be given it.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            if sys.platform == "linux":
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        if sys.platform == "linux":
            _KEPT.enter_context(stack.pop_all())
        return [each.getsockname()[1] for each in sockets]


def unmeasured() -> dict[str, str]:
    """The environment for processes in which coverage needn't count lines, at up to half their speed."""
    return {name: value for name, value in os.environ.items() if name != COUNTING}


@contextmanager
def running(command: list[str], endpoint: str, folder: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, from its first answer until the end of the block."""
    with open(f"{folder}/log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder, env=unmeasured()
        )
    try:
        await_answer(process, endpoint, Path(folder, "log"))
        yield process
    finally:
        process.kill()  # nothing of it is kept, and some servers take ten seconds to say goodbye
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def await_answer(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """Return once a server answers HTTP, whatever it says."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)  # nobody listens yet, and there is nothing else to wait on
    raise AssertionError(f"{process.args} didn't answer at {endpoint}: {log.read_text(errors='replace')[-2000:]}")


def s3_place(endpoint: str) -> Place:
    """An S3 server's bucket, which is made here."""
    from botocore.session import get_session  # s3fs brings it

    client = {"endpoint_url": endpoint, "aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    s3 = get_session().create_client("s3", region_name=REGION, **client)
    try:
        s3.create_bucket(Bucket=BUCKET)
    finally:
        s3.close()
    return Place(
        endpoint,
        f"s3://{BUCKET}",
        {"key": KEY, "secret": SECRET, "endpoint_url": endpoint, "client_kwargs": {"region_name": REGION}},
        {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": endpoint,
        },
    )


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Place]:
    """SeaweedFS: a real S3 server with conditional writes."""
    folder = tempfile.mkdtemp(prefix="weed")
    config = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "name": "splitfed", "actions": ["Admin"]}
    Path(folder, "s3.json").write_text(json.dumps({"identities": [config]}))
    names = ["s3.port", "master.port", "volume.port", "filer.port"]
    names += ["s3.port.grpc", "master.port.grpc", "volume.port.grpc", "filer.port.grpc"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        *(str(Path(sys.executable).with_name("weed")), "server", "-filer", "-s3", "-ip=127.0.0.1"),
        *(f"-dir={folder}", "-ip.bind=127.0.0.1", f"-s3.config={folder}/s3.json", "-master.telemetry=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}={port}" for name, port in ports.items())),
    ]
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    with running(command, endpoint, folder):
        yield s3_place(endpoint)


@contextmanager
def emulator(mode: str) -> Iterator[Place]:
    """Moto, honouring conditional writes or not."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", EMULATOR, str(port), mode]
    with running(command, endpoint, tempfile.mkdtemp(prefix="moto")):
        yield s3_place(endpoint)


@pytest.fixture(scope="session")
def moto() -> Iterator[Place]:
    """Moto: an emulator of S3 that honours conditional writes."""
    with emulator("honour") as place:
        yield place


@pytest.fixture(scope="session")
def ignoring() -> Iterator[Place]:
    """An S3 that takes every conditional write for an ordinary one."""
    with emulator("ignore") as place:
        yield place


@pytest.fixture(scope="session")
def azurite() -> Iterator[Place]:
    """Azurite: Microsoft's emulator of Azure's blob storage, installed by npm; for the soak."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm isn't here to install Azurite")
    folder = tempfile.mkdtemp(prefix="azurite")
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", f"--prefix={folder}", "azurite@3"]
    subprocess.run(install, check=True, timeout=600, stdin=subprocess.DEVNULL)
    (port,) = free_ports(1)
    program = [f"{folder}/node_modules/.bin/azurite-blob", "--silent", "--skipApiVersionCheck", "--inMemoryPersistence"]
    endpoint = f"http://127.0.0.1:{port}"
    with running([*program, "--blobHost=127.0.0.1", f"--blobPort={port}"], endpoint, folder):
        yield azure_place(endpoint)


def azure_place(endpoint: str) -> Place:
    """A container of Azurite, with the account and key that every Azurite has."""
    from azure.storage.blob import BlobServiceClient

    account = "devstoreaccount1"
    secret = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    connection = f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={secret};"
    connection += f"BlobEndpoint={endpoint}/{account};"
    with BlobServiceClient.from_connection_string(connection) as service:
        service.create_container(BUCKET)
    return Place(
        endpoint,
        f"abfs://{BUCKET}",
        {"connection_string": connection},
        {"AZURE_STORAGE_CONNECTION_STRING": connection},
    )
