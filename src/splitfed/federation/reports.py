"""The report of a round, as a plain dict that is read off the commit records.

So whoever makes it makes the same. A commit's record lists every batch that it closed, by what
became of it. A round's account is that of the commits between the versions that it began from and
those that it ended at, whoever made them; with the plan and the ending it says who took part, who
was late, who is missing, and what was dropped and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from splitfed.protocol.flows import Flow, added, entry
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import Outcome, Verdict
from splitfed.store.commit import Commit
from splitfed.store.rounds import Ending, Plan
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore

# The incarnation under which the change of a client's own body is counted, once a round: that of no
# process, for those are numbered from 1.
AVERAGED = 0


@dataclass(slots=True)
class Tally:
    """What the commits of one lineage closed in a round, counted by client."""

    closed: dict[Outcome, Counter[str]] = field(
        default_factory=lambda: {outcome: Counter() for outcome in Outcome}
    )
    """Batches by outcome and client; those that the ending closed aren't among them."""
    staleness: dict[str, int] = field(default_factory=dict)
    """Of each client's newest folded batch, in commits."""
    fresh: set[str] = field(default_factory=set)
    """Clients with a folded batch that began in this round."""
    flows: dict[str, Flow] = field(default_factory=dict)
    """What the clients of folded updates told of their compression."""
    num_commits: int = 0
    num_stale: int = 0
    num_rejected: int = 0

    @property
    def folded(self) -> Counter[str]:
        """Folded batches, by client."""
        return self.closed[Outcome.FOLDED]

    @property
    def stale(self) -> Counter[str]:
        """Batches that a commit itself found too old, by client."""
        return self.closed[Outcome.STALE]

    @property
    def rejected(self) -> Counter[str]:
        """Batches that a commit itself found unfit, by client."""
        return self.closed[Outcome.REJECTED]

    def add(self, commit: Commit, began: int, judged: Verdict) -> None:
        """Count a commit in.

        Args:
            commit: Its record.
            began: The version that the round began from.
            judged: What the ending decided of its batches.
        """
        self.num_commits += commit.kind == "fold"
        self.num_stale += commit.num_stale
        self.num_rejected += commit.num_rejected
        self.flows = added([self.flows, commit.flows])
        for batch, outcome in commit.verdict.items():
            if outcome is Outcome.FOLDED:
                self._add_folded(commit, batch, began)
            elif not judged.closes(batch):
                self.closed[outcome][batch.client_id] += 1

    def _add_folded(self, commit: Commit, batch: BatchId, began: int) -> None:
        # A change that was averaged is no batch: those that it is made of are counted for it.
        if batch.incarnation == AVERAGED:
            return
        base = commit.base_of(batch)
        self.folded[batch.client_id] += 1
        self.staleness[batch.client_id] = commit.version - 1 - base
        if base >= began:
            self.fresh.add(batch.client_id)


def make_report(store: GradientStore, plan: Plan, ending: Ending) -> Row:
    """The report of a round that was carried out: the row of kind 'round'.

    It has the keys that can be known from the store.

    Args:
        store: The store.
        plan: The round.
        ending: How it was decided.
    """
    pair = store.pair()
    versions = {"body": pair.body, "client": pair.client}
    body = _tally(store, "body", plan, versions["body"], ending)
    halves = _tally(store, "client", plan, versions["client"], ending)
    first = store.rounds().plan(1)
    dropped = _dropped(body, halves, ending)
    is_kept = ending.status == "below_quorum" and plan.below_quorum == "keep"
    kept = sorted(ending.samples) if is_kept else []
    clients = _clients(plan, ending, body, halves, dropped, kept)
    num_folded = sum(body.folded.values())
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
        "batches": num_folded,
        "gradients_folded": num_folded,
        "gradients_waiting": len(store.waiting("body")),
        "gradients_stale": body.num_stale,
        "gradients_rejected": body.num_rejected,
        **entry(halves.flows),
    }


def _tally(store: GradientStore, lineage: str, plan: Plan, upto: int, ending: Ending) -> Tally:
    began = plan.version(lineage)
    judged = ending.verdict(lineage)
    tally = Tally()
    for version in range(began + 1, upto + 1):
        commit = store.lineage(lineage).commit(version)
        tally.add(commit, began if plan.barrier else 0, judged)  # without a barrier none is late
        for batch in commit.folded:
            if batch.incarnation == AVERAGED:
                for own in _averaged_commits(store, batch):
                    tally.add(own, 0, judged)
    return tally


def _averaged_commits(store: GradientStore, change: BatchId) -> Iterator[Commit]:
    """The folds on a client's own body that make up a change which was averaged, newest first.

    They are those between the commit that closed the client's turn and the one that began it.
    """
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
    """Why something of a client doesn't count; the reasons of the ending come first."""
    found: dict[str, list[str]] = {name: [why] for name, why in ending.dropped.items()}
    unfit = "its update is unfit (not finite, or it doesn't fit the half)"
    for name in halves.rejected:
        found.setdefault(name, []).append(unfit)
    for name in halves.stale:
        found.setdefault(name, []).append("its update is too old (max_staleness)")
    for name, count in body.rejected.items():
        reason = f"{count} of its batches aren't finite (NaN or Inf) or don't fit"
        found.setdefault(name, []).append(reason)
    for name, count in body.stale.items():
        reason = f"{count} of its batches are too old (max_staleness)"
        found.setdefault(name, []).append(reason)
    return {name: "; ".join(why) for name, why in sorted(found.items())}


def _clients(
    plan: Plan,
    ending: Ending,
    body: Tally,
    halves: Tally,
    dropped: dict[str, str],
    kept: list[str],
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
