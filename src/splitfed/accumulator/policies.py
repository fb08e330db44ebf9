"""The modes of split federated learning: when to commit, and what staleness costs.

Each is one policy of one accumulator. All modes fold pending gradients into one mean and take one
optimizer step. They differ in how many batches make a commit, in how stale a batch may be and what
that costs it, in what the clients publish of their halves, and in whose body a client trains. A
mode is these answers and no mechanism.

The weight s(τ) of a gradient that was computed τ commits ago damps the gradient and leaves the
denominator of the mean alone (see `mean`), so that one stale batch among fresh ones moves the model
less instead of being blown up to full size again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from splitfed.checks import at_least
from splitfed.errors import InputError

StalenessWeight = Callable[[int], float]


def constant(staleness: int) -> float:
    """s(τ) = 1: a stale gradient counts like a fresh one.

    Raises:
        InputError: the staleness is negative.
    """
    _check_staleness(staleness)
    return 1.0


def inverse_sqrt(staleness: int) -> float:
    """s(τ) = 1/√(1+τ), the weight of FedBuff (Nguyen et al. 2022, arXiv 2106.06639, section 5).

    Raises:
        InputError: the staleness is negative.
    """
    _check_staleness(staleness)
    return 1.0 / math.sqrt(1 + staleness)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of updating body and client halves.

    Raises:
        InputError: a setting out of its range.
    """

    name: str
    """`round`, `buffered`, `synchronous`, `sflv2`, `sflv1`, or one of your own."""
    min_batches: int | None = None
    """The number of pending batches that makes a commit; `None`: the end of the round does, or each
    global step.
    """
    max_batches: int | None = None
    """A commit folds so many pending batches at most, the oldest first; `None` for all of them.

    It needs `min_batches`, and one body for all clients.
    """
    max_staleness: int | None = None
    """Batches whose base is more commits behind are reported as stale and not folded; `None` for
    any.
    """
    staleness_weight: StalenessWeight = constant
    """s(τ)."""
    gradients: bool = False
    """Whether clients publish the gradient of their half and take no local step
    (`push(gradient=True)`).
    """
    per_client: bool = False
    """Whether each client has a body of its own, averaged when the round ends (`PerClient`)."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(
                f"a mode needs a name, got {self.name!r}: "
                f"expected one of {', '.join(MODES)}, or your own"
            )
        if self.min_batches is not None:
            at_least("min_batches", self.min_batches, 1)
        self._check_most()
        if self.max_staleness is not None:
            at_least("max_staleness", self.max_staleness, 0)
        if not callable(self.staleness_weight):
            raise InputError(
                f"staleness_weight is {self.staleness_weight!r}: "
                "expected a function, as inverse_sqrt"
            )

    def _check_most(self) -> None:
        if self.max_batches is None:
            return
        if self.min_batches is None or self.per_client:
            raise InputError(
                f"max_batches is {self.max_batches!r} in mode {self.name!r}, whose commits aren't "
                "made by numbers of batches on one body: leave it out, or take such as 'buffered'"
            )
        check_most(self.max_batches, self.min_batches)

    @property
    def streams(self) -> bool:
        """Whether the body's batches are committed while a round goes on, not at its end."""
        return self.min_batches is not None

    @property
    def shares_steps(self) -> bool:
        """Whether clients train on what others have done in the same round."""
        return self.gradients or (self.streams and not self.per_client)

    @property
    def shared_lineages(self) -> tuple[str, ...]:
        """The lineages whose commits fold the batches of all clients."""
        return ("client",) if self.per_client else ("body", "client")

    @property
    def accumulator(self) -> str:
        """The class that commits the body's batches, with its article."""
        return "a PerClient" if self.per_client else "an Accumulator"

    def settings(self) -> dict[str, Any]:
        """The keywords of the accumulator of the body that follows this mode."""
        numbers = {"min_batches": self.min_batches or 1, "max_batches": self.max_batches}
        return {
            **({} if self.per_client else numbers),
            "max_staleness": self.max_staleness,
            "staleness_weight": self.staleness_weight,
        }

    def server_settings(self) -> dict[str, Any]:
        """The keywords of the `SplitServer` that follows this mode."""
        return {"per_client": self.per_client}

    def describe(self) -> dict[str, Any]:
        """The mode as plain JSON, for records."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "staleness_weight": getattr(self.staleness_weight, "__name__", "own")}


_MODES = (
    Mode("round"),
    Mode("buffered", min_batches=8, max_staleness=16, staleness_weight=inverse_sqrt),
    Mode("synchronous", gradients=True),
    Mode("sflv2", min_batches=1),
    Mode("sflv1", min_batches=1, per_client=True),
)
MODES = tuple(one.name for one in _MODES)


def mode(name: str | Mode, /, **settings: Any) -> Mode:
    """A mode by its name, with settings of your own in place of its usual ones.

    - `round`: one commit over all batches of a round, as in the study that this library builds on;
    - `buffered`: a commit whenever 8 batches are pending (FedBuff, Nguyen et al. 2022, arXiv
      2106.06639);
    - `synchronous`: a commit per global step, over one batch of every sampled client: large-batch
      training;
    - `sflv2`: a commit per batch on one body (Thapa et al. 2020, arXiv 2004.12088, section 3.2);
    - `sflv1`: a commit per batch on a body per client, and their average when the round ends (the
      same).

    A commit per batch needs somebody who looks after each batch, as `simulate` does. A `Federation`
    looks at each poll and folds what came since into one commit; `Accumulator.run(poll=0.005)`
    beside it makes commits in between.

    Args:
        name: One of these, or a `Mode`.
        settings: Fields of `Mode`, such as `min_batches=20`.

    Raises:
        InputError: an unknown name or field, or a setting out of its range.
    """
    found = name if isinstance(name, Mode) else _by_name(name)
    unknown = sorted(settings.keys() - set(Mode.__dataclass_fields__))
    if unknown:
        raise InputError(
            f"a mode has no setting {unknown[0]!r}: expected {', '.join(Mode.__dataclass_fields__)}"
        )
    return replace(found, **settings)


def _by_name(name: str) -> Mode:
    for one in _MODES:
        if one.name == name:
            return one
    raise InputError(
        f"mode {name!r} isn't known: expected one of {', '.join(MODES)}, or a policies.Mode"
    )


def check_most(max_batches: int, min_batches: int) -> None:
    """Check the most batches of a commit against the least.

    Raises:
        InputError: it isn't an integer of at least 1, or is below the least.
    """
    at_least("max_batches", max_batches, 1)
    if max_batches < min_batches:
        raise InputError(
            f"max_batches is {max_batches}: expected at least min_batches={min_batches}, "
            "the number that makes a commit"
        )


def _check_staleness(staleness: int) -> None:
    if staleness < 0:
        raise InputError(f"staleness {staleness} isn't allowed: expected 0 or more commits")
