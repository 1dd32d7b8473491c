"""The exact simulator and its engines."""

from orlomo_jax.simulation.engine_choice import Compiled as Compiled
from orlomo_jax.simulation.engine_choice import Eager as Eager
from orlomo_jax.simulation.simulate import RunStart as RunStart
from orlomo_jax.simulation.simulate import simulate as simulate
from orlomo_jax.simulation.simulate import simulate_together as simulate_together
