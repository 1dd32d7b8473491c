"""Checks Lemmas 1 and 2 on a server while it trains."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import trees
from orlomo_jax.methods.method import Method
from orlomo_jax.server.reports import Report
from orlomo_jax.server.state import start_momentum
from orlomo_jax.server.step import weight_on_host

_ROUNDINGS = 8.0
"""Roundings allowed in each entry per server step; a step makes fewer."""


class AuditError(AssertionError):
    """Raised if the server's u or w contradicts Lemma 1 or 2."""


class Audit:
    r"""A float64 ledger of the arrived reports, which is compared with an OrLoMo server.

    Lemmas 1 and 2 hold for any η̂ of the reports that have not arrived, including lost ones. With
    η̂ = 0 for those, the lemmas state sums over the arrived reports, each with its own i and η and
    n = ⌈t/K⌉ − ⌈i/K⌉:

    - u_{t+1} = Σ β^n η Δu,
    - w_{t+1} = w_0 − Σ η Δw − β/(1−β) Σ (1 − β^n) η Δu.

    The server does not compute these sums; it only keeps u and w. The ledger also bounds the
    rounding error of each entry. That bound grows with the run, so the ledger compares the changes
    of each single step too.

    Args:
        method: OrLoMo as made by :func:`~orlomo_jax.make_method`; the sums do not hold for a chain
            that changes reports.
        params: w at the start.
        state: The rule's state at the start.

    Raises:
        ValueError: If the method is not OrLoMo.

    Example:
        >>> from orlomo_jax import LocalUpdate, ParameterServer, make_method
        >>> method = make_method("orlomo", num_workers=2, num_local_steps=1)
        >>> server = ParameterServer(method, jnp.zeros(1), local_learning_rate=0.1)
        >>> audit = Audit(method, server.params, server.state.rule_state)
        >>> report = Report(server.dispatch(0).id, LocalUpdate(jnp.ones(1), jnp.ones(1)))
        >>> _ = server.receive(report)
        >>> audit.applied(report, 0, server.params, server.state.rule_state)
    """

    def __init__(self, method: Method, params: trees.Params, state: Any) -> None:
        """Start the ledger from (w, u)."""
        check_auditable(method)
        self._rate, self._num_workers = method.model_state_weight, method.num_workers
        self._decay = float(method.worker_momentum or 0.0)
        momentum = start_momentum(state)
        self._params, self._momentum = _flat(params), _flat(momentum)  # the server's, step by step
        self._start, self._u = self._params, self._momentum.copy()  # the ledger's
        self._all_u = self._u.copy()  # Σ ηΔu, each at full weight
        self._descent = np.zeros_like(self._start)  # Σ ηΔw
        self._params_unit, self._momentum_unit = _units(params), _units(momentum)
        self._u_error, self._w_error = np.zeros_like(self._u), np.zeros_like(self._u)
        self._tags: set[tuple[int, int]] = set()

    def applied(self, report: Report, step: int, params: trees.Params, state: Any) -> None:
        """Add a report applied at ``step`` to the ledger, and compare the server's w and u with it.

        Raises:
            AuditError: If an entry differs by more than rounding, or the same worker's same round
                was applied before.
        """
        tag = (report.id.worker, report.id.round)
        if tag in self._tags:
            raise AuditError(f"(worker, round) = {tag} was applied twice, again at step {step}")
        self._tags.add(tag)
        decay, num_workers = self._decay, self._num_workers
        eta = weight_on_host(self._rate, step, step - report.id.dispatched_at)
        opens = float((step - 1) % num_workers == 0)  # group ⌈t/K⌉ opens
        late = -(-step // num_workers) + (-report.id.dispatched_at // num_workers)  # n
        scaled_u = eta * _flat(report.update.momentum)
        scaled_w = eta * _flat(report.update.delta)
        missed = decay * (1 - decay**late) / (1 - decay)
        kept = decay if opens else 1.0

        before_w, before_u = self._params, self._momentum
        self._params, self._momentum = _flat(params), _flat(start_momentum(state))
        if not (np.isfinite(self._params).all() and np.isfinite(self._momentum).all()):
            return  # it overflowed; the next reports will be non-finite
        self._u = kept * self._u + decay**late * scaled_u
        self._all_u += scaled_u
        self._descent += scaled_w
        w = self._start - self._descent - decay / (1 - decay) * (self._all_u - self._u)

        sizes = np.abs(kept * before_u) + np.abs(scaled_u)
        u_rounding = _allowance(self._momentum_unit, sizes)
        w_rounding = opens * u_rounding + _allowance(
            self._params_unit,
            np.abs(before_w) + opens * sizes + np.abs(scaled_w) + missed * np.abs(scaled_u),
        )
        self._u_error = kept * self._u_error + u_rounding
        self._w_error += opens * self._u_error + w_rounding
        step_u = kept * before_u + decay**late * scaled_u
        step_w = before_w - opens * decay * before_u - scaled_w - missed * scaled_u
        _compare("Lemma 1", step, self._momentum, step_u, u_rounding)
        _compare("Lemma 2", step, self._params, step_w, w_rounding)
        _compare("Lemma 1, summed,", step, self._momentum, self._u, self._u_error)
        _compare("Lemma 2, summed,", step, self._params, w, self._w_error)


def check_auditable(method: Method) -> None:
    """Raise ValueError unless the method is OrLoMo with a known K and global learning rate."""
    if method.name != "orlomo" or method.model_state_weight is None:
        raise ValueError(
            f"`audit` needs OrLoMo, because it checks Lemmas 1 and 2, got method={method.name!r}"
        )


def _compare(
    lemma: str, step: int, found: np.ndarray, expected: np.ndarray, allowed: np.ndarray
) -> None:
    wrong = ~(np.abs(found - expected) <= allowed)
    if wrong.any():
        entry = int(np.argmax(wrong))
        raise AuditError(
            f"{lemma} fails at step {step}: entry {entry} is {found[entry]}, the ledger says "
            f"{expected[entry]} ± {allowed[entry]:.2g}"
        )


def _allowance(units: tuple[np.ndarray, np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Return the rounding error allowed for entries of these sizes, flushing to zero included."""
    eps, tiny = units
    return _ROUNDINGS * (eps * sizes + tiny)


def _units(tree: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return eps and the smallest normal number of each entry's dtype."""
    infos = [(jnp.finfo(jnp.result_type(x)), _flat(x).size) for x in jax.tree.leaves(tree)]
    sizes = [size for _, size in infos]
    eps = np.repeat([float(info.eps) for info, _ in infos], sizes)
    return eps, np.repeat([float(info.smallest_normal) for info, _ in infos], sizes)


def _flat(tree: Any) -> np.ndarray:
    """Return all entries in one float64 vector, complex ones as pairs."""
    leaves = [np.atleast_1d(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    leaves = [x.view(x.real.dtype) if np.iscomplexobj(x) else x for x in leaves]
    return np.concatenate([x.astype(float).ravel() for x in leaves] or [np.zeros(0)])
