"""Defines the tasks of a comparison: data, its partition among the workers, loss, evaluation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models
from experiments.data import datasets
from experiments.models import mlp
from orlomo_jax.worker import by_class_partition, dirichlet_partition


class Task(NamedTuple):
    """What is trained; a function given as ``--task module:function`` returns one.

    Attributes:
        loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics))``.
        params: The first parameters, or a function of a key that returns them.
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``, with "loss" and perhaps
            "accuracy" in %; "accuracy_of_class_C" for each class adds the slow workers' figure.
        batch_fn: As in :func:`orlomo_jax.simulate`; it does not know the partition.
        make_batch_fn: ``make_batch_fn(num_workers, num_local_steps, partition, seed) -> batch_fn``,
            instead of ``batch_fn``. Return the same function object for equal arguments.
        model_state: The first model state, or None.
        labels: The classes of the training examples, if they are to be partitioned.
    """

    loss_fn: Callable
    params: Any
    evaluate: Callable
    batch_fn: Callable | None = None
    make_batch_fn: Callable | None = None
    model_state: Any = None
    labels: np.ndarray | None = None

    def start(self, seed: int) -> tuple[Any, Any, jax.Array]:
        """Return the first parameters, the model state and the run's key."""
        init_key, key = jax.random.split(jax.random.key(seed))
        params = self.params(init_key) if callable(self.params) else self.params
        return params, self.model_state, key

    def batches(self, num_workers: int, steps: Any, partition: str, seed: int) -> Callable:
        """Return the batch function of a run."""
        if self.make_batch_fn is not None:
            return self.make_batch_fn(num_workers, steps, partition, seed)
        if partition != "iid":
            raise ValueError(
                f"`partition` must be iid for a task without make_batch_fn, got {partition!r}"
            )
        assert self.batch_fn is not None
        return self.batch_fn


def check_start(name: str, task: Task, num_workers: int, partition: str) -> None:
    """Raise ValueError unless the task's first loss, gradient and evaluation are finite."""
    params, model_state, key = task.start(0)
    batches = task.batches(num_workers, 1, partition, 0)(key, 0, 0)
    batch = jax.tree.map(lambda x: x[0], batches)
    gradient_fn = jax.jit(jax.value_and_grad(task.loss_fn, has_aux=True))
    (loss, _), gradient = gradient_fn(params, model_state, batch, key)
    evaluated = task.evaluate(params, model_state).get("loss")
    if evaluated is None:
        raise ValueError(f"`evaluate` of the task {name!r} must return a dict with 'loss'")
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    if not (np.isfinite(loss) and np.isfinite(evaluated) and finite):
        raise ValueError(
            f"the task {name!r} is not finite at its first parameters, so no method can train it: "
            f"loss {float(loss):g}, evaluated loss {float(evaluated):g}, "
            f"gradient {'finite' if finite else 'not finite'}"
        )


def partition_of(labels: Any, num_workers: int, partition: str, seed: int) -> list[np.ndarray]:
    """Return each worker's examples under "iid", "dirichlet:ALPHA" or "classes:N".

    With "iid" each worker draws from all examples.

    Example:
        >>> [len(part) for part in partition_of([0, 1] * 10, 2, "classes:1", seed=0)]
        [10, 10]
    """
    kind, _, value = partition.partition(":")
    try:
        if partition == "iid":
            return [np.arange(len(labels))] * num_workers
        if kind == "dirichlet":
            return dirichlet_partition(labels, num_workers, float(value), seed, min_size=4)
        if kind == "classes":
            return by_class_partition(labels, num_workers, int(value), seed)
    except ValueError as error:
        if not str(error).startswith("could not") and not str(error).startswith("invalid"):
            raise
    raise ValueError(
        f"`partition` must be iid, dirichlet:ALPHA or classes:N, got partition={partition!r}"
    )


def partitioned(data: Any, labels: np.ndarray, batch_size: int) -> Callable:
    """Return ``make_batch_fn`` of a labelled data set: random draws from a worker's examples."""

    def make_batch_fn(num_workers, num_local_steps, partition, seed):
        return make(num_workers, num_local_steps, partition, 0 if partition == "iid" else seed)

    @lru_cache(maxsize=64)
    def make(num_workers, num_local_steps, partition, seed):
        parts = partition_of(labels, num_workers, partition, seed)
        table = np.zeros((num_workers, len(labels)), np.int32)  # one shape for all partitions
        for worker, part in enumerate(parts):
            table[worker, : len(part)] = part
        sizes = jnp.array([len(part) for part in parts], jnp.int32)
        draw = _drawing(num_local_steps if isinstance(num_local_steps, int) else 0, batch_size)
        return jax.tree_util.Partial(draw, data, jnp.asarray(table), sizes)

    return make_batch_fn


@lru_cache
def _drawing(num_local_steps: int, batch_size: int) -> Callable:
    """Return one function for all runs of a shape, so that they share a program."""

    def draw(data, table, sizes, key, worker, round, steps=num_local_steps):
        key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
        places = jax.random.randint(key, (steps, batch_size), 0, sizes[worker])
        chosen = table[worker, places]
        return jax.tree.map(lambda x: x[chosen], data)

    return draw


def quadratic(batch_size: int) -> Task:
    """Return ½ (w − x)ᵀ D (w − x) with random x; the centres of its 10 classes differ."""
    generator = np.random.default_rng(0)
    labels = np.arange(1000) % 10
    points = generator.normal(size=(10, 20))[labels] + generator.normal(size=(1000, 20))
    points = jnp.asarray(points, jnp.float32)
    scale = jnp.logspace(-2, 0, 20)
    centre = points.mean(0)

    def loss_fn(params, model_state, batch, key):
        return 0.5 * (scale * (params - batch) ** 2).sum(-1).mean(), (model_state, {})

    @jax.jit
    def evaluate(params, model_state):
        return {"loss": 0.5 * (scale * (params - centre) ** 2).sum()}

    make = partitioned(points, labels, batch_size)
    start = partial(jnp.full, 20, 3.0, jnp.float32)
    return Task(loss_fn, start(), evaluate, make_batch_fn=make, labels=labels)


def softmax(batch_size: int) -> Task:
    """Return softmax regression on 10 Gaussian classes in 16 dimensions."""
    generator = np.random.default_rng(0)
    labels = np.arange(2000) % 10
    points = 1.2 * generator.normal(size=(10, 16))[labels] + generator.normal(size=(2000, 16))
    split = datasets.Split(jnp.asarray(points, jnp.float32), jnp.asarray(labels, jnp.int32))
    init = partial(mlp.init, widths=(16, 10))
    return _perceptron(init, split, split, batch_size)


def digits(batch_size: int) -> Task:
    """Return an MLP with 32 hidden units on scikit-learn's digits."""
    train, test = datasets.digits()
    return _perceptron(partial(mlp.init, widths=(64, 32, 10)), train, test, batch_size)


def cifar(batch_size: int) -> Task:
    """Return a ResNet8 of half the width on CIFAR-10, averaged down to 8×8 pixels."""
    source = datasets.load("cifar10", pool=4)
    network = models.make("resnet8", 10, source.image_shape, width=0.5)
    model_state = network.init(jax.random.key(0))[1]
    evaluate = _evaluation(
        lambda params, state, images: network.predict(params, state, source.preprocess(images)),
        *(jax.tree.map(lambda x: x[:2000], split) for split in (source.train, source.test)),
    )
    labels = np.asarray(source.train.labels)
    return Task(
        source.training_loss(network.loss_fn),
        lambda key: network.init(key)[0],
        evaluate,
        make_batch_fn=partitioned(source.train, labels, batch_size),
        model_state=model_state,
        labels=labels,
    )


def _perceptron(init: Callable, train: Any, test: Any, batch_size: int) -> Task:
    labels = np.asarray(train.labels)
    evaluate = _evaluation(lambda params, _, images: mlp.logits(params, images), train, test)
    make = partitioned(train, labels, batch_size)
    return Task(mlp.loss_fn, init, evaluate, make_batch_fn=make, labels=labels)


def _evaluation(predict: Callable, train: Any, test: Any) -> Callable:
    """Return an evaluation: training loss, test accuracy, and that of each class."""

    @jax.jit
    def evaluate(params, model_state):
        logits = predict(params, model_state, train.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, train.labels)
        hits = predict(params, model_state, test.images).argmax(-1) == test.labels
        of_class = {
            f"accuracy_of_class_{c}": 100 * jnp.mean(hits, where=test.labels == c)
            for c in range(10)
        }
        return {"loss": losses.mean(), "accuracy": 100 * hits.mean(), **of_class}

    return evaluate


TASKS: dict[str, Callable[[int], Task]] = {
    "quadratic": quadratic,
    "softmax": softmax,
    "digits": digits,
    "cifar": cifar,
}


def load(name: str, batch_size: int) -> Task:
    """Return a task by name, or the result of ``module:function``.

    Raises:
        ValueError: If it is unknown, cannot be imported, or is not a :class:`Task`.
    """
    if name in TASKS:
        return TASKS[name](batch_size)
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(TASKS)
        raise ValueError(f"`task` must be {known} or module:function, got task={name!r}")
    try:
        task = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`task` {name!r} cannot be loaded: {error}") from error
    if not isinstance(task, Task) or (task.batch_fn is None) == (task.make_batch_fn is None):
        raise ValueError(
            f"`task` {name!r} must return a Task with either batch_fn or make_batch_fn"
        )
    return task
