"""Made-up rows of runs of the paper's cells."""

from dataclasses import asdict

from experiments.config import Run
from experiments.paper import scales, search

SCALE = scales.SCALES["digits"]
ENVIRONMENT = {"device": "cpu", "cpus": 2, "jax": "0.10.2"}


def row_of(run: Run, loss=None, status="finished"):
    """The row of a run; by default its loss grows with rate and seed."""
    loss = 0.1 * run.learning_rate + 0.01 * run.seed if loss is None else loss
    metrics = {"train_loss": loss, "test_accuracy": 100 - loss}
    curve = {"step": [1, 2], "virtual_time": [1.0, 2.0]}
    curve |= {name: [value, value] for name, value in metrics.items()}
    missing = status != "finished"
    return {
        "run": asdict(run),
        "status": status,
        "max_delay": 34,
        "wall_time": 1.0,
        "curve": curve,
        "environment": ENVIRONMENT,
        **{name: None if missing else value for name, value in metrics.items()},
    }


def fill(runs, rows, seeds=3, **options):
    """Add the rows that a search asks for."""
    for run in search.missing(runs, rows, SCALE, seeds):
        rows[run] = row_of(run, **options)
