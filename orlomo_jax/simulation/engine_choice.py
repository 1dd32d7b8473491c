"""Defines the protocol and settings of the simulator's engines, and chooses an engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import jax

from orlomo_jax.checks import check_count
from orlomo_jax.methods.method import Method
from orlomo_jax.recording.columns import Stacked
from orlomo_jax.recording.state_source import StateSource
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.simulation.compiled import CompiledEngine
from orlomo_jax.simulation.eager import EagerEngine
from orlomo_jax.simulation.planning import group_starts
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.workload import RoundMetrics, Workload

MANY = 1_000_000
"""From this number of parameters, the eager engine is faster on a CPU, because it does not copy
versions into slots and out again."""


Rounds: TypeAlias = Stacked | Iterable[RoundMetrics]


class Engine(StateSource, Protocol):
    """Carries out a simulated run; the server's step is always current."""

    def advance(self, stop: int) -> Rounds:
        """Apply reports until step ``stop``; return the metrics of each."""
        ...


@dataclass(frozen=True)
class Eager:
    """Run every step from Python."""


@dataclass(frozen=True)
class Compiled:
    """Run segments of at most 256 steps as one compiled program each.

    Attributes:
        rounds: How independent rounds are computed: one by one ("loop"), or several together by
            ``jax.lax.map`` ("map") or ``jax.vmap`` ("vmap"). "auto" is "loop" on a CPU or for a
            loss with convolutions, else "vmap".
        max_batch: The largest number of rounds computed together, ≥ 1; memory must hold as many
            reports. None is the average number of independent rounds in the trace.

    Raises:
        TypeError, ValueError: If an argument is unknown, out of range or of a wrong type.
    """

    rounds: Literal["auto", "loop", "map", "vmap"] = "auto"
    max_batch: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.rounds not in ("auto", "loop", "map", "vmap"):
            raise ValueError(
                f'`rounds` must be "auto", "loop", "map" or "vmap", got rounds={self.rounds!r}'
            )
        if self.max_batch is not None:
            check_count("max_batch", self.max_batch, 1)


def choose(
    engine: Any, server: ParameterServer, workload: Workload, trace: ArrivalTrace
) -> Eager | Compiled:
    """Return complete settings for ``engine``; raise ValueError if it is unknown."""
    named = {"auto": None, "eager": Eager(), "compiled": Compiled()}
    if not isinstance(engine, Eager | Compiled):
        if not isinstance(engine, str) or engine not in named:
            raise ValueError(
                '`engine` must be "auto", "eager", "compiled", Eager() or Compiled(…), '
                f"got engine={engine!r}"
            )
        engine = named[engine]
    if isinstance(workload.batch_fn, HostBatches):
        if isinstance(engine, Compiled):  # several runs together too
            raise ValueError(
                '`engine` must be "eager" for HostBatches: a compiled segment cannot call Python. '
                "Pass a batch_fn that JAX can trace to compile the run"
            )
        return Eager()
    start, cpu = server.to_send(), jax.default_backend() == "cpu"
    if engine is None:
        size = sum(leaf.size for leaf in jax.tree.leaves(start.params))
        is_slow = cpu and (size >= MANY or workload.convolves(start))
        engine = Eager() if is_slow else Compiled()
    if isinstance(engine, Eager):
        return engine
    rounds = engine.rounds
    if rounds == "auto":
        rounds = "loop" if cpu or workload.convolves(start) else "vmap"
    if rounds == "loop":
        return Compiled("loop", 1)
    most = trace.num_workers if engine.max_batch is None else engine.max_batch
    return Compiled(rounds, min(trace.num_workers, most, _mean_group(trace)))


def make_engine(
    settings: Eager | Compiled,
    server: ParameterServer,
    workload: Workload,
    trace: ArrivalTrace,
    method: Method,
    hyperparameters: dict[str, float],
) -> EagerEngine | CompiledEngine:
    """Return the engine with the settings of :func:`choose`; see :class:`CompiledEngine`."""
    if isinstance(settings, Eager):
        return EagerEngine(server, workload, trace)
    assert settings.rounds != "auto"
    batch = settings.max_batch or 1
    return CompiledEngine(server, workload, trace, settings.rounds, batch, method, hyperparameters)


def _mean_group(trace: ArrivalTrace) -> int:
    """Return the average number of rounds that can be computed together."""
    starts = group_starts(trace.dispatched_at, 0, max(1, trace.num_steps))
    return max(1, round(trace.num_steps / max(1, len(starts))))
