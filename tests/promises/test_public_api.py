"""The public names: true, sorted, documented, and loaded only when they are used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest

import splitfed
from splitfed import errors

PACKAGE = Path(splitfed.__file__)
CONTRACT = {
    *("GradientStore", "SplitServer", "SplitClient", "Accumulator", "Commit", "CutPoint", "Transport", "BatchId"),
    *("split", "join", "reference", "check", "register_container", "SplitFedError", "__version__", "History"),
    *("Federation", "PerClient", "VirtualTime", "simulate"),
}
# Each of them has another answer: go on, take a new batch, wait, begin again, mend an argument, the cut or the store.
ACTED_ON = {
    *("SplitFedError", "AlreadyAppliedError", "ExpiredError", "BusyError", "UnreachableError", "TokenError"),
    *("SupersededError", "StoreError", "CorruptedError", "InputError", "CutError", "ArchitectureError"),
    *("BodyError", "ReplayError"),
}
TREE = sorted(name for name, value in vars(errors).items() if inspect.isclass(value))


def fresh(code: str) -> set[str]:
    """What a fresh interpreter prints on running `code`, as words."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def with_torch(code: str) -> set[str]:
    """The same where torch is imported already, and nothing of ours."""
    ended = programs.run(programs.code, code, ("splitfed",))
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


def test_all_is_sorted_and_without_doubles() -> None:
    """`__all__` reads like an index."""
    assert splitfed.__all__ == sorted(set(splitfed.__all__))


def test_all_holds_the_contract_and_the_errors_to_act_on() -> None:
    """`__all__` is the names of the design and the errors that a user acts on differently, no more."""
    assert set(splitfed.__all__) == CONTRACT | ACTED_ON
    assert len(splitfed.__all__) <= 33


@pytest.mark.parametrize("name", TREE)
def test_every_error_is_reachable(name: str) -> None:
    """Those that aren't in `__all__` too: `splitfed.FormatError` is `splitfed.errors.FormatError`."""
    assert getattr(splitfed, name) is getattr(errors, name)


@pytest.mark.parametrize("name", splitfed.__all__)
def test_name_resolves_and_is_documented(name: str) -> None:
    """Each public name loads, calls itself by that name, and has a docstring of its own."""
    value = getattr(splitfed, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+([.\-+a-z0-9]+)?", value)
        return
    assert value.__name__ == name
    assert value.__module__.partition(".")[0] == "splitfed"
    assert inspect.cleandoc(value.__doc__ or "").partition("\n")[0].endswith((".", ":", "?"))


@pytest.mark.parametrize("name", sorted(set(splitfed.__all__) - {"__version__"}))
def test_public_methods_are_documented(name: str) -> None:
    """Each public method and property that a public class defines has a docstring."""
    value = getattr(splitfed, name)
    if inspect.isclass(value):
        members = {key: member for key, member in vars(value).items() if not key.startswith("_")}
        undocumented = {
            key
            for key, member in members.items()
            if (inspect.isroutine(member) or isinstance(member, property)) and not inspect.getdoc(getattr(value, key))
        }
        assert not undocumented
    else:
        assert "Raises:" in inspect.getdoc(value) or "raise" not in inspect.getsource(value)


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import splitfed` alone brings neither torch nor fsspec nor any module of ours."""
    loaded = fresh("import sys, splitfed; print(*sys.modules)")
    assert not loaded & {"torch", "numpy", "fsspec", "filelock", "safetensors", "transformers", "asyncio"}
    ours = {name for name in loaded if name.partition(".")[0] == "splitfed"}
    assert ours == {"splitfed", "splitfed._lazy", "splitfed._version"}


@pytest.mark.parametrize("name", ["SplitFedError", "BatchId"])
def test_light_names_stay_light(name: str) -> None:
    """Errors and ids load without torch."""
    assert "torch" not in fresh(f"import sys; from splitfed import {name}; print(*sys.modules)")


def test_a_star_import_brings_all_names() -> None:
    """`from splitfed import *` gives what `__all__` says."""
    assert set(splitfed.__all__) <= with_torch("from splitfed import *; print(*dir())")


def test_dir_lists_the_public_names() -> None:
    """Completion finds names that haven't loaded yet."""
    assert set(splitfed.__all__) <= fresh("import splitfed; print(*dir(splitfed))")


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A typo says which name the package doesn't have."""
    with pytest.raises(AttributeError, match="'splitfed' has no attribute 'Splitclient'"):
        _ = splitfed.Splitclient


@pytest.mark.parametrize(
    "path", ["policies.mode", "partition.iid", "report.write", "simulation.lognormal", "testing.BlobsSuite"]
)
def test_modules_that_are_used_by_name_are_there_at_once(path: str) -> None:
    """`import splitfed` is enough for `splitfed.policies.mode(...)`, whatever else has been imported before."""
    assert with_torch(f"import splitfed; print(splitfed.{path}.__name__)") == {path.rpartition(".")[2]}


PACKAGES = sorted(path.parent for path in PACKAGE.parent.rglob("__init__.py"))


@pytest.mark.parametrize("folder", PACKAGES, ids=[path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGES])
def test_no_exported_name_is_the_name_of_a_module(folder: Path) -> None:
    """Importing a submodule sets its name on the package, so a name for both would mean what was imported last."""
    name = ".".join(("splitfed", *folder.relative_to(PACKAGE.parent).parts))
    exported = getattr(importlib.import_module(name), "__all__", [])
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(exported)


@pytest.mark.parametrize("folder", PACKAGES, ids=[path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGES])
def test_type_checkers_and_the_run_time_see_the_same(folder: Path) -> None:
    """The imports for typing bring the exported names, each from the module that it lives in at run time."""
    tree = ast.parse((folder / "__init__.py").read_text())
    package = importlib.import_module(".".join(("splitfed", *folder.relative_to(PACKAGE.parent).parts)))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = [(node.module, alias) for block in blocks for node in block.body for alias in node.names]
    typed = {alias.name: module for module, alias in imported if alias.asname is None}
    assert set(typed) == set(getattr(package, "__all__", [])) - {"__version__"}
    for name, module in typed.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name), name
    for module, alias in imported:  # modules that are used by a name of their own, and errors besides those of __all__
        if alias.asname is not None:
            found = getattr(package, alias.asname)
            assert found.__name__ == (alias.name if inspect.isclass(found) else f"{module}.{alias.name}")


def test_importing_every_module_starts_nothing() -> None:
    """No module draws random numbers, starts a thread, warns or prints when it is imported."""
    names = [
        ".".join(("splitfed", *path.relative_to(PACKAGE.parent).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted(PACKAGE.parent.rglob("*.py"))
        if path.stem != "__main__"
    ]
    code = f"""
import importlib, threading, torch
before = torch.get_rng_state()
for name in {names}:
    importlib.import_module(name)
assert torch.equal(before, torch.get_rng_state()), "random numbers were drawn"
assert threading.active_count() == 1, threading.enumerate()
"""
    assert programs.run(programs.code, code, ("splitfed",), strict=True) == programs.Ended(0, "", "")


def test_the_package_says_that_it_is_typed() -> None:
    """`py.typed` is there, so that mypy reads the annotations."""
    assert (PACKAGE.parent / "py.typed").is_file()
    assert importlib.util.find_spec("splitfed").origin == str(PACKAGE)
