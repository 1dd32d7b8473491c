"""The paper's four methods: a server rule, local momentum or not, synchronous or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import rules
from orlomo_jax.fingerprint import fingerprint
from orlomo_jax.masks import Mask, zero_updates
from orlomo_jax.memo import shared
from orlomo_jax.rules import base, contract
from orlomo_jax.worker import RoundResult, local_momentum_sgd

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


METHOD_NAMES = ("orlomo", "prsgdm", "al_sgd", "local_ormo_da")
"""The names that :func:`make_method` knows."""


class Method(NamedTuple):
    """What server and workers have to agree on.

    Attributes:
        name: A short name, for records and messages.
        rule: The server rule, possibly in a chain of transformations.
        worker_momentum: β of the workers' local rounds; None is plain SGD, whose reports carry no
            momentum.
        synchronous: Whether all workers wait for each other after a round.
        num_workers: K that the rule was made for, or None where that is not known.
        merge_weight: The weight in [0, 1] with which a report's model state enters the server's, as
            a function of (step, delay); None where the method trains no model state.
        frozen: Which parameters neither workers nor server change; None for none.
        master_params: Whether the server keeps parameters and model state of 16 bits in float32.
    """

    name: str
    rule: optax.GradientTransformationExtraArgs
    worker_momentum: float | None
    synchronous: bool
    num_workers: int | None = None
    merge_weight: Callable[[Int[Array, ""], Int[Array, ""]], Float[Array, ""]] | None = None
    frozen: Mask | None = None
    master_params: bool = True

    @property
    def fingerprint(self) -> tuple[tuple[str, str], ...]:
        """Every value that tells this method from another, as pairs of a path and its text.

        A rule of one's own counts too, with all that it carries; see
        :func:`~orlomo_jax.with_fingerprint`.

        Example:
            >>> dict(make_method("orlomo", num_workers=2).fingerprint)["method.num_workers"]
            '2'
        """
        return tuple(fingerprint(self, "method").items())

    def local_round(
        self, loss_fn: Callable, num_local_steps: int, **options: Any
    ) -> Callable[..., RoundResult]:
        """Return :func:`~orlomo_jax.local_momentum_sgd` with this method's local momentum.

        Args:
            loss_fn: As in ``local_momentum_sgd``.
            num_local_steps: S ≥ 1.
            **options: ``weight_decay``, ``gradient_transform``, ``unroll``, ``frozen``; the last
                is by default what this method never changes.
        """
        options = {"frozen": Unmoved(self)} | options
        return local_momentum_sgd(loss_fn, num_local_steps, self.worker_momentum, **options)


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


@shared
def make_method(
    name: str,
    num_workers: int,
    momentum: float = 0.9,
    learning_rate: float | optax.Schedule = 1.0,
    delay_weight: base.DelayWeight | None = None,
    *,
    accumulator_dtype: Any = None,
    frozen: Any = None,
    master_params: bool = True,
) -> Method:
    """Return one of the four methods, with one β for the server's rule and the workers.

    Args:
        name: One of :data:`METHOD_NAMES`: ``"orlomo"``, ``"local_ormo_da"``, ``"al_sgd"``,
            ``"prsgdm"``.
        num_workers: K ≥ 1.
        momentum: β in [0, 1); not used by AL-SGD.
        learning_rate: Global learning rate of the asynchronous rules; a finite float ≥ 0 or a
            schedule of the server's step.
        delay_weight: Its factor by delay; None is Eq. (6).
        accumulator_dtype: dtype of the server's momentum where wider than the parameters'.
        frozen: Which parameters stay as they are, in workers and server: a tree of bools like
            params or like its first levels, or a function of params to one.
        master_params: Whether the server keeps parameters (and model state) of 16 bits in float32.
            Workers get them rounded. Without it 1/K of a report is often lost to rounding, and
            AL-SGD stands still.

    Raises:
        ValueError: If ``name`` is unknown, a hyperparameter is out of range, or PRSGDm, which
            averages, is given a global learning rate.
        TypeError: If a hyperparameter is of a wrong type.

    Example:
        >>> method = make_method("local_ormo_da", num_workers=16)
        >>> method.worker_momentum is None, method.synchronous
        (True, False)
    """
    if name not in METHOD_NAMES:
        raise ValueError(f"`name` must be one of {', '.join(METHOD_NAMES)}, got name={name!r}")
    contract.check_momentum(momentum)
    rate = base.global_learning_rate(num_workers, learning_rate, delay_weight)

    def method(rule, worker_momentum=None, synchronous=False, merge_weight=rate):
        return Method(
            name,
            rule,
            worker_momentum,
            synchronous,
            num_workers,
            merge_weight,
            None if frozen is None else Mask.of(frozen),
            master_params,
        )

    ordered = (num_workers, momentum, learning_rate, delay_weight)
    options = {"accumulator_dtype": accumulator_dtype}
    match name:
        case "orlomo":
            return method(rules.orlomo(*ordered, **options), worker_momentum=momentum)
        case "local_ormo_da":
            return method(rules.local_ormo_da(*ordered, **options))
        case "al_sgd":
            return method(rules.al_sgd(num_workers, learning_rate, delay_weight))

    if learning_rate != 1.0 or delay_weight is not None:
        raise ValueError(
            "prsgdm averages its reports: `learning_rate` must be 1.0 and `delay_weight` None, "
            f"got learning_rate={learning_rate!r}, delay_weight={delay_weight!r}"
        )

    def running_mean(step, delay):  # after the K reports of a round: their average
        return 1.0 / jnp.asarray(step % num_workers + 1).astype(float)

    return method(rules.prsgdm(num_workers, **options), momentum, True, running_mean)
