"""Metrics for Prometheus: what a process has served, or committed.

No id, payload or secret is in them, and labels come from fixed sets, so their number is bounded
whatever is requested.

The processes of one service count together: where `PROMETHEUS_MULTIPROC_DIR` names a folder, each
has its counts in files there, and whichever of them is asked answers for all. prometheus_client
decides on that when it is first imported, so the folder is named before a process begins
(`http.serve`). What is the same for all of them, such as the newest version, is read from the store
when somebody asks.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from splitfed.errors import InputError, SplitFedError
from splitfed.store.commit import Commit
from splitfed.store.store import GradientStore

T = TypeVar("T")
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names the folder in which the processes of one service count together."""
PREFIX = "splitfed"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of request times."""
COMMITS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
"""Upper bounds of the histogram of staleness."""
_CACHED_SECONDS = 5.0

Now = Callable[[], Iterable[Metric]]
"""Measures what is only known when somebody asks."""


class Counts:
    """The metrics of this process and of those that count with it, as a collector.

    Args:
        now: What is measured when somebody asks, besides.
    """

    def __init__(self, now: Now = tuple) -> None:
        self.now = now
        self.registry: CollectorRegistry | None = None
        """Where metrics are registered; nowhere if they are in the files of several processes."""
        found = CollectorRegistry()
        if os.environ.get(FOLDER):
            MultiProcessCollector(found)  # type: ignore[no-untyped-call]
        else:
            self.registry = found
        self._found = found

    def collect(self) -> Iterator[Metric]:
        """All of it, without the times at which counting began: they tell nothing of a run."""
        now = list(self.now())  # first: it may add to what is counted
        for family in [*self._found.collect(), *now]:
            family.samples = [one for one in family.samples if not one.name.endswith("_created")]
            if family.samples:
                yield family

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self)


def forget_process(pid: int | None, folder: str) -> None:
    """Drop what a process that has ended had under way; what it has counted stays counted.

    Args:
        pid: The process.
        folder: Where its service counts.
    """
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]


class RequestMetrics:
    """Counts of the requests that a process has answered: an `Observer`.

    Args:
        uses: How often the graph of a call was at hand, by `server.graphs.Uses`.
        now: What is measured when somebody asks, besides.
    """

    def __init__(
        self, uses: Callable[[], Mapping[str, int]] | None = None, now: Now = tuple
    ) -> None:
        def measure() -> Iterable[Metric]:
            self._note_uses()
            return now()

        self.counts = Counts(measure)
        registry = self.counts.registry
        self._requests = Counter(
            "requests", "Requests answered, by route and status.", ("path", "status"),
            namespace=PREFIX, registry=registry,
        )  # fmt: skip
        self._errors = Counter(
            "errors", "Requests answered with an error, by its class.", ("error",),
            namespace=PREFIX, registry=registry,
        )  # fmt: skip
        about = "Graphs that were kept, or computed again: recomputed for a backward, "
        about += "continued for the buffers that the next call goes on from."
        self._graphs = Counter("graphs", about, ("use",), namespace=PREFIX, registry=registry)
        about = "Time from a request's headers to the end of its answer."
        self._seconds = Histogram(
            "request_seconds", about, ("path",),
            namespace=PREFIX, buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._received = Counter(
            "received_bytes", "Bytes of requests' bodies.", namespace=PREFIX, registry=registry
        )
        self._sent = Counter(
            "sent_bytes", "Bytes of answers' bodies.", namespace=PREFIX, registry=registry
        )
        # Those of a process that has ended are under way no more: only live ones are added up.
        self._under_way = Gauge(
            "requests_in_flight", "Requests that are being received or answered.",
            namespace=PREFIX, registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        self._bytes = Gauge(
            "bytes_in_flight", "Bytes of their bodies.",
            namespace=PREFIX, registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        self._uses = uses
        self._noted: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, path: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count a request that was answered: see `Observer`."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        self._received.inc(received)
        self._sent.inc(sent)
        if self.counts.registry is None:
            self._note_uses()  # another process may be asked, which can't look here

    def error(self, name: str) -> None:
        """Count an error that a request was answered with, by its class."""
        self._errors.labels(name).inc()

    def under_way(self, requests: int, num_bytes: int) -> None:
        """Note how many requests are being received or answered, and the bytes of their bodies."""
        self._under_way.set(requests)
        self._bytes.set(num_bytes)

    def _note_uses(self) -> None:
        """Add what the server has counted since."""
        if self._uses is None:
            return
        with self._lock:
            for use, count in self._uses().items():
                self._graphs.labels(use).inc(count - self._noted.get(use, 0))
                self._noted[use] = count


class CommitMetrics:
    """Counts of the commits that a process has made, and of the batches that wait.

    Args:
        store: The store of the run.
        lineage: The lineage that the process commits.
        conflicts: How often another accumulator won.
    """

    def __init__(
        self, store: GradientStore, lineage: str, conflicts: Callable[[], int] = int
    ) -> None:
        self.counts = Counts(self._now)
        registry = self.counts.registry
        self._store = store
        self._lineage = lineage
        self._conflicts = conflicts
        self._state = kept(self._look, _CACHED_SECONDS)
        self._commits = Counter(
            "commits", "Versions that this process has made.", namespace=PREFIX, registry=registry
        )
        self._batches = Counter(
            "batches", "Batches that its commits have closed, by what became of them.",
            ("outcome",), namespace=PREFIX, registry=registry,
        )  # fmt: skip
        for outcome in ("folded", "stale", "rejected", "skipped"):
            self._batches.labels(outcome)
        self._samples = Counter(
            "samples", "Examples in the batches that it has folded.",
            namespace=PREFIX, registry=registry,
        )  # fmt: skip
        self._staleness = Histogram(
            "staleness_commits", "How many commits a folded batch was behind.",
            namespace=PREFIX, buckets=COMMITS, registry=registry,
        )  # fmt: skip

    def note(self, commit: Commit) -> None:
        """Count a commit."""
        self._commits.inc()
        for outcome in ("folded", "stale", "rejected", "skipped"):
            self._batches.labels(outcome).inc(len(getattr(commit, outcome)))
        self._samples.inc(commit.num_samples)
        for age, count in commit.staleness.items():
            for _ in range(count):
                self._staleness.observe(age)

    def _look(self) -> tuple[int, float, int]:
        line = self._store.lineage(self._lineage)
        head = line.head()
        return head, line.commit(head).time, len(self._store.waiting(self._lineage))

    def _now(self) -> Iterator[Metric]:
        about = "How often another accumulator won the version that this one had computed."
        yield CounterMetricFamily(f"{PREFIX}_conflicts", about, self._conflicts())
        # A store that fails makes no metrics, and hides none.
        with contextlib.suppress(SplitFedError):
            head, made, waiting = self._state()
            yield newest_version(head)
            about = "When the newest version was made, in seconds since 1970, whoever made it."
            yield GaugeMetricFamily(f"{PREFIX}_last_commit_timestamp_seconds", about, made)
            about = "Batches that are pending: on file, and in no commit yet."
            yield GaugeMetricFamily(f"{PREFIX}_waiting_batches", about, waiting)


def newest_version(head: int) -> Metric:
    """The newest version of the lineage that is served or committed, as a metric."""
    about = "The newest version of the lineage."
    return GaugeMetricFamily(f"{PREFIX}_version", about, head)


def kept(read: Callable[[], T], seconds: float) -> Callable[[], T]:
    """A function whose result is kept for some seconds: frequent requests read the store once.

    So is its error, if it is one of ours. One thread reads at a time; others wait for what it
    finds.
    """
    found: list[tuple[float, T | SplitFedError]] = []
    lock = threading.Lock()

    def look() -> T:
        with lock:
            if not found or time.monotonic() - found[0][0] > seconds:
                result: T | SplitFedError
                try:
                    result = read()
                except SplitFedError as error:
                    result = error
                # The time after the reading, which may take longer than its result is kept.
                found[:] = [(time.monotonic(), result)]
            result = found[0][1]
        if isinstance(result, SplitFedError):
            raise result.with_traceback(None)  # else it would grow with each that asks
        return result

    return look


@contextlib.contextmanager
def listening(counts: Counts, host: str, port: int) -> Iterator[str]:
    """Answer Prometheus at an address, in a thread of its own, within this context.

    Args:
        counts: What is told.
        host: Address to listen at.
        port: Port to listen at; 0 for any that is free.

    Yields:
        The URL.

    Raises:
        InputError: the address can't be used.
    """
    try:
        server, thread = start_http_server(port, host, counts)
    except (OSError, OverflowError) as error:
        raise InputError(f"can't listen for metrics at {host!r}, port {port}: {error}") from error
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
