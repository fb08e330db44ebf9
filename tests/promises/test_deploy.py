"""What `examples/deploy/` says is what happens: its terminals are run word by word, its manifests are valid."""

from __future__ import annotations

import argparse
import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pages import BLOCK, ROOT
from servers import free_ports

import splitfed
from splitfed.cli.command import _parser
from splitfed.service.http.limits import Limits
from splitfed.store.store import GradientStore

DEPLOY = ROOT / "examples" / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
OVERLAYS = sorted((DEPLOY / "overlays").iterdir())
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
NEEDED = {"splitfed-tokens", "splitfed-s3"}
"""Secrets that the text makes by hand."""


def terminal(name: str) -> str:
    """The block of the text that is labelled so."""
    text = (DEPLOY / "README.md").read_text("utf-8")
    (found,) = [block[0] for block in BLOCK.finditer(text) if block[0].startswith(f"```sh {name}\n")]
    return "\n".join(found.splitlines()[1:-1])


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone has of the folder; the package is installed."""
    shutil.copytree(DEPLOY, tmp_path / "examples" / "deploy", ignore=shutil.ignore_patterns("__pycache__", "runs"))
    return tmp_path


@pytest.fixture
def environment() -> dict[str, str]:
    """A shell in which `splitfed` and `python` are those under test."""
    folder = Path(sys.executable).parent
    source = Path(splitfed.__file__).parents[1]
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(source), "PYTHONUNBUFFERED": "1"}


@contextmanager
def left_running(text: str, ready: str, clone: Path, environment: dict[str, str]) -> Iterator[list[str]]:
    """A terminal whose last command stays; yields the lines so far once one begins with `ready`, and ends it."""
    command = ["bash", "-ec", text]
    lines: list[str] = []
    begun = threading.Event()
    with subprocess.Popen(
        command,
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:

        def read() -> None:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                if line.startswith(ready):
                    begun.set()
            begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert begun.wait(200), lines
            assert any(line.startswith(ready) for line in lines), lines
            yield lines
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the shell, and what it left in the background
            reader.join(60)


def run(text: str, clone: Path, environment: dict[str, str]) -> str:
    """A terminal that ends by itself: what it printed."""
    done = subprocess.run(
        ["bash", "-ec", text], cwd=clone, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_port(port: int, *texts: str) -> list[str]:
    """The texts with another port than 8000 and 8001, which may be taken on the machine that tests."""
    return [re.sub(r"\b800[01]\b", str(port), text) for text in texts]


@pytest.mark.soak
def test_two_terminals(clone: Path, environment: dict[str, str]) -> None:
    """Word by word: two owners train over HTTP, end well, and its versions have all batches, two in each."""
    (port,) = free_ports(1)
    one, two = on_port(port, terminal("terminal-1"), terminal("terminal-2"))
    with left_running(one, "splitfed: serving on", clone, environment) as lines:
        printed = run(two, clone, environment)
        store = GradientStore(clone / "examples/deploy/runs/digits")
        for _ in range(600):  # the accumulator is another process, and looks twice a second
            if not store.waiting():
                break
            threading.Event().wait(0.1)
    accuracies = dict(re.findall(r"(site-[ab]): accuracy ([\d.]+)", printed))
    assert sorted(accuracies) == ["site-a", "site-b"]
    assert min(map(float, accuracies.values())) >= 0.85
    folded = [store.lineage().commit(version).num_batches for version in range(1, store.latest_version() + 1)]
    assert folded == [2] * 84  # whatever the load
    assert store.waiting() == []
    assert "Traceback" not in "\n".join(lines)


@pytest.mark.soak
def test_terminals_with_tokens(clone: Path, environment: dict[str, str]) -> None:
    """With its token the owner trains; without it, it is refused."""
    (port,) = free_ports(1)
    one, two = on_port(port, terminal("tokens-1"), terminal("tokens-2"))
    with left_running(one, "splitfed: serving on", clone, environment):
        assert "site-a: accuracy" in run(two, clone, environment)
        without = two.replace("SPLITFED_TOKEN=$(cat site-a.token) ", "")
        refused = subprocess.run(
            ["bash", "-ec", without],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert refused.returncode != 0
    assert "TokenError" in refused.stderr


@pytest.mark.soak
def test_terminals_without_a_server(clone: Path, environment: dict[str, str]) -> None:
    """An owner that reaches nothing but files is answered by a worker."""
    with left_running(terminal("files-1"), "splitfed: working in", clone, environment):
        assert "site-a: accuracy" in run(terminal("files-2"), clone, environment)
    store = GradientStore(clone / "examples/deploy/runs/files")
    assert store.latest_version() > 0


def test_commits_have_one_size_whatever_the_load() -> None:
    """Each accumulator in pages and examples folds as many batches as make a commit, and no more."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md"), *UNITS]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    lines = re.findall(r"^(?:ExecStart=\S*/)?splitfed (accumulate .*?)(?: &)?$", text, re.MULTILINE)
    commands = [shlex.split(line) for line in lines]
    commands += [yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]["accumulator"]["command"]]
    commands += [c["args"] for pod in pods() for c in pod["containers"] if c.get("args", [""])[0] == "accumulate"]
    found = [read for read in map(parsed, commands) if read.mode is None and read.lineage == "body"]
    assert len(found) >= 8
    assert [read for read in found if read.max_batches is None or read.max_batches != read.min_batches] == []


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The arguments of a command, as the command reads them."""
    return _parser().parse_args([str(argument) for argument in arguments])


def documents(path: Path) -> list[dict[str, Any]]:
    """The resources of a manifest."""
    return [found for found in yaml.safe_load_all(path.read_text("utf-8")) if found]


def pods() -> list[dict[str, Any]]:
    """The pod specifications of all manifests."""
    found = [document for path in MANIFESTS for document in documents(path)]
    return [document["spec"]["template"]["spec"] for document in found if "template" in document.get("spec", {})]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path) -> None:
    """Each resource follows the schema of its kind, without unknown fields."""
    for document in documents(path):
        if document["kind"] == "Kustomization":
            assert {*document["resources"]} == {other.name for other in MANIFESTS} - {path.name}
        else:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_manifests_run_commands_that_exist() -> None:
    """Each container of ours has arguments that `splitfed` takes, and finds its store in the environment."""
    ours = [c for pod in pods() for c in pod["containers"] if c["image"] == "splitfed-digits" and "command" not in c]
    assert sorted(parsed(container["args"]).verb for container in ours) == ["accumulate", "serve"]
    for container in ours:
        assert {"configMapRef": {"name": "splitfed"}} in container["envFrom"]
        assert parsed(container["args"]).threads == 1
    serve = parsed(next(c["args"] for c in ours if c["args"][0] == "serve"))
    (replica,) = [pod for pod in pods() if pod["containers"][0]["name"] == "replica"]
    assert serve.port == replica["containers"][0]["ports"][0]["containerPort"]
    assert replica["terminationGracePeriodSeconds"] > serve.drain_seconds
    mounted = {mount["mountPath"] for mount in replica["containers"][0]["volumeMounts"]}
    assert str(Path(serve.tokens).parent) in mounted


def rendered(overlay: str) -> list[dict[str, Any]]:
    """The resources that an overlay makes of the manifests, by the real Kustomize."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def replica(resources: list[dict[str, Any]]) -> dict[str, Any]:
    """The container of a replica among resources."""
    (found,) = [one for one in resources if (one["kind"], one["metadata"]["name"]) == ("Deployment", "replica")]
    container: dict[str, Any] = found["spec"]["template"]["spec"]["containers"][0]
    return container


needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl isn't installed")


@needs_kubectl
@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_overlays_are_valid(path: Path) -> None:
    """What each makes follows the schemas, runs commands that exist, and is in the text."""
    resources = rendered(path.name)
    for resource in resources:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    assert parsed(replica(resources)["args"]).verb == "serve"
    assert f"kubectl apply -k overlays/{path.name}" in (path / "kustomization.yaml").read_text("utf-8")
    assert f"overlays/{path.name}" in (DEPLOY / "README.md").read_text("utf-8")


@needs_kubectl
def test_an_overlay_for_a_bucket_leaves_out_the_object_store() -> None:
    """Nothing of it is left, and all processes read the bucket's URL from one place."""
    resources = rendered("bucket")
    names = {one["metadata"]["name"] for one in resources}
    assert not names & {"objects", "bucket"}
    (settings,) = [one["data"] for one in resources if one["kind"] == "ConfigMap"]
    assert settings["SPLITFED_STORE"].startswith("s3://")
    assert settings["AWS_ENDPOINT_URL"].startswith("https://")
    assert settings["OMP_NUM_THREADS"] == "1"


@needs_kubectl
def test_an_overlay_for_gpus_computes_on_them() -> None:
    """Replica and accumulator ask for one each, and use it."""
    pods = [one["spec"]["template"]["spec"] for one in rendered("gpu") if one["kind"] == "Deployment"]
    assert len(pods) == 2
    for pod in pods:
        (container,) = pod["containers"]
        assert parsed(container["args"]).device == "cuda"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


@needs_kubectl
def test_an_overlay_for_tls_serves_and_is_asked_by_it() -> None:
    """The certificate is where the command reads it, and probes speak HTTPS."""
    resources = rendered("tls")
    container = replica(resources)
    arguments = parsed(container["args"])
    (mounted,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "tls"]
    assert {str(Path(arguments.tls_cert).parent), str(Path(arguments.tls_key).parent)} == {mounted}
    probes = [container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert [probe["scheme"] for probe in probes] == ["HTTPS"] * 3


def test_manifests_and_image_agree() -> None:
    """Secrets are those that the text makes; the user is the image's."""
    text = yaml.dump([document for path in MANIFESTS for document in documents(path)])
    named = set(re.findall(r"(?:secretName|name): (splitfed-\w+)\n", text)) - {"splitfed-digits"}
    assert named == NEEDED
    made = (DEPLOY / "README.md").read_text("utf-8")
    assert all(f"secret generic {name} " in made for name in NEEDED)
    user = re.search(r"^USER (\d+)$", (DEPLOY / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert user is not None
    assert {pod["securityContext"]["runAsUser"] for pod in pods() if "securityContext" in pod} == {int(user[1])}


def test_image_copies_what_exists() -> None:
    """Every path that the Dockerfile copies is in the repository."""
    lines = re.findall(r"^COPY (.+)$", (DEPLOY / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    for line in lines:
        for path in shlex.split(line)[:-1]:
            assert (ROOT / path).exists(), path


def test_compose_runs_commands_that_exist() -> None:
    """Our services have arguments that `splitfed` takes; owners have no way to the store."""
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    services = found["services"]
    ours = {name: s for name, s in services.items() if s["image"] == "splitfed-digits" and "entrypoint" not in s}
    assert {name: parsed(s["command"]).verb for name, s in ours.items()} == {
        "replica": "serve",
        "accumulator": "accumulate",
    }
    assert all("SPLITFED_STORE" in s["environment"] for s in ours.values())
    owners = [s for name, s in services.items() if name.startswith("site-")]
    assert [s["environment"] for s in owners] == [{}, {}]
    for service in services.values():
        assert {*service.get("depends_on", ())} <= set(services)
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in found["volumes"] or (DEPLOY / source).exists(), source


def test_the_balancer_takes_as_much_as_a_replica() -> None:
    """A body that a replica would take isn't refused before it."""
    allowed = re.search(r"client_max_body_size (\d+)m;", (DEPLOY / "nginx.conf").read_text("utf-8"))
    assert allowed is not None
    assert int(allowed[1]) << 20 == Limits().body


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_run_commands_that_exist(path: Path) -> None:
    """A unit's command parses, ends on SIGTERM within its time, and comes again when it was killed."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(path.read_text("utf-8"))
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"].replace("%i", "8000"))
    assert Path(program).name == "splitfed"
    read = parsed(arguments)
    assert read.verb in path.name
    assert service["Restart"] == "always"
    assert int(service["TimeoutStopSec"]) > getattr(read, "drain_seconds", 30)
