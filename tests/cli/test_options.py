"""What verbs share: `module:attribute`, and the store, whose credentials come from the environment alone."""

from __future__ import annotations

import argparse
import sys
import uuid
from pathlib import Path

import pytest
import torch
from torch import nn

import splitfed
from splitfed.cli.options import add_server, add_store, load_body, load_object, open_server, open_store
from splitfed.errors import InputError

SOURCE = """
from torch import nn
body = nn.Linear(2, 3)
number = 7

class Made(nn.Module):
    pass

class Holder:
    inner = nn.Linear(4, 5)

def build():
    return nn.Linear(6, 7)

def broken():
    raise RuntimeError("no weights here")

def needy(width):
    return nn.Linear(width, 7)

class Lazy:
    @property
    def body(self):
        raise RuntimeError("no disk")

lazy = Lazy()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has a module of the user's."""
    (tmp_path / "my_site.py").write_text(SOURCE)
    (tmp_path / "my_broken.py").write_text("x = 1\nimport not_installed_at_all\n")
    (tmp_path / "my_typo.py").write_text("body = (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_site", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_module_is_taken_as_it_is_although_it_can_be_called() -> None:
    """An nn.Module is callable, and isn't called."""
    body = load_body("my_site:body")
    assert isinstance(body, nn.Linear)
    assert body.out_features == 3


@pytest.mark.parametrize(("spec", "kind"), [("build", nn.Linear), ("Made", nn.Module), ("Holder.inner", nn.Linear)])
def test_functions_classes_and_dotted_names_work(spec: str, kind: type) -> None:
    """What a function or class without arguments returns is the body; dots go deeper."""
    assert isinstance(load_body(f"my_site:{spec}"), kind)


def test_an_object_needn_t_be_a_module() -> None:
    """Optimizers and loss functions load by the same door."""
    assert load_object("my_site:number", "--loss") == 7


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("my_site", "expected module:attribute"),
        (":body", "expected module:attribute"),
        ("my_site:", "expected module:attribute"),
        ("nowhere_at_all:body", "No module named 'nowhere_at_all'"),
        ("my_broken:body", r"not_installed_at_all.*my_broken.py, line 2"),
        ("my_site:bodies", "no attribute 'bodies'"),
        ("my_site:number", "is a int: expected the body as an nn.Module"),
        ("my_site:broken", r"RuntimeError: no weights here \(my_site.py, line 16\)"),
        ("my_site.py:body", "names a file: expected the name by which Python imports it"),
        ("./my_site:body", "names a file: expected the name by which Python imports it"),
        ("my_typo:body", r"SyntaxError: .*\(my_typo.py, line 1\)$"),
        ("my_site:needy", r"missing 1 required positional argument: 'width'$"),
        ("my_site:lazy.body", r"reading 'body' raised RuntimeError: no disk \(my_site.py, line 24\)"),
    ],
)
def test_a_mistake_is_told_in_one_line(spec: str, said: str) -> None:
    """Which argument, what was expected, and where in the user's file."""
    with pytest.raises(InputError, match=said) as caught:
        load_body(spec)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- store


def parsed(*words: str, writes: bool = True) -> argparse.Namespace:
    """The arguments of a verb that has nothing but a store."""
    parser = argparse.ArgumentParser()
    add_store(parser, writes=writes)
    return parser.parse_args(words)


def test_the_argument_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPLITFED_STORE is used where no --store is given."""
    monkeypatch.setenv("SPLITFED_STORE", str(tmp_path / "there"))
    assert open_store(parsed()).url == str(tmp_path / "there")
    assert open_store(parsed("--store", str(tmp_path / "here"))).url == str(tmp_path / "here")


def test_no_store_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says both ways to name one."""
    monkeypatch.delenv("SPLITFED_STORE", raising=False)
    with pytest.raises(InputError, match=r"--store URL.*SPLITFED_STORE"):
        open_store(parsed())


def test_durability_is_asked_of_writers_only() -> None:
    """A verb that only reads has no --sync; one that writes is safe against power cuts unless told otherwise."""
    assert parsed(writes=False).sync == parsed().sync == "power"
    assert open_store(parsed("--store", "memory://x", "--sync", "process")).sync == "process"
    with pytest.raises(SystemExit):
        parsed("--sync", "process", writes=False)


def test_clients_set_modes_and_what_is_named() -> None:
    """By default a service takes train and eval mode alone from a client's half."""
    half, _ = splitfed.split(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3)), "1")
    half[1].eval()
    parser = argparse.ArgumentParser()
    add_server(parser)
    for words, takes in (([], False), (["--settings", "nothing", "--settings", "in_*"], True)):
        server = open_server(parser.parse_args(["my_site:body", "--store", f"memory://{uuid.uuid4().hex}", *words]))
        client = splitfed.SplitClient(half, server, "a")
        half[1].in_features = 2
        assert client(torch.ones(1, 1)).shape == (1, 3)
        half[1].in_features = 5
        if takes:
            assert client(torch.ones(1, 1)).shape == (1, 3)
        else:
            with pytest.raises(InputError, match="--settings 'in_features'"):
                client(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("my_site:bodyy", r"no attribute 'bodyy'.*the nearest there are \['body'\]"),
        ("my_site:Holder.iner", r"no attribute 'iner' of 'Holder.iner'; the nearest there are \['inner'\]"),
        ("my_sites:body", r"No module named 'my_sites'; the nearest there are \['my_site'\]"),
        ("my_site:zzz", r"no attribute 'zzz' of 'zzz'; there are \[.*'body'.*\]"),
        ("package.on:body", r"No module named 'package.on'; the nearest there are \['one'\]"),
    ],
)
def test_a_mistyped_name_is_answered_by_the_nearest(folder: Path, spec: str, said: str) -> None:
    """Of the module, of a class in it, of the folder, of a package."""
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "one.py").write_text("body = None\n")
    with pytest.raises(InputError, match=said):
        load_body(spec)


def test_what_a_module_lacks_itself_is_not_answered_by_the_folder() -> None:
    """It is no name that the user has typed."""
    with pytest.raises(InputError, match=r"not_installed_at_all'.*my_broken.py, line 2\)$"):
        load_body("my_broken:x")
