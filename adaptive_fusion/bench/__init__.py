"""Benchmarks of a wrapped model: what each operating point answers, and what it takes.

Nothing of the runtime may import this package.
"""
