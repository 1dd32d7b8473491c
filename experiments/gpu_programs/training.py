"""The program of one segment of a simulated run, ready to compile for any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments import models
from experiments.data import datasets
from experiments.gpu_programs.targets import abstract
from experiments.parts import schedule
from orlomo_jax import make_method
from orlomo_jax.server.state import ServerState, leaf_dtypes
from orlomo_jax.simulation.compiled import LENGTH, Carry, Settings, segment_program
from orlomo_jax.simulation.groups import RUN_AXES, over_runs
from orlomo_jax.simulation.planning import Segment
from orlomo_jax.worker.workload import RoundInput, RoundMetrics

WORKERS, LOCAL_STEPS, BATCH_SIZE, TRAIN_SIZE = 16, 16, 64, 50_000


def training(
    convolution: Literal["xla", "matmul"], together: int = 1, model: str = "resnet20"
) -> tuple[Callable, list[Any]]:
    """Return the program of a segment of a simulated run, and its abstract arguments.

    Args:
        convolution: How convolutions are computed.
        together: Number of runs in one program under ``jax.vmap``. They share data, step numbers
            and the number of groups.
        model: See :func:`experiments.models.make`.
    """
    network = models.make(model, 10, (32, 32, 3), convolution=convolution)
    none: Any = None  # the loss does not use the splits
    cifar10 = datasets.Dataset("cifar10", none, none, 10, (0.5,) * 3, (0.25,) * 3, padding=4)
    method = make_method("orlomo", WORKERS, LOCAL_STEPS)
    round_fn = method.local_round(
        cifar10.training_loss(network.loss_fn), weight_decay=1e-3, unroll=1
    )
    images = jax.ShapeDtypeStruct((TRAIN_SIZE, 32, 32, 3), jnp.uint8)
    labels: Any = jax.ShapeDtypeStruct((TRAIN_SIZE,), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)

    def start(params, model_state):
        rate = jnp.float32(0)
        version, accepted = jnp.int32(0), jnp.array(True)
        rule_state = method.rule.init(params)
        state = ServerState(params, rule_state, model_state, None, rate, version, accepted)
        task = RoundInput(params, model_state, None, rate, version)
        slots = jax.tree.map(lambda x: jnp.broadcast_to(x, (WORKERS, *x.shape)), task)
        metrics = RoundMetrics(jnp.zeros(LENGTH), {}, jnp.ones(LENGTH, bool))
        return Carry(state, slots, jnp.int32(-1), metrics, None)

    sent = jax.eval_shape(network.init, key)
    run = segment_program(method, round_fn, None, "loop", 1, leaf_dtypes(sent))
    args = [
        _batches(images, labels),
        Settings(schedule(0.1, 7812), {}),
        jax.eval_shape(start, *sent),
        jax.ShapeDtypeStruct((len(Segment._fields), LENGTH), jnp.int32),
        jnp.int32(0),
        jnp.int32(LENGTH),
        key,
        key,
    ]
    if together > 1:
        run, _ = over_runs(run, "vmap")
        pairs = zip(args, RUN_AXES, strict=True)
        args = [x if axis is None else abstract(x, None, (together,)) for x, axis in pairs]
    return run, args


def _batches(images: Any, labels: Any) -> Any:
    """Return the batch function over abstract images and labels."""
    batch_fn = datasets.shuffled_batches(
        datasets.Split(jnp.zeros(0), jnp.zeros(TRAIN_SIZE, jnp.int8)), BATCH_SIZE, LOCAL_STEPS
    )
    return jax.tree.unflatten(jax.tree.structure(batch_fn), (images, labels))
