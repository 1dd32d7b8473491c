"""Benchmarks: each figure is compared with a limit measured in the same run."""
