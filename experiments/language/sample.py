"""Draws text from a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.language.model import Network
from orlomo_jax import Callback, StepRecord


def sample(
    network: Network,
    context: int,
    params: Any,
    prompt: bytes,
    length: int,
    key: jax.Array,
    temperature: float = 0.8,
) -> bytes:
    """Return ``length`` bytes that continue a prompt.

    Args:
        network: The model.
        context: The number of bytes that it sees; of a longer text it sees the end.
        params: Its parameters.
        prompt: One byte or more.
        length: The number of new bytes, ≥ 1.
        key: A ``jax.random.key``.
        temperature: Divides the logits, > 0; a lower one gives more likely bytes.

    Raises:
        ValueError: If the prompt is empty, ``length`` < 1 or ``temperature`` ≤ 0.
    """
    if not prompt or length < 1 or not temperature > 0:
        raise ValueError(
            "`prompt` must not be empty, `length` ≥ 1 and `temperature` > 0, got "
            f"{prompt=}, {length=}, {temperature=}"
        )
    buffer = np.zeros(max(len(prompt) + length, context), np.uint8)
    buffer[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    program = _program(network.logits, context, length)
    drawn = program(params, buffer, len(prompt), key, temperature)
    return np.asarray(drawn)[len(prompt) : len(prompt) + length].tobytes()


@lru_cache(maxsize=16)
def _program(logits_fn: Callable, context: int, length: int) -> Callable:
    """Return the loop over new bytes as one compiled program."""

    @jax.jit
    def run(params, buffer, prompt_length, key, temperature):
        def draw(index, buffer):
            end = prompt_length + index
            begin = jnp.maximum(0, end - context)
            # The zeros after ``end`` do not matter: attention is causal.
            window = jax.lax.dynamic_slice(buffer, (begin,), (context,))
            logits = logits_fn(params, window[None])[0, end - begin - 1]
            byte = jax.random.categorical(jax.random.fold_in(key, index), logits / temperature)
            return buffer.at[end].set(byte.astype(buffer.dtype))

        return jax.lax.fori_loop(0, length, draw, jnp.asarray(buffer))

    return run


class Samples(Callback):
    """Evaluates the parameters and draws a text from them; shows it after each evaluation.

    It is both the ``evaluate`` of a run, which gets the parameters, and a callback, which knows the
    step.

    Args:
        evaluate: The evaluation of the run.
        draw: ``draw(params) -> bytes``.
        show: Called with the step, the evaluation and the text.
    """

    def __init__(
        self,
        evaluate: Callable[[Any, Any], dict[str, Any]],
        draw: Callable[[Any], bytes],
        show: Callable[[int, dict[str, float], str], Any],
    ) -> None:
        """Keep the functions."""
        self._evaluate, self._draw, self._show = evaluate, draw, show
        self._text = ""

    def evaluate(self, params: Any, model_state: Any) -> dict[str, Any]:
        """Return the evaluation, and keep a text from the same parameters."""
        self._text = printable(self._draw(params))
        return self._evaluate(params, model_state)

    def on_step(self, record: StepRecord) -> None:
        """Show the text of an evaluation."""
        if record.evaluation is not None:
            self._show(record.step, record.evaluation, self._text)


def drawing(
    network: Network, context: int, prompt: bytes, length: int, temperature: float, seed: int
) -> Callable[[Any], bytes]:
    """Return ``draw(params) -> bytes``; every call uses the same random numbers."""
    key = jax.random.key(seed)
    options = {"prompt": prompt, "length": length, "key": key, "temperature": temperature}
    return partial(lambda params, **rest: sample(network, context, params, **rest), **options)


def printable(content: bytes) -> str:
    r"""Return bytes as text for a terminal; bytes that are not text become ``·``.

    Example:
        >>> printable(b"a\n\tb\x1b[2J\xff")
        'a\n\tb·[2J·'
    """
    decoded = content.decode("utf-8", errors="replace").replace("�", "·")
    return "".join(x if x.isprintable() or x in "\n\t" else "·" for x in decoded)
