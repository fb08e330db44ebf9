"""`splitfed accumulate`: fold the pending gradients of a store into the next version.

The optimizer is named, not pickled: a class of torch.optim with its settings, or a factory of the
user's own. Its state is in the store, so whoever starts the next accumulator must name the same
one.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from splitfed.cli.options import (
    add_body,
    add_metrics,
    check_device,
    check_metrics,
    check_poll,
    load_body,
    load_object,
    metrics_at,
    open_store,
    set_threads,
)
from splitfed.cli.signals import Stopping, keep_going
from splitfed.errors import InputError, SplitFedError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from splitfed.accumulator.accumulator import Accumulator
    from splitfed.accumulator.policies import Mode
    from splitfed.service.metrics import CommitMetrics
    from splitfed.store.commit import Commit

_DESCRIPTION = """\
Fold the gradients that wait in a store into their mean, take one optimizer step, and commit the
next version; again and again, or once. Any number may run on one store, and any may be killed at
any moment. SIGTERM ends it after the commit under way."""

_MODES = ("buffered", "sflv2", "grouped")
"""The modes whose commits wait for no end of a round: those are a `Federation`'s."""
_OPTIMIZER_SETTINGS = ("lr", "momentum", "weight_decay")


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "accumulate",
        help="turn the gradients that wait into the next version",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_body(parser)
    add_optimizer(parser.add_argument_group("optimizer"))
    _add_policy(parser.add_argument_group("when to commit, and what counts"))
    parser.add_argument(
        "--once",
        action="store_true",
        help="commit the pending gradients, if they are enough, and exit",
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=0.5,
        metavar="S",
        help="longest pause between two looks when too few wait (default: %(default)s)",
    )
    parser.add_argument(
        "--history",
        metavar="FILE",
        help="write a line of JSON per commit to this file, whoever made it; "
        "'splitfed report FILE' draws it",
    )
    add_metrics(parser)
    parser.set_defaults(run=run)


def add_optimizer(group: argparse._ArgumentGroup, *, required: bool = True) -> None:
    """Add the arguments that name optimizer and scheduler."""
    group.add_argument(
        "--optimizer",
        required=required,
        metavar="NAME",
        help="a class of torch.optim, such as AdamW; "
        "or module:attribute, a function that makes one from parameters"
        + ("" if required else " (default: what is on record)"),
    )
    group.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="its learning rate, for the whole run (default: the class's own)",
    )
    group.add_argument("--momentum", type=float, metavar="X", help="its momentum")
    group.add_argument("--weight-decay", type=float, metavar="X", help="its weight decay")
    group.add_argument(
        "--lr-scheduler",
        metavar="MODULE:ATTRIBUTE",
        help="a function that makes a scheduler from the optimizer; it steps once per commit",
    )


def _add_policy(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mode",
        choices=_MODES,
        help="take the settings of a mode; what else is given here changes them. In mode grouped "
        "body and client halves are committed together: --half is needed then",
    )
    group.add_argument(
        "--group",
        type=int,
        metavar="G",
        help="in mode grouped: commit when so many batches of any clients wait (default: 4)",
    )
    group.add_argument(
        "--half",
        metavar="MODULE:ATTRIBUTE",
        help="in mode grouped: the client half as APP is the body; the same optimizer steps it",
    )
    group.add_argument(
        "--half-lr", type=float, metavar="X", help="its learning rate (default: that of the body)"
    )
    group.add_argument(
        "--personal",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names in the half that stay with each client; may be repeated",
    )
    group.add_argument(
        "--min-batches",
        type=int,
        metavar="K",
        help="commit when so many wait (default: 1, or that of the mode)",
    )
    group.add_argument(
        "--max-batches",
        type=int,
        metavar="N",
        help="fold so many in a commit at most, the oldest first (default: all that wait)",
    )
    group.add_argument(
        "--max-staleness",
        type=int,
        metavar="N",
        help="leave out batches more commits behind (default: any count, or that of the mode)",
    )
    group.add_argument(
        "--staleness-weight",
        choices=("constant", "inverse_sqrt"),
        help="what a batch counts that is t commits behind: 1, or 1/sqrt(1+t) "
        "(default: constant, or that of the mode)",
    )
    group.add_argument(
        "--clip-norm", type=float, metavar="X", help="clip the mean gradient to this 2-norm"
    )
    group.add_argument(
        "--lineage",
        default="body",
        metavar="NAME",
        help="body; or client, to average client halves: "
        "APP is the half then, and --optimizer SGD --lr 1 is FedAvg (default: %(default)s)",
    )
    group.add_argument(
        "--keep-versions",
        type=int,
        metavar="N",
        help="versions that stay readable (default: 16, or staleness + 2)",
    )
    group.add_argument(
        "--keep-bytes",
        type=int,
        metavar="N",
        help="bytes of older versions that stay for open calls (default: 64 MiB, or 4 x weights)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Accumulate until a signal ends it, or once.

    Raises:
        InputError: an argument doesn't fit.
    """
    check_poll(arguments)
    is_told = check_metrics(arguments)
    accumulator = open_accumulator(arguments)
    watchers = _watchers(arguments, accumulator)
    metrics = _metrics(accumulator) if is_told else None
    if metrics is not None:
        watchers.append(metrics.note)

    def report(commit: Commit) -> None:
        print(_commit_line(commit), flush=True)
        for watch in watchers:
            watch(commit)

    if arguments.once:
        commit = accumulator.step()
        if commit is None:
            print(_idle_line(accumulator, arguments.lineage), flush=True)
        else:
            report(commit)
        return 0

    with Stopping() as stopping, metrics_at(arguments, metrics):
        store = accumulator.store.shown
        print(f"splitfed: accumulating {arguments.lineage} in {store}", flush=True)
        keep_going(
            lambda: accumulator.run(stopping.event, poll=arguments.poll, on_commit=report),
            stopping.event,
        )
    return 0


def _watchers(
    arguments: argparse.Namespace, accumulator: Accumulator
) -> list[Callable[[Commit], object]]:
    """What hears of each commit besides the terminal."""
    found: list[Callable[[Commit], object]] = []
    if arguments.history:
        from splitfed.tracking.history import Follower

        lineages = [arguments.lineage]
        if arguments.half is not None:
            lineages.append("client")
        follower = Follower(accumulator.store, arguments.history, lineages)
        follower.catch_up()
        found.append(lambda commit: follower.catch_up())
    return found


def _metrics(accumulator: Accumulator) -> CommitMetrics:
    from splitfed.service.metrics import CommitMetrics

    return CommitMetrics(accumulator.store, accumulator.lineage, lambda: accumulator.num_conflicts)


def open_accumulator(arguments: argparse.Namespace) -> Accumulator:
    """The accumulator that the arguments describe; it begins the store if nobody has.

    Raises:
        InputError: an argument doesn't fit.
    """
    set_threads(arguments)
    mode = _mode(arguments)
    store = open_store(arguments)
    from splitfed.accumulator.accumulator import Accumulator

    shared = {
        **mode.settings(),
        "lr_scheduler": scheduler_factory(arguments),
        "clip_norm": arguments.clip_norm,
        "keep_versions": arguments.keep_versions,
        "keep_bytes": arguments.keep_bytes,
        "device": check_device(arguments.device),
    }
    body, optimizer = load_body(arguments.app), optimizer_factory(arguments)
    halves = None
    personal: dict[str, Any] = {"personal": tuple(arguments.personal)}
    if mode.gradients:
        half = load_body(arguments.half, "--half", "client half")
        rate = arguments.lr if arguments.half_lr is None else arguments.half_lr
        steps = optimizer_factory(argparse.Namespace(**{**vars(arguments), "lr": rate}))
        halves = Accumulator(half, store, steps, lineage="client", **personal, **shared)
        personal = {}
    return Accumulator(
        body,
        store,
        optimizer,
        lineage=arguments.lineage,
        halves=halves,
        durability=arguments.durability,
        **personal,
        **shared,
    )


def _mode(arguments: argparse.Namespace) -> Mode:
    """When to commit, and what counts.

    Raises:
        InputError: arguments that don't go together, or a setting out of its range.
    """
    from splitfed.accumulator import policies

    names = ("group", "min_batches", "max_batches", "max_staleness")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.staleness_weight is not None:
        given["staleness_weight"] = getattr(policies, arguments.staleness_weight)
    settings = {name: value for name, value in given.items() if value is not None}
    mode = policies.mode(arguments.mode or policies.Mode("accumulate", min_batches=1), **settings)
    if mode.gradients and (arguments.half is None or arguments.lineage != "body"):
        raise InputError(
            "--mode grouped commits body and client halves together: expected APP as the body, "
            "--half as the client half, and no --lineage"
        )
    if not mode.gradients and (arguments.half is not None or arguments.half_lr is not None):
        raise InputError("--half and --half-lr go with --mode grouped: leave them out")
    return mode


def scheduler_factory(arguments: argparse.Namespace) -> Callable[[Any], Any] | None:
    """The function that makes the scheduler from the optimizer, if one is named."""
    if arguments.lr_scheduler is None:
        return None
    return _user_factory(arguments.lr_scheduler, "--lr-scheduler")


def optimizer_factory(arguments: argparse.Namespace) -> Callable[[Any], Any]:
    """The function that makes the optimizer from parameters.

    Raises:
        InputError: there is no such class, or it doesn't take a setting.
    """
    name = arguments.optimizer
    given = {setting: getattr(arguments, setting) for setting in _OPTIMIZER_SETTINGS}
    settings = {setting: value for setting, value in given.items() if value is not None}
    if ":" in name:
        if settings:
            option = _option(next(iter(settings)))
            raise InputError(f"{option} goes with a class of torch.optim, not {name}")
        return _user_factory(name, "--optimizer")
    kind = _optimizer_class(name)
    _check_settings(kind, settings)

    def make(params: Any) -> Any:
        try:
            return kind(params, **settings)
        except (TypeError, ValueError) as error:
            refused = settings or "to go without settings"
            raise InputError(f"torch.optim.{name} refuses {refused}: {error}") from error

    return make


def _optimizer_class(name: str) -> Callable[..., Optimizer]:
    import torch

    kind = getattr(torch.optim, name, None)
    # Modules and functions of torch.optim are no optimizers.
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(
            f"--optimizer {name!r} isn't a class of torch.optim: "
            "expected such as SGD, Adam or AdamW"
        )
    return kind


def _check_settings(kind: Callable[..., Optimizer], settings: Mapping[str, float]) -> None:
    known = inspect.signature(kind).parameters
    for setting, value in settings.items():
        if not math.isfinite(value):
            raise InputError(f"{_option(setting)} is {value}: expected a finite number")
        if setting not in known:
            raise InputError(
                f"{_option(setting)}: torch.optim.{kind.__name__} takes none; leave it out"
            )


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _user_factory(spec: str, what: str) -> Callable[[Any], Any]:
    """A factory of the user's whose errors are a user's mistake, told in one line."""
    factory = load_object(spec, what)

    def make(given: Any) -> Any:
        try:
            return factory(given)
        except SplitFedError:
            raise
        except Exception as error:
            raise InputError(f"{what} {spec!r} raised {type(error).__name__}: {error}") from error

    return make


def _commit_line(commit: Commit) -> str:
    batches = "1 batch" if commit.num_batches == 1 else f"{commit.num_batches} batches"
    parts = [batches, f"{commit.num_samples:g} samples"]
    for kind in ("stale", "rejected", "skipped"):
        count = getattr(commit, f"num_{kind}")
        if count:
            parts.append(f"{count} {kind}")
    return f"version {commit.version}: {', '.join(parts)}"


def _idle_line(accumulator: Accumulator, lineage: str) -> str:
    pending = len(accumulator.store.waiting(lineage))
    return f"nothing to commit: {pending} of {accumulator.min_batches} batches wait"
