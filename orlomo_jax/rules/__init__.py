"""Server rules: optax transformations of a worker's report to an update of the parameters."""

from orlomo_jax.rules.al_sgd import ALSGDState as ALSGDState
from orlomo_jax.rules.al_sgd import al_sgd as al_sgd
from orlomo_jax.rules.contract import LocalUpdate as LocalUpdate
from orlomo_jax.rules.delay_adaptive_rate import delay_adaptive as delay_adaptive
from orlomo_jax.rules.delay_adaptive_rate import global_learning_rate as global_learning_rate
from orlomo_jax.rules.local_ormo_da import LocalOrMoDAState as LocalOrMoDAState
from orlomo_jax.rules.local_ormo_da import local_ormo_da as local_ormo_da
from orlomo_jax.rules.orlomo import OrLoMoState as OrLoMoState
from orlomo_jax.rules.orlomo import orlomo as orlomo
from orlomo_jax.rules.prsgdm import PRSGDmState as PRSGDmState
from orlomo_jax.rules.prsgdm import prsgdm as prsgdm
