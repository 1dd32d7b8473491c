"""Measures a ResNet's simulated run on one GPU: local steps per second and share of gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import models
from experiments.benchmarks import gpu_profile
from experiments.benchmarks.measure import Row, in_turn, rate, seconds
from experiments.data import datasets
from orlomo_jax import Compiled, make_method, simulate

Convolution = Literal["xla", "matmul"]
FORMS: tuple[Convolution, ...] = ("xla", "matmul")
WORKERS = 16
SHORT = 32
"""Rounds after which all workers hold distinct versions; longer runs use the same program."""
GOAL = 125_000 / 120
"""Local steps per second to reach: 160 epochs of 50 000 images, batch 64, in two minutes."""


class Sizes(NamedTuple):
    """The sizes of the measured work."""

    copied: int = 2**28
    product: int = 8192
    params: tuple[int, ...] = (10_000_000, 50_000_000)
    leaves: tuple[int, ...] = (1, 200)
    model: str = "resnet20"
    width: float = 1.0
    image: int = 32
    examples: int = 50_000
    batch: int = 64
    local_steps: int = 16
    rounds: int = 96
    repeats: int = 5
    scale: float = 1.0
    """Factor on the seconds of the stages."""


TINY = Sizes(
    copied=10_000,
    product=64,
    params=(10_000,),
    leaves=(1, 5),
    model="resnet8",
    width=1 / 16,
    image=8,
    examples=64,
    batch=4,
    local_steps=2,
    rounds=32,
    repeats=1,
    scale=0.2,
)
"""Sizes for a rehearsal on a CPU."""


def segment(sizes: Sizes, axis: str, form: Convolution, dtype: str) -> Iterator[Row]:
    """Measure a compiled segment of a simulated run."""
    run = partial(run_segment, sizes, axis, form, dtype)
    steps = sizes.rounds * sizes.local_steps
    figure = steps / statistics.median(seconds(run) for _ in range(min(3, sizes.repeats)))
    name = f"{_name(sizes)}: {axis}, {form}, {dtype}"
    against = "125 000 local steps of 64 images in 120 s"
    yield Row(name, figure, GOAL, "local steps/s", against, figure / GOAL, 1.0)
    images, limit = figure * sizes.batch, GOAL * 64
    yield Row(f"{name}, images", images, limit, "images/s", against, images / limit)


def gradients(sizes: Sizes, form: Convolution) -> Iterator[Row]:
    """Compare a segment with bare gradient descent; 1 − ratio is the time outside gradients."""
    ours = partial(run_segment, sizes, "loop", form, "float32")
    (timing,) = in_turn(min(2, sizes.repeats), ours, partial(run_descent, sizes, form))
    name = f"{_name(sizes)}: loop, {form}, float32, time in gradients"
    steps = sizes.rounds * sizes.local_steps
    yield rate(name, steps, timing, "local steps/s", "bare gradient descent")


def profiled(sizes: Sizes, form: Convolution) -> Iterator[Row]:
    """Compare the kernels' time in a profile with the time of a segment without a profile."""
    short = sizes._replace(rounds=SHORT)
    run = partial(run_segment, short, "loop", form, "float32")
    run()
    taken = statistics.median(seconds(run) for _ in range(3))
    yield from gpu_profile.rows(f"{_name(sizes)}: loop, {form}, float32", run, taken)


class Training(NamedTuple):
    """The parts of a run on random images; the loss includes augmentation."""

    loss_fn: Callable
    method: Any
    round_fn: Callable
    batch_fn: Callable
    params: Any
    model_state: Any


@cache
def _split(examples: int, image: int) -> datasets.Split:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (examples, image, image, 3), np.uint8)
    return datasets.Split(
        jnp.asarray(images), jnp.asarray(random.integers(0, 10, examples, np.int32))
    )


@cache
def _training(sizes: Sizes, form: Convolution, dtype: str) -> Training:
    split, padding = _split(sizes.examples, sizes.image), sizes.image // 8
    source = datasets.Dataset("cifar10", split, split, 10, (0.5,) * 3, (0.25,) * 3, padding)
    loss_fn = source.training_loss(_network(sizes, form, dtype).loss_fn)
    method = make_method("orlomo", WORKERS, sizes.local_steps)
    return Training(
        loss_fn,
        method,
        method.local_round(loss_fn, weight_decay=1e-3, unroll=1),
        datasets.shuffled_batches(split, sizes.batch, sizes.local_steps),
        *_start(sizes),
    )


@cache
def _start(sizes: Sizes) -> Any:
    """Return the initial parameters and model state, the same for all forms of the network."""
    return _network(sizes, "xla", "float32").init(jax.random.key(0))


def _network(sizes: Sizes, form: Convolution, dtype: str) -> models.Network:
    return models.make(
        sizes.model,
        10,
        (sizes.image, sizes.image, 3),
        width=sizes.width,
        dtype=jnp.dtype(dtype),
        convolution=form,
    )


def run_segment(sizes: Sizes, axis: Any, form: Convolution, dtype: str) -> None:
    """Run a compiled segment of a simulated run."""
    run, num_steps = _training(sizes._replace(rounds=0), form, dtype), sizes.rounds
    result = simulate(
        run.method,
        None,
        run.batch_fn,
        run.params,
        round_fn=run.round_fn,
        num_steps=num_steps,
        key=jax.random.key(0),
        model_state=run.model_state,
        local_learning_rate=0.01,
        engine=Compiled(axis, None if axis == "loop" else 4),
    )
    jax.block_until_ready(result.params)


@cache
def _descend(sizes: Sizes, form: Convolution) -> Callable:
    """Return a program that does S steps of plain gradient descent."""
    run = _training(sizes, form, "float32")
    gradient_fn = jax.grad(run.loss_fn, has_aux=True)

    @partial(jax.jit, donate_argnums=0)
    def descend(carry, batches, key):
        def step(carry, batch):
            params, model_state = carry
            gradient, (model_state, _) = gradient_fn(params, model_state, batch, key)
            params = jax.tree.map(lambda w, g: w - 0.01 * g, params, gradient)
            return (params, model_state), None

        return jax.lax.scan(step, carry, batches)[0]

    key = jax.random.key(0)
    return partial(descend, key=key, batches=jax.jit(_first)(run.batch_fn, key))


def _first(batch_fn: Callable, key: jax.Array) -> Any:
    return batch_fn(key, 0, 0)


def run_descent(sizes: Sizes, form: Convolution) -> None:
    """Do plain gradient descent with as many steps as a segment."""
    descend = _descend(sizes._replace(rounds=0), form)
    run = _training(sizes._replace(rounds=0), form, "float32")
    carry = jax.tree.map(jnp.copy, (run.params, run.model_state))
    for _ in range(sizes.rounds):
        carry = descend(carry)
    jax.block_until_ready(carry)


def compile_all(sizes: Sizes, axis: str, dtypes: tuple[str, ...]) -> list[Row]:
    """Compile all programs of one worker axis in parallel; errors appear when they are measured."""
    short = sizes._replace(rounds=SHORT)
    jobs = [(form, dtype) for form in FORMS for dtype in dtypes]
    for job in jobs:  # before the threads start, so that they share the cached functions
        _training(sizes._replace(rounds=0), *job)
    runs = [partial(run_segment, short, axis, *job) for job in jobs]
    runs += [partial(run_descent, short, form) for form in FORMS if axis == "loop"]
    with ThreadPoolExecutor(len(runs)) as pool:
        for ready in [pool.submit(run) for run in runs]:
            with suppress(Exception):
                ready.result()
    return []


def _name(sizes: Sizes) -> str:
    network = f"ResNet{sizes.model.removeprefix('resnet')}"
    return f"{network}, S={sizes.local_steps}, batch {sizes.batch}, K={WORKERS}"
