"""Memory and messages that kept states cost: nothing but what docs/local_optimizers.md says."""

import contextlib
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ray

from orlomo_jax import (
    ArrivalTrace,
    Checkpointer,
    Compiled,
    Eager,
    RayWorkers,
    ThreadWorkers,
    make_method,
)
from orlomo_jax.runtimes.ray_actor import Answer
from orlomo_jax.worker import RoundInput
from tests.support.every_method import K, T, real, simulated
from tests.support.real_runs import Killed, killed_at

pytestmark = pytest.mark.slow
SIZE = 1237  # of no other array
STATE_BYTES = 4 * SIZE


def marked(keep=True, name="al_sgd"):
    """A method with an optimizer whose state can be told from all other arrays."""
    optimizer = optax.GradientTransformation(
        lambda params: jnp.zeros(SIZE), lambda gradient, state, params: (gradient, state + 1.0)
    )
    return make_method(name, K, 2, local_optimizer=optimizer, keep_local_state=keep)


class LiveStates:
    """A callback that counts the states on all devices after each step, single and stacked."""

    def __init__(self):
        gc.collect()  # what is left of an earlier run
        self.counts = []

    def __call__(self, record):
        arrays = {x.unsafe_buffer_pointer(): x.shape for x in jax.live_arrays()}
        shapes = list(arrays.values())  # each once, also if a NumPy array has the same memory
        self.counts.append((shapes.count((SIZE,)), shapes.count((K, SIZE))))


@pytest.mark.parametrize("engine", [Eager(), Compiled("loop")], ids=["eager", "compiled"])
def test_a_simulation_has_one_state_for_each_worker(engine, tmp_path):
    """Also after a checkpoint, and in a run that resumes."""
    method, options = marked(), {"checkpoint": Checkpointer(tmp_path, every=5)}
    trace = ArrivalTrace.from_workers(np.arange(24) % K, K)
    with pytest.raises(Killed):
        simulated(method, trace, engine, callbacks=[killed_at(13)], **options)
    live = LiveStates()
    simulated(method, trace, engine, callbacks=[live], **options)
    assert len(live.counts) == 24 - 10
    assert set(live.counts) == {(0, 1) if isinstance(engine, Compiled) else (K, 0)}


def test_a_thread_has_at_most_two_states(tmp_path):
    """Also after a checkpoint, which reads one of them, and in a run that resumes."""
    method = marked()
    options = {"checkpoint": Checkpointer(tmp_path, every=5), "num_steps": 40}
    for step in (17, 40):
        live = LiveStates()
        with contextlib.suppress(Killed):
            real(method, ThreadWorkers(), callbacks=[live, killed_at(step)], **options)
        assert K <= max(single for single, _ in live.counts) <= 2 * K


@pytest.mark.usefixtures("cluster")
def test_messages_of_ray_do_not_contain_the_state(tmp_path, monkeypatch):
    """Except for a checkpoint: one state for each worker."""
    put, get, sizes = ray.put, ray.get, []

    def noted(value):
        sizes.append((type(value), len(ray.cloudpickle.dumps(value))))
        return value

    def messages(keep):
        sizes.clear()
        checkpoint = Checkpointer(tmp_path / str(keep), every=T)
        result = real(marked(keep, "diloco"), RayWorkers(), checkpoint=checkpoint)
        found = {kind: {size for t, size in sizes if t is kind} for kind in (RoundInput, Answer)}
        states = sorted(size for t, size in sizes if t not in (RoundInput, Answer, tuple))
        (arrays,) = checkpoint.newest().arrays["runs"]
        kept = arrays.pop("local_states")
        others = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (kept, arrays)]
        health = result.health
        return found, states, others, (health.sent_bytes, health.received_bytes)

    monkeypatch.setattr(ray, "put", lambda value: put(noted(value)))
    monkeypatch.setattr(ray, "get", lambda *args, **options: noted(get(*args, **options)))
    ours, states, (kept, others), counted = messages(True)
    assert (ours, [], [0, others], counted) == messages(False)
    assert all(len(found) == 1 for found in ours.values()), "all messages have one size"
    assert max(*ours[RoundInput], *ours[Answer]) < STATE_BYTES / 2
    assert len(states) == K
    assert STATE_BYTES < states[0] == states[-1] < STATE_BYTES + 500
    assert kept == K * STATE_BYTES
