"""Defines HeLoCo, which turns stale reports towards the momentum (Al Asif et al. 2026)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_nonnegative, check_number, check_type
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.momentum_lookahead import MomentumLookAheadState
from orlomo_jax.trees import Array


class Correction(NamedTuple):
    """The constants of HeLoCo's correction; the defaults are those of the authors' code.

    Attributes:
        aligned: The cosine in (0, 1] from which on a report is kept.
        shrink: k_s ≥ 0, the strength against a component opposite to the momentum.
        max_shrink: β_max in [0, 1], the largest part of that component that is removed.
        turn: k_d ≥ 0, the strength of the turn towards the momentum.
        kappa: κ ≥ 0; larger values correct less.
        epsilon: ε > 0; a leaf is kept if the norm of Δ or m is below it.
    """

    aligned: float = 0.2
    shrink: float = 0.5
    max_shrink: float = 0.5
    turn: float = 1.0
    kappa: float = 3.0
    epsilon: float = 1e-8


def heloco(
    num_workers: int,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 0.7,
    report_weight: float | optax.Schedule | None = None,
    *,
    correction: Correction | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Correct the direction of each leaf of a report by the momentum, then step as MLA does.

    For each leaf, with c = cos(Δ, m), conf = ‖Δ‖/(‖Δ‖ + κ‖m‖ + ε), and the m before this report:

    - c ≥ 0.2 (aligned): Δ̂ = Δ.
    - c < 0 (opposed): Δ̂ = Δ − β c‖Δ‖ m/‖m‖ with β = min(k_s(−c)conf, β_max). This removes the part
      β of the component of Δ along m.
    - Else: Δ̂ = ‖Δ‖ v/‖v‖ with v = (1−λ)Δ/‖Δ‖ + λm/‖m‖ and λ = min(k_d(1−c)conf, 1). This turns
      Δ towards m and keeps its norm.
    - If ‖Δ‖ < ε or ‖m‖ < ε: Δ̂ = Δ.

    Then G = ρΔ̂, m ← μm + (1−μ)G, and w ← w − η(G + μm) with the new m, as in
    :func:`~orlomo_jax.rules.momentum_lookahead`. The correction jumps at c = 0 and c = 0.2, as
    the authors intend. A complex leaf counts as a real vector. The delay is not used.

    The server *sends* w − ημm: use :func:`~orlomo_jax.rules.look_ahead` with the same μ and η.
    w already is the point ahead, so the workers look ahead twice. The authors' code does so (it
    cites the paper's Eqs. 5, 18 and 19). That code also takes the norms of Δ before ρ and of the m
    before the report, and compares them with ε. The paper's text was not checked.

    Needs: only ``delta``.

    Args:
        num_workers: K ≥ 1; only the default of ``report_weight`` uses it.
        momentum: μ in [0, 1); the default is the authors'.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step. The default is
            the authors'.
        report_weight: ρ, the weight of a report: a finite float ≥ 0, or a schedule of the step.
            None is 1/√K, which the authors recommend; their code has 1.
        correction: The constants of the correction; None is ``Correction()``, the authors'.
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
        >>> rule = heloco(num_workers=1, momentum=0.5, learning_rate=1.0)
        >>> state = rule.init(jnp.zeros(1))._replace(momentum=jnp.ones(1))
        >>> rule.update(LocalUpdate(-jnp.ones(1)), state)[1].momentum  # −1/2 + 1/2, less shrunk
        Array([0.0625], dtype=float32)

    References:
        Al Asif et al., `HeLoCo: Efficient asynchronous low-communication training under data and
        device heterogeneity <https://arxiv.org/abs/2606.00271>`_, 2026.
    """
    num_workers = contract.check_num_workers(num_workers)
    contract.check_momentum(momentum)
    check_type("correction", correction, Correction, "a Correction or None")
    correction = Correction() if correction is None else correction
    _check(correction)
    rate = scheduled("learning_rate", learning_rate)
    rho = scheduled("report_weight", num_workers**-0.5 if report_weight is None else report_weight)

    def init(params: trees.Params) -> MomentumLookAheadState:
        zero = jnp.zeros([], jnp.int32)
        return MomentumLookAheadState(zero, trees.zeros(params, accumulator_dtype))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.momentum, rule="heloco", momentum=False)
        eta, weight, mu = rate(state.step), rho(state.step), jnp.asarray(momentum, float)
        delta, structure = jax.tree.flatten(report.delta)
        steps = [
            _step(*leaves, eta, weight, mu, correction)
            for leaves in zip(delta, jax.tree.leaves(state.momentum), strict=True)
        ]
        new_updates, new_momentum = (
            structure.unflatten([step[part] for step in steps]) for part in (0, 1)
        )
        step = ordering.increment(state.step)
        return new_updates, MomentumLookAheadState(step, new_momentum)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(delta, m, eta, rho, mu, correction) -> tuple[Array, Array]:
    """Return the update and the new momentum m' of one leaf.

    With Δ̂ = aΔ + bm and D = μ + (1−μ)ρb: m' = Dm + (1−μ)ρaΔ, so that G = (μρaΔ + ρbm')/D if
    b > 0. Computed from m' instead of m, G lets XLA write m' in place; see `ordered_coefficients`.
    """
    a, b = _corrected(delta, m, correction)
    a, b = rho * a, rho * b
    decay = mu + (1 - mu) * b
    divisor = jnp.where(b == 0, 1, decay)  # decay may be 0 then
    of_delta, of_new = jnp.where(b == 0, a, mu * a / divisor), b / divisor
    decay, gain, of_delta, of_new = jax.lax.optimization_barrier(
        (decay, (1 - mu) * a, -eta * of_delta, -eta * (of_new + mu))
    )
    new = trees.combine([(decay, m), (gain, delta)], like=m)
    return trees.combine([(of_delta, delta), (of_new, new)], like=delta), new


def _corrected(delta: Array, m: Array, k: Correction) -> tuple[Array, Array]:
    """Return the factors of Δ and m in Δ̂, each float[]."""
    dtype = trees.wide_dtype(delta, m)
    delta, m = jnp.asarray(delta, dtype), jnp.asarray(m, dtype)
    # XLA for CPU computes each sum in its own pass, so the three sums read four arrays, not two.
    # A sum of tuples, of complex numbers, or of chunks in a loop reads two, but is not vectorized
    # and takes more than twice the time.
    dot = lambda x, y: jnp.sum((x.conj() * y).real).astype(float)  # noqa: E731
    length, norm = jnp.sqrt(dot(delta, delta)), jnp.sqrt(dot(m, m))
    small = (length < k.epsilon) | (norm < k.epsilon)
    norm = jnp.where(small, 1, norm)
    cosine = dot(delta, m) / (jnp.where(small, 1, length) * norm)
    confidence = length / (length + k.kappa * norm + k.epsilon)
    shrunk = jnp.minimum(-k.shrink * cosine * confidence, k.max_shrink)  # β
    turned = jnp.minimum(k.turn * (1 - cosine) * confidence, 1)  # λ
    rest = 1 - turned
    mixed = jnp.sqrt(rest**2 + turned**2 + 2 * rest * turned * cosine)  # ‖v‖
    kept, opposed = small | (cosine >= k.aligned), cosine < 0
    of_m = jnp.where(opposed, -shrunk * cosine, turned / mixed) * length / norm
    return jnp.where(kept | opposed, 1, rest / mixed), jnp.where(kept, 0, of_m)


def _check(k: Correction) -> None:
    """Raise unless every constant is in its range."""
    check_number("aligned", k.aligned, lambda x: 0 < x <= 1, "in (0, 1]")
    check_number("max_shrink", k.max_shrink, lambda x: 0 <= x <= 1, "in [0, 1]")
    check_number("epsilon", k.epsilon, lambda x: 0 < x < math.inf, "finite and > 0")
    for name in ("shrink", "turn", "kappa"):
        check_nonnegative(name, getattr(k, name))
