"""Benchmarks of one GPU: its limits, the server step, and a simulated run of ResNet20."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import gpu_training
from experiments.benchmarks.gpu_training import FORMS, WORKERS, Sizes
from experiments.benchmarks.measure import Row, in_turn, rate, seconds
from experiments.benchmarks.stages import Stage
from orlomo_jax import LocalUpdate, orlomo

SHEET = {"float32": 494.7e12, "float32 highest": 66.9e12, "bfloat16": 989.4e12}
PROMISED = {"H100": SHEET | {"copy": 3.35e12}, "H200": SHEET | {"copy": 4.8e12}}
"""Bytes and operations per second from NVIDIA's data sheets; float32 products use TF32."""


def stages(sizes: Sizes) -> list[Stage]:
    """Return all stages, the least important last."""
    made = [Stage("limits", "copy on the device", 8, partial(copy, sizes))]
    for name in ("float32", "float32 highest", "bfloat16"):
        made.append(Stage("limits", f"product, {name}", 10, partial(product, sizes, name)))
    for size in sizes.params:
        for leaves in sizes.leaves:
            for looped in (False, True)[: 1 + (leaves > 1)]:
                name = f"server step, {size} parameters, {leaves} leaves, looped={looped}"
                rows = partial(server_step, sizes, size, leaves, looped)
                made.append(Stage("server_step", name, 8, rows))

    def resnet(axis: str, dtypes: tuple[str, ...], limit: float) -> str:
        ready = f"compile {axis}, {' and '.join(dtypes)}"
        rows = partial(gpu_training.compile_all, sizes, axis, dtypes)
        made.append(Stage("resnet", ready, limit, rows))
        for dtype in dtypes:
            for form in FORMS:
                rows = partial(gpu_training.segment, sizes, axis, form, dtype)
                made.append(Stage("resnet", f"{axis}, {form}, {dtype}", 8, rows, ready))
        return ready

    ready = resnet("loop", ("float32", "bfloat16"), 60)
    for form in FORMS:
        rows = partial(gpu_training.gradients, sizes, form)
        made.append(Stage("gradients", f"share of gradients, {form}", 12, rows, ready))
    resnet("vmap", ("float32",), 35)
    for form in FORMS:
        rows = partial(gpu_training.profiled, sizes, form)
        made.append(Stage("profile", f"profile, {form}", 12, rows, ready))
    resnet("vmap", ("bfloat16",), 35)
    return [stage._replace(seconds=sizes.scale * stage.seconds) for stage in made]


def copy(sizes: Sizes) -> Iterator[Row]:
    """Copy an array on the device; count bytes read and written."""
    x, copied, calls = jnp.ones(sizes.copied), jax.jit(jnp.copy), 10
    yield _limit("copy", "copy on the device", sizes, 8 * sizes.copied, calls, lambda: copied(x))


def product(sizes: Sizes, name: str) -> Iterator[Row]:
    """Multiply two square matrices of normal random numbers."""
    dtype, _, precision = name.partition(" ")
    left, right = jax.random.normal(jax.random.key(0), (2, sizes.product, sizes.product), dtype)
    multiply = jax.jit(partial(jnp.matmul, precision=precision or None))
    title = f"product of {sizes.product}² matrices, {name}"
    flops = 2 * sizes.product**3
    yield _limit(name, title, sizes, flops, 5, lambda: multiply(left, right))


def server_step(sizes: Sizes, size: int, leaves: int, looped: bool) -> Iterator[Row]:
    """Compare OrLoMo's step, with params and state donated, with a copy of as many bytes.

    Steps are queued one by one, or run in a loop of one program as in a compiled run.
    """
    rule, count = orlomo(WORKERS), max(10, round(2e9 / size)) if sizes.scale == 1 else 10

    def step(params, state, update):
        updates, state = rule.update(update, state, params, dispatched_at=np.int32(0))
        return optax.apply_updates(params, updates), state

    def loop(params, state, update):
        return jax.lax.fori_loop(0, count, lambda _, x: step(x[0], x[1], update), (params, state))

    ones = partial(jnp.ones, size // leaves)
    params, delta, momentum, start = ([ones() for _ in range(leaves)] for _ in range(4))
    held, update = [params, rule.init(start)], LocalUpdate(delta, momentum)
    run = jax.jit(loop if looped else step, donate_argnums=(0, 1))
    x, copied = jnp.ones(3 * size), jax.jit(jnp.copy)  # 12 bytes a parameter read, 12 written

    def ours():
        for _ in range(1 if looped else count):
            held[:] = run(*held, update)
        jax.block_until_ready(held)

    (timing,) = in_turn(sizes.repeats, ours, partial(_queue, count, lambda: copied(x)))
    leaf = "leaf" if leaves == 1 else "leaves"
    name = f"server step, {size / 1e6:g} M parameters, {leaves} {leaf}"
    name += ", in a compiled loop" if looped else ""
    yield rate(name, 24e-9 * count * size, timing, "GB/s", "copy on the device", 0.85)


def _queue(count: int, function: Callable) -> None:
    result = None
    for _ in range(count):  # keeps no earlier result
        result = function()
    jax.block_until_ready(result)


def _limit(key: str, name: str, sizes: Sizes, each: float, calls: int, function: Callable) -> Row:
    """Return the row of a figure that is compared with the data sheet."""
    run = partial(_queue, calls, function)
    run()
    figure = calls * each / statistics.median(seconds(run) for _ in range(sizes.repeats))
    kind = jax.devices()[0].device_kind
    sheet = next((sheet for model, sheet in PROMISED.items() if model in kind), {})
    limit = sheet.get(key, figure)
    unit, scale = ("GB/s", 1e-9) if key == "copy" else ("TFLOP/s", 1e-12)
    against = "NVIDIA's data sheet" if sheet else "itself"
    return Row(name, scale * figure, scale * limit, unit, against, figure / limit)
