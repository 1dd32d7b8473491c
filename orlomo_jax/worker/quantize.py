"""Rounds the reports of a local round to int8, and keeps the rounding error for the next one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orlomo_jax import trees
from orlomo_jax.checks import check_count, check_flag
from orlomo_jax.trees import Array, PyTree, all_finite
from orlomo_jax.worker.int8_blocks import decode, encode, is_smaller
from orlomo_jax.worker.step_loop import RoundResult, init_state, keeps_state
from orlomo_jax.worker.wire import Int8Wire


class QuantizedState(NamedTuple):
    """What a worker keeps between rounds if its reports are rounded to int8.

    Attributes:
        error: Δ − report, for each rounded leaf of Δw, then for each of Δu.
        optimizer: The state of the local optimizer, or None if it is not kept.
    """

    error: list[Array]
    optimizer: PyTree


@dataclass(frozen=True)
class QuantizedRound:
    """See :func:`quantize_reports`."""

    round_fn: Callable[..., RoundResult]
    block: int
    error_feedback: bool

    @property
    def wire(self) -> Int8Wire:
        """How reports are sent."""
        return Int8Wire(self.block)

    @property
    def keep_state(self) -> bool:
        """Whether a worker keeps a rounding error or the state of its optimizer."""
        return self.error_feedback or keeps_state(self.round_fn)

    def init_state(self, params: Any) -> Any:
        """Return the state before a worker's first round: no rounding error yet."""
        state = init_state(self.round_fn, params)
        if not self.error_feedback:
            return state
        leaves = [jnp.zeros_like(x) for x in jax.tree.leaves(trees.widened(params))]
        rounded = [x for x in leaves if self._is_rounded(x)]
        return QuantizedState(rounded * (2 if _has_momentum(self.round_fn) else 1), state)

    def __call__(
        self, params: Any, *args: Any, local_state: PyTree = None, **kwargs: Any
    ) -> RoundResult:
        """Return the round's result with Δw and Δu rounded to int8, in their own dtypes."""
        optimizer_state, error = local_state, None
        if self.error_feedback:
            if local_state is None:
                local_state = self.init_state(params)
            error, optimizer_state = local_state
        if keeps_state(self.round_fn):
            kwargs["local_state"] = optimizer_state
        result = self.round_fn(params, *args, **kwargs)
        leaves, structure = jax.tree.flatten(jax.lax.optimization_barrier(result.update))
        places = [place for place, x in enumerate(leaves) if self._is_rounded(x)]
        exact = [leaves[place] for place in places]
        if error is not None:  # a method without momentum leaves the rest of the error unused
            exact = [x + e for x, e in zip(exact, error, strict=False)]
        rounded = [decode(encode(x, self.block), self.block, x.dtype) for x in exact]
        for place, x in zip(places, rounded, strict=True):
            leaves[place] = x
        update = jax.tree.unflatten(structure, leaves)
        kept = result.local_state
        if error is not None:
            new = [x - y for x, y in zip(exact, rounded, strict=True)]  # exact, by Sterbenz' lemma
            kept = QuantizedState(new + list(error[len(new) :]), kept)
        finite = result.finite & all_finite(exact) & all_finite(update)
        return result._replace(update=update, finite=finite, local_state=kept)

    def _is_rounded(self, x: Array) -> bool:
        return is_smaller(x.size, x.dtype, self.block)


def quantize_reports(
    round_fn: Callable[..., RoundResult], block: int = 256, *, error_feedback: bool = True
) -> QuantizedRound:
    r"""Return a round that rounds Δw and Δu to int8, with one float32 scale per block.

    With e_0 = 0, a worker's r-th round reports

    - c_r = Q(Δ_r + e_r), with Q(x) = s · round(x / s) and s = max |x| / 127 in each block,
    - e_{r+1} = Δ_r + e_r − c_r, which the worker keeps.

    So what rounding loses is reported later: Σ c_r = Σ Δ_r − e_R. :class:`~orlomo_jax.RayWorkers`
    sends 1 + 4/block bytes per entry instead of 4. The round returns c_r in the dtypes of the
    leaves, and these numbers survive the network bit for bit. So the simulator and all runtimes
    give the same results with the same round.

    e is a part of the worker's kept state, as that of a local optimizer (see
    :func:`~orlomo_jax.local_round`): it needs the memory of one more report per worker, is in
    checkpoints, and starts anew after a lost or cancelled round.

    Args:
        round_fn: A local round, for example of ``method.local_round(loss_fn)``. It may keep the
            state of its optimizer.
        block: The number of consecutive entries of a leaf that share a scale, ≥ 1.
        error_feedback: Whether to keep e; if False, it is 0.

    Returns:
        The round. Leaves that are complex or would not be smaller (with one entry) stay as they
        are. A report counts as not finite if Δ + e has a NaN or an Inf.

    Raises:
        TypeError, ValueError: If an argument has a wrong type or is out of range.

    Example:
        >>> from orlomo_jax import local_momentum_sgd
        >>> from orlomo_jax.worker import quantize_reports
        >>> def loss_fn(params, model_state, batch, key):
        ...     return jnp.sum(params * batch), (model_state, {})
        >>> round_fn = quantize_reports(local_momentum_sgd(loss_fn, 1, momentum=None))
        >>> batches, key = jnp.array([[127.0, 0.75]]), jax.random.key(0)
        >>> first = round_fn(jnp.zeros(2), None, batches, 1.0, key)
        >>> first.update.delta, first.local_state.error[0]
        (Array([127.,   1.], dtype=float32), Array([ 0.  , -0.25], dtype=float32))
        >>> kept = {"local_state": first.local_state}
        >>> round_fn(jnp.zeros(2), None, batches, 1.0, key, **kept).update.delta
        Array([127.,   0.], dtype=float32)

    References:
        Seide et al., `1-bit stochastic gradient descent and its application to data-parallel
        distributed training of speech DNNs
        <https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html>`_, 2014.
        Karimireddy et al., `Error feedback fixes SignSGD and other gradient compression schemes
        <https://arxiv.org/abs/1901.09847>`_, 2019.
    """
    if not callable(round_fn):
        raise TypeError(f"`round_fn` must be a local round, got round_fn={round_fn!r}")
    block = check_count("block", block, 1)
    return QuantizedRound(round_fn, block, check_flag("error_feedback", error_feedback))


def _has_momentum(round_fn: Any) -> bool:
    """Return whether a round reports Δu; True if that is unknown."""
    inner = getattr(round_fn, "round_fn", None)
    if inner is not None:
        return _has_momentum(inner)
    return getattr(round_fn, "momentum", True) is not None
