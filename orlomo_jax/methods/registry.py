"""Registers methods by name; users can add their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optax

from orlomo_jax.checks import check_choice, check_flag, check_local_steps
from orlomo_jax.memo import shared
from orlomo_jax.methods.method import Method
from orlomo_jax.rules import contract
from orlomo_jax.traces.policies import Policy
from orlomo_jax.worker.frozen import Mask

_FACTORIES: dict[str, Callable[..., Method]] = {}


def register_method(name: str, factory: Callable[..., Method]) -> None:
    """Add a method to those that :func:`make_method` can make.

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
        raise ValueError(f"`name` must be new, got name={name!r}, which is already registered")
    _FACTORIES[name] = factory


@shared
def make_method(
    name: str,
    num_workers: int,
    num_local_steps: int | Sequence[int],
    *,
    local_optimizer: optax.GradientTransformation | None = None,
    keep_local_state: bool = True,
    policy: Policy | None = None,
    frozen: Any = None,
    master_params: bool | None = None,
    **hyperparameters: Any,
) -> Method:
    """Return a method by name.

    Args:
        name: One of ``orlomo_jax.methods.METHOD_NAMES`` (the paper's four methods) or
            ``FIELD_METHODS``, or a name given to :func:`register_method`.
        num_workers: K ≥ 1.
        num_local_steps: S ≥ 1, the local steps of a round (H in the DiLoCo papers): one number, or
            one for each worker; see :func:`~orlomo_jax.dynamic_local_steps`.
        local_optimizer: The workers' optax transformation; see :func:`~orlomo_jax.local_round`.
            None is SGD, with momentum if the method needs it.
        keep_local_state: Whether each worker keeps its optimizer's state between rounds.
        policy: A :class:`~orlomo_jax.StalenessBound` or :class:`~orlomo_jax.RestartEvery`, for an
            asynchronous method; None keeps the method's own.
        frozen: The parameters that neither workers nor server change: a tree of bools like params
            or like its first levels, or a function that maps params to one.
        master_params: Whether the server keeps 16-bit parameters and model state in float32.
            Workers get them rounded. Without it, rounding often loses 1/K of a report, and AL-SGD
            makes no progress. None keeps the method's own choice, which is True by default.
        **hyperparameters: The method's own. The paper's four methods take ``momentum`` (β in [0, 1)
            of the server's rule and the workers; not used by AL-SGD), ``learning_rate`` (global,
            for the asynchronous rules; a finite float ≥ 0 or a schedule of the server's step),
            ``delay_weight`` (its factor as a function of the delay; None is Eq. (6)) and
            ``accumulator_dtype`` (of the server's momentum, if wider than the parameters'). The
            others take the arguments of their rule in ``orlomo_jax.rules``; in addition,
            ``ringmaster`` takes ``stops`` and ``rennala`` takes ``restart``, which cancel and
            restart workers that are too late.

    Raises:
        ValueError: If the name is unknown or a hyperparameter is out of range.
        TypeError: If a hyperparameter is unknown or has a wrong type.

    Example:
        >>> method = make_method("local_ormo_da", num_workers=16, num_local_steps=8, momentum=0.8)
        >>> method.worker_momentum is None, method.synchronous
        (True, False)
    """
    check_choice("name", name, _FACTORIES)
    if master_params is not None:
        master_params = check_flag("master_params", master_params)
    keep_local_state = check_flag("keep_local_state", keep_local_state)
    num_workers = contract.check_num_workers(num_workers)
    num_local_steps = check_local_steps(num_local_steps, num_workers)
    factory = partial(_make, name, num_workers, num_local_steps, **hyperparameters)
    method = factory()._replace(factory=factory)
    if local_optimizer is not None:
        method = method.with_local_optimizer(local_optimizer, keep_state=keep_local_state)
    if policy is not None:
        method = method.with_policy(policy)
    if frozen is not None:
        method = method._replace(frozen=Mask.of(frozen))
    return method if master_params is None else method._replace(master_params=master_params)


def _make(
    name: str, num_workers: int, num_local_steps: int | tuple[int, ...], **hyperparameters: Any
) -> Method:
    """Return a method as its factory makes it; raise for unknown or missing hyperparameters."""
    factory = _FACTORIES[name]
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = list(parameters)[2:]
    if not takes_any and (unknown := hyperparameters.keys() - set(known)):
        wanted = ", ".join(known) or "none"
        raise TypeError(f"`{name}` takes the hyperparameters {wanted}; got {sorted(unknown)[0]}")
    required = [x for x in known if parameters[x].default is parameters[x].empty]
    if not takes_any and (missing := set(required) - hyperparameters.keys()):
        raise TypeError(f"`{name}` needs the hyperparameter {sorted(missing)[0]}, got none")
    return factory(num_workers, num_local_steps, **hyperparameters)
