"""Benchmarks of the server step and ``ParameterServer.receive`` against ``np.add``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.measure import Row, in_turn, rate
from orlomo_jax import LocalUpdate, ParameterServer, Report, make_method, orlomo
from orlomo_jax.trees import all_finite

SIZES = ((10_000_000, 1), (50_000_000, 1), (10_000_000, 200), (50_000_000, 200))
"""Pairs (parameters, leaves)."""

STEPS = 4
"""Steps of one measurement; several, to measure a running server."""


def step(repeats: int) -> Iterator[Row]:
    """Time OrLoMo's step with params and state donated: 24 bytes per parameter in one pass."""
    for size, leaves in SIZES:
        rule = orlomo(16)

        @partial(jax.jit, donate_argnums=(0, 1))
        def run(params, state, update, index, rule=rule):
            updates, state = rule.update(update, state, params, dispatched_at=index)
            return optax.apply_updates(params, updates), state

        held = [_ones(size, leaves), rule.init(_ones(size, leaves))]
        update = LocalUpdate(_ones(size, leaves), _ones(size, leaves))

        def ours(held=held, run=run, update=update):
            for _ in range(STEPS):
                held[:] = run(*held, update, np.int32(0))
            jax.block_until_ready(held)

        yield _row("server step", size, leaves, repeats, ours, bar=1.0)


def receive(repeats: int) -> Iterator[Row]:
    """Time receive and dispatch on the server; 8 workers hold a version each."""
    for size, leaves in SIZES:
        for finite in (True, None):
            ours = _receiving(size, leaves, finite)
            name = "receive, 8 versions held" + (", payload checked" if finite is None else "")
            yield _row(name, size, leaves, repeats, ours, bar=0.8 if finite else None)


def masters(repeats: int) -> Iterator[Row]:
    """Compare receive and dispatch of bfloat16 parameters (with masters) with float32 ones."""
    for size, leaves in SIZES[:1] + SIZES[2:3]:
        ours, limit = (_receiving(size, leaves, True, dtype) for dtype in (jnp.bfloat16, None))
        (timing,) = in_turn(repeats, ours, limit)
        name = f"receive, float32 masters of bfloat16, {_form(size, leaves)}"
        yield rate(name, STEPS, timing, "reports/s", "float32 parameters")


def _receiving(size: int, leaves: int, finite: bool | None, dtype: Any = None) -> Any:
    params = jax.tree.map(lambda x: x.astype(dtype or x.dtype), _ones(size, leaves))
    server = ParameterServer(make_method("orlomo", 8, 1), params, local_learning_rate=1)
    update = LocalUpdate(_ones(size, leaves), _ones(size, leaves))
    for worker in range(8):
        server.dispatch(worker)

    def cycle(worker: int) -> Any:
        task = server.held(worker)
        assert task is not None
        report = Report(task.id, update, finite=finite)
        del task  # a worker releases its task too, so that the server may reuse the memory
        server.receive(report)
        return server.dispatch(worker).start.params

    for worker in range(8):  # makes all versions distinct
        cycle(worker)

    def ours():
        for _ in range(STEPS - 1):
            cycle(server.step % 8)
        jax.block_until_ready(cycle(server.step % 8))

    return ours


def finite(repeats: int) -> Iterator[Row]:
    """Time the check of a payload that its worker has not checked: reads 8 bytes per parameter."""
    check = all_finite
    for size, leaves in SIZES[:1] + SIZES[2:3]:
        update = LocalUpdate(_ones(size, leaves), _ones(size, leaves))
        a = np.ones(2 * size, np.float32)
        (timing,) = in_turn(
            repeats,
            lambda update=update: jax.block_until_ready(check(update)),
            lambda a=a: a.max(),
        )
        name = f"finite check, {_form(size, leaves)}"
        scale = 8 * size / 1e9
        yield Row(
            name, scale / timing.seconds, scale / timing.limit, "GB/s", "np.max", timing.ratio
        )


def _row(name, size, leaves, repeats, ours, bar) -> Row:
    a, b, out = np.ones((3, size), np.float32)

    def limit():
        for _ in range(STEPS):
            np.add(a, b, out=out)

    (timing,) = in_turn(repeats, ours, limit)
    scale = STEPS * size / 1e9
    return Row(
        f"{name}, {_form(size, leaves)}",
        24 * scale / timing.seconds,
        12 * scale / timing.limit,
        "GB/s",
        "np.add",
        2 * timing.ratio,
        bar,
    )


def _form(size: int, leaves: int) -> str:
    return f"{size // 10**6} M parameters, {leaves} {'leaf' if leaves == 1 else 'leaves'}"


def _ones(size: int, leaves: int) -> list[jax.Array]:
    return [jnp.ones(size // leaves) for _ in range(leaves)]
