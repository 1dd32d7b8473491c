"""Defines the source from which a recorder reads a run's state."""

from __future__ import annotations

from typing import Any, Protocol

from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.reports import RejectedReportError, Report
from orlomo_jax.server.state import ServerState
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.trees import PyTree, all_finite
from orlomo_jax.worker.workload import RoundMetrics, Workload


class StateSource(Protocol):
    """The source from which a recorder reads a run's state.

    Attributes:
        first_nonfinite: The step of the first non-finite round, −1 for none.
        local_states: By worker, the kept state of its optimizer after its newest applied report;
            current after ``sync_to_server``.
    """

    first_nonfinite: Any
    local_states: Any

    @property
    def like(self) -> RoundMetrics:
        """The shapes of a round's metrics."""
        ...

    @property
    def server(self) -> ParameterServer:
        """The run's server."""
        ...

    def view(self) -> ServerState:
        """Return the state, valid until the next step."""
        ...

    def find_nonfinite(self) -> int:
        """Return ``first_nonfinite``; if only the state is not finite, the newest step."""
        ...

    def model(self) -> tuple[Any, Any]:
        """Return params and model state, which later steps do not change."""
        ...

    def sync_to_server(self) -> None:
        """Give the server the state."""


class ServerSource:
    """The state of a server without a compiled engine.

    Raises:
        RejectedReportError: If the workload's reports do not fit the server's trees.
    """

    def __init__(self, server: ParameterServer, workload: Workload) -> None:
        """Keep the server."""
        self.server: ParameterServer = server
        self.first_nonfinite: Any = -1
        self.like = metric_shapes(server, workload)
        self.local_states: dict[int, PyTree] = {}

    def view(self) -> ServerState:
        """Return the state, valid until the next step."""
        return self.server.view()

    def find_nonfinite(self) -> int:
        """Return the first non-finite step, −1 for none; see :class:`StateSource`."""
        if int(self.first_nonfinite) < 0 and not bool(all_finite(self.view())):
            self.first_nonfinite = self.server.step - 1
        return int(self.first_nonfinite)

    def model(self) -> tuple[Any, Any]:
        """Return params and model state, which later steps do not change."""
        return self.server.params, self.server.model_state

    def sync_to_server(self) -> None:
        """Do nothing: the server has the state."""


def metric_shapes(server: ParameterServer, workload: Workload) -> RoundMetrics:
    """Return the shapes of a round's metrics; raise if its reports are malformed."""
    result, metrics = workload.shapes(server.to_send())
    try:
        server.check_form(Report(TaskId(0, 0, 0), result.update, result.model_state))
    except (TypeError, ValueError) as error:
        raise RejectedReportError(str(error)) from error
    return metrics
