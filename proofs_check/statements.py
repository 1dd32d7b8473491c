"""Defines a statement, and states the rules of the field and their identities."""

from __future__ import annotations

from typing import NamedTuple


class Statement(NamedTuple):
    """A statement of the paper, or one that the library adds.

    Attributes:
        title: The paper's name for it, if it has one.
        says: The statement in one line.
        cited: Regular expression that matches its citations in the library's source, for ``--map``.
    """

    title: str
    says: str
    cited: str


FIELD_STATEMENTS: dict[str, Statement] = {
    "fedasync": Statement("FedAsync", "w ← (1 − α_τ)w + α_τ·local", r"w ← \(1 − α_τ\) w"),
    "fedbuff": Statement("FedBuff", "w ← w − (η/B) Σ s(τ)Δ", r"w ← w − η D/B"),
    "nesterov": Statement(
        "Nesterov", "m ← μm + g; w ← w − η(g + μm)", r"w ← w − η\(g \+ μm\)"
    ),
    "delayed-nesterov": Statement(
        "Delayed Nesterov",
        "m ← μm + D/N once in N reports; w ← w − η(cμm + Δ/N)",
        r"w ← w − η\[",
    ),
    "momentum-lookahead": Statement(
        "MLA", "m ← μm + (1−μ)G; w ← w − η(G + μm)", r"w ← w − η\(G \+ μm\), with the new m"
    ),
    "heloco": Statement("HeLoCo", "MLA with Δ turned towards m; w − ημm is sent", r"G = ρΔ̂"),
    "delay-lookahead": Statement(
        "Delay look-ahead", "m ← ρm + η(1−ρ)/(K(1−μ))Δ; w ← w − m; w − hKm is sent",
        r"m ← ρm \+ η \(1−ρ\)/\(K\(1−μ\)\) Δw",
    ),
    "ordered-momentum-rate": Statement(
        "Ordered momentum, rate",
        "if Δ is linear, momentum in the order of dispatch is as fast as the best look-ahead",
        r"as fast as the best look-ahead",
    ),
    "delay-lookahead-rate": Statement(
        "Delay look-ahead, rate",
        "if Δ is linear, momentum helps only with look-ahead, then it divides the time by 3",
        r"converge faster than μ = 0",
    ),
    "ringmaster": Statement(
        "Ringmaster ASGD", "w ← w − ηΔ if the delay in accepted reports is below R",
        r"w ← w − ηΔ if the delay is below R",
    ),
    "rennala": Statement(
        "Rennala SGD", "w ← w − η·mean of B reports on the newest w", r"w ← w − \(η/B\) Σ Δ"
    ),
    "rescaled-asgd": Statement(
        "Rescaled ASGD", "w ← w − η(τ + 1)/K²·Δ", r"w ← w − η \(τ \+ 1\)/K²"
    ),
    "ca2fl": Statement("CA2FL", "w ← w − η(D/B + h̄)", r"w ← w − η\(D/B \+ h̄\)"),
    "fadas": Statement("FADAS", "AMSGrad on the mean of B reports", r"w ← w − η_t m/\(√v̂ \+ ε\)"),
    "local-sgd": Statement("Local SGD", "w ← w − η·mean Δ", r"w ← w − \(η/K\) Σ_k"),
    "fedavgm": Statement("FedAvgM", "m ← μm + mean Δ; w ← w − ηm", r"w ← w − ηm\b"),
    "slowmo": Statement("SlowMo", "u ← μu + mean Δ/γ; w ← w − αγu", r"w ← w − αγu"),
    "diloco": Statement(
        "DiLoCo", "Nesterov's step on mean Δ", r"w ← w − η\(Δ̄ \+ μm\)"
    ),
    "delayed-nesterov-mean": Statement(
        "Delayed Nesterov, c = 0", "N reports move w as one Nesterov step on their mean",
        r"N reports move w exactly as one Nesterov step",
    ),
    "fedbuff-of-one": Statement(
        "FedBuff, B = 1", "is AL-SGD with the same weight", r"B = 1, versions are reports"
    ),
    "ringmaster-without-limit": Statement(
        "Ringmaster, R = ∞", "is asynchronous SGD", r"None is no limit \(plain ASGD\)"
    ),
    "look-ahead-without-momentum": Statement(
        "MLA, μ = 0", "is AL-SGD with the constant weight ρ", r"def momentum_lookahead\("
    ),
    "ca2fl-of-equals": Statement(
        "CA2FL, equal reports", "w ← w − ηΔ once all workers have reported", r"def ca2fl\("
    ),
    "diloco-without-momentum": Statement(
        "DiLoCo, μ = 0, η = 1", "is local SGD", r"def (diloco|local_sgd)\("
    ),
    "one-worker": Statement(
        "K = S = 1", "each rule is its sequential optimizer",
        r"def (fedasync|fedbuff|(delayed_)?nesterov|(momentum|delay)_lookahead|ringmaster|rennala"
        r"|rescaled_asgd|ca2fl|fadas|local_sgd|fedavgm|slowmo|diloco)\(",
    ),
    "ordered-outer-momentum": Statement(
        "Ordered outer momentum", "with S = 1 and SGD it is OrMo-DA",
        r"Local OrMo-DA \(Algorithm 3\) on the changes",
    ),
    "rescaled-weights": Statement(
        "Rescaled weight", "mean(τ + 1) = t_k Σ_j 1/t_j at fixed times t_k", r"mean\(τ \+ 1\) = t_k"
    ),
    "kept-states": Statement(
        "Worker, kept states",
        "AdamW continues across rounds, and starts anew after a lost one",
        r"kept state starts anew",
    ),
}  # fmt: skip
