"""A small run, simulated or real, of which every setting can be changed."""

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import ArrivalTrace, Checkpointer, ThreadWorkers, make_method, simulate, train

K, S, T = 2, 2, 12
METHOD = {"name": "orlomo", "num_workers": K, "num_local_steps": S}


def loss_fn(params, model_state, batch, key):
    return sum(jnp.sum((x - batch) ** 2) for x in jax.tree.leaves(params)), (model_state, {})


def other_loss_fn(params, model_state, batch, key):
    return loss_fn(params, model_state, batch, key)


def ones(steps, key, worker, round):
    return steps


def batches(num_steps=S, value=1.0):
    return jax.tree_util.Partial(ones, jnp.full((num_steps, 1), value))


def run(
    folder,
    runtime="simulate",
    *,
    method=(),
    chain=None,
    loss_fn=loss_fn,
    value=1.0,
    rate=0.01,
    num_steps=T,
    params=None,
    any_version=False,
    **options,
):
    method = make_method(**METHOD | dict(method))
    if chain is not None:
        method = method.with_rule(optax.chain(chain, method.rule))
    names = ("weight_decay", "gradient_transform")
    local = {name: options.pop(name) for name in names if name in options}
    round_fn = method.local_round(loss_fn, **local)
    job = method, None, batches(method.num_local_steps, value)
    params = {"a": jnp.zeros(1), "b": jnp.ones(1)} if params is None else params
    every = {"checkpoint": Checkpointer(folder, every=5, any_version=any_version)}
    options = {"key": jax.random.key(0), "local_learning_rate": rate} | every | options
    options["round_fn"] = round_fn
    if runtime == "train":
        return train(*job, params, ThreadWorkers(), num_steps=num_steps, **options)
    trace = [0, 1] * (num_steps // 2)
    trace = ArrivalTrace.from_workers(trace, K, synchronous=method.synchronous)
    return simulate(*job, params, trace=trace, **options)
