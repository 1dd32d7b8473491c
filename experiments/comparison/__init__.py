"""The parts of ``python -m experiments.compare``: tasks, methods, runs and the report."""
