"""Defines the local round: S steps of momentum SGD from the parameters sent to the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_count
from orlomo_jax.memo import shared
from orlomo_jax.rules import contract
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.frozen import Mask
from orlomo_jax.worker.protocols import LossFn


class RoundResult(NamedTuple):
    """The result of a local round.

    Attributes:
        update: Δw and Δu, trees like params; Δu is None for plain SGD.
        model_state: The model state after the last step.
        loss: float[S], the loss before each step.
        metrics: The metrics of ``loss_fn``, stacked over a leading axis S.
        finite: bool[], whether update, model state and losses have no NaN or Inf.
    """

    update: contract.LocalUpdate
    model_state: PyTree
    loss: Array
    metrics: PyTree
    finite: Array


@shared
def local_momentum_sgd(
    loss_fn: LossFn,
    num_local_steps: int,
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
        num_local_steps: S ≥ 1 (H in the DiLoCo papers).
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
    num_local_steps = check_count("num_local_steps", num_local_steps, 1)
    if momentum is not None:
        contract.check_momentum(momentum)
    contract.check_learning_rate("weight_decay", weight_decay)
    mask = None if frozen is None else Mask.of(frozen)
    return LocalRound(
        loss_fn, num_local_steps, momentum, weight_decay, gradient_transform, unroll, mask
    )


@dataclass(frozen=True, eq=False)
class LocalRound:
    """A jitted local round; its fields are the arguments of :func:`local_momentum_sgd`."""

    loss_fn: LossFn
    num_local_steps: int
    momentum: Any = 0.9
    weight_decay: Any = 0.0
    gradient_transform: optax.GradientTransformation | None = None
    unroll: int | bool | None = None
    frozen: Mask | None = None

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
    ) -> RoundResult:
        """Run the round; see :func:`local_momentum_sgd`."""
        args = (params, model_state, batches, local_learning_rate, key)
        return self._jitted(*args, momentum=momentum)  # pyright: ignore[reportAttributeAccessIssue]

    def _run(self, params, model_state, batches, local_learning_rate, key, *, momentum=None):
        _check_leading_axis(batches, self.num_local_steps)
        contract.check_learning_rate("local_learning_rate", local_learning_rate)
        trees.check_floating("params", params)
        if self.momentum is None and momentum is not None:
            raise ValueError("`momentum` must be None for plain SGD, got a starting buffer")
        if momentum is not None:
            trees.check_like("momentum", momentum, params)
        params = jax.tree.map(jnp.asarray, params)
        split = _Split(params, None if self.frozen is None else self.frozen.leaves(params))
        # In bfloat16, rounding would lose most steps: parameters and buffer are in float32.
        start = trees.widened(split.trained(params))
        buffer = None
        if self.momentum is not None:
            like = [jnp.zeros_like(x) for x in start]
            given = like if momentum is None else split.trained(momentum)
            buffer = trees.combine([(1.0, given)], like=like)
        transform = self.gradient_transform

        def local_step(carry, inputs):
            local, buffer, model_state, transform_state = carry
            batch, index = inputs
            seen = split.rounded(local)

            def loss_of(trained):
                whole = split.whole(trained)
                result = self.loss_fn(whole, model_state, batch, jax.random.fold_in(key, index))
                return _check_loss(result, model_state)

            gradient_fn = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (model_state, metrics)), gradient = gradient_fn(seen)
            # JAX's gradient of a complex parameter is the conjugate of the ascent direction.
            gradient = [jnp.conj(x) for x in gradient]
            if transform is not None:
                whole = split.whole(gradient, frozen=jnp.zeros_like)
                whole, transform_state = transform.update(whole, transform_state, split.whole(seen))
                gradient = split.trained(whole)
            terms = [(local_learning_rate, gradient)]
            if not _is_zero(self.weight_decay):
                terms.append((local_learning_rate * self.weight_decay, local))
            if buffer is not None:
                terms.append((self.momentum, buffer))
            change = trees.combine(terms, like=start)
            local = trees.combine([(1.0, local), (-1.0, change)], like=start)
            buffer = None if buffer is None else change
            return (local, buffer, model_state, transform_state), (loss, metrics)

        carry = (start, buffer, model_state, () if transform is None else transform.init(params))
        steps = (batches, jnp.arange(self.num_local_steps))
        (local, buffer, model_state, _), (loss, metrics) = jax.lax.scan(
            local_step, carry, steps, unroll=_unroll(self.unroll, local_step, carry, steps)
        )
        zero = lambda x: jnp.zeros_like(trees.widened([x])[0])  # noqa: E731
        update = contract.LocalUpdate(
            split.whole(jax.tree.map(jnp.subtract, start, local), frozen=zero),
            None if buffer is None else split.whole(buffer, frozen=zero),
        )
        finite = trees.all_finite((update, model_state, loss))
        return RoundResult(update, model_state, loss, metrics, finite)


class _Split:
    """Splits trees like params into trained and frozen leaves."""

    def __init__(self, params: trees.Params, frozen: list[bool] | None) -> None:
        self._leaves, self._structure = jax.tree.flatten(params)
        self._frozen = [False] * len(self._leaves) if frozen is None else frozen

    def trained(self, tree: PyTree) -> list[Array]:
        leaves = jax.tree.leaves(tree)
        return [x for x, frozen in zip(leaves, self._frozen, strict=True) if not frozen]

    def rounded(self, trained: list[Array]) -> list[Array]:
        """Return trained leaves in the dtypes of params, as ``loss_fn`` gets them."""
        wanted = self.trained(self._leaves)
        return [x.astype(like.dtype) for x, like in zip(trained, wanted, strict=True)]

    def whole(
        self, trained: list[Any], frozen: Callable[[Array], Array] = lambda x: x
    ) -> trees.Params:
        """Return a tree like params from trained leaves; ``frozen`` maps the other leaves."""
        trained_leaves = iter(trained)
        leaves = [
            frozen(x) if is_frozen else next(trained_leaves)
            for x, is_frozen in zip(self._leaves, self._frozen, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _check_loss(result: Any, model_state: PyTree) -> Any:
    """Return the result of ``loss_fn``; raise if its form is wrong."""
    wanted = "`loss_fn` must return (loss, (model_state, metrics))"
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"{wanted}, got {type(result).__name__}")
    loss, aux = result
    if not (isinstance(aux, tuple) and len(aux) == 2):
        raise TypeError(f"{wanted}, got (loss, {type(aux).__name__})")
    if np.shape(loss) != ():
        raise ValueError(f"{wanted} with a scalar loss, got a loss of shape {np.shape(loss)}")
    trees.check_like("loss_fn's model_state", aux[0], model_state)
    return result


def convolves(function: Callable, *args: Any) -> bool:
    """Return whether a function contains a convolution; its arguments may be abstract.

    Example:
        >>> convolves(jnp.convolve, jnp.ones(3), jnp.ones(2)), convolves(jnp.dot, 1.0, 1.0)
        (True, False)
    """
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))


def _unroll(unroll: int | bool | None, local_step: Callable, carry: Any, steps: Any) -> int | bool:
    """Return ``unroll``, or its default; see :func:`local_momentum_sgd`."""
    if unroll is not None:
        return unroll
    if jax.default_backend() != "cpu":
        return 1
    first = jax.tree.map(lambda x: x[0], steps)
    return True if convolves(local_step, carry, first) else 1


def _check_leading_axis(batches: PyTree, num_local_steps: int) -> None:
    for path, leaf in jax.tree.leaves_with_path(batches):
        if np.shape(leaf)[:1] != (num_local_steps,):
            raise ValueError(
                f"`batches{jax.tree_util.keystr(path)}` must have a leading axis of "
                f"num_local_steps={num_local_steps}, got shape {np.shape(leaf)}"
            )
