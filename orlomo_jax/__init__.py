"""OrLoMo: ordered local momentum for asynchronous distributed training, in JAX."""

from orlomo_jax.adapters import Model, from_loss, from_nnx
from orlomo_jax.arrivals import (
    ComputeTimes,
    given,
    heterogeneous,
    homogeneous,
    one_slow_worker,
    simulate_arrivals,
)
from orlomo_jax.audit import Audit, AuditFailure
from orlomo_jax.books import TaskId
from orlomo_jax.callbacks import Callback, CSVLog, HealthLog, ProgressBar, TensorBoard
from orlomo_jax.checkpoint import Checkpoints
from orlomo_jax.engine import Compiled, Eager
from orlomo_jax.fingerprint import with_fingerprint
from orlomo_jax.health import Health
from orlomo_jax.history import Evaluation, History, StepRecord, TrainingResult
from orlomo_jax.host_batches import HostBatches
from orlomo_jax.journal import Arrival, Journal
from orlomo_jax.methods import METHOD_NAMES, Method, make_method, register_method
from orlomo_jax.narrow import narrow_reports
from orlomo_jax.order import TraceEvent
from orlomo_jax.reports import Report, ReportRejected, Task
from orlomo_jax.rules import (
    ALSGDState,
    LocalOrMoDAState,
    LocalUpdate,
    OrLoMoState,
    PRSGDmState,
    al_sgd,
    delay_adaptive,
    global_learning_rate,
    local_ormo_da,
    orlomo,
    prsgdm,
)
from orlomo_jax.runtimes import (
    Membership,
    RayWorkers,
    TaskOutcome,
    ThreadWorkers,
    WorkerPool,
    WorkersGone,
    train,
)
from orlomo_jax.server import ParameterServer
from orlomo_jax.simulator import simulate
from orlomo_jax.state import ServerState
from orlomo_jax.trace import ArrivalTrace
from orlomo_jax.worker import RoundResult, all_finite, local_momentum_sgd
from orlomo_jax.workload import RoundInput, RoundMetrics, Workload

__all__ = [
    "METHOD_NAMES",
    "ALSGDState",
    "Arrival",
    "ArrivalTrace",
    "Audit",
    "AuditFailure",
    "CSVLog",
    "Callback",
    "Checkpoints",
    "Compiled",
    "ComputeTimes",
    "Eager",
    "Evaluation",
    "Health",
    "HealthLog",
    "History",
    "HostBatches",
    "Journal",
    "LocalOrMoDAState",
    "LocalUpdate",
    "Membership",
    "Method",
    "Model",
    "OrLoMoState",
    "PRSGDmState",
    "ParameterServer",
    "ProgressBar",
    "RayWorkers",
    "Report",
    "ReportRejected",
    "RoundInput",
    "RoundMetrics",
    "RoundResult",
    "ServerState",
    "StepRecord",
    "Task",
    "TaskId",
    "TaskOutcome",
    "TensorBoard",
    "ThreadWorkers",
    "TraceEvent",
    "TrainingResult",
    "WorkerPool",
    "WorkersGone",
    "Workload",
    "al_sgd",
    "all_finite",
    "delay_adaptive",
    "from_loss",
    "from_nnx",
    "given",
    "global_learning_rate",
    "heterogeneous",
    "homogeneous",
    "local_momentum_sgd",
    "local_ormo_da",
    "make_method",
    "narrow_reports",
    "one_slow_worker",
    "orlomo",
    "prsgdm",
    "register_method",
    "simulate",
    "simulate_arrivals",
    "train",
    "with_fingerprint",
]
