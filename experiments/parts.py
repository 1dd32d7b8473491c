"""Assembles the parts of a run of the experiments; runs of one shape share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models
from experiments.config import Run
from experiments.data import datasets
from orlomo_jax import Method, RunStart, cast_reports, make_method

MILESTONES = (0.5, 0.75)
"""Shares of a run after which the local learning rate drops by 10: epochs 80 and 120 of 160."""


class Parts(NamedTuple):
    """The objects that runs of one shape share, so that each shape is compiled once."""

    method: Method
    network: models.Network
    train: datasets.Split
    loss_fn: Callable
    batch_fn: Callable
    round_fn: Callable
    evaluate: Callable


def assemble(
    run: Run,
    data_dir: Path | None = None,
    convolution: Literal["auto", "xla", "matmul", "native"] = "auto",
) -> Parts:
    """Return the parts of a run, the same objects for runs of one shape."""
    return _assemble(replace(shape_of(run), epochs=1, runtime="simulated"), data_dir, convolution)


def shape_of(run: Run) -> Run:
    """Return the run with defaults for settings that change neither its program nor its length."""
    return replace(run, scenario="homogeneous", seed=0, learning_rate=0.0, slowdown=1, max_delay=0)


@lru_cache(maxsize=8)
def _assemble(run: Run, data_dir: Path | None, convolution: Any) -> Parts:
    source, network, evaluate = _learning_problem(
        *(run.dataset, data_dir, run.pool, run.augmented, run.train_size),
        *(run.model, run.width, run.dtype, convolution),
    )
    method = make_method(run.method, run.workers, run.local_iterations, momentum=run.momentum)
    if run.policy is not None:
        method = method.with_policy(run.policy)
    loss_fn = source.training_loss(network.loss_fn)
    round_fn = method.local_round(loss_fn, weight_decay=run.weight_decay)
    if run.wire != "float32":
        round_fn = cast_reports(round_fn, run.wire)
    return Parts(
        method=method,
        network=network,
        train=source.train,
        loss_fn=loss_fn,
        batch_fn=datasets.shuffled_batches(source.train, run.batch_size, run.local_iterations),
        round_fn=round_fn,
        evaluate=evaluate,
    )


@lru_cache(maxsize=8)
def _learning_problem(
    dataset: str,
    data_dir: Path | None,
    pool: int,
    augmented: bool,
    train_size: int,
    model: str,
    width: float,
    dtype: str,
    convolution: Any,
) -> tuple[datasets.Dataset, models.Network, Callable]:
    """Return data set, network and evaluation; all methods share the compiled evaluation."""
    source = datasets.load(dataset, data_dir, pool=pool, augmented=augmented, train_size=train_size)
    network = models.make(
        model,
        source.num_classes,
        source.image_shape,
        width=width,
        dtype=jnp.dtype(dtype),
        convolution=convolution,
    )
    return source, network, _evaluation(network, source)


def beginning(run: Run, parts: Parts) -> tuple[Any, Any, jax.Array]:
    """Return the initial parameters and model state of a run, and its key."""
    init_key, key = jax.random.split(jax.random.key(run.seed))
    return *parts.network.init(init_key), key


def run_start(run: Run, parts: Parts, num_steps: int) -> RunStart:
    """Return the start of a run: parameters, arrivals, key, schedule and model state."""
    params, model_state, key = beginning(run, parts)
    rate = schedule(run.learning_rate, num_steps)
    return RunStart(params, run.trace(num_steps), key, rate, model_state)


def _evaluation(
    network: models.Network, source: datasets.Dataset, batch_size: int = 100
) -> Callable:
    """Return a function of params and model state to training loss and test accuracy.

    The training loss uses at most 10 000 fixed training examples, without augmentation. The images
    are arguments of the jitted function: as constants they would be part of its program.
    """

    def summed(params, model_state, split, statistic):
        count = len(split.labels)
        whole = count - count % batch_size

        def over(images, labels):
            logits = network.predict(params, model_state, source.preprocess(images))
            return statistic(logits, labels).sum()

        head = jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), split)
        total = jax.lax.map(lambda batch: over(*batch), head).sum()
        if whole < count:
            total += over(*jax.tree.map(lambda x: x[whole:], split))
        return total / count

    @jax.jit
    def evaluate(train, test, params, model_state):
        sample = jax.tree.map(lambda x: x[:10_000], train)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        accuracy = lambda logits, labels: logits.argmax(-1) == labels  # noqa: E731
        return {
            "train_loss": summed(params, model_state, sample, cross_entropy),
            "test_accuracy": 100 * summed(params, model_state, test, accuracy),
        }

    return jax.tree_util.Partial(evaluate, source.train, source.test)


def schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Return a schedule that drops by 10 at each milestone of the global iterations.

    All schedules share one compiled program.
    """
    drops = np.array([round(share * num_steps) for share in MILESTONES], np.int32)
    return jax.tree_util.Partial(_in_steps, np.float32(learning_rate), drops)


def _in_steps(start: jax.Array, drops: jax.Array, step: jax.Array) -> jax.Array:
    return start * 0.1 ** (step >= drops).sum()
