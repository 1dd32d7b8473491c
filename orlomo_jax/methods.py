"""Methods: a server rule, K, S, local momentum or not, synchronous or not; and their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import rules
from orlomo_jax.checks import check_count
from orlomo_jax.fingerprint import fingerprint
from orlomo_jax.masks import Mask, zero_updates
from orlomo_jax.memo import shared
from orlomo_jax.rules import base, contract
from orlomo_jax.worker import RoundResult, local_momentum_sgd

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Method(NamedTuple):
    """What server and workers have to agree on.

    Attributes:
        name: A short name, for records and messages.
        rule: The server rule, possibly in a chain of transformations.
        num_workers: K ≥ 1.
        num_local_steps: S ≥ 1, the local steps of a round.
        worker_momentum: β of the workers' local rounds; None is plain SGD, whose reports carry no
            momentum.
        synchronous: Whether all workers wait for each other after a round.
        merge_weight: The weight in [0, 1] with which a report's model state enters the server's, as
            a function of (step, delay); None where the method trains no model state.
        frozen: Which parameters neither workers nor server change; None for none.
        master_params: Whether the server keeps parameters and model state of 16 bits in float32.
    """

    name: str
    rule: optax.GradientTransformationExtraArgs
    num_workers: int
    num_local_steps: int
    worker_momentum: float | None = None
    synchronous: bool = False
    merge_weight: Callable[[Int[Array, ""], Int[Array, ""]], Float[Array, ""]] | None = None
    frozen: Mask | None = None
    master_params: bool = True

    @property
    def fingerprint(self) -> tuple[tuple[str, str], ...]:
        """Every value that tells this method from another, as pairs of a path and its text.

        A rule of one's own counts too, with all that it carries; see
        :func:`~orlomo_jax.with_fingerprint`.

        Example:
            >>> dict(make_method("orlomo", 2, num_local_steps=4).fingerprint)["method.num_workers"]
            '2'
        """
        return tuple(fingerprint(self, "method").items())

    def with_rule(self, rule: optax.GradientTransformationExtraArgs) -> Method:
        """Return the method with another rule: this one in an ``optax.chain``, for example."""
        return self._replace(rule=rule)

    def local_round(self, loss_fn: Callable, **options: Any) -> Callable[..., RoundResult]:
        """Return :func:`~orlomo_jax.local_momentum_sgd` with this method's S and local momentum.

        Args:
            loss_fn: As in ``local_momentum_sgd``.
            **options: ``weight_decay``, ``gradient_transform``, ``unroll``, ``frozen``; by default
                the last is what this method never changes.
        """
        options = {"frozen": Unmoved(self)} | options
        return local_momentum_sgd(loss_fn, self.num_local_steps, self.worker_momentum, **options)


class Unmoved(NamedTuple):
    """Which parameters a method leaves as they are: its ``frozen`` ones, and what its rule zeroes.

    ``optax.chain(rule, optax.masked(optax.set_to_zero(), mask))`` freezes parameters on the server;
    a worker that trained them all the same would compute the other gradients at wrong points.
    """

    method: Method

    def __call__(self, params: contract.Params) -> contract.Params:
        """Return a tree of bools like params."""
        method, structure = self.method, jax.tree.structure(params)
        unmoved = zero_updates(method.rule, params, momentum=method.worker_momentum is not None)
        if method.frozen is not None:
            frozen = method.frozen.leaves(params)
            unmoved = [a or b for a, b in zip(unmoved, frozen, strict=True)]
        return jax.tree.unflatten(structure, unmoved)


def round_of(method: Method, loss_fn: Callable | None, round_fn: Callable | None) -> Callable:
    """Return ``round_fn``, or the method's local round of ``loss_fn``.

    Raises:
        ValueError: If both are given, or neither.
    """
    if (loss_fn is None) == (round_fn is None):
        given = "both" if loss_fn is not None else "neither"
        raise ValueError(f"pass either `loss_fn` or `round_fn`, got {given}")
    return method.local_round(loss_fn) if loss_fn is not None else round_fn  # pyright: ignore


_FACTORIES: dict[str, Callable[..., Method]] = {}


def register_method(name: str, factory: Callable[..., Method]) -> None:
    """Let :func:`make_method` know a method by name.

    Args:
        name: The method's name.
        factory: ``factory(num_workers, num_local_steps, **hyperparameters) -> Method``.

    Raises:
        ValueError: If the name belongs to another method.

    Example:
        >>> from orlomo_jax import Method, al_sgd, make_method, register_method
        >>> def half_steps(num_workers, num_local_steps):
        ...     rule = al_sgd(num_workers, learning_rate=0.5)
        ...     return Method("half_steps", rule, num_workers, num_local_steps)
        >>> register_method("half_steps", half_steps)
        >>> make_method("half_steps", num_workers=4, num_local_steps=8).name
        'half_steps'
    """
    if _FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"`name` must be new, got name={name!r}, which is registered already")
    _FACTORIES[name] = factory


@shared
def make_method(
    name: str,
    num_workers: int,
    num_local_steps: int,
    *,
    frozen: Any = None,
    master_params: bool = True,
    **hyperparameters: Any,
) -> Method:
    """Return a method by name.

    Args:
        name: ``"orlomo"``, ``"local_ormo_da"``, ``"al_sgd"``, ``"prsgdm"``, or a name of
            :func:`register_method`.
        num_workers: K ≥ 1.
        num_local_steps: S ≥ 1, the local steps of a round.
        frozen: Which parameters stay as they are, in workers and server: a tree of bools like
            params or like its first levels, or a function of params to one.
        master_params: Whether the server keeps parameters (and model state) of 16 bits in float32.
            Workers get them rounded. Otherwise 1/K of a report is often lost to rounding, and
            AL-SGD stands still.
        **hyperparameters: Those of the method. The paper's four take ``momentum`` (β in [0, 1), of
            the server's rule and the workers; not used by AL-SGD), ``learning_rate`` (global, of
            the asynchronous rules; a finite float ≥ 0 or a schedule of the server's step),
            ``delay_weight`` (its factor by delay; None is Eq. (6)) and ``accumulator_dtype`` (of
            the server's momentum, if wider than the parameters').

    Raises:
        ValueError: If the name is unknown or a hyperparameter is out of range.
        TypeError: If a hyperparameter is unknown or of a wrong type.

    Example:
        >>> method = make_method("local_ormo_da", num_workers=16, num_local_steps=8, momentum=0.8)
        >>> method.worker_momentum is None, method.synchronous
        (True, False)
    """
    if name not in _FACTORIES:
        raise ValueError(f"`name` must be one of {', '.join(_FACTORIES)}, got name={name!r}")
    num_workers = contract.check_num_workers(num_workers)
    num_local_steps = check_count("num_local_steps", num_local_steps, 1)
    factory = _FACTORIES[name]
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any and (unknown := hyperparameters.keys() - parameters.keys()):
        known = ", ".join(list(parameters)[2:]) or "none"
        raise TypeError(f"`{name}` takes the hyperparameters {known}; got {sorted(unknown)[0]}")
    method = factory(num_workers, num_local_steps, **hyperparameters)
    mask = None if frozen is None else Mask.of(frozen)
    return method._replace(frozen=mask, master_params=master_params)


METHOD_NAMES = ("orlomo", "prsgdm", "al_sgd", "local_ormo_da")
"""The paper's four methods."""


def _orlomo(
    num_workers,
    num_local_steps,
    momentum=0.9,
    learning_rate=1.0,
    delay_weight=None,
    accumulator_dtype=None,
) -> Method:
    args = num_workers, momentum, learning_rate, delay_weight
    rule = rules.orlomo(*args, accumulator_dtype=accumulator_dtype)
    rate = base.global_learning_rate(num_workers, learning_rate, delay_weight)
    return Method(
        "orlomo", rule, num_workers, num_local_steps, worker_momentum=momentum, merge_weight=rate
    )


def _local_ormo_da(
    num_workers,
    num_local_steps,
    momentum=0.9,
    learning_rate=1.0,
    delay_weight=None,
    accumulator_dtype=None,
) -> Method:
    args = num_workers, momentum, learning_rate, delay_weight
    rule = rules.local_ormo_da(*args, accumulator_dtype=accumulator_dtype)
    rate = base.global_learning_rate(num_workers, learning_rate, delay_weight)
    return Method("local_ormo_da", rule, num_workers, num_local_steps, merge_weight=rate)


def _al_sgd(
    num_workers,
    num_local_steps,
    momentum=0.9,
    learning_rate=1.0,
    delay_weight=None,
    accumulator_dtype=None,
) -> Method:
    contract.check_momentum(momentum)  # taken for uniformity, not used
    rule = rules.al_sgd(num_workers, learning_rate, delay_weight)
    rate = base.global_learning_rate(num_workers, learning_rate, delay_weight)
    return Method("al_sgd", rule, num_workers, num_local_steps, merge_weight=rate)


def _prsgdm(
    num_workers,
    num_local_steps,
    momentum=0.9,
    learning_rate=1.0,
    delay_weight=None,
    accumulator_dtype=None,
) -> Method:
    contract.check_momentum(momentum)
    if learning_rate != 1.0 or delay_weight is not None:
        raise ValueError(
            "prsgdm averages its reports: `learning_rate` must be 1.0 and `delay_weight` None, "
            f"got learning_rate={learning_rate!r}, delay_weight={delay_weight!r}"
        )

    def running_mean(step, delay):  # after the K reports of a round: their average
        return 1.0 / jnp.asarray(step % num_workers + 1).astype(float)

    return Method(
        "prsgdm",
        rules.prsgdm(num_workers, accumulator_dtype=accumulator_dtype),
        num_workers,
        num_local_steps,
        worker_momentum=momentum,
        synchronous=True,
        merge_weight=running_mean,
    )


for _name, _factory in zip(METHOD_NAMES, (_orlomo, _prsgdm, _al_sgd, _local_ormo_da), strict=True):
    register_method(_name, _factory)
