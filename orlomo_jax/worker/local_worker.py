"""Runs the rounds of one worker, and keeps the state of its optimizer between them."""

from __future__ import annotations

from typing import Any, NamedTuple

from orlomo_jax.trees import PyTree
from orlomo_jax.worker.step_loop import RoundResult
from orlomo_jax.worker.workload import RoundInput, RoundMetrics, Workload


class KeptState(NamedTuple):
    """The state of a worker's optimizer after a round, from which its next round starts.

    Attributes:
        round: The worker's round.
        state: The optimizer's state, a tree of arrays.
    """

    round: int
    state: Any


class LocalWorker:
    """Runs the rounds of one worker; worker pools have one for each.

    If the workload keeps states, it keeps those after the newest two rounds: the server may not
    have the report of the newest one yet when it writes a checkpoint.

    Args:
        workload: The computation.
        worker: k.
        kept: The state to continue from, if the run resumes.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from orlomo_jax import from_loss, local_round
        >>> loss_fn = from_loss(lambda params, batch: jnp.sum(params * batch))
        >>> round_fn = local_round(loss_fn, 2, optax.scale_by_adam())
        >>> batch_fn = lambda key, worker, round: jnp.ones((2, 1))
        >>> worker = LocalWorker(Workload.of(round_fn, batch_fn, jax.random.key(0)), 0)
        >>> start = RoundInput(jnp.zeros(1), None, None, jnp.float32(0.1))
        >>> _ = worker.run(0, start, fresh=True), worker.run(1, start, fresh=False)
        >>> int(worker.local_state(1).count)
        4
    """

    def __init__(self, workload: Workload, worker: int, kept: KeptState | None = None) -> None:
        """Run nothing yet."""
        self.workload, self.worker = workload, worker
        self._states: dict[int, Any] = {} if kept is None else dict([kept])

    def run(
        self, round: int, start: RoundInput, *, fresh: bool
    ) -> tuple[RoundResult, RoundMetrics]:
        """Run a round; ``fresh`` is that of its task. Return the result without the kept state."""
        continues = self.workload.keeps_state and not fresh
        # The server has the report of the previous round: it asks for no earlier state.
        states = {round - 1: self._states[round - 1]} if continues else {}
        self._states = states
        kept = states.get(round - 1)
        result, metrics, _ = self.workload.run(self.worker, round, start, kept)
        if result.local_state is not None:
            self._states = states | {round: result.local_state}
        return result._replace(local_state=None), metrics

    def local_state(self, round: int) -> PyTree:
        """Return the state after one of the newest two rounds; another thread may run meanwhile."""
        return self._states[round]
