"""Implements a parameter server and its workers in NumPy, from the paper, as the reference.

It does not use the library's code, only the formulas of :class:`~proofs_check.claims.Claims`. The
long runs are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from proofs_check.claims import PAPER, Claims

BETA = 0.9
WEIGHT_DECAY = 0.25
CURVATURE = np.array([0.5, 0.25])
START, START_STATE = np.array([1.0, -2.0]), np.array([0.5])


def gamma(step):
    """Return γ at a step; it differs at each step."""
    return 0.01 / (1 + step * 2.0**-9)


def global_rate(step):
    """Return the global learning rate; it differs between consecutive steps."""
    return 0.5 + (7 * step % 16) * 2.0**-5


def delay_weight(delay):
    """Return the factor for a delay; it differs for each delay."""
    return 1 / (1 + delay * 2.0**-3)


class Sent(NamedTuple):
    """The task that a worker must receive; it has the fields of :class:`orlomo_jax.Task`."""

    worker: int
    round: int
    dispatched_at: int
    params: np.ndarray
    model_state: np.ndarray
    momentum: np.ndarray | None
    local_learning_rate: float


class Server:
    """A parameter server for two parameters and a model state of one number.

    Args:
        name: One of :data:`orlomo_jax.METHOD_NAMES`.
        num_workers: K.
        claims: The printed algorithms.
        rate: ``rate(step, delay)`` is η_t.

    Attributes:
        step: The number of reports applied.
        params: w_t.
        momentum: u_t; 0 for AL-SGD.
        model_state: The merged model state.
        held: The task of each busy worker.
    """

    def __init__(
        self,
        name: str,
        num_workers: int,
        claims: Claims = PAPER,
        rate: Callable[[int, int], float] = lambda step, delay: (
            global_rate(step) * delay_weight(delay)
        ),
    ) -> None:
        """Start with every worker idle."""
        self.synchronous, self.num_workers = name == "prsgdm", num_workers
        self._rate, self._group, self._opens = rate, claims.group, claims.opens
        self._algorithm = {
            "al_sgd": claims.algorithm_1,
            "orlomo": claims.algorithm_2,
            "local_ormo_da": claims.algorithm_3,
        }.get(name)
        self.step = 0
        self.params, self.momentum, self.model_state = START, 0 * START, START_STATE
        self.held: dict[int, Sent] = {}
        self._dispatches = [0] * num_workers
        self._waiting: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def reported(self) -> set[int]:
        """The set of workers that wait at the barrier."""
        return {worker for worker, *_ in self._waiting}

    def dispatch(self, worker: int) -> Sent:
        """Send the newest parameters, or in a synchronous round those of the round's start."""
        version = self.step - len(self._waiting)
        momentum = self.momentum if self.synchronous else None
        self.held[worker] = Sent(
            worker, self._dispatches[worker], version, self.params, self.model_state, momentum,
            gamma(version),
        )  # fmt: skip
        self._dispatches[worker] += 1
        return self.held[worker]

    def release(self, worker: int) -> Sent:
        """Remove a worker's task and return it."""
        return self.held.pop(worker)

    def receive(
        self, worker: int, du: np.ndarray, dw: np.ndarray, end: np.ndarray
    ) -> tuple[int, ...]:
        """Apply a report and return the workers that wait for a task."""
        at = self.held.pop(worker).dispatched_at
        if self._algorithm is None:
            return self._receive_at_barrier(worker, du, dw, end)
        step, rate = self.step, self._rate(self.step, self.step - at)
        late = self._group(step, self.num_workers) - self._group(at, self.num_workers)
        opens = int(step > 0 and self._opens(step, self.num_workers))
        power = BETA**late
        past = BETA * (1 - power) / (1 - BETA)
        of = self._algorithm(BETA, opens, power, past, rate)
        given = np.stack([self.momentum, du, dw])
        self.params = self.params + np.array(of.w, float) @ given
        self.momentum = np.array(of.u, float) @ given
        self.model_state = self.model_state + rate * (end - self.model_state)
        self.step += 1
        return (worker,)

    def _receive_at_barrier(self, *report) -> tuple[int, ...]:
        self._waiting.append(report)
        self.step += 1
        if len(self._waiting) < self.num_workers:
            return ()
        _, du, dw, ends = zip(*self._waiting, strict=True)
        self.momentum, self.model_state = np.mean(du, 0), np.mean(ends, 0)
        self.params = self.params - np.mean(dw, 0)
        self._waiting = []
        return tuple(range(self.num_workers))


class Round(NamedTuple):
    """The result of a local round."""

    du: np.ndarray
    dw: np.ndarray
    model_state: np.ndarray
    loss: float


def local_round(task: Sent, linear: np.ndarray, beta: float | None) -> Round:
    """Run S steps on Σ (CURVATURE·w²/2 + linear_s·w); weight decay replaces g by g + λw̃.

    Args:
        task: Gives the start.
        linear: Batches plus noise, float[S, 2].
        beta: β; None is plain SGD.
    """
    w, state, losses = task.params, task.model_state, []
    u = 0 * w if task.momentum is None else task.momentum
    for c in linear:
        losses.append(float(np.sum(CURVATURE * w**2 / 2 + c * w)))
        state = 0.75 * state + 0.25 * w.sum()
        gradient = CURVATURE * w + c + WEIGHT_DECAY * w
        u = (0.0 if beta is None else beta) * u + task.local_learning_rate * gradient
        w = w - u
    return Round(u, task.params - w, state, float(np.mean(losses)))


EVENTS = ("lost", "redispatched", "left", "joined")


class Timeline(NamedTuple):
    """The worker that reports at each step, and the (kind, worker) events before it.

    ``absent`` are the workers that are absent at the start.
    """

    num_workers: int
    workers: list[int]
    events: list[list[tuple[str, int]]]
    absent: set[int]


def timeline(
    num_workers: int, num_steps: int, seed: int, *, synchronous: bool = False, density: float = 1.0
) -> Timeline:
    """Draw arrivals and events; density 1 gives every kind of event before every step.

    Unless synchronous, worker 0 reports about once in 200 steps and is never lost. This gives long
    delays.

    Args:
        num_workers: K; at least 6 unless synchronous.
        num_steps: T.
        seed: Seed of the draws.
        synchronous: Whether there is a barrier; if so, no worker leaves or joins.
        density: The probability of each kind of event at each step.
    """
    draws = np.random.default_rng(seed)
    everybody = set(range(num_workers))
    absent = set() if synchronous else {num_workers - 2, num_workers - 1}
    busy, idle = everybody - absent, set()
    late, arrived = set(absent), set()
    workers, events = [], []

    def pick(among):
        return sorted(among)[draws.integers(len(among))]

    def happen(kind: str) -> bool:
        losable = busy if synchronous else busy - {0}
        among = {"lost": losable, "redispatched": idle, "joined": absent, "left": losable}[kind]
        if kind == "left" and len(idle) > 2:
            among = losable | idle
        if not among or (kind == "left" and len(busy) < 3):
            return False
        worker = pick(among)
        for group in (busy, idle, absent):
            group.discard(worker)
        {"lost": idle, "left": absent}.get(kind, busy).add(worker)
        events[-1].append((kind, worker))
        return True

    for step in range(num_steps):
        events.append([])
        kinds = EVENTS[:2] if synchronous else EVENTS
        kinds = [k for k in draws.permutation(kinds).tolist() if draws.random() < density]
        if step < 2 and not synchronous:
            kinds.insert(0, "lost")  # from then on two workers are idle
        for kind in [kind for kind in kinds if not happen(kind)]:
            happen(kind)
        if not (busy if synchronous else busy - {0}):
            happen("redispatched")
        slow = not synchronous and 0 in busy and draws.random() < 1 / 200
        worker = 0 if slow else pick(busy if synchronous else busy - {0})
        workers.append(worker)
        if synchronous:
            busy.remove(worker)
            arrived.add(worker)
            if arrived == everybody:
                busy, arrived = set(everybody), set()
    return Timeline(num_workers, workers, events, late)
