"""Benchmarks of compactattn: `python -m benchmarks --help`."""
