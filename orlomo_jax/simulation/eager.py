"""Defines the eager engine, which runs every step of the parameter server from Python."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from orlomo_jax.recording.state_source import ServerSource
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.traces.events import Events
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.worker.workload import RoundMetrics, Workload


class EagerEngine(ServerSource):
    """Simulates a run step by step; see ``Engine`` in engine_choice.py."""

    def __init__(self, server: ParameterServer, workload: Workload, trace: ArrivalTrace) -> None:
        """Continue from the server's step."""
        super().__init__(server, workload)
        self._workload, self._trace, self._events = workload, trace, Events(trace)
        self.first_nonfinite = jnp.int32(-1)

    def advance(self, stop: int) -> Iterator[RoundMetrics]:
        """Apply reports until step ``stop``; yield the metrics of each as soon as it is applied."""
        for step in range(self.server.step, stop):
            self._events.apply(step, self.server)
            task = self.server.held(int(self._trace.workers[step]))
            assert task is not None  # the trace's validation says so
            worker, round, _ = task.id
            kept = None if task.fresh else self.local_states.get(worker)
            result, metrics, self.first_nonfinite = self._workload.run(
                worker, round, task.start, kept, step, self.first_nonfinite
            )
            if result.local_state is not None:
                self.local_states[worker] = result.local_state
            # The device keeps the first non-finite round; waiting for it would stall every step.
            report = task.report(result)._replace(finite=True)
            task = kept = None  # an array that is not needed any more should not stay
            for waiting in self.server.receive(report):
                self.server.dispatch(waiting)
            yield metrics._replace(accepted=self.server.view().accepted)
