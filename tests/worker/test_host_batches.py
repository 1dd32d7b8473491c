"""Batches made on the host: the same ones on every engine and runtime, and after a resumption."""

import itertools
import pickle
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import Checkpointer, Compiled, HostBatches, RayWorkers, ThreadWorkers, simulate
from orlomo_jax.runtimes import WorkersLostError
from tests.support import helpers
from tests.support.real_runs import Killed, Unreliable, assert_replays, killed_at, run
from tests.support.toy import PARAMS, STATE, K, S, loss_fn, method_of, schedule, trace_of

ROUNDS = 60


def table():
    """The batches of every worker and round, float32[K, ROUNDS, S, 4, 3]."""
    return np.random.default_rng(0).normal(size=(K, ROUNDS, S, 4, 3)).astype(np.float32)


def from_memmap(folder):
    path = folder / "examples.npy"
    np.save(path, table())

    def make(worker, first_round):
        rows = np.load(path, mmap_mode="r")
        yield from rows[worker, first_round:]

    return make


def from_grain(folder):
    rows = table()[:, :5].reshape(K, -1, 3)  # an epoch of 5 rounds

    def make(worker, first_round):
        dataset = grain.MapDataset.source(rows[worker]).seed(worker).shuffle().repeat()
        once = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)  # HostBatches reads ahead
        batches = iter(dataset.batch(4).batch(S).to_iter_dataset(once))
        batches.set_state({"next_index": first_round})
        return batches

    return make


makers = pytest.mark.parametrize("maker", [from_memmap, from_grain])


def simulated(batch_fn, trace=None, name="orlomo", **options):
    arguments = {"key": jax.random.key(0), "model_state": STATE, "local_learning_rate": schedule}
    arguments |= {"trace": trace_of(name, 30) if trace is None else trace} | options
    return simulate(method_of(name), loss_fn, batch_fn, PARAMS, **arguments)


def from_table(key, worker, round):
    """The same batches as from_memmap, for a program."""
    return jnp.asarray(table())[worker, round]


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("orlomo", from_memmap),
        pytest.param("prsgdm", from_memmap, marks=pytest.mark.slow),
        ("orlomo", from_grain),
    ],
)
def test_threads_train_as_the_eager_simulator(name, maker, tmp_path):
    make = maker(tmp_path)
    result = run(name, ThreadWorkers(slowdowns=[1, 1, 3]), batch_fn=HostBatches(make))
    assert_replays(result, name, HostBatches(make, prefetch=0))


@pytest.mark.slow
@makers
def test_ray_trains_as_the_eager_simulator(maker, tmp_path):
    make = maker(tmp_path)
    result = run("orlomo", RayWorkers(), batch_fn=HostBatches(make))
    assert_replays(result, "orlomo", HostBatches(make))


def test_batches_are_those_of_a_traced_function(tmp_path):
    mine, traced = simulated(HostBatches(from_memmap(tmp_path))), simulated(from_table)
    helpers.assert_trees_close(mine.params, traced.params, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine.history.loss, traced.history.loss, rtol=1e-4)


@pytest.mark.slow
@makers
def test_a_killed_run_resumes_with_the_same_batches(maker, tmp_path):
    make = maker(tmp_path)
    with pytest.raises(Killed):
        run(
            batch_fn=HostBatches(make),
            checkpoint=Checkpointer(tmp_path / "run", every=4),
            callbacks=[killed_at(14)],
        )
    result = run(batch_fn=HostBatches(make), checkpoint=Checkpointer(tmp_path / "run", every=4))
    assert_replays(result, "orlomo", HostBatches(make))
    assert len(result.history.step) == 30


def test_a_killed_simulation_resumes_with_the_same_batches(tmp_path):
    make = from_memmap(tmp_path)
    unbroken = simulated(HostBatches(make))
    with pytest.raises(Killed):
        simulated(
            HostBatches(make),
            checkpoint=Checkpointer(tmp_path / "run", every=4),
            callbacks=[killed_at(14)],
        )
    resumed = simulated(HostBatches(make), checkpoint=Checkpointer(tmp_path / "run", every=4))
    helpers.assert_trees_equal(resumed.params, unbroken.params)
    np.testing.assert_array_equal(resumed.history.loss, unbroken.history.loss)


def test_a_lost_round_uses_up_its_batch(tmp_path):
    make = from_memmap(tmp_path)
    workers = Unreliable(failing={(1, 1), (2, 0)}, failing_first=True)
    result = run(workers=workers, batch_fn=HostBatches(make))
    trace = result.trace
    assert [event.kind for event in trace.events].count("lost") == 2
    for worker, lost in ((1, 1), (2, 0)):
        rounds = trace.rounds[trace.workers == worker].tolist()
        assert rounds == [r for r in range(len(rounds) + 1) if r != lost]
    assert_replays(result, "orlomo", HostBatches(make))
    traced = simulated(from_table, trace)
    helpers.assert_trees_close(result.params, traced.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["compiled", Compiled(rounds="vmap")])
def test_a_compiled_run_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="a compiled segment cannot call Python"):
        simulated(HostBatches(from_memmap(tmp_path)), engine=engine)


def ending(worker, first_round):
    return iter(table()[worker, first_round : 3 if worker == 1 else ROUNDS])


def test_an_iterator_that_ends_is_named():
    with pytest.raises(ValueError, match=r"yield a batch for every round.*worker 1's round 3"):
        simulated(HostBatches(ending))


def test_an_iterator_that_ends_is_named_by_threads():
    def all_end(worker, first_round):
        return iter(table()[worker, first_round:3])

    with pytest.raises(WorkersLostError, match=r"every round.*ends before worker \d's round \d"):
        run(batch_fn=HostBatches(all_end), max_failures=1)


def test_what_make_raises_is_its_own():
    def make(worker, first_round):
        raise KeyError("examples")

    with pytest.raises(KeyError, match="examples"):
        simulated(HostBatches(make))


class Noting:
    """Iterators over (worker, round), which note what is read of them."""

    def __init__(self):
        self.made, self.read = [], []

    def __call__(self, worker, first_round):
        self.made.append((worker, first_round))
        for round in itertools.count(first_round):
            self.read.append((worker, round))
            yield worker, round


def test_rounds_are_read_once_in_order_and_ahead():
    notes = Noting()
    batches = HostBatches(notes, prefetch=0)
    assert [batches(0, r) for r in (0, 0, 1, 2, 2)] == [(0, r) for r in (0, 0, 1, 2, 2)]
    assert (notes.made, notes.read) == ([(0, 0)], [(0, 0), (0, 1), (0, 2)])
    assert batches(1, 7) == (1, 7)
    assert batches(0, 1) == (0, 1)  # a step back
    assert notes.made == [(0, 0), (1, 7), (0, 1)]


def test_batches_are_read_ahead():
    ahead = threading.Event()

    def make(worker, first_round):
        for round in itertools.count(first_round):
            if round == 2:
                ahead.set()
            yield round

    assert HostBatches(make, prefetch=2)(0, 0) == 0
    assert ahead.wait(30), "round 2 is read while round 0 is computed"


def test_iterators_stay_at_home():
    batches = HostBatches(ending, prefetch=1)
    batches(0, 0)
    again = pickle.loads(pickle.dumps(batches))
    assert (again.make, again.prefetch) == (ending, 1)
    np.testing.assert_array_equal(again(0, 1), batches(0, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, r"`make` must be a function of \(worker, first_round\), got 3"),
        ((ending, -1), ValueError, "`prefetch` must be ≥ 0, got prefetch=-1"),
        ((ending, 1.5), TypeError, "prefetch=1.5"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        HostBatches(*arguments)


def test_the_threads_that_read_ahead_end_with_the_run():
    def readers():
        return [x for x in threading.enumerate() if x.name.startswith("orlomo batches")]

    before = set(readers())
    batches = HostBatches.of(lambda worker, round: np.ones((S, 4, 3), np.float32))
    batches(0, 0)
    assert set(readers()) - before, "one reads ahead"
    batches.close()
    for reader in set(readers()) - before:
        reader.join(5)
    assert not set(readers()) - before
    assert batches(0, 1).shape == (S, 4, 3), "and starts anew"
