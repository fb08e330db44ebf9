"""What came of a round, as a plain dict: read off the commit records, so that whoever makes the report makes the same.

A commit's record lists every batch that it closed, by what became of it. A round's account is that of the commits
between the versions that it began from and those that it ended at, whoever made them; with the plan and the ending it
says who took part, who was late, who is missing, and what was dropped and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from splitfed.protocol.ids import BatchId
from splitfed.store.commit import Commit
from splitfed.store.rounds import Ending, Plan
from splitfed.store.rows import Row
from splitfed.store.selection import Selection
from splitfed.store.store import GradientStore

AVERAGED = 0  # the incarnation under which the change of a client's own body is counted


@dataclass(slots=True)
class Tally:
    """What the commits of one lineage closed in a round, by client."""

    folded: Counter[str] = field(default_factory=Counter)
    staleness: dict[str, int] = field(default_factory=dict)
    """Of each client's newest folded batch, in commits."""
    stale: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    """Those that a commit itself found unfit; what was refused before isn't among them."""
    num_commits: int = 0
    num_stale: int = 0
    num_rejected: int = 0
    fresh: set[str] = field(default_factory=set)
    """Clients with a folded batch that began in this round."""

    def add(self, commit: Commit, began: int, judged: Selection) -> None:
        """Count a commit in.

        Args:
            commit: Its record.
            began: The version that the round began from.
            judged: What was decided of batches before.
        """
        self.num_commits += commit.kind == "fold"
        self.num_stale += commit.num_stale
        self.num_rejected += commit.num_rejected
        for batch in commit.folded:
            if batch.incarnation == AVERAGED:
                continue
            base = commit.base_of(batch)
            self.folded[batch.client_id] += 1
            self.staleness[batch.client_id] = commit.version - 1 - base
            if base >= began:
                self.fresh.add(batch.client_id)
        self.stale.update(batch.client_id for batch in commit.stale if not judged.closes(batch))
        self.rejected.update(batch.client_id for batch in commit.rejected if not judged.closes(batch))


def make_report(store: GradientStore, plan: Plan, ending: Ending) -> Row:
    """The report of a round that was carried out: the row of kind 'round', as far as the store can tell.

    Args:
        store: The store.
        plan: The round.
        ending: How it was decided.
    """
    versions = {lineage: store.latest_version(lineage) for lineage in ("body", "client")}
    body = _tally(store, "body", plan, versions["body"], ending.body)
    halves = _tally(store, "client", plan, versions["client"], ending.client)
    first = store.rounds().plan(1)
    dropped = _dropped(body, halves, ending)
    kept = sorted(ending.samples) if ending.status == "below_quorum" and plan.below_quorum == "keep" else []
    clients = _clients(plan, ending, body, halves, dropped, kept)
    return {
        "kind": "round",
        "round": plan.number,
        "status": ending.status,
        "version": versions["body"],
        "client_version": versions["client"],
        "seconds": ending.ended - first.started,
        "time": ending.time - first.opened,
        "sampled": list(plan.sampled),
        "participants": sorted(halves.fresh),
        "late": sorted({*ending.late, *(halves.folded.keys() - halves.fresh)}),
        "missing": sorted({*plan.sampled} - {*ending.heard}),
        "kept": kept,
        "dropped": dropped,
        "clients": clients,
        "commits": body.num_commits,
        "batches": sum(body.folded.values()),
        "gradients_folded": sum(body.folded.values()),
        "gradients_waiting": len(store.waiting("body")),
        "gradients_stale": body.num_stale,
        "gradients_rejected": body.num_rejected,
    }


def commit_rows(
    store: GradientStore, lineage: str, after: int, upto: int, round_number: int | None = None
) -> list[Row]:
    """The rows of kind 'commit' of some versions of a lineage.

    Args:
        store: The store.
        lineage: Which line.
        after: The version before the first.
        upto: The last version.
        round_number: The round in which they were made, if there was one.
    """
    found = (store.lineage(lineage).commit(version) for version in range(after + 1, upto + 1))
    return [
        {
            "kind": "commit",
            "lineage": lineage,
            "version": commit.version,
            "time": commit.time,
            "num_batches": commit.num_batches,
            "num_samples": commit.num_samples,
            "staleness": {str(age): count for age, count in commit.staleness.items()},
            "num_stale": commit.num_stale,
            "num_rejected": commit.num_rejected,
            "num_skipped": commit.num_skipped,
            "delay": None,
        }
        | ({} if round_number is None else {"round": round_number})
        for commit in found
    ]


def _tally(store: GradientStore, lineage: str, plan: Plan, upto: int, judged: Selection) -> Tally:
    began, tally = plan.version(lineage), Tally()
    for version in range(began + 1, upto + 1):
        commit = store.lineage(lineage).commit(version)
        tally.add(commit, began if plan.barrier else 0, judged)  # without a barrier nothing is late
        for batch in commit.folded:
            if batch.incarnation == AVERAGED:
                for own in _line(store, batch):
                    tally.add(own, 0, judged)
    return tally


def _line(store: GradientStore, change: BatchId) -> Iterator[Commit]:
    """The commits on a client's own body that make up a change which was averaged (SFLV1), newest first."""
    line = store.lineage(f"body@{change.client_id}")
    is_within = False
    for version in range(line.head(), 0, -1):
        commit = line.commit(version)
        if commit.kind == "end":
            is_within = commit.turn == change.seq
        elif is_within and commit.kind != "fold":
            return
        elif is_within:
            yield commit


def _dropped(body: Tally, halves: Tally, ending: Ending) -> dict[str, str]:
    """Why something of a client doesn't count; what the ending said comes first."""
    found: dict[str, list[str]] = {name: [why] for name, why in ending.dropped.items()}
    for name in halves.rejected:
        found.setdefault(name, []).append("its update is unfit (not finite, or it doesn't fit the half)")
    for name in halves.stale:
        found.setdefault(name, []).append("its update is too old (max_staleness)")
    for name, count in body.rejected.items():
        found.setdefault(name, []).append(f"{count} of its batches aren't finite (NaN or Inf) or don't fit")
    for name, count in body.stale.items():
        found.setdefault(name, []).append(f"{count} of its batches are too old (max_staleness)")
    return {name: "; ".join(why) for name, why in sorted(found.items())}


def _clients(
    plan: Plan, ending: Ending, body: Tally, halves: Tally, dropped: dict[str, str], kept: list[str]
) -> dict[str, Row]:
    """One entry for each client that the round has something to say of."""
    found: dict[str, Row] = {}
    for name in sorted({*plan.sampled, *halves.folded, *body.folded, *dropped, *kept}):
        entry: Row = {"status": _status(name, halves, dropped, kept)}
        if name in ending.samples:
            entry["num_samples"] = ending.samples[name]
        entry["batches"] = body.folded[name]
        if name in halves.staleness:
            entry["staleness"] = halves.staleness[name]
        found[name] = entry
    return found


def _status(name: str, halves: Tally, dropped: dict[str, str], kept: list[str]) -> str:
    """What became of a client's update."""
    if name in halves.folded:
        return "folded" if name in halves.fresh else "late"
    if name in kept:
        return "kept"
    return "dropped" if name in dropped else "missing"
