"""`splitfed doctor`: is all there that a run needs, and does it keep its promises? Says how to mend what doesn't.

Unlike `status` it writes: the probe of a store races for a few keys beneath `probe/` and deletes them. Each check goes
as far as it can on its own; one that fails is told in the words of its error, which say what to do.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from splitfed._version import __version__
from splitfed.cli.stores import add_store, open_store
from splitfed.cli.tables import size, table
from splitfed.errors import MissingError, SplitFedError

if TYPE_CHECKING:
    from splitfed.store.status import StoreStatus
    from splitfed.store.store import GradientStore

_DESCRIPTION = """\
Check what a run needs: packages; a store (is it reachable, does it honour create-if-absent, are its newest versions
what was committed); a server (is it reachable, is it of this version, does it take the token in $SPLITFED_TOKEN). The
exit status is 1 if anything fails. A few small keys are written beneath probe/ in the store and deleted again."""

_EXTRAS = {
    "http": ("starlette", "uvicorn", "urllib3"),
    "s3": ("s3fs",),
    "gcs": ("gcsfs",),
    "azure": ("adlfs",),
    "demo": ("matplotlib", "mlxtend", "tqdm"),
}
_SAMPLE = 2**20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    state: str
    """'ok', 'note' (worth knowing) or 'FAIL'."""
    what: str
    detail: str


Findings = Iterator[Finding]


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "doctor",
        help="check packages, a store and a server, and say how to mend what fails",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_store(parser, writes=False)
    parser.add_argument("--server", metavar="URL", help="a service to try, such as https://host:8000")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if anything failed."""
    found = [*_packages()]
    if arguments.store:
        found += _guarded("store", partial(_store, arguments))
    if arguments.server:
        found += _guarded("server", partial(_server, arguments.server))
    print(table([(finding.state, finding.what, finding.detail) for finding in found]))
    failed = sum(finding.state == "FAIL" for finding in found)
    print(f"\n{failed} of {len(found)} checks failed" if failed else f"\nall {len(found)} checks passed")
    return 1 if failed else 0


def _guarded(what: str, check: Callable[[], Findings]) -> Findings:
    """What a check finds, and the error that ends it."""
    try:
        yield from check()
    except SplitFedError as error:
        yield Finding("FAIL", what, f"{type(error).__name__}: {error}")


def _packages() -> Findings:
    names = ("torch", "safetensors", "fsspec", "filelock")
    found = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    yield Finding("ok", "splitfed", f"{__version__}, with {', '.join(found)}")
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        told = ", ".join(f"{name} {_version(name)}" for name in modules)
        mend = f"{' and '.join(missing)} not installed; if you need it: pip install 'splitfed[{extra}]'"
        yield Finding("note" if missing else "ok", f"extra {extra}", mend if missing else told)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # importable all the same
        return "of unknown version"


def _store(arguments: argparse.Namespace) -> Findings:
    store = open_store(arguments)
    began = time.perf_counter()
    store.blobs.get("format.json")
    yield Finding("ok", "store is reachable", f"{store.blobs!r}, {_since(began)} to the first answer")
    began = time.perf_counter()
    store.blobs.probe()
    yield Finding("ok", "create-if-absent", f"honoured: of racing writers one won each key ({_since(began)})")
    yield _speed(store)
    from splitfed.store.status import read_status

    try:
        status = read_status(store)
    except MissingError:
        yield Finding("note", "run", "none was begun here yet: the first server or accumulator begins it")
        return
    for problem in status.problems:
        yield Finding("FAIL", "health", problem)
    if not status.problems:
        yield Finding("ok", "health", f"{status.num_objects} objects, {size(sum(status.bytes.values()))}")
    yield _numerics(status)
    for lineage in status.lineages:
        if lineage.version >= 0:
            check = partial(_newest, store, lineage.name, lineage.version)
            yield from _guarded(f"lineage {lineage.name}", check)


def _speed(store: GradientStore) -> Finding:
    """Write and read one object, and delete it."""
    key, data = f"probe/{os.urandom(8).hex()}/speed", os.urandom(_SAMPLE)
    began = time.perf_counter()
    try:
        store.blobs.create(key, [data])
        written = _since(began)
        began = time.perf_counter()
        same = bytes(store.blobs.get(key) or b"") == data
        read = _since(began)
    finally:
        store.blobs.delete(key)
    if not same:
        return Finding("FAIL", "read after write", "another content came back than was written: use other storage")
    return Finding("ok", "read after write", f"{size(_SAMPLE)} written in {written}, read in {read}")


def _numerics(status: StoreStatus) -> Finding:
    import torch

    from splitfed.model.numerics import class_id, numerics_class

    own = numerics_class(torch.device("cpu"))
    if class_id(own) == status.numerics:
        return Finding("ok", "numerics class", f"{status.numerics}: bits computed here are those of version 0's class")
    told = f"torch {own['torch']}, {own['cpu']}, {own['threads']} threads"
    return Finding(
        "note",
        "numerics class",
        f"on the CPU here it is {class_id(own)} ({told}), the store's is {status.numerics}: batches computed here "
        "count, and are exact up to rounding; for equal bits use the same torch, threads (OMP_NUM_THREADS) and device",
    )


def _newest(store: GradientStore, name: str, newest: int) -> Findings:
    """Check the newest version's files against the hashes in its commit record."""
    versions = store.lineage(name)
    began = time.perf_counter()
    state = versions.checked_state(newest)
    versions.applied(newest)
    versions.optimizer(newest)
    told = size(sum(tensor.nbytes for tensor in state.values()))
    yield Finding("ok", f"lineage {name}", f"version {newest} is what was committed: {told}, read in {_since(began)}")


def _server(url: str) -> Findings:
    if importlib.util.find_spec("urllib3") is None:
        yield Finding("FAIL", "server", "urllib3 isn't installed: pip install 'splitfed[http]'")
        return
    from splitfed.service.http.client import HttpTransport

    transport = HttpTransport(url, timeout=10.0, patience=0.0)
    try:
        began = time.perf_counter()
        ready = transport.ready()
        yield Finding("ok", "server is ready", f"{url} at version {ready.get('version')}, answered in {_since(began)}")
        theirs = ready.get("splitfed")
        if theirs != __version__:
            yield Finding("note", "server version", f"it runs splitfed {theirs}, here is {__version__}: use the same")
        status = transport.status()
        yield Finding("ok", "access", "it tells its status: the token, if it asks for one, is right")
        for problem in status.get("problems", ()):
            yield Finding("FAIL", "the server's store", problem)
    finally:
        transport.close()


def _since(began: float) -> str:
    return f"{1000 * (time.perf_counter() - began):.0f} ms"
