"""Every rule as a case for the optax contracts, and a short run of one."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orlomo_jax import LocalUpdate, al_sgd, local_ormo_da, orlomo, prsgdm, rules
from tests.support import helpers

K, STEPS = 3, 7


DISPATCHED_AT = [0, 0, 1, 0, 3, 5, 4]


DISPATCHED_VERSION = [0, 0, 1, 0, 1, 1, 2]  # in [0, version] for every rule


START_OF_ROUND = [0, 0, 0, 3, 3, 3, 6]


class Case(NamedTuple):
    """A rule, and what the contracts must know of it.

    Attributes:
        factory: The rule's function.
        arguments: Its arguments but K; the floats are its hyperparameters.
        dispatched_at: The index of each report.
        costly: The costly operations that it does for every parameter.
        needs_params: Whether it needs the server's parameters.
    """

    factory: Callable
    arguments: dict = {}  # noqa: RUF012
    dispatched_at: list[int] = DISPATCHED_AT
    costly: tuple[str, ...] = ()
    needs_params: bool = False

    def make(self, num_workers: int, **options):
        known = self.takes("num_workers")
        return self.factory(**known, **{**self.arguments, **options})

    def takes(self, name: str, value: Any = K) -> dict[str, Any]:
        """Return the argument, if the rule takes it."""
        return {name: value} if name in inspect.signature(self.factory).parameters else {}


CASES = {
    "orlomo": Case(orlomo, {"momentum": 0.5}),
    "local_ormo_da": Case(local_ormo_da, {"momentum": 0.5}),
    "al_sgd": Case(al_sgd),
    "prsgdm": Case(prsgdm, dispatched_at=START_OF_ROUND),
    "ringmaster": Case(rules.ringmaster, {"max_delay": 2}),
    "rennala": Case(rules.rennala, {"buffer_size": 2}),
    "fedasync": Case(rules.fedasync, {"mixing_rate": 0.5}, needs_params=True),
    "fedbuff": Case(rules.fedbuff, {"buffer_size": 2}),
    "nesterov": Case(rules.nesterov, {"momentum": 0.5}),
    "delayed_nesterov": Case(rules.delayed_nesterov, {"momentum": 0.5, "c": 0.25}),
    "momentum_lookahead": Case(rules.momentum_lookahead, {"momentum": 0.5}),
    "heloco": Case(rules.heloco, {"momentum": 0.5}),
    "delay_lookahead": Case(rules.delay_lookahead, {"momentum": 0.0625}),
    "rescaled_asgd": Case(rules.rescaled_asgd),
    "ca2fl": Case(rules.ca2fl, {"buffer_size": 2}, costly=("slice(",)),
    "fadas": Case(
        rules.fadas,
        {"buffer_size": 2, "learning_rate": 0.5, "b1": 0.5, "delay_threshold": 0},
        costly=("divide(",),
    ),
    "local_sgd": Case(rules.local_sgd, dispatched_at=START_OF_ROUND),
    "fedavgm": Case(rules.fedavgm, {"momentum": 0.5}, START_OF_ROUND),
    "slowmo": Case(rules.slowmo, {"momentum": 0.5}, START_OF_ROUND),
    "diloco": Case(rules.diloco, {"momentum": 0.5}, START_OF_ROUND),
}


def sent(case: Case, step: int = 0, params: Any = None) -> dict[str, Any]:
    """Return the keywords of ``update`` that a server gives with a report."""
    return {
        "dispatched_at": case.dispatched_at[step],
        "dispatched_version": DISPATCHED_VERSION[step],
        "worker": step % K,
        "num_local_steps": 1,
        "local_learning_rate": 0.5,
        "dispatched_params": helpers.tree() if params is None else params,
    }


def reports(dtype=jnp.float32) -> list[LocalUpdate]:
    return [helpers.report(seed, dtype) for seed in range(STEPS)]


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def run(case, rule, params=None, updates=None):
    params = helpers.tree() if params is None else params
    first, state = params, rule.init(params)
    for step, update in enumerate(reports() if updates is None else updates):
        changes, state = rule.update(update, state, params, **sent(case, step, first))
        params = jax.tree.map(jnp.add, params, changes)
    return params, state
