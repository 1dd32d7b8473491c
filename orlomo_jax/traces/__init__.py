"""Arrival traces, models of compute times and staleness policies; uses NumPy only."""

from orlomo_jax.traces.compute_times import ComputeTimes as ComputeTimes
from orlomo_jax.traces.compute_times import heterogeneous as heterogeneous
from orlomo_jax.traces.compute_times import homogeneous as homogeneous
from orlomo_jax.traces.compute_times import one_slow_worker as one_slow_worker
from orlomo_jax.traces.compute_times import per_worker_times as per_worker_times
from orlomo_jax.traces.local_steps import dynamic_local_steps as dynamic_local_steps
from orlomo_jax.traces.policies import Policy as Policy
from orlomo_jax.traces.policies import RestartEvery as RestartEvery
from orlomo_jax.traces.policies import StalenessBound as StalenessBound
from orlomo_jax.traces.sample_trace import sample_trace as sample_trace
from orlomo_jax.traces.trace import ArrivalTrace as ArrivalTrace
from orlomo_jax.traces.trace_validation import TraceEvent as TraceEvent
