"""Arrival traces, models of compute times and staleness policies; uses NumPy only."""

from orlomo_jax.traces.compute_time_tables import COMPUTE_TIME_NAMES as COMPUTE_TIME_NAMES
from orlomo_jax.traces.compute_time_tables import deepmind_toy as deepmind_toy
from orlomo_jax.traces.compute_time_tables import forgather_4to1 as forgather_4to1
from orlomo_jax.traces.compute_time_tables import halos_16 as halos_16
from orlomo_jax.traces.compute_time_tables import named_compute_times as named_compute_times
from orlomo_jax.traces.compute_time_tables import sqrt_k as sqrt_k
from orlomo_jax.traces.compute_times import ComputeTimes as ComputeTimes
from orlomo_jax.traces.compute_times import heterogeneous as heterogeneous
from orlomo_jax.traces.compute_times import homogeneous as homogeneous
from orlomo_jax.traces.compute_times import one_slow_worker as one_slow_worker
from orlomo_jax.traces.compute_times import per_worker_times as per_worker_times
from orlomo_jax.traces.fit import ComputeTimesFit as ComputeTimesFit
from orlomo_jax.traces.fit import fit_compute_times as fit_compute_times
from orlomo_jax.traces.local_steps import dynamic_local_steps as dynamic_local_steps
from orlomo_jax.traces.policies import Policy as Policy
from orlomo_jax.traces.policies import RestartEvery as RestartEvery
from orlomo_jax.traces.policies import StalenessBound as StalenessBound
from orlomo_jax.traces.sample_trace import sample_trace as sample_trace
from orlomo_jax.traces.trace import ArrivalTrace as ArrivalTrace
from orlomo_jax.traces.trace_validation import TraceEvent as TraceEvent
