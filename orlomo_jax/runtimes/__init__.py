"""Asynchronous training on real workers: threads, Ray actors, or a custom pool."""

from orlomo_jax.runtimes.failures import WorkersLostError as WorkersLostError
from orlomo_jax.runtimes.membership import Membership as Membership
from orlomo_jax.runtimes.protocol import TaskOutcome as TaskOutcome
from orlomo_jax.runtimes.protocol import WorkerPool as WorkerPool
from orlomo_jax.runtimes.ray import RayWorkers as RayWorkers
from orlomo_jax.runtimes.threads import ThreadWorkers as ThreadWorkers
from orlomo_jax.runtimes.train import train as train
