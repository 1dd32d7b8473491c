"""Real asynchrony: a parameter server and workers that take the time they take."""

from orlomo_jax.runtimes.driver import WorkersLostError as WorkersLostError
from orlomo_jax.runtimes.membership import Membership as Membership
from orlomo_jax.runtimes.protocol import TaskOutcome as TaskOutcome
from orlomo_jax.runtimes.protocol import WorkerPool as WorkerPool
from orlomo_jax.runtimes.ray import RayWorkers as RayWorkers
from orlomo_jax.runtimes.threads import ThreadWorkers as ThreadWorkers
from orlomo_jax.runtimes.train import train as train
