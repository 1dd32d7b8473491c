"""Benchmarks of rounds and simulated runs, against the bare compiled programs inside them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import models
from experiments.benchmarks.measure import Row, in_turn, of_pairs, rate, seconds
from experiments.models import mlp
from orlomo_jax import ArrivalTrace, Compiled, Method, make_method, one_slow_worker, simulate
from orlomo_jax import sample_trace as arrivals_of

APPFL_JOB = Path(__file__).with_name("appfl_job.py")
"""The script that times APPFL's simulator; it runs in an environment with APPFL."""


class Job(NamedTuple):
    """A run to be timed.

    Attributes:
        name: Its name in rows.
        method: OrLoMo, for K workers.
        round_fn: The method's local round.
        params: The initial parameters w_0.
        model_state: The initial model state.
        batches: The batches of every round of every worker.
        trace: Arrivals; the last worker is 5 times slower.
    """

    name: str
    method: Method
    round_fn: Callable
    params: Any
    model_state: Any
    batches: Any
    trace: ArrivalTrace

    @property
    def batch_fn(self) -> Callable:
        """The batch function."""
        return jax.tree_util.Partial(_same, self.batches)

    def simulated(self, **options: Any) -> None:
        """Run the job in the simulator."""
        result = simulate(
            self.method,
            None,
            self.batch_fn,
            self.params,
            round_fn=self.round_fn,
            trace=self.trace,
            key=jax.random.key(0),
            model_state=self.model_state,
            local_learning_rate=0.01,
            **options,
        )
        jax.block_until_ready(result.params)

    def rounds(self) -> Any:
        """Call only the jitted round, once per step of the trace."""
        args = (self.params, self.model_state, self.batches, 0.01, jax.random.key(0))
        result = None
        for _ in range(self.trace.num_steps):  # keeps no earlier result
            result = self.round_fn(*args)
        return jax.block_until_ready(result)


def perceptron(widths, num_local_steps, num_workers, num_steps, batch_size=32) -> Job:
    """Return the job of a multilayer perceptron."""
    params = mlp.init(jax.random.key(0), widths)
    shape = (num_local_steps, batch_size)
    batches = jnp.ones((*shape, widths[0])), jnp.zeros(shape, jnp.int32)
    return _job("MLP", mlp.loss_fn, params, None, batches, num_workers, num_steps)


def resnet(
    num_local_steps=4, num_workers=4, num_steps=6, batch_size=64, convolution: Any = "auto"
) -> Job:
    """Return the job of ResNet8 on 32×32 images."""
    network = models.make("resnet8", 10, (32, 32, 3), convolution=convolution)
    params, model_state = network.init(jax.random.key(0))
    shape = (num_local_steps, batch_size)
    batches = jnp.ones((*shape, 32, 32, 3)), jnp.zeros(shape, jnp.int32)
    return _job("ResNet8", network.loss_fn, params, model_state, batches, num_workers, num_steps)


def simulator(repeats: int) -> Iterator[Row]:
    """Measure global iterations per second of the eager and the compiled engine."""
    small = _small()
    for engine, form, bar in (("compiled", "compiled", 1.2), ("eager", "driven from Python", 0.5)):
        run = partial(small.simulated, engine=engine)
        (timing,) = in_turn(repeats, run, small.rounds)
        name = f"simulator, {form}, {small.name}"
        yield rate(name, small.trace.num_steps, timing, "iterations/s", "bare rounds", bar)
    jobs = (
        (perceptron((64, 512, 80), 8, 4, 200), repeats),
        (perceptron((64, 256, 200, 10), 32, 16, 64), repeats),
        (resnet(), min(repeats, 3)),
    )
    for job, count in jobs:
        (timing,) = in_turn(count, job.simulated, job.rounds)
        steps, name = job.trace.num_steps, f"simulator, {job.name}"
        yield rate(name, steps, timing, "iterations/s", "bare rounds", 1 / 1.05)


def axes(repeats: int) -> Iterator[Row]:
    """Compare each way of computing rounds with the automatic choice; no ratio should exceed 1."""
    dense, convolving = perceptron((64, 512, 80), 8, 16, 64), resnet(2, 8, 16)
    jobs = [("", dense, dense, repeats)]
    for form in ("matmul",) if jax.default_backend() == "cpu" else ("xla", "matmul"):
        job = resnet(2, 8, 16, convolution=form)
        jobs.append((f", {form}", job, convolving, min(repeats, 3)))
    for form, job, chosen, count in jobs:
        for axis in ("loop", "map", "vmap"):
            run = partial(job.simulated, engine=Compiled(axis))
            (timing,) = in_turn(count, run, chosen.simulated)
            name = f"{job.name}: {axis}{form}"
            yield rate(name, job.trace.num_steps, timing, "iterations/s", "as chosen")


def has_appfl(python: Path) -> bool:
    """Return whether that Python can import APPFL's simulator."""
    look = "import importlib.util as util; assert util.find_spec('appfl.vsim')"
    try:
        return subprocess.run([str(python), "-c", look], capture_output=True).returncode == 0
    except OSError:
        return False


def against_appfl(repeats: int, python: Path) -> Iterator[Row]:
    """Compare the compiled small job with APPFL's simulator, with and without garbage collection.

    By default APPFL collects all garbage about ten times in a global iteration. The more modules
    are imported, the longer this takes.
    """
    job = _small()
    job.simulated(engine="compiled")
    for collect, num_steps, against in (
        (True, 4, "APPFL 1.12"),
        (False, 400, "APPFL 1.12, never collecting garbage"),
    ):
        figures, limits = [], []
        for _ in range(min(repeats, 5)):
            command = [str(python), str(APPFL_JOB), str(num_steps), str(collect)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            limits.append(num_steps / float(done.stdout))
            figures.append(job.trace.num_steps / seconds(partial(job.simulated, engine="compiled")))
        name = f"simulator, compiled, {job.name}"
        yield of_pairs(name, figures, limits, "iterations/s", against, 80.0)


def worker(repeats: int) -> Iterator[Row]:
    """Compare a local round of S steps with S calls of one jitted step of momentum SGD."""
    for job, count in ((perceptron((64, 512, 80), 8, 1, 20), repeats), (resnet(4, 1, 1), 3)):
        steps = job.trace.num_steps * len(jax.tree.leaves(job.batches)[0])
        loss_fn = (
            mlp.loss_fn if "MLP" in job.name else models.make("resnet8", 10, (32, 32, 3)).loss_fn
        )

        @jax.jit
        def local_step(params, buffer, model_state, batch, key, loss_fn=loss_fn):
            gradient, (model_state, _) = jax.grad(loss_fn, has_aux=True)(
                params, model_state, batch, key
            )
            buffer = jax.tree.map(lambda u, g: 0.9 * u + 0.01 * g, buffer, gradient)
            return jax.tree.map(jnp.subtract, params, buffer), buffer, model_state

        def bare(job=job, steps=steps, local_step=local_step):
            batch, key = jax.tree.map(lambda x: x[0], job.batches), jax.random.key(0)
            carry = (job.params, jax.tree.map(jnp.zeros_like, job.params), job.model_state)
            for _ in range(steps):
                carry = local_step(*carry, batch, key)
            jax.block_until_ready(carry)

        (timing,) = in_turn(count, job.rounds, bare)
        yield rate(f"worker round, {job.name}", steps, timing, "local steps/s", "bare steps")


def _small() -> Job:
    return perceptron((64, 32, 10), 8, 4, 1000)


def _job(name, loss_fn, params, model_state, batches, num_workers, num_steps) -> Job:
    images, _ = batches
    num_local_steps, batch_size = images.shape[:2]
    method = make_method("orlomo", num_workers, num_local_steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Job(
        f"{name} of {size}, S={num_local_steps}, batch {batch_size}, K={num_workers}",
        method,
        method.local_round(loss_fn),
        params,
        model_state,
        batches,
        arrivals_of(one_slow_worker(5), num_workers, num_steps, num_local_steps, 0),
    )


def _same(batches: Any, key: Any, worker: Any, round: Any) -> Any:
    return batches
