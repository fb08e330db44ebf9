"""Which package may import which: the architecture, in one table that is read here and nowhere else."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest

import splitfed

ROOT = Path(splitfed.__file__).parent

# Leaf first: a row may name only rows above it, so the table can be read in dependency order and has no circles.
# "base" is the files beside the packages: errors, checks of arguments, quantities, the version, names that load lazily.
MAY_IMPORT = {
    "base": "",
    # Values without behaviour, and how they become bytes.
    "protocol": "base",
    # Atomic bytes under keys.
    "blobs": "base",
    # The model: cut, run, and run again.
    "model": "base protocol",
    # The owner's side.
    "client": "base protocol model",
    # The state of a run.
    "store": "base protocol model blobs",
    # Forward and backward; the next version. They meet only in the store.
    "server": "base protocol model store",
    "accumulator": "base protocol model store",
    # What a run tells, and who hears it.
    "tracking": "base store blobs",
    # Rounds.
    "federation": "base protocol model store accumulator",
    # Ways to a server in another process.
    "service": "base protocol blobs store server",
    # Tools that examine a split, or a run.
    "diagnostics": "base protocol model client store server accumulator",
    # Virtual clients of a real federation.
    "simulation": "base protocol blobs model client store server accumulator tracking federation",
    # The commands.
    "cli": "base protocol blobs model client store server accumulator tracking federation service diagnostics "
    "simulation",
}

# They compute; what they know of the world was given to them.
NO_IO = ("protocol", "model", "accumulator.mean", "accumulator.buffers", "accumulator.policies", "errors", "checks")
IO_MODULES = set(
    "asyncio ctypes filelock fsspec glob http io mmap multiprocessing os pathlib pickle requests shutil signal socket "
    "ssl starlette subprocess tempfile urllib urllib3 uvicorn".split()
)
IO_CALLS = set("open print input exec eval load save from_file".split())

SERVER_SIDE = {"store", "server", "accumulator", "blobs"}


def modules() -> dict[str, Path]:
    """Every module below the package by its name within it; the facade and `__main__` aren't any."""
    outside = {ROOT / "__init__.py", ROOT / "__main__.py"}
    paths = [path for path in ROOT.rglob("*.py") if path not in outside]
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
    """What each module imports of ours, read from the sources. A package that re-exports imports nothing by it."""
    known = modules()
    return {
        name: set()
        if path.name == "__init__.py"
        else {found for found in imports(path.read_text(), set(known)) if not found.startswith("<")}
        for name, path in known.items()
    }


def row(module: str) -> str:
    """The row of the table that a module belongs to."""
    first = module.partition(".")[0]
    return first if (ROOT / first).is_dir() else "base"


def reach(start: str) -> set[str]:
    """All modules that a module, or any module of a package, needs, directly or not."""
    edges = graph()
    waiting = {name for name in edges if name == start or name.startswith(f"{start}.")}
    found: set[str] = set()
    while waiting:
        here = waiting.pop()
        found.add(here)
        waiting |= edges.get(here, set()) - found
    return found


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


def test_every_package_has_a_row_and_every_row_a_package() -> None:
    """A new package without a row, or a row whose package is gone, fails."""
    assert {row(module) for module in modules()} == set(MAY_IMPORT)


def test_the_root_holds_only_what_all_packages_share() -> None:
    """A new module goes into a package."""
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == {"__init__", "__main__", "_lazy", "_version", "checks", "errors", "quantities"}


def test_rows_name_only_rows_above_them() -> None:
    """The table is leaf first."""
    above: set[str] = set()
    for name, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= above, name
        above.add(name)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_package_imports_only_what_its_row_allows(name: str) -> None:
    """No import of ours goes beyond the table."""
    allowed = {name, *MAY_IMPORT[name].split()}
    beyond = {(a, b) for a, targets in graph().items() if row(a) == name for b in targets if row(b) not in allowed}
    assert not beyond


def test_nothing_imports_the_facade() -> None:
    """`from splitfed import X` is for users: inside, a name comes from the module that defines it."""
    assert not {name for name, targets in graph().items() if "splitfed" in targets}


def test_no_circles() -> None:
    """The imports, within packages too, have an order."""
    list(graphlib.TopologicalSorter(graph()).static_order())


def test_a_package_only_exports() -> None:
    """An `__init__` holds a docstring, `__all__` and lazy imports: no class, no function, no eager import of ours."""
    for name, path in modules().items():
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text()).body:
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            ours = isinstance(node, ast.ImportFrom) and str(node.module).startswith("splitfed")
            simple = isinstance(node, ast.Expr | ast.Assign | ast.ImportFrom) and not ours
            assert typing_only or simple, f"{name}: {ast.unparse(node)[:80]}"


def test_no_module_imports_a_private_name_of_another() -> None:
    """What another module needs has a public name."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("splitfed"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not set(private) - {"__version__"}, f"{name}: {private} of {node.module}"


@pytest.mark.parametrize("name", NO_IO)
def test_pure_modules_do_no_io(name: str) -> None:
    """Protocol, model and the mathematics of a commit touch no file, network or process; they run no code from data."""
    for module, path in modules().items():
        if module != name and not module.startswith(f"{name}."):
            continue
        source = path.read_text()
        found = {found.strip("<>") for found in imports(source, set(modules())) if found.startswith("<")}
        assert not found & IO_MODULES, module
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        called = {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)}
        assert not called & IO_CALLS, module
    assert not {row(module) for module in reach(name) - {name}} & SERVER_SIDE - {name.partition(".")[0]}


@pytest.mark.parametrize("name", ["client", "model", "protocol", "service.http.client"])
def test_the_client_side_never_reaches_the_server_side(name: str) -> None:
    """A device needs neither the store nor the server nor the accumulator, directly or through others."""
    assert not {row(module) for module in reach(name)} & SERVER_SIDE


def test_the_mailbox_client_knows_only_the_keys_of_the_store() -> None:
    """The client's end of the mailbox opens blobs and names keys; it reads no version and no gradient."""
    found = {module for module in reach("service.mailbox.client") if row(module) in SERVER_SIDE}
    assert {module for module in found if row(module) != "blobs"} == {"store.layout"}


@pytest.mark.parametrize(("one", "other"), [("server", "accumulator"), ("accumulator", "server")])
def test_server_and_accumulator_meet_only_in_the_store(one: str, other: str) -> None:
    """Neither knows the other."""
    assert other not in {row(module) for module in reach(one)}


@pytest.mark.parametrize("wanted", ["splitfed", "splitfed.service.http.client"])
def test_the_client_works_where_server_packages_are_missing(wanted: str) -> None:
    """Without fsspec, filelock and starlette a fresh process imports a client, and no server module with it."""
    code = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"fsspec", "filelock", "starlette"}}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
from splitfed import CutPoint, SplitClient, SplitFedError, Transport, join, split
import {wanted}
print(*sorted(name.split(".")[1] for name in sys.modules if name.startswith("splitfed.")))
"""
    result = programs.run(programs.code, code, ("splitfed", "fsspec", "filelock", "starlette"))
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "client" in loaded
    assert not loaded & SERVER_SIDE
