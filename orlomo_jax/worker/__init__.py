"""The worker's side: local rounds, batches, partitions of data and the workload."""

from orlomo_jax.worker.host_batches import HostBatches as HostBatches
from orlomo_jax.worker.local_round import local_momentum_sgd as local_momentum_sgd
from orlomo_jax.worker.local_round import local_round as local_round
from orlomo_jax.worker.local_worker import KeptState as KeptState
from orlomo_jax.worker.local_worker import LocalWorker as LocalWorker
from orlomo_jax.worker.partition import by_class_partition as by_class_partition
from orlomo_jax.worker.partition import dirichlet_partition as dirichlet_partition
from orlomo_jax.worker.protocols import BatchFn as BatchFn
from orlomo_jax.worker.protocols import Evaluate as Evaluate
from orlomo_jax.worker.protocols import LossFn as LossFn
from orlomo_jax.worker.protocols import RoundFn as RoundFn
from orlomo_jax.worker.quantize import quantize_reports as quantize_reports
from orlomo_jax.worker.step_loop import RoundResult as RoundResult
from orlomo_jax.worker.wire import Wire as Wire
from orlomo_jax.worker.wire import cast_reports as cast_reports
from orlomo_jax.worker.workload import RoundInput as RoundInput
from orlomo_jax.worker.workload import RoundMetrics as RoundMetrics
from orlomo_jax.worker.workload import Workload as Workload
