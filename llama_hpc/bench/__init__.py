"""Benchmarks: each measures its limit (memory, registers) beside it, in alternation, on the same threads."""
