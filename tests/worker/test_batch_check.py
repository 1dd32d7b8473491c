"""A batch function that gives another batch each time it is called is refused, not repeated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax.worker.batch_check import check_batch_fn
from tests.simulation.test_ends import runs

KEY = jax.random.key(0)
TABLE, HOST_TABLE = jnp.arange(12.0).reshape(4, 3), np.ones((4, 3), np.float32)


def loader():
    for index in itertools.count():
        yield np.full((2, 3), index, np.float32)


def stateful():
    """Yield the name and a maker of each function that is refused."""

    def from_loader():
        batches = loader()
        return lambda key, worker, round: next(batches)

    def compiled():
        return jax.jit(from_loader())

    def converted():
        batches = loader()
        return lambda key, worker, round: jnp.asarray(next(batches)) / 255 + worker

    def scalar():
        count = itertools.count()
        return lambda key, worker, round: jnp.full((2, 3), float(next(count)))

    def numpy_random():
        rng = np.random.default_rng(0)
        return lambda key, worker, round: TABLE[rng.permutation(4)[:2]]

    def growing():
        count = itertools.count(1)
        return lambda key, worker, round: {"x": np.ones((next(count), 3), np.float32)}

    def partial():
        return jax.tree_util.Partial(lambda start, *rest: start + from_batches(*rest), jnp.ones(3))

    from_batches = from_loader()
    yield from (from_loader, compiled, converted, scalar, numpy_random, growing, partial)


@pytest.mark.parametrize("make", list(stateful()), ids=lambda make: make.__name__)
def test_a_function_that_changes_is_refused(make):
    with pytest.raises(TypeError, match=r"traced once.*HostBatches.*different batches"):
        check_batch_fn(make(), KEY)


def test_a_loader_at_its_end_is_refused():
    batches = iter([np.ones((2, 3))])
    with pytest.raises(TypeError, match=r"traced once.*It raised StopIteration"):
        check_batch_fn(lambda key, worker, round: next(batches), KEY)


@pytest.mark.parametrize(
    "batch_fn",
    [
        lambda key, worker, round: jnp.ones((2, 3)),
        lambda key, worker, round: HOST_TABLE,
        lambda key, worker, round: (TABLE[worker], jnp.asarray(HOST_TABLE)[round], jnp.nan),
        lambda key, worker, round: jax.random.normal(jax.random.key(3), (2, 3)) + worker,
        jax.jit(lambda key, worker, round: jax.random.normal(key, (2, 3))),
        jax.tree_util.Partial(lambda table, key, worker, round: table[worker], TABLE),
        lambda key, worker, round: jax.pure_callback(
            lambda w: np.full((2, 3), w, np.float32), jax.ShapeDtypeStruct((2, 3), float), worker
        ),
    ],
)
def test_functions_of_their_arguments_pass(batch_fn):
    with jax.enable_x64(True):
        check_batch_fn(batch_fn, KEY)


def test_a_function_that_keeps_what_it_computed_at_first_passes():
    kept = []

    def batch_fn(key, worker, round):
        if kept:
            return jnp.asarray(kept[0])[worker] + 1
        kept.append(np.ones((4, 2, 3)))
        return jnp.ones((2, 3))

    check_batch_fn(batch_fn, KEY)


@pytest.mark.parametrize(
    ("batch_fn", "steps", "message"),
    [
        (lambda key, worker, round: TABLE, 2, r"\(key, worker, round, num_local_steps\), .* one"),
        (
            lambda key, worker, round, steps: TABLE,
            None,
            r"\(key, worker, round\), .* is one num",
        ),
        (lambda: TABLE, None, "too many positional arguments"),
    ],
)
def test_a_function_of_other_arguments_is_refused(batch_fn, steps, message):
    for function in (batch_fn, jax.jit(batch_fn), jax.tree_util.Partial(batch_fn)):
        with pytest.raises(TypeError, match=f"`batch_fn` must take .*{message}"):
            check_batch_fn(function, KEY, steps)


def test_what_a_function_raises_is_its_own():
    def slip(key, worker, round):
        raise KeyError("images")

    with pytest.raises(KeyError, match="images"):
        check_batch_fn(slip, KEY)


@runs
def test_all_runs_refuse_a_loader(run):
    batches = loader()
    with pytest.raises(TypeError, match="`batch_fn` must be a function of its arguments alone"):
        run(batch_fn=lambda key, worker, round: next(batches))
