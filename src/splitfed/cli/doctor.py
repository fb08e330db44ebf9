"""`splitfed doctor`: check what a run needs, and say how to mend what fails.

Unlike `status` it writes: the probe of a store races for a few keys beneath `probe/` and deletes
them. Each check goes as far as it can on its own; one that fails is reported with the message of
its error, which says what to do.
"""

from __future__ import annotations

import argparse
import difflib
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
from splitfed.checks import install
from splitfed.cli.options import add_store, open_store
from splitfed.cli.tables import table
from splitfed.errors import MissingError, SplitFedError
from splitfed.quantities import size

if TYPE_CHECKING:
    from splitfed.store.status import StoreStatus
    from splitfed.store.store import GradientStore

_DESCRIPTION = """\
Check what a run needs: packages; a store (is it reachable, does it honour create-if-absent, are
its newest versions what was committed); a server (is it reachable, is it of this version, does it
take the token in $SPLITFED_TOKEN). The exit status is 1 if anything fails. A few small keys are
written beneath probe/ in the store and deleted again; a folder that isn't there isn't made."""

_EXTRAS = {
    "http": ("starlette", "uvicorn", "urllib3"),
    "s3": ("s3fs",),
    "gcs": ("gcsfs",),
    "azure": ("adlfs",),
    "demo": ("matplotlib", "mlxtend", "tqdm"),
}
_PACKAGES = ("torch", "safetensors", "fsspec", "filelock")
_SAMPLE_BYTES = 2**20
_SERVER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: a check and its result."""

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
    parser.add_argument(
        "--server", metavar="URL", help="a service to try, such as https://host:8000"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 if a check failed."""
    found = list(_packages())
    if arguments.store:
        found += _guarded("store", partial(_store, arguments))
    if arguments.server:
        found += _guarded("server", partial(_server, arguments.server))
    print(table([(finding.state, finding.what, finding.detail) for finding in found]))
    failed = sum(finding.state == "FAIL" for finding in found)
    if failed:
        print(f"\n{failed} of {len(found)} checks failed")
        return 1
    print(f"\nall {len(found)} checks passed")
    return 0


def _guarded(what: str, check: Callable[[], Findings]) -> Findings:
    """The findings of a check, and the error that ends it as one more."""
    try:
        yield from check()
    except SplitFedError as error:
        yield Finding("FAIL", what, f"{type(error).__name__}: {error}")


def _packages() -> Findings:
    found = [f"Python {platform.python_version()}"]
    found += [f"{name} {version(name)}" for name in _PACKAGES]
    yield Finding("ok", "splitfed", f"{__version__}, with {', '.join(found)}")
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            detail = f"{' and '.join(missing)} not installed; if you need it: {install(extra)}"
            yield Finding("note", f"extra {extra}", detail)
        else:
            detail = ", ".join(f"{name} {_version(name)}" for name in modules)
            yield Finding("ok", f"extra {extra}", detail)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a module without metadata can be imported all the same
        return "of unknown version"


def _store(arguments: argparse.Namespace) -> Findings:
    store = open_store(arguments)
    root = getattr(store.blobs, "root", None)
    if root is not None and not os.path.isdir(root):
        yield Finding("FAIL", "store", _absent(root))
        return
    began = time.perf_counter()
    store.blobs.raw.get("format.json")
    detail = f"{store.blobs!r}, {_since(began)} to the first answer"
    yield Finding("ok", "store is reachable", detail)
    # Before the probe, which clears up at its end.
    speed = _speed(store)
    began = time.perf_counter()
    store.blobs.probe()
    detail = f"honoured: of racing writers one won each key ({_since(began)})"
    yield Finding("ok", "create-if-absent", detail)
    yield speed
    yield from _run_in(store)


def _absent(root: str) -> str:
    """What to say of a folder that isn't there: nothing is made for a name that may be mistyped."""
    if os.path.lexists(root):
        return f"{root} is no folder: expected one, or a name that is free"
    above = os.path.dirname(root)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    missing = os.path.relpath(root, above).split(os.sep)[0]
    try:
        near = difflib.get_close_matches(missing, os.listdir(above), n=3)
    except OSError:  # it may be entered and not be listed
        near = []
    hint = f"; the nearest there are {near}" if near else ""
    return (
        f"{root} isn't there: {above} has no {missing!r}{hint}. Nothing was made; "
        "a run that is to begin there can, or make the folder (mkdir -p) to have it checked"
    )


def _run_in(store: GradientStore) -> Findings:
    """The health of the run in a store, and whether its newest versions are what was committed."""
    from splitfed.store.status import read_status

    try:
        status = read_status(store)
    except MissingError:
        detail = "none was begun here yet: the first server or accumulator begins it"
        yield Finding("note", "run", detail)
        return
    for problem in status.problems:
        yield Finding("FAIL", "health", problem)
    if not status.problems:
        detail = f"{status.num_objects} objects, {size(sum(status.bytes.values()))}"
        yield Finding("ok", "health", detail)
    yield _numerics(store, status)
    for lineage in status.lineages:
        if lineage.version >= 0:
            # Guarded one by one: a damaged lineage must not hide the state of the others.
            check = partial(_newest, store, lineage.name, lineage.version)
            yield from _guarded(f"lineage {lineage.name}", check)


def _speed(store: GradientStore) -> Finding:
    """Write one object, read and delete it."""
    place = f"probe/{os.urandom(8).hex()}"
    blobs = store.blobs.raw
    key = f"{place}/speed"
    data = os.urandom(_SAMPLE_BYTES)
    began = time.perf_counter()
    try:
        blobs.create(key, [data])
        written = _since(began)
        began = time.perf_counter()
        same = bytes(blobs.get(key) or b"") == data
        read = _since(began)
    finally:
        blobs.delete_tree(place)
        store.blobs.prune("")
    if not same:
        detail = "another content came back than was written: use other storage"
        return Finding("FAIL", "read after write", detail)
    detail = f"{size(_SAMPLE_BYTES)} written in {written}, read in {read}"
    return Finding("ok", "read after write", detail)


def _numerics(store: GradientStore, status: StoreStatus) -> Finding:
    import torch

    from splitfed.model.numerics import class_id, numerics_class

    record = (store.header() or {}).get("numerics")
    own = numerics_class(torch.device("cpu"), record)
    if class_id(own) == status.numerics:
        detail = f"{status.numerics}: bits computed here are those of version 0's class"
        return Finding("ok", "numerics class", detail)
    machine = f"torch {own['torch']}, {own['cpu']}, {own['threads']} threads"
    if "kernels" in own:
        machine += f", kernels {own['kernels']}"
    return Finding(
        "note",
        "numerics class",
        f"on the CPU here it is {class_id(own)} ({machine}), the store's is {status.numerics}: "
        "batches computed here count, and are exact up to rounding; "
        "for equal bits use the same torch, threads (OMP_NUM_THREADS), device and kind of CPU",
    )


def _newest(store: GradientStore, name: str, newest: int) -> Findings:
    """Check the newest version's files against the hashes in its commit record."""
    versions = store.lineage(name)
    began = time.perf_counter()
    state = versions.checked_state(newest)
    versions.applied(newest)
    versions.optimizer(newest)
    read = f"{size(sum(tensor.nbytes for tensor in state.values()))}, read in {_since(began)}"
    if versions.durability == "log":
        read += "; a batch is kept as what its gradient follows from (a log)"
    yield Finding("ok", f"lineage {name}", f"version {newest} is what was committed: {read}")


def _server(url: str) -> Findings:
    if importlib.util.find_spec("urllib3") is None:
        yield Finding("FAIL", "server", f"urllib3 isn't installed: {install('http')}")
        return
    from splitfed.service.http.client import HttpTransport

    # Without patience: a server that is away is a finding, not a reason to wait.
    transport = HttpTransport(url, timeout=_SERVER_SECONDS, patience=0.0)
    try:
        began = time.perf_counter()
        ready = transport.ready()
        detail = f"{url} at version {ready.get('version')}, answered in {_since(began)}"
        yield Finding("ok", "server is ready", detail)
        theirs = ready.get("splitfed")
        if theirs != __version__:
            detail = f"it runs splitfed {theirs}, here is {__version__}: use the same"
            yield Finding("note", "server version", detail)
        status = transport.status()
        yield Finding(
            "ok", "access", "it tells its status: the token, if it asks for one, is right"
        )
        for problem in status.get("problems", ()):
            yield Finding("FAIL", "the server's store", problem)
    finally:
        transport.close()


def _since(began: float) -> str:
    return f"{1000 * (time.perf_counter() - began):.0f} ms"
