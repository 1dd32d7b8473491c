"""Lemmas 1 and 2, held against a server while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.methods import Method
from orlomo_jax.reports import Report
from orlomo_jax.rules import contract
from orlomo_jax.server_step import merge_weight_on_host, start_momentum

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDINGS = 8.0
"""Roundings that one server step is granted in each entry; it makes about five."""


class AuditFailure(AssertionError):
    """The server's u or w is not what Lemma 1 or 2 says of the reports that arrived."""


class Audit:
    r"""The ledger of the reports that arrived, in float64, beside a server that runs OrLoMo.

    Lemmas 1 and 2 hold for any η̂ of what is dispatched and has not arrived, lost reports among it.
    With η̂ = 0 for those their ledger form speaks of known numbers alone. With i and η of each
    arrived report, n = ⌈t/K⌉ − ⌈i/K⌉:

    - u_{t+1} = Σ β^n η Δu,
    - w_{t+1} = w_0 − Σ η Δw − β/(1−β) Σ (1 − β^n) η Δu.

    The server never computes these sums: it keeps u and w alone, and neither H = Σ ηΔu nor
    Σ ηΔw. What rounding may do to each entry is reckoned beside them.

    Args:
        method: OrLoMo, as :func:`~orlomo_jax.make_method` makes it (in a chain with what changes
            reports, the sums are others).
        params: w at the start.
        state: The rule's state at the start.

    Raises:
        ValueError: If the method is not OrLoMo.

    Example:
        >>> from orlomo_jax import LocalUpdate, ParameterServer, make_method
        >>> method = make_method("orlomo", num_workers=2)
        >>> server = ParameterServer(method, jnp.zeros(1), 2, local_learning_rate=0.1)
        >>> audit = Audit(method, server.params, server.state)
        >>> report = Report(*server.dispatch(0)[:3], LocalUpdate(jnp.ones(1), jnp.ones(1)))
        >>> _ = server.receive(report)
        >>> audit.arrived(report, 0)
        >>> audit.check(server.params, server.state)
    """

    def __init__(self, method: Method, params: contract.Params, state: Any) -> None:
        """Start the ledger from (w, u)."""
        if method.name != "orlomo" or method.num_workers is None or method.merge_weight is None:
            raise ValueError(
                f"`audit` needs OrLoMo, whose Lemmas 1 and 2 it checks, got method={method.name!r}"
            )
        self._method, self._num_workers = method, method.num_workers
        self._decay = float(method.worker_momentum or 0.0)
        self._start, self._momentum = _flat(params), _flat(start_momentum(state))
        self._all_momentum = self._momentum.copy()  # H: Σ ηΔu, each at full weight
        self._descent = np.zeros_like(self._start)  # Σ ηΔw
        leaves = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
        self._eps = _ROUNDINGS * max((float(jnp.finfo(d).eps) for d in leaves), default=0.0)
        self._momentum_error = np.zeros_like(self._start)
        self._params_error = np.zeros_like(self._start)
        self._applied: set[tuple[int, int]] = set()

    def arrived(self, report: Report, step: int) -> None:
        """Enter a report that the server applied at ``step``.

        Raises:
            AuditFailure: If the same worker's same round was applied before.
        """
        tag = (report.worker, report.round)
        if tag in self._applied:
            raise AuditFailure(f"(worker, round) = {tag} was applied twice, again at step {step}")
        self._applied.add(tag)
        decay, num_workers = self._decay, self._num_workers
        eta = merge_weight_on_host(self._method.merge_weight, step, step - report.dispatched_at)
        if (step - 1) % num_workers == 0:  # group ⌈t/K⌉ opens
            opens = 1.0
            self._momentum *= decay
            self._momentum_error *= decay
        else:
            opens = 0.0
        late = -(-step // num_workers) + (-report.dispatched_at // num_workers)  # n
        momentum, delta = _flat(report.update.momentum), _flat(report.update.delta)
        self._momentum += decay**late * eta * momentum
        self._all_momentum += eta * momentum
        self._descent += eta * delta
        sizes = np.abs(self._momentum) + eta * np.abs(momentum)
        self._momentum_error += self._eps * sizes
        self._params_error += opens * self._momentum_error + self._eps * (
            np.abs(self._params()) + sizes / (1 - decay) + eta * np.abs(delta)
        )

    def check(self, params: contract.Params, state: Any) -> None:
        """Hold the server's w and u against the ledger.

        Raises:
            AuditFailure: If an entry is further away than rounding explains.
        """
        pairs = (
            ("Lemma 1", start_momentum(state), self._momentum, self._momentum_error),
            ("Lemma 2", params, self._params(), self._params_error),
        )
        for lemma, tree, expected, allowed in pairs:
            excess = np.abs(_flat(tree) - expected) - allowed
            if excess.size and not (excess <= 0).all():
                worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
                is_now = _flat(tree)[worst]
                raise AuditFailure(
                    f"{lemma} fails after {len(self._applied)} reports: entry {worst} is {is_now}, "
                    f"the ledger says {expected[worst]} ± {allowed[worst]:.2g}"
                )

    def _params(self) -> NDArray[np.float64]:
        missed = self._decay / (1 - self._decay) * (self._all_momentum - self._momentum)
        return self._start - self._descent - missed


def _flat(tree: Any) -> NDArray[np.float64]:
    """Return all entries in one float64 vector, complex ones as pairs."""
    leaves = [np.atleast_1d(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    leaves = [x.view(x.real.dtype) if np.iscomplexobj(x) else x for x in leaves]
    return np.concatenate([x.astype(float).ravel() for x in leaves] or [np.zeros(0)])
