"""Runs the S steps of a local round as one compiled function."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.frozen import Mask
from orlomo_jax.worker.local_optimizer import as_strong, check_kept, transformed
from orlomo_jax.worker.protocols import LossFn
from orlomo_jax.worker.round_parts import (
    Split,
    check_leading_axis,
    check_loss,
    choose_unroll,
    is_zero,
)


class RoundResult(NamedTuple):
    """The result of a local round.

    Attributes:
        update: Δw and Δu, trees like params; Δu is None for plain SGD.
        model_state: The model state after the last step.
        loss: float[S], the loss before each step.
        metrics: The metrics of ``loss_fn``, stacked over a leading axis S.
        finite: bool[], whether update, model state and losses have no NaN or Inf.
        local_state: The state of the worker's optimizer after the round, if it is kept; else None.
    """

    update: contract.LocalUpdate
    model_state: PyTree
    loss: Array
    metrics: PyTree
    finite: Array
    local_state: PyTree = None


@dataclass(frozen=True, eq=False)
class LocalRound:
    """A jitted local round; for its fields see :func:`local_round` and `local_momentum_sgd`."""

    loss_fn: LossFn
    num_local_steps: int | tuple[int, ...]
    momentum: Any = 0.9
    weight_decay: Any = 0.0
    gradient_transform: optax.GradientTransformation | None = None
    unroll: int | bool | None = None
    frozen: Mask | None = None
    optimizer: optax.GradientTransformation | None = None
    keep_state: bool = False

    def __post_init__(self) -> None:
        """Create one jitted function for all calls."""
        object.__setattr__(self, "_jitted", jax.jit(self._run))

    def __reduce__(self) -> tuple:
        """Pickle without the jitted function."""
        return LocalRound, tuple(getattr(self, field.name) for field in fields(self))

    def __call__(
        self,
        params: trees.Params,
        model_state: PyTree,
        batches: PyTree,
        local_learning_rate: Any,
        key: Array,
        *,
        momentum: trees.Params | None = None,
        local_state: PyTree = None,
    ) -> RoundResult:
        """Run the round; see :func:`local_momentum_sgd` and :func:`local_round`."""
        args = (params, model_state, batches, local_learning_rate, key)
        run: Any = self._jitted  # pyright: ignore[reportAttributeAccessIssue]
        return run(*args, momentum=momentum, local_state=local_state)

    def init_state(self, params: trees.Params) -> PyTree:
        """Return a new state of the optimizer."""
        assert self.optimizer is not None
        split, start = self._split(jax.tree.map(jnp.asarray, params))
        return as_strong(self.optimizer.init(split.optional(start)))

    def _split(self, params: trees.Params) -> tuple[Split, list[Array]]:
        """Return the split of params, and the trained leaves.

        In bfloat16, rounding would lose most steps: parameters and buffer are in float32.
        """
        split = Split(params, None if self.frozen is None else self.frozen.leaves(params))
        return split, trees.widened(split.trained(params))

    def _run(
        self,
        params,
        model_state,
        batches,
        local_learning_rate,
        key,
        *,
        momentum=None,
        local_state=None,
    ):
        num_steps = check_leading_axis(batches, self.num_local_steps)
        contract.check_learning_rate("local_learning_rate", local_learning_rate)
        trees.check_floating("params", params)
        if self.momentum is None and momentum is not None:
            raise ValueError("`momentum` must be None for plain SGD, got a starting buffer")
        if momentum is not None:
            trees.check_like("momentum", momentum, params)
        params = jax.tree.map(jnp.asarray, params)
        split, start = self._split(params)
        buffer = None
        if self.momentum is not None:
            like = [jnp.zeros_like(x) for x in start]
            given = like if momentum is None else split.trained(momentum)
            buffer = trees.combine([(1.0, given)], like=like)
        transform, optimizer = self.gradient_transform, self.optimizer
        transform_state = () if transform is None else transform.init(params)
        if optimizer is not None:
            transform_state = local_state
            if local_state is None:
                transform_state = as_strong(optimizer.init(split.optional(start)))

        def local_step(carry, inputs):
            local, buffer, model_state, transform_state = carry
            batch, index = inputs
            seen = split.rounded(local)

            def loss_of(trained):
                whole = split.whole(trained)
                result = self.loss_fn(whole, model_state, batch, jax.random.fold_in(key, index))
                return check_loss(result, model_state)

            gradient_fn = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (model_state, metrics)), gradient = gradient_fn(seen)
            # JAX's gradient of a complex parameter is the conjugate of the ascent direction.
            gradient = [jnp.conj(x) for x in gradient]
            if transform is not None:
                whole = split.whole(gradient, frozen=jnp.zeros_like)
                given = whole
                whole, transform_state = transformed(
                    transform, whole, transform_state, split.whole(seen), loss
                )
                trees.check_like("the result of gradient_transform", whole, given)
                gradient = split.trained(whole)
            if optimizer is not None:
                old, given = transform_state, split.optional(trees.widened(gradient))
                direction, transform_state = transformed(
                    optimizer, given, old, split.optional(local), loss
                )
                trees.check_like("the result of optimizer", direction, given)
                transform_state = check_kept(transform_state, old)
                gradient = jax.tree.leaves(direction)
            terms = [(local_learning_rate, gradient)]
            if not is_zero(self.weight_decay):
                terms.append((local_learning_rate * self.weight_decay, local))
            if buffer is not None:
                terms.append((self.momentum, buffer))
            change = trees.combine(terms, like=start)
            local = trees.combine([(1.0, local), (-1.0, change)], like=start)
            buffer = None if buffer is None else change
            return (local, buffer, model_state, transform_state), (loss, metrics)

        carry = (start, buffer, model_state, transform_state)
        steps = (batches, jnp.arange(num_steps))
        (local, buffer, model_state, transform_state), (loss, metrics) = jax.lax.scan(
            local_step, carry, steps, unroll=choose_unroll(self.unroll, local_step, carry, steps)
        )
        zero = lambda x: jnp.zeros_like(trees.widened([x])[0])  # noqa: E731
        update = contract.LocalUpdate(
            split.whole(jax.tree.map(jnp.subtract, start, local), frozen=zero),
            None if buffer is None else split.whole(buffer, frozen=zero),
        )
        finite = trees.all_finite((update, model_state, loss))
        kept = transform_state if self.keep_state else None
        return RoundResult(update, model_state, loss, metrics, finite, kept)


def keeps_state(round_fn: Any) -> bool:
    """Return whether a round keeps the state of the worker's optimizer.

    A round of your own does if it has a method ``init_state(params)``. It then takes
    ``local_state`` and returns the new state in :class:`RoundResult`.
    """
    return hasattr(round_fn, "init_state") and getattr(round_fn, "keep_state", True)


def init_state(round_fn: Any, params: trees.Params) -> PyTree:
    """Return a new state of the optimizer of any round; None if the round does not keep one."""
    return round_fn.init_state(params) if keeps_state(round_fn) else None
