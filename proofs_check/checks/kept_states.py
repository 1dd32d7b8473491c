"""Compares simulated runs of workers with any local optimizer with plain NumPy in float64.

The workers have different S, rounds are lost, workers leave and join. Each worker keeps the state
of AdamW between its rounds; after a lost round it starts anew. The servers are those of ordered
outer momentum (Algorithm 3) and of Ringmaster, which declines reports. With S = 1 and SGD, ordered
outer momentum must be OrMo-DA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proofs_check import reference
from proofs_check.checks.every_order import momentum_of
from proofs_check.checks.long_simulations import trace_of
from proofs_check.claims import Claims
from proofs_check.reference import BETA, CURVATURE, START, Timeline, gamma
from proofs_check.registry import Outcome, Size, Subject, holds

K, ALLOWED, LIMIT = 7, 1e-10, 4
UNEVEN = (4, 1, 3, 2, 5, 1, 2)
CLIP, DECAY, B1, B2, EPS = 1.0, 0.1, 0.9, 0.999, 1e-8
ADAMW = optax.chain(
    optax.clip_by_global_norm(CLIP),
    optax.scale_by_adam(B1, B2, EPS),
    optax.add_decayed_weights(DECAY),
)


class Moments(NamedTuple):
    """The state of AdamW."""

    steps: int
    first: np.ndarray
    second: np.ndarray


def adamw_round(
    w: np.ndarray, linear: np.ndarray, rate: float, state: Moments | None
) -> tuple[np.ndarray, Moments]:
    """Return Δ of S steps of AdamW on Σ (CURVATURE·w²/2 + linear_s·w), and the state after them."""
    start = w
    count, first, second = Moments(0, 0 * w, 0 * w) if state is None else state
    for c in linear:
        g = CURVATURE * w + c
        g = g * min(1.0, CLIP / np.sqrt(np.sum(g**2)))
        count += 1
        first, second = B1 * first + (1 - B1) * g, B2 * second + (1 - B2) * g**2
        mean, square = first / (1 - B1**count), second / (1 - B2**count)
        w = w - rate * (mean / (np.sqrt(square) + EPS) + DECAY * w)
    return start - w, Moments(count, first, second)


def sgd_step(w: np.ndarray, linear: np.ndarray, rate: float, state: Any) -> tuple[np.ndarray, None]:
    """Return Δ = γg of one gradient."""
    (c,) = linear
    return rate * (CURVATURE * w + c), None


class Ordered(reference.Server):
    """The server of Algorithm 3, with the weights of Eq. (6)."""

    def __init__(self, claims: Claims) -> None:
        """Start at w_0."""

        def rate(step: int, delay: int) -> float:
            numerator, denominator = claims.delay_adaptive(K, delay)
            return numerator / denominator

        super().__init__("local_ormo_da", K, claims, rate)

    def merge(self, worker: int, delta: np.ndarray) -> None:
        """Apply a worker's Δ."""
        self.receive(worker, delta, delta, self.model_state)


class Declining(reference.Server):
    """The server of Ringmaster, which declines a report with a delay of LIMIT or more."""

    def __init__(self, claims: Claims) -> None:
        """Start at w_0."""
        super().__init__("al_sgd", K, claims)
        self.accepted = 0
        self.sent: dict[int, int] = {}

    def dispatch(self, worker: int) -> reference.Sent:
        """Note the version that the worker is sent."""
        self.sent[worker] = self.accepted
        return super().dispatch(worker)

    def merge(self, worker: int, delta: np.ndarray) -> None:
        """Apply a worker's Δ unless it is too old."""
        self.held.pop(worker)
        self.step += 1
        if self.accepted - self.sent[worker] < LIMIT:
            self.params, self.accepted = self.params - delta, self.accepted + 1


RUNS: dict[str, tuple[str, dict[str, Any], Any, Any, tuple[int, ...]]] = {
    # the method, its hyperparameters, its server, the workers' round, S
    "AdamW, ordered outer momentum": (
        "ordered_outer_momentum", {"momentum": BETA}, Ordered, adamw_round, UNEVEN),
    "AdamW, Ringmaster": ("ringmaster", {"max_delay": LIMIT}, Declining, adamw_round, UNEVEN),
    "SGD, S = 1, ordered outer momentum": (
        "ordered_outer_momentum", {"momentum": BETA}, Ordered, sgd_step, (1,) * K),
}  # fmt: skip


def batch_fn(data_key, worker, round, num_steps):
    """Return batches [S, 2] that differ by data key, worker and round."""
    key = jax.random.fold_in(jax.random.fold_in(data_key, worker), round)
    return jax.random.normal(key, (num_steps, 2))


def _drawn(key: jax.Array, workers: Any, rounds: Any, steps: tuple[int, ...]) -> list[np.ndarray]:
    """Return the batches of each round."""
    data_key, _ = jax.random.split(key)
    found: dict[tuple[int, int], np.ndarray] = {}
    for worker, count in enumerate(steps):
        own = np.unique(np.asarray(rounds)[np.asarray(workers) == worker])
        if len(own):
            draw = jax.vmap(lambda r, k=worker, n=count: batch_fn(data_key, k, r, n))
            batches = np.asarray(draw(jnp.asarray(own)))
            found |= {(worker, int(r)): batch for r, batch in zip(own, batches, strict=True)}
    return [found[int(w), int(r)] for w, r in zip(workers, rounds, strict=True)]


def transcribed(server: Any, round_of: Any, timeline: Timeline, batches: list) -> Any:
    """Run the workers one step after the other; return the server at the end."""
    states: dict[int, Any] = {}
    for worker in set(range(K)) - timeline.absent:
        server.dispatch(worker)
    for step, worker in enumerate(timeline.workers):
        for kind, who in timeline.events[step]:
            if kind in ("redispatched", "joined"):
                server.dispatch(who)
            else:  # lost or left: the worker's next round starts anew
                states.pop(who, None)
                server.held.pop(who, None)
        task = server.held[worker]
        delta, states[worker] = round_of(
            task.params, batches[step], task.local_learning_rate, states.get(worker)
        )
        server.merge(worker, delta)
        server.dispatch(worker)
    return server


def run_error(subject: Subject, name: str, engine: str, num_steps: int, seed: int) -> float:
    """Return the difference of w (and u) from the transcription, relative to the larger values."""
    method_name, options, make_server, round_of, steps = RUNS[name]
    timeline = reference.timeline(K, num_steps, seed, density=0.1)
    trace, key = trace_of(timeline, False), jax.random.key(seed)
    optimizer = ADAMW if round_of is adamw_round else None
    method = subject.make_method(method_name, K, steps, local_optimizer=optimizer, **options)

    def loss_fn(params, model_state, batch, key):
        return jnp.sum(CURVATURE * params**2 / 2 + batch * params), (model_state, {})

    result = subject.simulate(
        method, loss_fn, batch_fn, jnp.asarray(START), trace=trace, key=key,
        local_learning_rate=gamma, engine=engine,
    )  # fmt: skip
    batches = _drawn(key, trace.workers, trace.rounds, steps)
    server = transcribed(make_server(subject.claims), round_of, timeline, batches)
    pairs = [(result.params, server.params)]
    if make_server is Ordered:
        pairs.append((momentum_of(result.rule_state), server.momentum))
    else:  # some reports must be declined
        pairs.append((np.sum(result.history.accepted), np.array(server.accepted)))
        if server.accepted == num_steps:
            raise ValueError(f"`num_steps` must give late reports, got num_steps={num_steps}")
    if result.status != "finished":
        return float("inf")
    errors = [np.abs(np.asarray(x) - y).max() / np.abs(y).max() for x, y in pairs]
    return float(np.max(errors))


@holds("kept-states", "ordered-outer-momentum", strength="property")
def kept_states(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare simulations with uneven S, kept states and lost rounds with NumPy."""
    found: dict[str, tuple[float, int, str]] = {}
    num_steps = max(size.long_steps // 8, 128)
    with jax.enable_x64(True):
        for name, (*_, round_of, _) in RUNS.items():
            statement = "kept-states" if round_of is adamw_round else "ordered-outer-momentum"
            for engine in ("eager", "compiled"):
                worst, count, note = found.get(statement, (0.0, 0, ""))
                error = run_error(subject, name, engine, num_steps, size.seed)
                if not error <= worst:
                    worst, note = (error if error == error else float("inf")), f"{name}, {engine}"
                found[statement] = worst, count + num_steps, note
    for statement, (worst, count, note) in found.items():
        note = f"at worst in {note}" if note else "no rounding"
        yield Outcome(statement, count, worst, ALLOWED, worst <= ALLOWED, note)
