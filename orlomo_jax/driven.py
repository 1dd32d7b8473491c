"""A simulated run driven from Python, one step after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.plan import Events
from orlomo_jax.reports import Report, ReportRejected
from orlomo_jax.rounds import RoundMetrics, fused_round
from orlomo_jax.server import ParameterServer
from orlomo_jax.server_step import start_momentum
from orlomo_jax.trace import ArrivalTrace

if TYPE_CHECKING:
    from jaxtyping import Array


class Job(NamedTuple):
    """What is to be run on a server; see :func:`~orlomo_jax.simulate`."""

    round_fn: Callable
    batch_fn: jax.tree_util.Partial
    trace: ArrivalTrace
    data_key: Array
    noise_key: Array


def check_job(server: ParameterServer, job: Any) -> RoundMetrics:
    """Trace a round, and return the shapes of its metrics.

    Args:
        server: The server that the reports are for.
        job: A :class:`Job`, or what else has its functions and keys.

    Raises:
        ReportRejected: If the job's reports are not like the server's trees.
    """
    params, model_state = server.to_send()
    momentum = start_momentum(server.state) if server.method.synchronous else None
    result, metrics, _ = jax.eval_shape(
        fused_round(job.round_fn),
        job.batch_fn,
        params,
        model_state,
        momentum,
        jnp.zeros([]),
        job.data_key,
        job.noise_key,
        *(np.int32(0),) * 4,
    )
    try:
        server.check_form(Report(0, 0, 0, result.update, result.model_state))
    except (TypeError, ValueError) as error:
        raise ReportRejected(str(error)) from error
    return metrics


class Driven:
    """Drives the server's own methods.

    Attributes:
        metrics: The shapes of a round's metrics.
        first_bad: The step of the first non-finite round, −1 for none, int32[] on the device.
    """

    def __init__(self, server: ParameterServer, job: Job) -> None:
        """Go on from where the server is."""
        self._server, self._job, self._events = server, job, Events(job.trace)
        self._run_round = partial(fused_round(job.round_fn), job.batch_fn)
        self.first_bad = jnp.int32(-1)
        self.metrics = check_job(server, job)

    def advance(self, stop: int) -> Iterator[RoundMetrics]:
        """Step on until ``stop`` reports are applied; yield the metrics of each as it goes."""
        server, job = self._server, self._job
        for t in range(server.step, stop):
            self._events.apply(t, server)
            worker = int(job.trace.workers[t])
            task = server.held(worker)
            assert task is not None  # the trace's own ledger says so
            result, metrics, self.first_bad = self._run_round(
                task.params,
                task.model_state,
                task.momentum,
                task.local_learning_rate,
                job.data_key,
                job.noise_key,
                np.int32(worker),
                np.int32(task.round),
                np.int32(t),
                self.first_bad,
            )
            # The device remembers the first non-finite round: to look here would stall each step.
            report, task = task.report(result)._replace(finite=True), None
            for waiting in server.receive(report):
                server.dispatch(waiting)
            yield metrics

    def peek(self) -> tuple[Any, Any, Any]:
        """Return params, model state and the rule's state, of use until the next step."""
        return self._server.peek()

    def arrays(self) -> tuple[Any, Any, Any]:
        """Return params, model state and the rule's state; they stay as they are."""
        return self._server.params, self._server.model_state, self._server.state

    def settle(self) -> None:
        """Leave everything with the server, where it is in any case."""
