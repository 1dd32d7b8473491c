"""A scenario for every method: AdamW with kept states, uneven S and lost rounds."""

import jax
import numpy as np
import optax

from orlomo_jax import ArrivalTrace, make_method, simulate, train
from orlomo_jax.methods import FIELD_METHODS, METHOD_NAMES
from tests.support.toy import PARAMS, STATE, loss_fn

K, T = 3, 24
ADAMW = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
NEEDED = {
    "ringmaster": {"max_delay": 2, "stops": True},
    "rennala": {"buffer_size": 2},
    "ca2fl": {"buffer_size": 2},
    "fadas": {"buffer_size": 2, "learning_rate": 0.01},
    "slowmo": {"momentum": 0.5},
    "fedbuff": {"buffer_size": 2},
}
MERGES_LOCAL_MOMENTUM = {"orlomo", "prsgdm"}  # these run momentum SGD
ALL = [*METHOD_NAMES, *FIELD_METHODS]
ROUNDING = {"rtol": 2e-3, "atol": 2e-4}
"""Two programs of the same float32 run; Adam divides by the root of small numbers."""


def method_of(name, uneven=True, keep=True):
    optimizer = None if name in MERGES_LOCAL_MOMENTUM else ADAMW
    steps = (2, 1, 3) if uneven else 2
    options = {"local_optimizer": optimizer, "keep_local_state": keep} | NEEDED.get(name, {})
    return make_method(name, K, steps, **options)


def batch_fn(key, worker, round, num_steps=2):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    return jax.random.normal(key, (num_steps, 4, 3))


def trace_of(method, losses=True):
    """Arrivals with lost rounds; for Ringmaster with stops, the rounds that it cancels."""
    if method.synchronous:
        order = [w for r in range(T // K) for w in np.roll(range(K), r)]
        events = [(4, "lost", 1), (4, "redispatched", 1), (9, "lost", 1), (10, "redispatched", 1)]
        events = events if losses else []
        return ArrivalTrace.from_workers(order, K, synchronous=True, events=events)
    order = [0, 1, 1, 0, 2, 1, 0, 1, 2, 0, 1, 1, 0, 2, 1, 1, 0, 1, 2, 0, 1, 2, 1, 0]
    if method.policy is None:
        events = [(2, "lost", 2), (3, "redispatched", 2), (8, "restarted", 0), (9, "left", 1)]
        events += [(9, "joined", 1), (15, "lost", 0), (16, "redispatched", 0)]
        events = events if losses else []
        return ArrivalTrace.from_workers(order, K, events=events)
    held, events = dict.fromkeys(range(K), 0), []
    for step, worker in enumerate(order, 1):
        held[worker] = step
        for late in method.policy.restarts(step, held):
            held[late] = step
            if step < T:
                events.append((step, "restarted", late))
    return ArrivalTrace.from_workers(order, K, events=events)


def arguments():
    return {"key": jax.random.key(3), "model_state": STATE, "local_learning_rate": 0.02}


def simulated(method, trace, engine, **options):
    return simulate(
        method, loss_fn, batch_fn, PARAMS, trace=trace, engine=engine, **arguments(), **options
    )


def real(method, workers, **options):
    """A run on real workers."""
    options = {"num_steps": T} | arguments() | options
    return train(method, loss_fn, batch_fn, PARAMS, workers, **options)
