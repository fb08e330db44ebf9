"""Which module may import which: the architecture, in one table that is read here and nowhere else."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import splitfed

ROOT = Path(splitfed.__file__).parent

# Leaf first: a row may name only rows above it, so the table can be read in dependency order and has no circles.
# A subpackage is one row. "splitfed" is the lazy facade; only what stands above the whole library uses it.
MAY_IMPORT = {
    "errors": "",
    # Values without behaviour, and how they become bytes.
    "ids": "errors",
    "messages": "",
    "rows": "errors",
    "trees": "errors",
    "memory": "",
    "foreign": "errors",
    "strides": "errors foreign",
    "codec": "errors memory foreign strides",
    "kinds": "errors messages",
    "packing": "errors messages foreign kinds trees codec",
    "wire": "errors messages codec packing",
    # The model: cut, run, and run again.
    "cache": "",
    "numerics": "",
    "seeding": "",
    "copying": "errors",
    "template": "errors copying",
    "personal": "errors template",
    "absent": "errors",
    "cutpoint": "errors template absent",
    "cutting": "errors copying template cutpoint",
    "boundary": "codec",
    "unsplit": "errors trees seeding copying template cutting boundary",
    "model": "errors template boundary",
    "replay": "errors messages trees codec seeding boundary model",
    # The client side.
    "transport": "messages",
    "roundrobin": "transport",
    "transports": "errors transport",
    "connection": "errors messages transport",
    "passes": "messages connection",
    "guards": "errors",
    "calls": "errors messages trees seeding cutpoint boundary connection passes guards",
    "onetrip": "errors messages seeding cutpoint calls",
    "methods": "passes calls",
    "syncing": "errors messages personal template connection",
    "participating": "ids messages syncing",
    "standin": "",
    "client": "errors ids messages cutpoint transport transports connection passes calls methods onetrip syncing "
    "participating standin",
    # The mathematics of a commit.
    "averaging": "errors ids",
    "buffers": "errors",
    "policies": "errors ids",
    "optimizers": "errors",
    # The store.
    "blobs": "errors",
    "applied": "errors ids",
    "selection": "errors ids applied",
    "commits": "errors ids applied",
    "layout": "errors ids",
    "versions": "errors ids codec packing cache template blobs applied commits layout",
    "lineage": "errors codec packing template applied commits versions",
    "pile": "errors ids messages packing blobs layout",
    "rounds": "errors ids messages rows packing cache blobs selection layout",
    "store": "errors ids numerics packing cache blobs layout lineage pile rounds",
    # A store as the way to a server; the worker at its other end is below the server.
    "storetransport": "errors ids packing wire transport blobs layout",
    # The server: forward and backward.
    "sealing": "errors ids messages numerics packing applied versions pile",
    "halves": "errors ids kinds messages packing template rounds store sealing",
    "running": "errors messages cache template model replay buffers versions pile",
    "lines": "errors ids cache template pile store sealing running",
    "server": "errors ids kinds messages trees packing template boundary replay store halves sealing lines",
    "working": "errors ids packing wire transport layout store",
    # The accumulator: stored gradients become the next version.
    "folding": "errors ids numerics messages template averaging buffers selection pile",
    "stepping": "template optimizers versions",
    "accumulator": "errors ids template personal buffers policies optimizers applied selection commits store folding "
    "stepping",
    # What a run tells, and who hears it.
    "callbacks": "errors rows",
    "progress": "errors rows",
    "history": "errors blobs layout store rows",
    "changes": "messages template buffers commits lineage",
    "perclient": "errors copying ids cache messages packing template buffers policies optimizers applied selection "
    "commits lineage store sealing accumulator changes",
    "pictures": "errors",
    "report": "errors rows pictures history splitfed",
    # What stands on top of both sides.
    "sampling": "errors",
    "judging": "errors ids applied selection rounds store",
    "reporting": "ids rows selection commits rounds store",
    "federation": "errors ids policies rows rounds accumulator perclient sampling judging reporting",
    "partition": "errors pictures",
    # Virtual clients of a real federation.
    "simulation": "errors ids messages seeding copying template cutting personal wire transport roundrobin "
    "client optimizers policies blobs rounds commits store server accumulator perclient rows callbacks progress "
    "history sampling judging reporting federation",
    "checking": "errors messages trees copying template cutting unsplit client store server",
    "inspecting": "messages trees codec packing client store server",
    "testing": "errors blobs",
    "status": "errors ids numerics packing commits layout pile store versions",
    "http": "errors ids messages memory trees foreign codec packing wire transport server status splitfed",
    "demo": "errors rows callbacks store history policies pictures report partition simulation",
    "cli": "errors rows callbacks progress history report demo splitfed http server status store accumulator commits "
    "policies working inspecting cutpoint cutting numerics",
}

# They compute; what they know of the world was given to them.
NO_IO = set("errors ids messages trees cutting averaging buffers policies optimizers".split())
IO_MODULES = set(
    "asyncio ctypes filelock fsspec glob http io mmap multiprocessing os pathlib pickle requests shutil signal socket "
    "ssl starlette subprocess tempfile urllib urllib3 uvicorn".split()
)
IO_CALLS = set("open print input exec eval load save from_file".split())

CLIENT_SIDE = set(
    "client standin calls guards methods passes onetrip connection syncing participating transport cutting cutpoint "
    "unsplit".split()
)
SERVER_SIDE = set(
    "blobs layout versions lineage pile store sealing halves running lines server folding stepping accumulator".split()
)


def modules() -> dict[str, Path]:
    """Every module below the package by its name within it; the facade itself isn't one."""
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(source: str, known: set[str]) -> Iterator[str]:
    """The modules that a source imports at any depth, those for typing only included; ours without the prefix."""

    def inside(name: str) -> str:
        parts = name.split(".")
        while parts and ".".join(parts) not in known:
            parts.pop()
        return ".".join(parts) or "splitfed"

    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            yield inside(rest) if top == "splitfed" else f"<{top}>"


@functools.cache
def graph() -> dict[str, set[str]]:
    """What each module imports of ours, read from the sources."""
    known = modules()
    return {
        name: {found for found in imports(path.read_text(), set(known)) if not found.startswith("<")}
        for name, path in known.items()
    }


def row(module: str) -> str:
    """The row of the table that a module belongs to."""
    return module.partition(".")[0]


def reach(start: str) -> set[str]:
    """All rows that a row needs, directly or not."""
    edges = graph()
    found: set[str] = set()
    waiting = {start}
    while waiting:
        here = waiting.pop()
        found.add(here)
        waiting |= {row(b) for a, targets in edges.items() if row(a) == here for b in targets} - found
    return found - {start}


def existing(names: set[str]) -> list[str]:
    """Those of the named rows that have a module, in order."""
    return sorted(names & {row(module) for module in modules()})


def test_the_reader_sees_every_form_of_import() -> None:
    """Plain, aliased, from-package, facade, function-level and typing-only imports are all found."""
    source = """
import splitfed.codec as c
from splitfed import trees, SplitClient
from splitfed.blobs.local import LocalBlobs
if TYPE_CHECKING:
    from splitfed.ids import BatchId
def late():
    import os.path
"""
    known = {"codec", "trees", "blobs", "blobs.local", "ids"}
    assert sorted(imports(source, known)) == ["<os>", "blobs.local", "codec", "ids", "splitfed", "trees"]


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    """A new module without a row, or a row whose module is gone, fails."""
    assert {row(module) for module in modules()} == set(MAY_IMPORT)


def test_rows_name_only_rows_above_them() -> None:
    """The table is leaf first."""
    above = {"splitfed"}
    for name, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= above, name
        above.add(name)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_module_imports_only_what_its_row_allows(name: str) -> None:
    """No import of ours goes beyond the table."""
    found = {row(b) for a, targets in graph().items() if row(a) == name for b in targets} - {name}
    assert found <= set(MAY_IMPORT[name].split())


def test_no_circles() -> None:
    """The imports, within subpackages too, have an order."""
    edges = {a: {b for b in targets if not a.startswith(f"{b}.")} for a, targets in graph().items()}
    list(graphlib.TopologicalSorter(edges).static_order())


@pytest.mark.parametrize("name", existing(NO_IO))
def test_pure_modules_do_no_io(name: str) -> None:
    """Errors, messages, cutting, averaging touch no file, network or process, and run no code from data."""
    source = modules()[name].read_text()
    found = {found.strip("<>") for found in imports(source, set(modules())) if found.startswith("<")}
    assert not found & IO_MODULES
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    called = {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)}
    assert not called & IO_CALLS
    assert not reach(name) & SERVER_SIDE


@pytest.mark.parametrize("name", existing(CLIENT_SIDE))
def test_the_client_side_never_reaches_the_server_side(name: str) -> None:
    """A device needs neither the store nor the server nor the accumulator, directly or through others."""
    assert not reach(name) & SERVER_SIDE


@pytest.mark.parametrize(("one", "other"), [("server", "accumulator"), ("accumulator", "server")])
def test_server_and_accumulator_meet_only_in_the_store(one: str, other: str) -> None:
    """Neither knows the other."""
    assert other not in reach(one)


def test_the_client_works_where_server_packages_are_missing() -> None:
    """Without fsspec, filelock and starlette a fresh process imports `SplitClient`, and no server module with it."""
    code = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fsspec", "filelock", "starlette"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
from splitfed import CutPoint, SplitClient, SplitFedError, Transport, join, split
print(*sorted(name.split(".")[1] for name in sys.modules if name.startswith("splitfed.")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "client" in loaded
    assert not loaded & SERVER_SIDE
