"""Benchmarks: ratios of alternatives timed alternately in one run, never a test that could fail on a slow machine."""
