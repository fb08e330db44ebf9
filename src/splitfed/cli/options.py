"""Arguments that several verbs have, and the objects that they name: body, store, server.

`module:attribute` is the user's own code, loaded as uvicorn loads an app: the folder that the
command runs in comes first on the import path, as for a script there. An error within the user's
module keeps its own message and the line where it was raised; without these an import error is a
riddle.

The URL of a store is an argument, its credentials never are. Arguments are seen by everyone on the
machine and end up in shell histories, so keys and endpoints of an object store come from the
environment, as its client library reads it, or fsspec: FSSPEC_<PROTOCOL>_<OPTION>.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from splitfed.checks import install
from splitfed.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from splitfed.server.server import SplitServer
    from splitfed.service.metrics import CommitMetrics, RequestMetrics
    from splitfed.store.store import GradientStore

STORE_VARIABLE = "SPLITFED_STORE"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""How the verbs that answer requests log."""
_MOST_THREADS = 4096
_MOST_NAMES = 12


# -------------------------------------------------------------------------- the user's own code


def load_object(spec: str, what: str) -> Any:
    """The attribute that `module:attribute` names; dots after the colon go deeper.

    Args:
        spec: Such as `hospital.models:body`.
        what: The name of the argument, for the message.

    Raises:
        InputError: it isn't of this form, there is no such module or attribute, or importing or
            reading it raised.
    """
    module, path = _module_and_path(spec, what)
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        near = ""
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "\0"):
            near = _nearest(str(error.name).rpartition(".")[2], _modules_beside(error.name))
        raise InputError(
            f"{what} {spec!r}: importing {module!r} from {folder} raised "
            f"{_description(error)}{near}"
        ) from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise InputError(
                f"{what} {spec!r}: {module!r} has no attribute {name!r} of {path!r}"
                f"{_nearest(name, dir(found))}"
            ) from error
        except Exception as error:
            raise InputError(
                f"{what} {spec!r}: reading {name!r} raised {_description(error)}"
            ) from error
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    """What a message says of the names that are there: the nearest, or some that may be meant."""
    public = [other for other in known if not other.startswith("_")]
    near = difflib.get_close_matches(name, public, n=3)
    if near:
        return f"; the nearest there are {near}"
    return f"; there are {public}" if 0 < len(public) <= _MOST_NAMES else ""


def _modules_beside(name: str | None) -> list[str]:
    """The modules of the folder or package in which one wasn't found."""
    package = str(name).rpartition(".")[0]
    places: Iterable[str] | None = [os.getcwd()]
    if package:
        places = getattr(sys.modules.get(package), "__path__", None)
    return [found.name for found in pkgutil.iter_modules(places)] if places else []


def _module_and_path(spec: str, what: str) -> tuple[str, str]:
    module, colon, path = spec.partition(":")
    if not (module and colon and path):
        raise InputError(f"{what} is {spec!r}: expected module:attribute, such as my_models:body")
    if "/" in module or module.startswith(".") or module.endswith(".py"):
        raise InputError(
            f"{what} is {spec!r}, which names a file: "
            "expected the name by which Python imports it from the current folder, "
            "such as my_models:body for my_models.py, "
            "or sites.my_models:body for sites/my_models.py"
        )
    return module, path


def load_body(spec: str, what: str = "APP", part: str = "body") -> nn.Module:
    """The body that APP names: a module, or a function or class without arguments that returns one.

    Args:
        spec: The name.
        what: The argument that it was given as.
        part: Which part of a model it's to be, in words.

    Raises:
        InputError: it is neither, or calling it raised.
    """
    from torch import nn

    found = load_object(spec, what)
    # A module can be called too, but then it computes: only what isn't one yet is called.
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise InputError(f"{what} {spec!r}: calling it raised {_description(error)}") from error
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{what} {spec!r} is a {type(found).__name__}: "
            f"expected the {part} as an nn.Module, or a function that returns it, "
            "such as lambda: splitfed.split(model, '1:5')[1]"
        )
    return found


def _description(error: Exception) -> str:
    """The error, and the place in the user's code where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    # A place in this file or in Python's import tells the user nothing: a module that isn't
    # there, a function that needs arguments.
    if last.filename == __file__ or last.filename.startswith("<frozen importlib"):
        return f"{type(error).__name__}: {error}"
    place = f"{os.path.basename(last.filename)}, line {last.lineno}"
    return f"{type(error).__name__}: {error} ({place})"


# ------------------------------------------------------------------------------------- the store


def add_store(parser: argparse.ArgumentParser, *, writes: bool = True) -> None:
    """Add the arguments for the store, and for the durability of what the verb writes to it."""
    parser.add_argument(
        "--store",
        metavar="URL",
        default=os.environ.get(STORE_VARIABLE),
        help="the store of the run: a folder, or a URL such as s3://bucket/run "
        f"(default: ${STORE_VARIABLE}); credentials are taken from the environment",
    )
    if not writes:
        parser.set_defaults(sync="power", shared=False)
        return
    parser.add_argument(
        "--sync",
        choices=("power", "process"),
        default="power",
        help="what a batch that was answered survives: a power cut, or the death of processes "
        "only, which is faster (default: power)",
    )
    parser.add_argument(
        "--shared",
        action="store_true",
        help="let users of the same group work in a local store, as far as the umask lets them "
        "(default: only where the folder that holds it is setgid)",
    )


def add_beginning(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verbs that may begin a run, which decide on how it is kept."""
    parser.add_argument(
        "--durability",
        choices=("gradient", "log"),
        help="what of a batch is on file when it is acknowledged: its gradient, as large as the "
        "body, or what that follows from, as large as what crosses the cut; said by whoever begins "
        "the run (default: the run's; for a new one, log where a gradient is large)",
    )
    parser.add_argument(
        "--keep-forwards",
        action="store_true",
        help="a run that begins here keeps what its gradients follow from, for `splitfed replay`: "
        "as many bytes a batch as cross the cut",
    )


def open_store(arguments: argparse.Namespace) -> GradientStore:
    """The store that the arguments name; nothing is read or written yet.

    Raises:
        InputError: none is named, or the URL isn't one.
    """
    if not arguments.store:
        raise InputError(
            f"which store? Give --store URL, such as --store runs/demo, or set {STORE_VARIABLE}"
        )
    from splitfed.store.store import GradientStore

    return GradientStore(
        arguments.store,
        sync=arguments.sync,
        shared=arguments.shared,
        keep_forwards=getattr(arguments, "keep_forwards", False),
    )


# ---------------------------------------------------------------------------- body and server


def add_body(parser: argparse.ArgumentParser, *, writes: bool = True) -> None:
    """Add the arguments of all verbs that compute: the body, the store, device and threads."""
    parser.add_argument(
        "app",
        metavar="APP",
        help="the body as module:attribute: an nn.Module, or a function that returns it, "
        "such as my_model:body",
    )
    add_store(parser, writes=writes)
    if writes:
        add_beginning(parser)
    parser.add_argument(
        "--device",
        metavar="D",
        help="where to compute, such as cuda:0 (default: the body's own)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of torch; all processes of a run need the same number for the same bits "
        "(default: torch's)",
    )


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a `SplitServer`."""
    add_body(parser)
    parser.add_argument(
        "--loss",
        metavar="MODULE:ATTRIBUTE",
        help="for client.loss(x, y): a function of outputs and target, "
        "such as torch.nn.functional:cross_entropy",
    )
    parser.add_argument(
        "--keep-graphs",
        type=int,
        default=8,
        metavar="N",
        help="batches whose graphs stay in memory, which saves their recompute; 0 for none "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--settings",
        action="append",
        default=[],
        metavar="PATTERN",
        help="what clients may set of the body for their calls, beside train and eval mode, such "
        "as '*.p' or layer.beta; may be repeated (default: nothing)",
    )


def add_size_limits(group: argparse._ArgumentGroup) -> None:
    """Add the limits of messages and memory, which are the same however requests come."""
    for option, unit, about in (
        ("--max-body", "BYTES", "of a request (default: 256 MiB)"),
        ("--max-tensors", "N", "in a request (default: 10000)"),
        ("--max-samples", "N", "in a batch (default: 1000000)"),
        ("--memory", "BYTES", "of calls under way and kept graphs (default: 4 GiB)"),
        ("--client-memory", "BYTES", "of these, of one client (default: 256 MiB)"),
    ):
        group.add_argument(option, type=int, metavar=unit, help=about)
    group.add_argument(
        "--client-calls",
        type=int,
        metavar="N",
        help="calls that one client may have on record without a backward (default: 4096)",
    )
    group.add_argument(
        "--client-disk",
        type=int,
        metavar="BYTES",
        help="what one client may have open in the store: recorded calls and pending batches "
        "(default: 32 GiB)",
    )


def size_limits(arguments: argparse.Namespace) -> dict[str, int]:
    """Those of the limits of `add_size_limits` that were given, as a service names them."""
    options = {
        "body": "max_body",
        "tensors": "max_tensors",
        "samples": "max_samples",
        "memory": "memory",
        "client_memory": "client_memory",
    }
    return given(arguments, options)


def given(arguments: argparse.Namespace, options: Mapping[str, str]) -> dict[str, Any]:
    """The values of options that the command line has, by the names of the settings they are for.

    Args:
        arguments: The command line's.
        options: The option of each setting.
    """
    found = {name: getattr(arguments, option, None) for name, option in options.items()}
    return {name: value for name, value in found.items() if value is not None}


def set_threads(arguments: argparse.Namespace) -> None:
    """Let torch compute with as many threads as the arguments say.

    The number is part of the numerics class: it is set before anything is computed or begun.

    Raises:
        InputError: fewer than one, or more than torch can count.
    """
    if arguments.threads is None:
        return
    if not 1 <= arguments.threads <= _MOST_THREADS:
        raise InputError(
            f"--threads is {arguments.threads}: "
            f"expected 1 to {_MOST_THREADS}, as many as there are cores at most"
        )
    import torch

    torch.set_num_threads(arguments.threads)


def check_device(name: str | None) -> str | None:
    """The name of a device, if torch knows it and the machine has it.

    Raises:
        InputError: it doesn't.
    """
    if name is None:
        return None
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name!r} can't be used: {reason}") from error
    return name


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a process tells its metrics."""
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--metrics-port",
        type=int,
        metavar="N",
        help="answer Prometheus at /metrics of this port; 0 for any that is free (default: none)",
    )
    group.add_argument(
        "--metrics-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen at for it; there is nothing secret (default: %(default)s)",
    )


@contextlib.contextmanager
def metrics_at(
    arguments: argparse.Namespace, metrics: RequestMetrics | CommitMetrics | None
) -> Iterator[None]:
    """Within this context Prometheus is answered, where the arguments say so.

    Raises:
        InputError: the address can't be used.
    """
    if metrics is None:
        yield
        return
    from splitfed.service.metrics import listening

    with listening(metrics.counts, arguments.metrics_host, arguments.metrics_port) as url:
        print(f"splitfed: metrics on {url}", flush=True)
        yield


def check_metrics(arguments: argparse.Namespace) -> bool:
    """Whether metrics are asked for, after a check that they can be told.

    Raises:
        InputError: prometheus_client isn't installed.
    """
    if arguments.metrics_port is None:
        return False
    if importlib.util.find_spec("prometheus_client") is None:
        raise InputError(f"--metrics-port needs prometheus-client: {install('metrics')}")
    return True


def check_poll(arguments: argparse.Namespace) -> None:
    """Check the pause between two looks at the store.

    Raises:
        InputError: it is no time.
    """
    if not arguments.poll > 0:
        raise InputError(f"--poll is {arguments.poll}: expected a number of seconds above 0")


def open_server(arguments: argparse.Namespace) -> SplitServer:
    """The server that the arguments describe; it begins the store if nobody has.

    Raises:
        InputError: an argument doesn't fit.
    """
    set_threads(arguments)
    if arguments.keep_graphs < 0:
        raise InputError(f"--keep-graphs is {arguments.keep_graphs}: expected 0 or more")
    store = open_store(arguments)
    from splitfed.server.server import SplitServer
    from splitfed.store.quota import Quota

    quota = Quota(**given(arguments, {"calls": "client_calls", "disk": "client_disk"}))

    loss = None if arguments.loss is None else load_object(arguments.loss, "--loss")
    if loss is not None and not callable(loss):
        raise InputError(
            f"--loss {arguments.loss!r} is a {type(loss).__name__}: expected a function"
        )
    return SplitServer(
        load_body(arguments.app),
        store,
        device=check_device(arguments.device),
        loss_fn=loss,
        keep_graphs=arguments.keep_graphs,
        settings=arguments.settings,
        quota=quota,
        durability=arguments.durability,
    )
