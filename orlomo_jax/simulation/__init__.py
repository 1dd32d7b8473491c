"""The exact simulator and its engines."""

from orlomo_jax.simulation.engine import Compiled as Compiled
from orlomo_jax.simulation.engine import Eager as Eager
from orlomo_jax.simulation.simulate import simulate as simulate
