"""OrLoMo: ordered local momentum for asynchronous distributed training, in JAX."""

from orlomo_jax.rules import (
    ALSGDState,
    LocalOrMoDAState,
    LocalUpdate,
    OrLoMoState,
    PRSGDmState,
    al_sgd,
    delay_adaptive,
    global_learning_rate,
    local_ormo_da,
    orlomo,
    prsgdm,
)
from orlomo_jax.worker import RoundResult, all_finite, local_momentum_sgd

__all__ = [
    "ALSGDState",
    "LocalOrMoDAState",
    "LocalUpdate",
    "OrLoMoState",
    "PRSGDmState",
    "RoundResult",
    "al_sgd",
    "all_finite",
    "delay_adaptive",
    "global_learning_rate",
    "local_momentum_sgd",
    "local_ormo_da",
    "orlomo",
    "prsgdm",
]
