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

__all__ = [
    "ALSGDState",
    "LocalOrMoDAState",
    "LocalUpdate",
    "OrLoMoState",
    "PRSGDmState",
    "al_sgd",
    "delay_adaptive",
    "global_learning_rate",
    "local_ormo_da",
    "orlomo",
    "prsgdm",
]
