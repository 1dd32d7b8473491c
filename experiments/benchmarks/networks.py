"""Benchmarks of convolutional networks: training steps against PyTorch's, and compile times."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import models
from experiments.benchmarks.measure import Row, of_pairs, seconds
from orlomo_jax import make_method

TORCH_JOB = Path(__file__).with_name("torch_job.py")
"""The script that times PyTorch; it runs in an environment with PyTorch."""
WARM_UP, STEPS, ROUND = 5, 15, 4
NETWORKS = (  # name, blocks in a stage, factor of the width, pixels, batch, bar
    ("ResNet20", 3, 1.0, 32, 64, 1.0),
    ("ResNet8", 1, 1.0, 32, 64, 1.0),
    ("ResNet8 of half the width", 1, 0.5, 8, 16, 4.0),
)


def has_torch(python: Path) -> bool:
    """Return whether that Python can import PyTorch."""
    look = "import importlib.util as util; assert util.find_spec('torch')"
    try:
        return subprocess.run([str(python), "-c", look], capture_output=True).returncode == 0
    except OSError:
        return False


def training_step(
    name: str, width: float, size: int, batch: int, form: Any, steps: int = 1
) -> Callable[[], float]:
    """Return a function that trains with momentum SGD and returns the median time of a step.

    One program computes ``steps`` steps.
    """
    network = models.make(
        name.split()[0].lower(), 10, (size, size, 3), width=width, convolution=form
    )
    images = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    batch_of = images, jnp.arange(batch) % 10

    def step(carry):
        params, momentum, state = carry
        loss = lambda p: network.loss_fn(p, state, batch_of, jax.random.key(0))  # noqa: E731
        gradient, (state, _) = jax.grad(loss, has_aux=True)(params)
        momentum = jax.tree.map(lambda u, g: 0.9 * u + 0.01 * g, momentum, gradient)
        return jax.tree.map(jnp.subtract, params, momentum), momentum, state

    @partial(jax.jit, donate_argnums=0)
    def round_of(carry):
        if steps == 1:  # XLA's convolutions are slow in a loop
            return step(carry)
        return jax.lax.fori_loop(0, steps, lambda _, carry: step(carry), carry)

    params, state = network.init(jax.random.key(0))
    carry = params, jax.tree.map(jnp.zeros_like, params), state

    def run() -> float:
        nonlocal carry
        times = []
        for _ in range(WARM_UP + STEPS):

            def once():
                nonlocal carry
                carry = jax.block_until_ready(round_of(carry))

            times.append(seconds(once))
        return statistics.median(times[WARM_UP:]) / steps

    return run


def against_torch(repeats: int, python: Path) -> Iterator[Row]:
    """Compare a training step with each form of convolutions with PyTorch's.

    The last form is a step in a round of several, as training computes it.
    """
    threads = len(os.sched_getaffinity(0))
    for name, blocks, width, size, batch, bar in NETWORKS:
        steps = {
            form: training_step(name, width, size, batch, form)
            for form in ("xla", "matmul", "native")
        }
        round_of = training_step(name, width, size, batch, "native", ROUND)
        steps[f"native, in a round of {ROUND}"] = round_of
        limits, figures = [], {form: [] for form in steps}
        for _ in range(repeats):
            arguments = (blocks, round(16 * width), size, batch, threads)
            command = [str(python), str(TORCH_JOB), *map(str, arguments)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            limits.append(1 / float(done.stdout))
            for form, run in steps.items():
                figures[form].append(1 / run())
        for form, values in figures.items():
            what = f"{name}, {size}×{size}, batch {batch}, training step, {form}"
            yield of_pairs(what, values, limits, "steps/s", "PyTorch, channels_last", bar)


def compiling(repeats: int) -> Iterator[Row]:
    """Time the compilation of ResNet20's round of 16 steps, with each form of convolutions."""
    del repeats  # the second compilation would find the first in memory
    for form in ("matmul", "native"):
        network = models.make("resnet20", 10, (32, 32, 3), convolution=form)
        round_fn = make_method("orlomo", 16, 16).local_round(network.loss_fn)
        params, state = network.init(jax.random.key(0))
        batches = jnp.ones((16, 64, 32, 32, 3)), jnp.zeros((16, 64), jnp.int32)
        lowered = jax.jit(round_fn).lower(params, state, batches, 0.1, jax.random.key(0))
        taken = seconds(lowered.compile)
        name = f"compiling a round of ResNet20, S=16, {form}"
        yield Row(name, taken, 8.0, "s", "8 seconds", 8.0 / taken, 1.0)
