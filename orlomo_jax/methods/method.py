"""Defines the method: everything that server and workers must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_flag
from orlomo_jax.methods.fingerprint import fingerprint
from orlomo_jax.rules.rule_program import reads_sent_params, zero_updates
from orlomo_jax.traces.policies import Policy
from orlomo_jax.trees import Array
from orlomo_jax.worker.frozen import Mask
from orlomo_jax.worker.local_optimizer import check_optimizer
from orlomo_jax.worker.local_round import local_momentum_sgd, local_round
from orlomo_jax.worker.step_loop import RoundResult


class Method(NamedTuple):
    """A server rule, and the other settings that server and workers must agree on.

    Attributes:
        name: A short name, for records and messages.
        rule: The server rule, possibly in a chain of transformations.
        num_workers: K ≥ 1.
        num_local_steps: S ≥ 1, the local steps of a round (H in the DiLoCo papers): one int for all
            workers, or a tuple with one for each.
        worker_momentum: β of the workers' local rounds; None is plain SGD, without a momentum in
            the reports.
        synchronous: Whether all workers wait for each other after a round.
        model_state_weight: The weight in [0, 1] of a report's model state in the server's, as a
            function of (step, delay); None if the method does not train model state.
        frozen: The parameters that neither workers nor server change; None for none.
        master_params: Whether the server keeps 16-bit parameters and model state in float32.
        local_optimizer: The workers' optax transformation, see :func:`~orlomo_jax.local_round`;
            None is SGD, with ``worker_momentum``.
        keep_local_state: Whether each worker keeps its optimizer's state between rounds.
        policy: When the server holds back tasks, restarts workers or drops reports; None is never.
        dispatch: ``dispatch(rule_state, params) -> params``, what workers are sent if it is not w.
        factory: Returns the method with other hyperparameters, which are keyword arguments; None
            for a method that was not made by :func:`~orlomo_jax.make_method`.
    """

    name: str
    rule: optax.GradientTransformationExtraArgs
    num_workers: int
    num_local_steps: int | tuple[int, ...]
    worker_momentum: float | None = None
    synchronous: bool = False
    model_state_weight: Callable[[Array, Array], Array] | None = None
    frozen: Mask | None = None
    master_params: bool = True
    local_optimizer: optax.GradientTransformation | None = None
    keep_local_state: bool = True
    policy: Policy | None = None
    dispatch: Callable[[Any, Any], Any] | None = None
    factory: Callable[..., Method] | None = None

    @property
    def steps_of_worker(self) -> tuple[int, ...]:
        """S of each worker.

        Example:
            >>> from orlomo_jax import make_method
            >>> make_method("al_sgd", 2, num_local_steps=4).steps_of_worker
            (4, 4)
        """
        steps = self.num_local_steps
        return steps if isinstance(steps, tuple) else (steps,) * self.num_workers

    @property
    def fingerprint(self) -> tuple[tuple[str, str], ...]:
        """Every value that distinguishes this method from others, as pairs (path, text).

        The values in a custom rule count too; see :func:`~orlomo_jax.with_fingerprint`.

        Example:
            >>> from orlomo_jax import make_method
            >>> dict(make_method("orlomo", 2, num_local_steps=4).fingerprint)["method.num_workers"]
            '2'
        """
        values = fingerprint(self._replace(factory=None), "method")  # the rule has its values
        return tuple((path, text) for path, text in values.items() if path != "method.factory")

    def with_rule(self, rule: optax.GradientTransformationExtraArgs) -> Method:
        """Return the method with another rule, for example this rule in an ``optax.chain``."""
        return self._replace(rule=rule, factory=None)

    def with_hyperparameters(self, **values: Any) -> Method:
        """Return the method with other hyperparameters of its server rule.

        The values may be traced, so that one program serves several of them.

        Args:
            **values: Those hyperparameters of :func:`~orlomo_jax.make_method` that change.

        Raises:
            ValueError: If the method does not come from ``make_method``, a value is out of range,
                or a hyperparameter changes more than the server rule.
            TypeError: If a hyperparameter is unknown or has a wrong type.

        Example:
            >>> from orlomo_jax import make_method
            >>> method = make_method("orlomo", 2, num_local_steps=4)
            >>> method.with_hyperparameters(learning_rate=0.5).num_local_steps
            4
        """
        if self.factory is None:
            raise ValueError(
                f"{self.name} must come from make_method without another rule, to change its "
                f"hyperparameters {', '.join(values)}"
            )
        new = self.factory(**values)
        for field in ("worker_momentum", "num_local_steps", "synchronous"):
            if getattr(new, field) != getattr(self, field):
                raise ValueError(
                    f"{', '.join(values)} must stay as it is, because it also changes {field} of "
                    f"{self.name} from {getattr(self, field)} to {getattr(new, field)}"
                )
        return self._replace(
            rule=new.rule, model_state_weight=new.model_state_weight, dispatch=new.dispatch
        )

    def with_local_optimizer(
        self, optimizer: optax.GradientTransformation, *, keep_state: bool = True
    ) -> Method:
        """Return the method with workers that run an optax transformation.

        Raises:
            ValueError: If the method needs the workers' local momentum, or the transformation
                descends; see :func:`~orlomo_jax.local_round`.
            TypeError: If ``optimizer`` is not an optax transformation.
        """
        if self.worker_momentum is not None:
            raise ValueError(
                f"`local_optimizer` must be None for {self.name}, which merges the momentum of "
                f"local momentum SGD, got local_optimizer={optimizer!r}; the method "
                "ordered_outer_momentum takes any local optimizer"
            )
        check_optimizer(optimizer)
        keep_state = check_flag("keep_state", keep_state)
        return self._replace(local_optimizer=optimizer, keep_local_state=keep_state)

    def with_policy(self, policy: Policy) -> Method:
        """Return the method with a policy, which bounds delays or restarts workers.

        Raises:
            ValueError: If the method is synchronous, or the policy does not work with K workers.
            TypeError: If ``policy`` is not a policy.
        """
        if not isinstance(policy, Policy):
            raise TypeError(f"`policy` must be a StalenessBound or RestartEvery, got {policy!r}")
        if self.synchronous:
            raise ValueError(
                f"`policy` must be None for {self.name}, which waits for all workers, "
                f"got policy={policy!r}"
            )
        policy.check_num_workers(self.num_workers)
        return self._replace(policy=policy)

    def local_round(self, loss_fn: Callable, **options: Any) -> Callable[..., RoundResult]:
        """Return the local round with this method's S and local optimizer or local momentum.

        Args:
            loss_fn: As in :func:`~orlomo_jax.local_round`.
            **options: The other arguments of ``local_round`` or, without ``local_optimizer``, of
                ``local_momentum_sgd``. By default, the parameters that this method never changes
                are frozen.
        """
        options = {"frozen": Unmoved(self)} | options
        if self.local_optimizer is None:
            return local_momentum_sgd(
                loss_fn, self.num_local_steps, self.worker_momentum, **options
            )
        options = {"keep_state": self.keep_local_state} | options
        return local_round(loss_fn, self.num_local_steps, self.local_optimizer, **options)

    def reads_sent_params(self, params: trees.Params) -> bool:
        """Return whether the rule reads the parameters that a report's worker was sent."""
        return reads_sent_params(self.rule, params, momentum=self.worker_momentum is not None)


class Unmoved(NamedTuple):
    """Finds the parameters that a method never changes: by ``frozen`` or by its rule.

    ``optax.chain(rule, optax.masked(optax.set_to_zero(), mask))`` freezes parameters on the server.
    The workers must not train them either, or the other gradients would be at wrong points.
    """

    method: Method

    def __call__(self, params: trees.Params) -> trees.Params:
        """Return a tree of bools like params."""
        method, structure = self.method, jax.tree.structure(params)
        unmoved = zero_updates(method.rule, params, momentum=method.worker_momentum is not None)
        if method.frozen is not None:
            frozen = method.frozen.leaves(params)
            unmoved = [a or b for a, b in zip(unmoved, frozen, strict=True)]
        return jax.tree.unflatten(structure, unmoved)


def round_of(method: Method, loss_fn: Callable | None, round_fn: Callable | None) -> Callable:
    """Return ``round_fn`` or the local round of ``loss_fn``; raise unless one is given."""
    if (loss_fn is None) == (round_fn is None):
        given = "both" if loss_fn is not None else "neither"
        raise ValueError(f"pass either `loss_fn` or `round_fn`, got {given}")
    return method.local_round(loss_fn) if loss_fn is not None else round_fn  # pyright: ignore
