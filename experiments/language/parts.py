"""Defines one run of the language experiment, and assembles its parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from experiments.checks import check
from experiments.comparison.clusters import (
    ALL_METHODS,
    DEFAULTS,
    Cluster,
    cluster_of_speeds,
    hyperparameters,
    named_cluster,
)
from experiments.language import text
from experiments.language.model import GPTConfig, Network, network, size_named
from experiments.language.optimizers import (
    LEARNING_RATES,
    Optimizer,
    clipped,
    optimizer,
    schedule,
)
from orlomo_jax import Method, RunStart, make_method

WITH_MOMENTUM = (
    *("orlomo", "prsgdm", "local_ormo_da", "nesterov", "delayed_nesterov", "momentum_lookahead"),
    *("heloco", "fedavgm", "slowmo", "diloco", "ordered_outer_momentum"),
    "delay_lookahead",
)
"""The methods whose server has a momentum."""
WITH_BUFFER = ("fedbuff", "delayed_nesterov", "rennala", "ca2fl", "fadas")
"""The methods whose server takes a step, or updates its momentum, once in several reports."""
MOMENTA = {"ordered_outer_momentum": 0.5}
"""The server's momentum, if it is not the method's default in the library."""


@dataclass(frozen=True)
class LanguageRun:
    """All settings of one run."""

    method: str = "delay_lookahead"
    """Any of the library's methods; orlomo and prsgdm run local momentum SGD."""
    learning_rate: float | None = None
    """The largest local learning rate γ; by default 0.64/width, or 6.4/width for momentum SGD."""
    server_learning_rate: float | None = None
    """The server's η; None is the method's default."""
    server_momentum: float | None = None
    """The server's momentum; None is 0.5 for ordered_outer_momentum, else the method's default."""
    buffer_size: int | None = None
    """Reports that the server collects before a step, if the method does; None is the default."""
    size: str = "0.1m"
    """The model: tiny, 0.1m, 1m, 10m or 35m, after its number of parameters."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model's computation; auto is bfloat16 on a GPU, else float32."""
    text: tuple[Path, ...] = ()
    """Files, and folders of text files; none is Python's standard library."""
    shards: text.Shards = "shared"
    """Each worker's text: all of it, equal parts, or parts of unequal size and kind."""
    workers: int | None = None
    """K; None is 4, or the number of workers of the cluster."""
    compute_times: str = "forgather_4to1"
    """equal, one_slow, deepmind_toy, forgather_4to1, halos_16 or sqrt_k: how fast workers are."""
    speeds: tuple[float, ...] = ()
    """Relative speeds of the workers, instead of compute_times."""
    variation: float | None = None
    """How much the seconds of a worker's rounds vary; None is the cluster's own."""
    local_steps: str = "32"
    """S, or dynamic:S, which gives slow workers fewer steps."""
    num_reports: int = 200
    """Length of the run in reports of the fastest worker; it is a budget of tokens."""
    batch_size: int = 8
    """Windows of text in one local step."""
    optimizer: Optimizer = "adamw"
    """The workers' optimizer; momentum is momentum SGD."""
    warmup: float = 0.05
    """Share of the run in which γ rises; then it falls to a tenth, along a cosine."""
    weight_decay: float = 0.1
    """Weight decay of the matrices (with orlomo and prsgdm: of all parameters)."""
    clip: float = 1.0
    """The largest norm of a local gradient; 0 does not clip."""
    keep_state: bool = True
    """Whether each worker keeps the state of its optimizer between rounds."""
    seed: int = 0
    """Seed of initialisation, batches and arrivals."""
    runtime: Literal["simulated", "threads", "ray"] = "simulated"
    """Simulated workers in virtual time, or real workers, slowed down like the cluster's."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings that are invalid in every run."""
        for names, valid, wanted in (
            ("num_reports batch_size", _is_count, "an integer ≥ 1"),
            ("workers buffer_size", lambda x: x is None or _is_count(x), "an integer ≥ 1"),
            ("seed", lambda x: x == 0 or _is_count(x), "an integer in [0, 2³¹)"),
            ("learning_rate server_learning_rate", _is_rate, "finite and ≥ 0"),
            ("weight_decay clip", _is_rate, "finite and ≥ 0"),
            ("server_momentum", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("warmup variation", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ):
            for name in names.split():
                if (value := getattr(self, name)) is not None:
                    check(name, value, valid, wanted)
        _check_choice("method", self.method, ALL_METHODS)
        _check_choice("optimizer", self.optimizer, LEARNING_RATES)
        _check_choice("runtime", self.runtime, ("simulated", "threads", "ray"))
        for name, value, valid in (
            ("server_momentum", self.server_momentum, self.method in WITH_MOMENTUM),
            ("server_learning_rate", self.server_learning_rate, self._rate is not None),
            ("buffer_size", self.buffer_size, self.method in WITH_BUFFER),
        ):
            if value is not None and not valid:
                raise ValueError(f"`{name}` must be None for {self.method}, got {name}={value!r}")

    @property
    def _rate(self) -> str | None:
        return DEFAULTS[self.method].rate

    @property
    def config(self) -> GPTConfig:
        """The model's shape."""
        return replace(size_named(self.size), dtype=self.dtype)

    @property
    def top_rate(self) -> float:
        """The largest γ."""
        if self.learning_rate is not None:
            return self.learning_rate
        own_sgd = self.method in ("orlomo", "prsgdm")
        return LEARNING_RATES["momentum" if own_sgd else self.optimizer] / self.config.width

    def cluster(self) -> Cluster:
        """Return the workers and their speeds; raise ValueError if ``workers`` is another K."""
        if self.speeds:
            cluster = cluster_of_speeds(self.speeds, self.variation)
        else:
            cluster = named_cluster(self.compute_times, self.workers or 4, self.variation)
        if self.workers not in (None, cluster.num_workers):
            raise ValueError(
                f"`workers` must be {cluster.num_workers} for the cluster {cluster.name!r}, got "
                f"workers={self.workers}"
            )
        return cluster

    def own_hyperparameters(self) -> dict[str, float]:
        """Return those numbers of the server's rule that one compiled program can vary."""
        if self.server_learning_rate is None or not DEFAULTS[self.method].traced:
            return {}
        return {str(self._rate): self.server_learning_rate}

    def make_method(self, cluster: Cluster) -> Method:
        """Return the method, with the default η if a compiled program can vary it."""
        K = cluster.num_workers
        chosen = hyperparameters(self.method, K, 1.0)
        if self.server_learning_rate is not None and not self.own_hyperparameters():
            chosen[str(self._rate)] = self.server_learning_rate
        momentum = self.server_momentum
        if momentum is None:
            momentum = MOMENTA.get(self.method)
        if momentum is not None:
            chosen["momentum"] = momentum
        if self.buffer_size is not None:
            chosen["buffer_size"] = self.buffer_size
        method = make_method(self.method, K, cluster.local_steps(self.local_steps), **chosen)
        if method.worker_momentum is not None:  # orlomo and prsgdm
            return method
        local = optimizer(self.optimizer, self.weight_decay, self.clip)
        return method.with_local_optimizer(local, keep_state=self.keep_state)


class Parts(NamedTuple):
    """A run that is ready to start, for ``simulate_many`` and ``train``.

    Attributes:
        method: The method; ``start.hyperparameters`` may replace its η.
        network: The model.
        loss_fn: The loss of the workers' steps.
        round_fn: The local round.
        batch_fn: The batch function.
        evaluate: The held-out loss in nats per byte.
        start: What the run has for itself in a sweep: parameters, arrivals, key, γ, η.
        tokens_per_step: Tokens in one local step.
    """

    method: Method
    network: Network
    loss_fn: Callable
    round_fn: Callable
    batch_fn: Callable
    evaluate: Callable
    start: RunStart
    tokens_per_step: int


def assemble(run: LanguageRun) -> Parts:
    """Return the parts of a run; runs that differ only in seed, γ and η can share a sweep.

    Raises:
        ValueError: If settings do not fit together, or a worker has too little text.
        FileNotFoundError: If a path of ``text`` does not exist.
    """
    config, cluster = run.config, run.cluster()
    method, model = run.make_method(cluster), network(config)
    options = {}
    if method.worker_momentum is not None:
        options = {"weight_decay": run.weight_decay, "gradient_transform": clipped(run.clip)}
    steps = method.steps_of_worker
    batch_fn = text.batches(
        run.text,
        run.shards,
        *(cluster.num_workers, method.num_local_steps, run.batch_size, config.context),
    )
    init_key, key = jax.random.split(jax.random.key(run.seed))
    arrivals = cluster.arrivals(method, run.num_reports * max(steps), run.seed)
    start = RunStart(
        model.init(init_key),
        arrivals,
        key,
        schedule(run.top_rate, run.warmup, arrivals.num_steps),
        {},  # the model state of a network without one
        run.own_hyperparameters(),
    )
    return Parts(
        method,
        model,
        model.loss_fn,
        method.local_round(model.loss_fn, **options),
        batch_fn,
        text.evaluation(run.text, config.context, model.loss_fn),
        start,
        run.batch_size * config.context,
    )


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {name}={value!r}")


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and 1 <= x < 2**31


def _is_rate(x: float) -> bool:
    return 0 <= x < math.inf
