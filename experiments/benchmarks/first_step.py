"""Measures the seconds from the start of a command to its first step, in fresh processes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator

from experiments.benchmarks.measure import Row, fresh_process

# What experiments.train does after it has read its flags. Real images are not needed for it.
COMMAND = """
import os, time
import jax
from experiments import train, runner
from experiments.config import Run
from experiments.data import datasets

def load(name, *_, **__):
    if name == "digits":
        return datasets.Dataset(name, *datasets.digits(), num_classes=10)
    images = jax.random.bits(jax.random.key(0), (1000, 32, 32, 3), "uint8")
    split = datasets.Split(images, jax.numpy.arange(1000) % 10)
    return datasets.Dataset(name, split, split, 10, (0.5,) * 3, (0.25,) * 3, padding=4)

def stop(record):
    print(time.time(), flush=True)
    os._exit(0)

datasets.load = load
train.keep_compiled_programs()
runner.execute(Run({run}), evaluate_every={evaluate_every}, callbacks=[stop])
"""
RUNS = (  # name, settings, steps until the first evaluation
    (
        "quickstart, MLP, K=16, S=32, batch 32",
        "model='mlp', dataset='digits', workers=16, local_iterations=32, batch_size=32, epochs=40",
        2,
    ),
    (
        "ResNet20, 32×32, K=2, S=16, batch 16",
        "model='resnet20', workers=2, local_iterations=16, batch_size=16, epochs=0.6",
        1000,
    ),
)


def first_step(repeats: int) -> Iterator[Row]:
    """Start each run with an empty folder of compiled programs, then again, at most three times."""
    for name, run, evaluate_every in RUNS:
        code = COMMAND.format(run=run, evaluate_every=evaluate_every)
        cold, warm = [], []
        for _ in range(min(repeats, 3)):
            with tempfile.TemporaryDirectory() as folder:
                cold.append(seconds_to_first_step(code, folder))
                warm.append(seconds_to_first_step(code, folder))
        ratio = statistics.median(c / w for c, w in zip(cold, warm, strict=True))
        figure, limit = statistics.median(warm), statistics.median(cold)
        what = f"command to first step, {name}, again"
        yield Row(what, figure, limit, "s", "the first time", ratio, 1.5)


def seconds_to_first_step(code: str, folder: str) -> float:
    """Return the seconds until the process prints its time; it keeps programs in ``folder``."""
    start = time.time()
    return float(fresh_process(code, XDG_CACHE_HOME=folder).split()[-1]) - start
