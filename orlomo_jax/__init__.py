"""OrLoMo: ordered local momentum for asynchronous distributed training, in JAX.

The sub-packages ``methods``, ``rules``, ``server``, ``worker``, ``traces``, ``recording`` and
``runtimes`` have more names, for authors of rules, loops and runtimes.
"""

from importlib import metadata as _metadata

from orlomo_jax.adapters import from_loss, from_nnx
from orlomo_jax.methods import Method, make_method, register_method, with_fingerprint
from orlomo_jax.recording import (
    Callback,
    Checkpointer,
    CSVLog,
    HealthLog,
    ProgressBar,
    StepRecord,
    TensorBoard,
    TrainingResult,
)
from orlomo_jax.rules import LocalUpdate, al_sgd, delay_adaptive, local_ormo_da, orlomo, prsgdm
from orlomo_jax.runtimes import Membership, RayWorkers, ThreadWorkers, train
from orlomo_jax.server import ParameterServer, Report
from orlomo_jax.simulation import Compiled, Eager, RunStart, simulate, simulate_many
from orlomo_jax.traces import (
    ArrivalTrace,
    RestartEvery,
    StalenessBound,
    dynamic_local_steps,
    heterogeneous,
    homogeneous,
    one_slow_worker,
    per_worker_times,
    sample_trace,
)
from orlomo_jax.worker import HostBatches, cast_reports, local_momentum_sgd, local_round

__all__ = [
    "ArrivalTrace",
    "CSVLog",
    "Callback",
    "Checkpointer",
    "Compiled",
    "Eager",
    "HealthLog",
    "HostBatches",
    "LocalUpdate",
    "Membership",
    "Method",
    "ParameterServer",
    "ProgressBar",
    "RayWorkers",
    "Report",
    "RestartEvery",
    "RunStart",
    "StalenessBound",
    "StepRecord",
    "TensorBoard",
    "ThreadWorkers",
    "TrainingResult",
    "al_sgd",
    "cast_reports",
    "delay_adaptive",
    "dynamic_local_steps",
    "from_loss",
    "from_nnx",
    "heterogeneous",
    "homogeneous",
    "local_momentum_sgd",
    "local_ormo_da",
    "local_round",
    "make_method",
    "one_slow_worker",
    "orlomo",
    "per_worker_times",
    "prsgdm",
    "register_method",
    "sample_trace",
    "simulate",
    "simulate_many",
    "train",
    "with_fingerprint",
]

try:
    __version__ = _metadata.version("orlomo-jax")
except _metadata.PackageNotFoundError:  # imported from its folder, not installed
    __version__ = "unknown"
