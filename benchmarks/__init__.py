"""Measurements beside a raw loop, a bare tokenizer and a bare interpreter; run with ``python -m benchmarks.<name>``.

Models and data come from seeds; nothing is downloaded. Every script prints a table and appends one line of JSON to
``benchmarks/results``.
"""
