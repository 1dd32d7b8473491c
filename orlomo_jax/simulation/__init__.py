"""The exact simulator and its engines."""

from orlomo_jax.simulation.engine_choice import Compiled as Compiled
from orlomo_jax.simulation.engine_choice import Eager as Eager
from orlomo_jax.simulation.run_start import RunStart as RunStart
from orlomo_jax.simulation.simulate import simulate as simulate
from orlomo_jax.simulation.simulate_many import simulate_many as simulate_many
