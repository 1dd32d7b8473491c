"""Real asynchrony: a parameter server and workers that take the time they take."""

from orlomo_jax.runtimes.driver import WorkersGone as WorkersGone
from orlomo_jax.runtimes.membership import Membership as Membership
from orlomo_jax.runtimes.ray import RayWorkers as RayWorkers
from orlomo_jax.runtimes.threads import Threads as Threads
from orlomo_jax.runtimes.train import train as train
from orlomo_jax.runtimes.workers import Outcome as Outcome
from orlomo_jax.runtimes.workers import Work as Work
from orlomo_jax.runtimes.workers import Workers as Workers
