"""Calls the user's evaluation, and tests it before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from orlomo_jax.worker.protocols import Evaluate


def evaluated(evaluate: Evaluate, params: Any, model_state: Any) -> dict[str, float]:
    """Return the user's evaluation; raise TypeError unless it is ``{name: scalar}``."""
    values = evaluate(params, model_state)
    try:
        return {name: float(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise _wrong(values) from error


def check_evaluation(evaluate: Evaluate, params: Any, model_state: Any) -> None:
    """Compile a jitted evaluation, and call any other; raise as :func:`evaluated` does.

    Over a whole data set, a call may take longer than many steps. The compiled program is the one
    that later calls run.
    """
    function, args, options = evaluate, (params, model_state), {}
    while isinstance(function, partial):  # also jax.tree_util.Partial
        args, options = (*function.args, *args), function.keywords | options
        function = function.func
    jitted = isinstance(function, jax.stages.Wrapped)
    if not jitted or jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        evaluated(evaluate, params, model_state)
        return
    lowered = function.lower(*args, **options)
    form: Any = lowered.out_info
    if not isinstance(form, Mapping) or not all(map(_is_real, form.values())):
        raise _wrong(form)
    lowered.compile()


def _is_real(form: Any) -> bool:
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    is_scalar = getattr(form, "shape", None) == ()
    return is_scalar and any(jnp.issubdtype(form.dtype, kind) for kind in kinds)


def _wrong(values: Any) -> TypeError:
    return TypeError(f"`evaluate` must return {{name: scalar}}, got {values!r}")
