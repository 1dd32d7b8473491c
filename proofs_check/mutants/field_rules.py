"""Defines faulty rules of the field. Many are bugs of public implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import orlomo_jax.rules as rules
from orlomo_jax import LocalUpdate, al_sgd, make_method
from orlomo_jax.rules import scheduled
from proofs_check.mutants.bookkeeping import Mutant
from proofs_check.mutants.faulty_rules import Faults, faulty
from proofs_check.registry import field_rule

Factory = Callable[..., Any]


def changed(
    rule: Any,
    before: Callable = lambda report, *_: report,
    after: Callable = lambda updates, *_: updates,
) -> optax.GradientTransformationExtraArgs:
    """Return the rule with a report changed before it, or the updates after it.

    Args:
        rule: The rule.
        before: ``before(report, state, params, extra) -> report``; it may change ``extra``.
        after: ``after(updates, old state, new state, report) -> updates``.
    """

    def update(updates, state, params=None, **extra):
        report = before(updates, state, params, extra)
        changes, new = rule.update(report, state, params, **extra)
        return after(changes, state, new, report), new

    return optax.GradientTransformationExtraArgs(rule.init, update)  # pyright: ignore[reportArgumentType]


def against_current(report, state, params, extra):
    """Take Δ against the current w, not against what was sent."""
    local = jax.tree.map(jnp.subtract, extra["dispatched_params"], report.delta)
    return LocalUpdate(jax.tree.map(jnp.subtract, params, local))


def counted_twice(size: int, learning_rate: Any) -> Callable:
    """Return the change to descend along the mean, too, at the N-th report."""
    rate = scheduled("learning_rate", learning_rate)

    def after(updates, state, new, report):
        last = jnp.where(new.step % size == 0, rate(state.step) / size, 0.0)
        return jax.tree.map(lambda u, total: u - last * total, updates, new.pending)

    return after


def steps_as_delays(report, state, params, extra):
    """Count the delay in all reports: give the version that makes it so."""
    extra["dispatched_version"] = state.version - (state.step - extra["dispatched_at"])
    return report


def dispatched_now(report, state, params, extra):
    """Take the delay as 0."""
    extra["dispatched_at"] = state.step
    extra["dispatched_version"] = getattr(state, "version", state.step)
    return report


def _twice(num_workers, size=None, momentum=0.9, learning_rate=0.7, c=0.0):
    rule = rules.delayed_nesterov(num_workers, size, momentum, learning_rate, c)
    return changed(rule, after=counted_twice(size or num_workers, learning_rate))


def _scaled(by: Callable[[int], float]) -> Factory:
    """Return delayed Nesterov with η multiplied by a function of N."""

    def factory(num_workers, size=None, momentum=0.9, learning_rate=0.7, c=0.0):
        rate, factor = scheduled("learning_rate", learning_rate), by(size or num_workers)
        return rules.delayed_nesterov(
            num_workers, size, momentum, lambda step: factor * rate(step), c
        )

    return factory


def _ca2fl(of_mean: Callable[[Any, Any], Any]) -> Factory:
    """Return CA2FL with η·of_mean(the old, the new h̄) added to the update at a flush."""

    def factory(num_workers, buffer_size, learning_rate=1.0):
        rate = scheduled("learning_rate", learning_rate)

        def after(updates, old, new, report):
            eta = jnp.where(new.version > old.version, rate(old.step), 0.0)
            return jax.tree.map(
                lambda u, h, g: u + eta * of_mean(h, g), updates, old.cached_mean, new.cached_mean
            )

        return changed(rules.ca2fl(num_workers, buffer_size, learning_rate), after=after)

    return factory


def _before(name: str, change: Callable) -> Factory:
    """Return the factory of a rule with its reports changed."""
    return lambda *args, **options: changed(field_rule(name)(*args, **options), before=change)


def without_gamma(report, state, params, extra):
    """Take γ as 1."""
    extra["local_learning_rate"] = jnp.ones_like(extra["local_learning_rate"])
    return report


def replaced(name: str, factory: Factory) -> Factory:
    """Return :func:`~proofs_check.registry.field_rule` with one rule replaced."""
    return lambda wanted: factory if wanted == name else field_rule(wanted)


def in_order_of_arrival(name, num_workers, num_local_steps, **options):
    """Return a method; ordered outer momentum gives every report the weight 1 in u."""
    method = make_method(name, num_workers, num_local_steps, **options)
    if name != "ordered_outer_momentum":
        return method
    faults = Faults(swap=True, weight=lambda beta, late: jnp.ones_like(beta))
    return method.with_rule(faulty(faults)(num_workers, momentum=0.9))


def _restarts_counts(run, step):
    """Keep Adam's moments, but restart its step counter in each round."""

    def change(self, *args, local_state=None, **options):
        integer = lambda x: jnp.issubdtype(x.dtype, jnp.integer)  # noqa: E731
        state = jax.tree.map(lambda x: jnp.zeros_like(x) if integer(x) else x, local_state)
        return run(self, *args, local_state=state, **options)

    return change


def _keeps_after_a_loss(release, step):
    """Let a worker continue from the state before the lost round."""

    def change(self, worker):
        fresh = self.fresh[worker]
        task_id = release(self, worker)
        self.fresh[worker] = fresh
        return task_id

    return change


FAULTY: tuple[tuple[str, str, str, Factory], ...] = (
    # (the rule, the fault, the statements that fail, the factory)
    ("fedasync", "Δ for w − local", "fedasync",
     lambda alpha, s=None: al_sgd(2, alpha, s or rules.polynomial())),
    ("fedasync", "a delay of 0", "fedasync", _before("fedasync", dispatched_now)),
    ("fedbuff", "Δ against the current w", "fedbuff fedbuff-of-one",
     _before("fedbuff", against_current)),
    ("fedbuff", "delays in reports", "fedbuff", _before("fedbuff", steps_as_delays)),
    ("fedbuff", "a delay of 0", "fedbuff fedbuff-of-one", _before("fedbuff", dispatched_now)),
    ("nesterov", "ρ = 1/√K", "nesterov",
     lambda k, mu, eta: rules.nesterov(k, mu, eta, k**-0.5)),
    ("nesterov", "momentum of an average", "nesterov one-worker",
     lambda k, mu, eta: rules.momentum_lookahead(k, mu, eta, 1 / k)),
    ("delayed_nesterov", "each report twice", "delayed-nesterov delayed-nesterov-mean", _twice),
    ("delayed_nesterov", "η for ε", "delayed-nesterov delayed-nesterov-mean",
     _scaled(lambda size: size)),
    ("delayed_nesterov", "ε for η", "delayed-nesterov delayed-nesterov-mean",
     _scaled(lambda size: 1 / size)),
    ("momentum_lookahead", "a sum, not an average", "momentum-lookahead",
     lambda k, mu, eta, rho=None: rules.nesterov(k, mu, eta, k**-0.5)),
    ("momentum_lookahead", "ρ = 1/√K always", "look-ahead-without-momentum",
     lambda k, mu, eta, rho=None: rules.momentum_lookahead(k, mu, eta)),
    ("heloco", "no correction", "heloco",
     lambda k, mu, eta, correction=None: rules.momentum_lookahead(k, mu, eta)),
    ("local_ormo_da", "order of arrival", "ordered-momentum-rate",
     faulty(Faults(swap=True, group=lambda index, num_workers: 0 * index))),
    ("delay_lookahead", "μ for ρ", "delay-lookahead delay-lookahead-rate",
     lambda k, mu, eta: rules.delay_lookahead(k, mu**k, eta)),
    ("ringmaster", "declined reports in the delay", "ringmaster",
     _before("ringmaster", steps_as_delays)),
    ("ringmaster", "a limit of 2 if there is none", "ringmaster-without-limit",
     lambda limit, eta: rules.ringmaster(limit or 2, eta)),
    ("rennala", "stale reports accepted", "rennala", _before("rennala", dispatched_now)),
    ("rescaled_asgd", "Eq. (6) for the weight", "rescaled-asgd",
     lambda k, eta: al_sgd(k, eta)),
    ("rescaled", "τ for τ + 1", "rescaled-weights",
     lambda k: lambda delay: jnp.asarray(delay).astype(float) / k**2),
    ("ca2fl", "h̄ of now", "ca2fl", _ca2fl(lambda old, new: old - new)),
    ("ca2fl", "no h̄", "ca2fl ca2fl-of-equals", _ca2fl(lambda old, new: old)),
    ("fadas", "no delay threshold", "fadas",
     lambda *args, delay_threshold: rules.fadas(*args, delay_threshold=None)),
    ("local_sgd", "a sum, not a mean", "local-sgd",
     lambda k, eta: changed(rules.local_sgd(k, eta),
                            after=lambda u, *_: jax.tree.map(lambda x: k * x, u))),
    ("fedavgm", "Nesterov momentum", "fedavgm one-worker",
     lambda k, mu, eta=1.0: rules.diloco(k, mu, eta)),
    ("slowmo", "Δ not divided by γ", "slowmo", _before("slowmo", without_gamma)),
    ("diloco", "no Nesterov momentum", "diloco one-worker",
     lambda k, mu, eta: rules.fedavgm(k, mu, eta)),
    ("diloco", "η = 0.7 always", "diloco-without-momentum",
     lambda k, mu, eta: rules.diloco(k, mu)),
)  # fmt: skip
CHECKED_BY = ("field-momentum-rules", "field-buffer-rules", "field-identities", "momentum-rates")
"""The checks that compare these rules."""
KEPT = {
    "Adam's step counter restarted in each round": Mutant(
        "orlomo_jax.worker.step_loop:LocalRound._run", _restarts_counts),
    "a state made anew in each round": Mutant(
        "orlomo_jax.server.task_table:TaskTable.fresh_task",
        lambda method, step: lambda self, worker: True),
    "a state kept after a loss": Mutant(
        "orlomo_jax.server.task_table:TaskTable.release", _keeps_after_a_loss),
}  # fmt: skip
