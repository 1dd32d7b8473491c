"""Defines MLA, momentum look-ahead (Ajanthan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.trees import Array


class MomentumLookAheadState(NamedTuple):
    """State of :func:`momentum_lookahead` and :func:`~orlomo_jax.rules.heloco`.

    Attributes:
        step: t, the number of reports received, int32[].
        momentum: m, an exponential moving average of the pseudo-gradients; a tree like params.
    """

    step: Array
    momentum: trees.Params


def momentum_lookahead(
    num_workers: int,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 0.7,
    report_weight: float | optax.Schedule | None = None,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Take Nesterov steps with an averaged momentum, from the point ahead along the momentum.

    With the pseudo-gradient G = ρΔw,

    - m ← μm + (1−μ)G,
    - w ← w − η(G + μm), with the new m.

    The server sends w itself, because w *is* the point ahead: with θ = w + ημm and a constant η,
    this is θ ← θ − η(G + μm) with the *old* m, while the workers are sent θ − ημm. The two forms
    send the same parameters. Do not combine this rule with :func:`look_ahead`, except to study it:
    that would look ahead twice, as HeLoCo does. With μ = 0 the rule is
    :func:`~orlomo_jax.al_sgd` with the constant weight ρ. The delay is not used.

    Sources: the paper's text could not be read for this implementation. The step in w, and that w
    is sent, are as in two public implementations (one cites the paper's Eq. 7; the other is the
    baseline of HeLoCo's authors); a third public text quotes the paper's form in θ. They agree.

    Needs: only ``delta``.

    Args:
        num_workers: K ≥ 1; only the default of ``report_weight`` uses it.
        momentum: μ in [0, 1); the default is DiLoCo's.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step. The default is
            DiLoCo's.
        report_weight: ρ, the weight of a report: a finite float ≥ 0, or a schedule of the step.
            None is 1/√K, which HeLoCo's authors recommend for HeLoCo; their MLA has ρ = 1.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of params.
        TypeError: If ``update`` gets anything but a LocalUpdate, or a leaf of params is not
            floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = momentum_lookahead(num_workers=1, momentum=0.5, learning_rate=1.0)
        >>> updates, state = rule.update(LocalUpdate(jnp.ones(1)), rule.init(jnp.zeros(1)))
        >>> updates, state.momentum
        (Array([-1.25], dtype=float32), Array([0.5], dtype=float32))

    References:
        Ajanthan et al., `Momentum look-ahead for asynchronous distributed low-communication
        training <https://openreview.net/forum?id=4O8nzTkHPI>`_, 2025.
    """
    num_workers = contract.check_num_workers(num_workers)
    contract.check_momentum(momentum)
    rate = scheduled("learning_rate", learning_rate)
    rho = scheduled("report_weight", num_workers**-0.5 if report_weight is None else report_weight)

    def init(params: trees.Params) -> MomentumLookAheadState:
        zero = jnp.zeros([], jnp.int32)
        return MomentumLookAheadState(zero, trees.zeros(params, accumulator_dtype))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        report = contract.check_report(
            updates, state.momentum, rule="momentum_lookahead", momentum=False
        )
        eta, weight, mu = rate(state.step), rho(state.step), jnp.asarray(momentum, float)
        mu, gain, of_delta, of_momentum = jax.lax.optimization_barrier(
            (mu, (1 - mu) * weight, -eta * weight, -eta * mu)
        )
        new_momentum = trees.combine(
            [(mu, state.momentum), (gain, report.delta)], like=state.momentum
        )
        new_updates = trees.combine(
            [(of_delta, report.delta), (of_momentum, new_momentum)], like=report.delta
        )
        step = ordering.increment(state.step)
        return new_updates, MomentumLookAheadState(step, new_momentum)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclass(frozen=True)
class LookAhead:
    """A function of the rule's state and the server's parameters to those that are sent.

    Made by :func:`look_ahead`. It equals every one with the same fields.

    Attributes:
        momentum: μ.
        learning_rate: η, or a schedule.
    """

    momentum: float
    learning_rate: float | optax.Schedule

    def __call__(self, rule_state: Any, params: trees.Params) -> trees.Params:
        """Return w − ημm, a tree like params in their dtypes, with η at the state's step.

        Raises:
            TypeError: If the state does not contain a :class:`MomentumLookAheadState`.
        """
        state = contract.find_state(rule_state, MomentumLookAheadState)
        eta = scheduled("learning_rate", self.learning_rate)(state.step)
        scale = jax.lax.optimization_barrier(-eta * jnp.asarray(self.momentum, float))
        return trees.combine([(1.0, params), (scale, state.momentum)], like=params)


def look_ahead(momentum: float = 0.9, learning_rate: float | optax.Schedule = 0.7) -> LookAhead:
    """Return the function that looks ahead along the momentum: it sends w − ημm.

    Give it the same μ and η as the rule. HeLoCo sends what this function returns; see
    :func:`momentum_lookahead` for MLA.

    Args:
        momentum: μ in [0, 1).
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step.

    Returns:
        A hashable function ``dispatch(rule_state, params) -> params``. It finds the rule's own
        state also in the state of an ``optax.chain``.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> scaling = optax.scale(2.0).init(jnp.zeros(1))
        >>> state = (MomentumLookAheadState(jnp.int32(3), jnp.ones(1)), scaling)  # of a chain
        >>> look_ahead(momentum=0.5, learning_rate=1.0)(state, jnp.zeros(1))
        Array([-0.5], dtype=float32)
    """
    contract.check_momentum(momentum)
    scheduled("learning_rate", learning_rate)
    rate = learning_rate if callable(learning_rate) else float(learning_rate)
    return LookAhead(float(momentum), rate)
