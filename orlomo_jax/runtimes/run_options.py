"""Defines the checked arguments of a real run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from orlomo_jax.runtimes.membership import Membership
from orlomo_jax.server.reports import Report


class RunOptions(NamedTuple):
    """The arguments of :func:`~orlomo_jax.train` that its loop needs, checked."""

    membership: Membership
    round_timeout: float
    start_timeout: float
    max_failures: int
    fault_injector: Callable[[Report], Iterable[Report]] | None
