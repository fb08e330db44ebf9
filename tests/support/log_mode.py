"""Tests of everything in a log: with `--log`, stores that are begun without a word about it are logs.

`--log=sums` has servers add up what they hold, as soon as it is two gradients; `--log=derive` has them lose it at once,
so that each gradient is computed again from its recipes.
"""

from __future__ import annotations

from typing import Any

OLD = "it plants gradients of version 0 in a window of two versions: in a log these are stale"
LEFT_OUT = {
    "test_a_commit_that_was_made_is_returned_whatever_others_do_meanwhile": OLD,
    "test_a_replica_that_is_overtaken_looks_again": OLD,
    "test_what_a_loser_dropped_is_counted_by_whoever_commits": OLD,
    "test_a_reader_at_any_moment_of_a_commit_sees_a_whole_version": "its accumulators have different windows",
    "test_everything_in_a_store_is_safetensors_json_or_a_number": "it names each kind of file, and a log has more",
}
"""Tests that stay with gradients on file, and why."""


def begin_logs(how: str) -> None:
    """Have this process begin every store as a log, and hold gradients in one way."""
    # Here: whoever only collects tests needs no torch, which takes a second.
    from splitfed.accumulator import gather
    from splitfed.store import beginning
    from splitfed.store import holder as holders

    beginning.durability_of = lambda fingerprint: "log"
    holders.LEAST, holders.BYTES, holders.NEAR = 1, 0, 0.002
    if how == "derive":
        gather.WAIT = 0.05
        holders.Holder.put = _lose  # type: ignore[method-assign]


def _lose(self: Any, batch: Any, record: Any) -> None:
    self.check_process()
