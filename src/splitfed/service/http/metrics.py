"""Counts of what a server process does, as Prometheus text.

Our own few lines instead of a client library: counters, gauges and one histogram are all there is. No id, payload or
secret is in here, and labels come from fixed sets, so their number is bounded whatever is asked for.

Each process counts for itself. Behind `--workers` a scrape meets one of them; replicas of one worker each are scraped
one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram."""


class Metrics:
    """What a process has served. Used from the event loop alone, so it needs no lock."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._errors: Counter[str] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._received = 0
        self._sent = 0

    def count(self, path: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count a request that was answered.

        Args:
            path: Its route, never what a client wrote.
            status: What it was answered with.
            seconds: From its headers to the last byte of the answer.
            received: Bytes of its body.
            sent: Bytes of the answer's body.
        """
        self._requests[path, status] += 1
        buckets = self._buckets.setdefault(path, [0] * (len(SECONDS) + 1))
        buckets[bisect_left(SECONDS, seconds)] += 1
        self._seconds[path] = self._seconds.get(path, 0.0) + seconds
        self._received += received
        self._sent += sent

    def error(self, name: str) -> None:
        """Count an error that a request was answered with, by its class."""
        self._errors[name] += 1

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> bytes:
        """All of it, in Prometheus's text format.

        Args:
            gauges: What is measured at this moment: help and value by name.
        """
        lines = _head("requests_total", "counter", "Requests answered, by route and status.")
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'splitfed_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += _head("errors_total", "counter", "Requests answered with an error, by its class.")
        lines += [f'splitfed_errors_total{{error="{name}"}} {n}' for name, n in sorted(self._errors.items())]
        lines += _head("request_seconds", "histogram", "Time from a request's headers to the end of its answer.")
        for path, buckets in sorted(self._buckets.items()):
            total = 0
            for bound, count in zip([*map(str, SECONDS), "+Inf"], buckets, strict=True):
                total += count
                lines.append(f'splitfed_request_seconds_bucket{{path="{path}",le="{bound}"}} {total}')
            lines.append(f'splitfed_request_seconds_sum{{path="{path}"}} {self._seconds[path]:.6f}')
            lines.append(f'splitfed_request_seconds_count{{path="{path}"}} {total}')
        lines += _head("received_bytes_total", "counter", "Bytes of requests' bodies.")
        lines.append(f"splitfed_received_bytes_total {self._received}")
        lines += _head("sent_bytes_total", "counter", "Bytes of answers' bodies.")
        lines.append(f"splitfed_sent_bytes_total {self._sent}")
        for name, (said, value) in gauges.items():
            lines += [*_head(name, "gauge", said), f"splitfed_{name} {value:g}"]
        return ("\n".join(lines) + "\n").encode()


def _head(name: str, kind: str, said: str) -> list[str]:
    return [f"# HELP splitfed_{name} {said}", f"# TYPE splitfed_{name} {kind}"]
