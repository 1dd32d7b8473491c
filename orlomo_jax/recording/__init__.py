"""Records of runs: callbacks, histories, checkpoints, journals and health."""

from orlomo_jax.recording.callbacks import Callback as Callback
from orlomo_jax.recording.callbacks import CSVLog as CSVLog
from orlomo_jax.recording.callbacks import HealthLog as HealthLog
from orlomo_jax.recording.callbacks import ProgressBar as ProgressBar
from orlomo_jax.recording.callbacks import TensorBoard as TensorBoard
from orlomo_jax.recording.checkpoint import Checkpointer as Checkpointer
from orlomo_jax.recording.health import Health as Health
from orlomo_jax.recording.history import Evaluation as Evaluation
from orlomo_jax.recording.history import History as History
from orlomo_jax.recording.history import StepRecord as StepRecord
from orlomo_jax.recording.history import TrainingResult as TrainingResult
from orlomo_jax.recording.journal import Arrival as Arrival
from orlomo_jax.recording.journal import Journal as Journal
from orlomo_jax.recording.sweep_progress import SweepProgress as SweepProgress
