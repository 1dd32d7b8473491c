"""Adapts plain losses and Flax NNX modules to the loss of a local round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from orlomo_jax import trees
from orlomo_jax.trees import Array, PyTree

Criterion: TypeAlias = Callable[[Any, Any], Array | tuple[Array, PyTree]]


@dataclass(frozen=True)
class PlainLoss:
    """See :func:`from_loss`."""

    function: Callable

    def __call__(self, params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        """Return (loss, (model_state, {}))."""
        del key
        return self.function(params, batch), (model_state, {})


def from_loss(function: Callable[[Any, Any], Array]) -> PlainLoss:
    """Return ``function(params, batch) -> loss`` as a ``loss_fn`` without model state and metrics.

    Args:
        function: Returns the scalar loss of a batch; the round differentiates it.

    Example:
        >>> loss_fn = from_loss(lambda params, batch: (params - batch) ** 2)
        >>> loss_fn(1.0, None, 3.0, None)
        (4.0, (None, {}))
    """
    return PlainLoss(function)


class Model(NamedTuple):
    """A model as pure functions of its parameters and its state.

    Attributes:
        params: Trainable arrays, nested dicts.
        model_state: Arrays that training changes without a gradient (BatchNorm statistics), nested
            dicts; ``{}`` if there are none.
        loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics))``, in
            training mode.
        predict: ``predict(params, model_state, *inputs)``, the module's output in evaluation mode.
    """

    params: PyTree
    model_state: PyTree
    loss_fn: Callable
    predict: Callable


def from_nnx(
    module: Any, criterion: Criterion, *, wrt: Any = None, train_mode: bool = True
) -> Model:
    """Return a Flax NNX module and a criterion as a :class:`Model`.

    Args:
        module: An ``nnx.Module``, which is not changed. Its ``nnx.Param`` variables are trained;
            all other variables except random-number state are model state. Under
            ``nnx.eval_shape`` it may be abstract.
        criterion: ``criterion(module, batch)`` returns the scalar loss of a batch, or the loss and
            a dict of metrics.
        wrt: The variables to train, an nnx filter such as ``nnx.LoRAParam``; None is
            ``nnx.Param``. Other parameters are constants of the loss.
        train_mode: Whether ``loss_fn`` calls ``module.train()``. False leaves every layer in its
            mode, for example a BatchNorm with frozen statistics.

    Returns:
        A :class:`Model`. Its ``loss_fn`` runs the module after ``module.train()``: BatchNorm uses
        the batch and updates its statistics, and dropout draws from the ``key`` of each step. Its
        ``predict`` runs the module after ``module.eval()``. Both accept any parameters of the
        module's structure, and work under ``jit``, ``scan`` and ``vmap``.

    Raises:
        TypeError: If a variable of the model state is not an array of numbers or flags.
        ImportError: If Flax is not installed.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from orlomo_jax import from_nnx
        >>> module = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        >>> model = from_nnx(module, lambda module, batch: (module(batch) ** 2).mean())
        >>> jax.tree.map(jax.numpy.shape, (model.params, model.model_state))
        ({'bias': (2,), 'scale': (2,)}, {'mean': (2,), 'var': (2,)})
        >>> batch = jax.numpy.array([[0.0, 1.0], [2.0, 3.0]])
        >>> loss, (state, _) = model.loss_fn(*model[:2], batch, jax.random.key(0))
        >>> loss.round(3), state["mean"]  # 0.99 · 0 + 0.01 · the batch's mean
        (Array(1., dtype=float32), Array([0.01, 0.02], dtype=float32))
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("from_nnx needs Flax: pip install flax") from error

    if isinstance(module, type):
        raise TypeError(f"`module` must be an nnx.Module, got the class {module.__name__}")
    trained = nnx.Param if wrt is None else wrt
    graphdef, params, constants, rng_state, model_state = nnx.split(
        module, trained, nnx.Param, nnx.RngState, ...
    )
    params, rng_state, model_state = map(nnx.to_pure_dict, (params, rng_state, model_state))
    trees.check_numbers("model_state", model_state)
    streams, structure = jax.tree.flatten(rng_state)
    kept = nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate))
    expected = jax.tree.structure(model_state)

    def merge(params, model_state, key):
        if (got := jax.tree.structure(model_state)) != expected:
            raise ValueError(
                "`model_state` must be like that of from_nnx; pass it to simulate or train as "
                f"model_state=…; wanted {expected}, got {got}"
            )
        fresh = [_seed(stream, jax.random.fold_in(key, i)) for i, stream in enumerate(streams)]
        fresh = jax.tree.unflatten(structure, fresh)
        return nnx.merge(graphdef, params, constants, fresh, model_state)

    def loss_fn(params, model_state, batch, key):
        module = merge(params, model_state, key)
        if train_mode:
            module.train()
        loss, metrics = _with_metrics(criterion(module, batch))
        return loss, (nnx.to_pure_dict(nnx.state(module, kept)), metrics)

    def predict(params, model_state, *inputs):
        module = merge(params, model_state, jax.random.key(0))
        module.eval()
        return module(*inputs)

    return Model(params, model_state, loss_fn, predict)


def _with_metrics(result: Any) -> tuple[Array, PyTree]:
    """Return a criterion's loss and metrics; raise TypeError if its result has another form."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if isinstance(loss, tuple | list | dict) or loss is None:
        form = f"a {type(loss).__name__}" if loss is result else f"({type(loss).__name__}, …)"
        raise TypeError(f"`criterion` must return the loss or (loss, metrics), got {form}")
    return loss, metrics


def _seed(stream: Array | jax.ShapeDtypeStruct, key: Array) -> Array:
    """Return a stream's new key, or zero for its counter, so that layers never share a mask."""
    if jnp.issubdtype(stream.dtype, jax.dtypes.prng_key):
        return jax.random.split(key, stream.shape)
    return jnp.zeros(stream.shape, stream.dtype)
