"""Defines the local round: S steps of an optimizer from the parameters sent to the worker."""

from __future__ import annotations

from typing import Any

import optax

from orlomo_jax.checks import check_flag, check_local_steps
from orlomo_jax.memo import shared
from orlomo_jax.rules import contract
from orlomo_jax.worker.frozen import Mask
from orlomo_jax.worker.local_optimizer import check_optimizer
from orlomo_jax.worker.protocols import LossFn
from orlomo_jax.worker.step_loop import LocalRound


@shared
def local_round(
    loss_fn: LossFn,
    num_local_steps: int | tuple[int, ...],
    optimizer: optax.GradientTransformation,
    *,
    keep_state: bool = True,
    unroll: int | bool | None = None,
    frozen: Any = None,
) -> LocalRound:
    r"""Return a jitted round of S local steps of an optax transformation.

    From w̃_0 = ``params``, for s in [S]:

    - d_s = the transformation of ∇loss(w̃_s; batch s),
    - w̃_{s+1} = w̃_s − γ d_s.

    The transformation returns a direction without a sign and without a learning rate, because γ is
    the round's ``local_learning_rate``. AdamW is ``optax.chain(optax.scale_by_adam(),
    optax.add_decayed_weights(0.1))``; add ``optax.clip_by_global_norm(1.0)`` in front to clip, or
    ``optax.scale_by_schedule`` for a schedule of the worker's own steps.

    Args:
        loss_fn: As in :func:`~orlomo_jax.local_momentum_sgd`.
        num_local_steps: S ≥ 1 (H in the DiLoCo papers), or a tuple with S of each worker.
        optimizer: The transformation. It sees parameters and gradients in float32 or wider; frozen
            leaves are ``optax.MaskedNode()``. It may read the loss as ``value``, as
            ``optax.contrib.reduce_on_plateau`` does.
        keep_state: Whether a worker keeps the transformation's state for its next round, as
            DiLoCo does (so Adam's step count continues), or starts each round with a new one. A
            kept state starts anew after a lost or cancelled round. It has a cost: the memory of K
            states in a simulation, one per worker in a real run.
        unroll: As in ``local_momentum_sgd``.
        frozen: As in ``local_momentum_sgd``.

    Returns:
        A round like that of ``local_momentum_sgd``, without a momentum in the report. If the state
        is kept, it also takes ``local_state`` (None for a new one) and returns the new state in
        :class:`RoundResult`.

    Raises:
        ValueError: If the transformation returns a descent direction (as ``optax.adamw`` does), or
            ``num_local_steps`` is out of range; in the round, if the state's structure changes or
            a result is not like the gradient.
        TypeError: If ``optimizer`` is not an optax transformation, or needs arguments other than
            ``value``.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from orlomo_jax import from_loss, local_round
        >>> loss_fn = from_loss(lambda params, batch: jnp.sum(params * batch))
        >>> round_fn = local_round(loss_fn, 2, optax.scale_by_adam())
        >>> result = round_fn(jnp.zeros(1), None, jnp.ones((2, 1)), 0.5, jax.random.key(0))
        >>> result.update.delta.round(3), int(result.local_state.count)
        (Array([1.], dtype=float32), 2)
        >>> local_round(loss_fn, 2, optax.adamw(0.1))
        Traceback (most recent call last):
        ...
        ValueError: `optimizer` must return an ascent direction without a learning rate, got one
        that descends: pass for example optax.chain(optax.scale_by_adam(),
        optax.add_decayed_weights(0.1)) instead of optax.adamw(…), and γ as `local_learning_rate`

    References:
        Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023 (state kept). Liu et
        al., `Asynchronous local-SGD training for language modeling
        <https://arxiv.org/abs/2401.09135>`_, 2024 (its notebook makes the state anew).
    """
    num_local_steps = check_local_steps(num_local_steps)
    check_optimizer(optimizer)
    keep_state = check_flag("keep_state", keep_state)
    mask = None if frozen is None else Mask.of(frozen)
    return LocalRound(
        loss_fn, num_local_steps, None, 0.0, None, unroll, mask, optimizer, keep_state
    )


@shared
def local_momentum_sgd(
    loss_fn: LossFn,
    num_local_steps: int | tuple[int, ...],
    momentum: float | None = 0.9,
    weight_decay: float = 0.0,
    gradient_transform: optax.GradientTransformation | None = None,
    unroll: int | bool | None = None,
    frozen: Any = None,
) -> LocalRound:
    r"""Return a jitted round of S local momentum-SGD steps (Algorithm 2, lines 20–27).

    From w̃_0 = ``params`` and ũ_0 = 0 (or the buffer given to the round), for s in [S]:

    - g_s = transform(∇loss(w̃_s; batch s)) + weight_decay · w̃_s,
    - ũ_{s+1} = βũ_s + γg_s,
    - w̃_{s+1} = w̃_s − ũ_{s+1}.

    Args:
        loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics))`` with
            a scalar loss; ``key`` differs in every step.
        num_local_steps: S ≥ 1 (H in the DiLoCo papers), or a tuple with S of each worker.
        momentum: β in [0, 1). None is plain SGD, w̃_{s+1} = w̃_s − γg_s, without a momentum in the
            report (AL-SGD, local OrMo-DA).
        weight_decay: Coefficient ≥ 0 of the parameters, added to the gradient.
        gradient_transform: Applied to the gradient before weight decay and momentum, for example
            clipping. Its state starts afresh in each round.
        unroll: As in ``jax.lax.scan``. None is True on a CPU if the loss contains a convolution,
            else 1: on a CPU, XLA runs convolution gradients much slower inside a loop, but matrix
            products faster.
        frozen: The parameters that are not trained: a tree of bools like params or like its first
            levels, or a function that maps params to one. They have no gradient, weight decay or
            momentum; their Δw and Δu are 0.

    Returns:
        ``round_fn(params, model_state, batches, local_learning_rate, key, *, momentum=None)``, a
        jitted function that returns a :class:`RoundResult`. It keeps 16-bit parameters in float32:
        ``loss_fn`` gets them rounded, and Δw and Δu are float32. The leaves of ``batches`` have a
        leading axis S, ``local_learning_rate`` is γ, ``key`` is a ``jax.random.key``, and
        ``momentum`` is the starting buffer ũ_0, a tree like params (PRSGDm).

    Raises:
        ValueError: If a concrete hyperparameter is out of range, a leaf of ``batches`` does not
            have the leading axis S, the learning rate is not a scalar, or plain SGD gets a starting
            momentum.
        TypeError: If a hyperparameter has a wrong type, or a leaf of params is not floating.

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
    num_local_steps = check_local_steps(num_local_steps)
    if momentum is not None:
        contract.check_momentum(momentum)
    contract.check_learning_rate("weight_decay", weight_decay)
    mask = None if frozen is None else Mask.of(frozen)
    return LocalRound(
        loss_fn, num_local_steps, momentum, weight_decay, gradient_transform, unroll, mask
    )
