"""Defines the source from which a recorder reads a run's state."""

from __future__ import annotations

from typing import Any, Protocol

from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.state import ServerState
from orlomo_jax.trees import PyTree


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
    def server(self) -> ParameterServer:
        """The run's server."""
        ...

    def view(self) -> ServerState:
        """Return the state, valid until the next step."""
        ...

    def model(self) -> tuple[Any, Any]:
        """Return params and model state, which later steps do not change."""
        ...

    def sync_to_server(self) -> None:
        """Give the server the state."""


class ServerSource:
    """The state of a server without a compiled engine."""

    def __init__(self, server: ParameterServer) -> None:
        """Keep the server."""
        self.server: ParameterServer = server
        self.first_nonfinite: Any = -1
        self.local_states: dict[int, PyTree] = {}

    def view(self) -> ServerState:
        """Return the state, valid until the next step."""
        return self.server.view()

    def model(self) -> tuple[Any, Any]:
        """Return params and model state, which later steps do not change."""
        return self.server.params, self.server.model_state

    def sync_to_server(self) -> None:
        """Do nothing: the server has the state."""
