"""Benchmarks of a wrapped model: what each operating point answers, and what it takes.

Imports `learning` for its metrics, so nothing of the runtime may import this package.
"""
