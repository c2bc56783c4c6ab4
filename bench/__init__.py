"""Runnable experiments and micro-benchmarks: ``python -m bench.NAME``; ``--quick`` is the small one that CI runs."""
