"""A worker's local round: S steps of momentum SGD from the parameters that it was sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax.checks import check_count
from orlomo_jax.rules import base, contract

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, PyTree

    LossFn: TypeAlias = Callable[..., tuple[Array, tuple[PyTree[Array], PyTree[Array]]]]


class RoundResult(NamedTuple):
    """What a local round returns.

    Attributes:
        update: Δw and Δu, trees like params; Δu is None for plain SGD.
        model_state: The model state after the last step.
        loss: float[S], the loss before each step.
        metrics: The metrics of ``loss_fn``, stacked over a leading axis S.
        finite: bool[], whether update, model state and losses are free of NaN and Inf.
    """

    update: contract.LocalUpdate
    model_state: PyTree[Array]
    loss: Float[Array, " S"]
    metrics: PyTree[Array]
    finite: Bool[Array, ""]


def local_momentum_sgd(
    loss_fn: LossFn,
    num_local_steps: int,
    momentum: float | None = 0.9,
    weight_decay: float = 0.0,
    gradient_transform: optax.GradientTransformation | None = None,
    unroll: int | bool | None = None,
) -> Callable[..., RoundResult]:
    r"""Return a jitted round of S local momentum-SGD steps (Algorithm 2, lines 20–27).

    From w̃_0 = ``params`` and ũ_0 = 0 (or the buffer given to the round), for s in [S]:

    - g_s = transform(∇loss(w̃_s; batch s)) + weight_decay · w̃_s,
    - ũ_{s+1} = βũ_s + γg_s,
    - w̃_{s+1} = w̃_s − ũ_{s+1}.

    Args:
        loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics))`` with
            a scalar loss; ``key`` is this step's own.
        num_local_steps: S ≥ 1.
        momentum: β in [0, 1); None is plain SGD, w̃_{s+1} = w̃_s − γg_s, which reports no momentum
            (AL-SGD, local OrMo-DA).
        weight_decay: Coefficient ≥ 0 of the parameters, added to the gradient.
        gradient_transform: Applied to the gradient before weight decay and momentum (clipping,
            say); initialised anew each round.
        unroll: As in ``jax.lax.scan``. None is True on a CPU where the loss convolves and 1
            elsewhere: XLA runs convolution gradients inside a rolled loop on CPU 6 to 39 times
            slower, and matrix products up to twice as fast as unrolled.

    Returns:
        ``round_fn(params, model_state, batches, local_learning_rate, key, *, momentum=None)``, a
        jitted function that returns a :class:`RoundResult`. The leaves of ``batches`` have a
        leading axis S; ``local_learning_rate`` is γ; ``key`` a ``jax.random.key``; ``momentum`` the
        starting buffer ũ_0, a tree like params (PRSGDm).

    Raises:
        ValueError: If a concrete hyperparameter is out of range, a leaf of ``batches`` has not the
            leading axis S, the learning rate is no scalar, or plain SGD is given a starting
            momentum.
        TypeError: If a hyperparameter is of a wrong type, or a leaf of params is not floating.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import local_momentum_sgd
        >>> def loss_fn(params, model_state, batch, key):
        ...     return jnp.sum(params * batch), (model_state, {})
        >>> round_fn = local_momentum_sgd(loss_fn, num_local_steps=2, momentum=0.5)
        >>> result = round_fn(jnp.zeros(1), None, jnp.ones((2, 1)), 1.0, jax.random.key(0))
        >>> result.update.momentum, result.update.delta  # ũ: 1, 1.5
        (Array([1.5], dtype=float32), Array([2.5], dtype=float32))
    """
    num_local_steps = check_count("num_local_steps", num_local_steps, 1)
    if momentum is not None:
        contract.check_momentum(momentum)
    decay = momentum  # `momentum` is the starting buffer below
    contract.check_learning_rate("weight_decay", weight_decay)
    without_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    transform = optax.identity() if gradient_transform is None else gradient_transform

    def round_fn(params, model_state, batches, local_learning_rate, key, *, momentum=None):
        _check_leading_axis(batches, num_local_steps)
        contract.check_learning_rate("local_learning_rate", local_learning_rate)
        if decay is None and momentum is not None:
            raise ValueError("`momentum` must be None for plain SGD, got a starting buffer")
        params = jax.tree.map(jnp.asarray, params)
        if momentum is not None:
            contract.check_like("momentum", momentum, params)
        wide = base.zeros(params, jnp.float32)  # bfloat16 steps add up in float32
        buffer = wide if momentum is None else base.combine([(1.0, momentum)], like=wide)
        buffer = None if decay is None else buffer

        def local_step(carry, inputs):
            params, buffer, model_state, transform_state = carry
            batch, index = inputs
            gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, (model_state, metrics)), gradient = gradient_fn(
                params, model_state, batch, jax.random.fold_in(key, index)
            )
            # JAX's gradient of a complex parameter points along the conjugate of the ascent.
            gradient = jax.tree.map(jnp.conj, gradient)
            gradient, transform_state = transform.update(gradient, transform_state, params)
            terms = [(local_learning_rate, gradient)]
            if not without_decay:
                terms.append((local_learning_rate * weight_decay, params))
            if buffer is not None:
                terms.append((decay, buffer))
            change = base.combine(terms, like=wide)
            params = base.combine([(1.0, params), (-1.0, change)], like=params)
            buffer = None if buffer is None else change
            return (params, buffer, model_state, transform_state), (loss, metrics)

        carry = (params, buffer, model_state, transform.init(params))
        steps = (batches, jnp.arange(num_local_steps))
        (local, buffer, model_state, _), (loss, metrics) = jax.lax.scan(
            local_step, carry, steps, unroll=_unroll(unroll, local_step, carry, steps)
        )
        if buffer is not None:
            buffer = jax.tree.map(lambda u, w: u.astype(w.dtype), buffer, params)
        update = contract.LocalUpdate(jax.tree.map(jnp.subtract, params, local), buffer)
        finite = all_finite((update, model_state, loss))
        return RoundResult(update, model_state, loss, metrics, finite)

    return jax.jit(round_fn)


@partial(jax.jit, inline=True)
def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Return whether no floating leaf of ``tree`` holds a NaN or an Inf, bool[].

    Example:
        >>> bool(all_finite({"a": jnp.ones(2), "b": jnp.array(jnp.inf)}))
        False
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    # Inf − Inf and NaN − NaN are NaN: one pass, in a third of the time of isfinite on a CPU.
    return jnp.stack([jnp.sum(x - x) == 0 for x in leaves]).all() if leaves else jnp.array(True)


def convolves(function: Callable, *args: Any) -> bool:
    """Return whether a function of (possibly abstract) arrays contains a convolution.

    Example:
        >>> convolves(jnp.convolve, jnp.ones(3), jnp.ones(2)), convolves(jnp.dot, 1.0, 1.0)
        (True, False)
    """
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))


def _unroll(unroll: int | bool | None, local_step: Callable, carry: Any, steps: Any) -> int | bool:
    """Choose how far to unroll the loop over local steps (see :func:`local_momentum_sgd`)."""
    if unroll is not None:
        return unroll
    if jax.default_backend() != "cpu":
        return 1
    first = jax.tree.map(lambda x: x[0], steps)
    return True if convolves(local_step, carry, first) else 1


def _check_leading_axis(batches: PyTree[Array], num_local_steps: int) -> None:
    for path, leaf in jax.tree.leaves_with_path(batches):
        if np.shape(leaf)[:1] != (num_local_steps,):
            raise ValueError(
                f"`batches{jax.tree_util.keystr(path)}` must have a leading axis of "
                f"num_local_steps={num_local_steps}, got shape {np.shape(leaf)}"
            )
