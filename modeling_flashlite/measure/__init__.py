"""Evaluation, metrics, benchmarks and the results files that every table comes from."""
