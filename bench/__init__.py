"""Benchmark scripts for a checkout: `python -m bench.battery` on a GPU, `python -m bench.report` for the page."""
