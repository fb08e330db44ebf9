"""Prometheus text: counters, a histogram whose buckets add up, gauges."""

from __future__ import annotations

import re

from splitfed.service.http.metrics import Metrics

LINE = re.compile(r'splitfed_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? \d+(\.\d+)?(e[+-]\d+)?')


def test_three_requests_by_hand() -> None:
    """2 ms, 200 ms and two minutes: 1, 2 and 3 requests below the bounds of 2.5 ms, 0.25 s and infinity."""
    metrics = Metrics()
    metrics.count("/v1/forward", 200, 0.002, 100, 10)
    metrics.count("/v1/forward", 200, 0.2, 200, 20)
    metrics.count("/v1/forward", 429, 120.0, 0, 5)
    metrics.error("BusyError")
    text = metrics.text({"version": ("The newest version.", 7)}).decode()
    for line in (
        'splitfed_requests_total{path="/v1/forward",status="200"} 2',
        'splitfed_requests_total{path="/v1/forward",status="429"} 1',
        'splitfed_errors_total{error="BusyError"} 1',
        'splitfed_request_seconds_bucket{path="/v1/forward",le="0.001"} 0',
        'splitfed_request_seconds_bucket{path="/v1/forward",le="0.0025"} 1',
        'splitfed_request_seconds_bucket{path="/v1/forward",le="0.25"} 2',
        'splitfed_request_seconds_bucket{path="/v1/forward",le="+Inf"} 3',
        'splitfed_request_seconds_sum{path="/v1/forward"} 120.202000',
        'splitfed_request_seconds_count{path="/v1/forward"} 3',
        "splitfed_received_bytes_total 300",
        "splitfed_sent_bytes_total 35",
        "splitfed_version 7",
    ):
        assert f"\n{line}\n" in text


def test_every_line_has_the_form_and_every_name_its_type() -> None:
    """A scraper reads line by line."""
    metrics = Metrics()
    metrics.count("/metrics", 200, 0.01, 0, 0)
    lines = metrics.text({"bytes_in_flight": ("Bytes.", 8388608)}).decode().splitlines()
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    for line in lines:
        if not line.startswith("#"):
            assert LINE.fullmatch(line), line
            name = re.split(r"[{ ]", line)[0]
            assert name in typed or re.sub(r"_(bucket|sum|count)$", "", name) in typed
