"""Memory is written over only once nobody can see it any more, however they came to see it."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import LocalUpdate, ParameterServer, Report, make_method
from orlomo_jax.server.buffer_pool import LARGE, BufferPool
from orlomo_jax.server.parameter_server import ServerState, TaskId
from orlomo_jax.server.step import server_step
from orlomo_jax.worker.workload import RoundInput

SIZE = LARGE // 4
METHOD = make_method("orlomo", 2, 1)


def make_server(params=None):
    params = {"w": jnp.arange(SIZE, dtype=jnp.float32)} if params is None else params
    return ParameterServer(METHOD, params, local_learning_rate=0.1)


def step(server, worker=0):
    """Receive a report of worker's task, and dispatch to it again."""
    task = server.held(worker) or server.dispatch(worker)
    ones = jax.tree.map(jnp.ones_like, task.start.params)
    report, task = Report(task.id, LocalUpdate(ones, ones), finite=True), None
    server.receive(report)
    return server.dispatch(worker)


def address(tree):
    return jax.tree.leaves(tree)[0].unsafe_buffer_pointer()


def test_dead_versions_are_written_over():
    """The memory of a run is that of a few versions, whatever its length."""
    server = make_server()
    server.dispatch(1)  # holds w_0 for ever
    addresses = {address(step(server).start.params) for _ in range(20)}
    assert len(addresses) <= 5


WAYS = {
    "the array": lambda x: x,
    "an alias on its device": lambda x: jax.device_put(x, x.device),
    "a shard": lambda x: x.addressable_data(0),
    "a shard's alias": lambda x: jax.device_put(x.addressable_shards[0].data, x.device),
    "through jit": jax.jit(lambda x: x),
    "NumPy": np.asarray,
    "a slice of NumPy": lambda x: np.asarray(x)[3:],
    "a memory view": lambda x: memoryview(np.asarray(x)),
    "what NumPy's array is made of": lambda x: np.asarray(x).base,
    "a slice of that": lambda x: memoryview(np.asarray(x).base)[4:],
    "DLPack": jnp.from_dlpack,
    "DLPack of NumPy": np.from_dlpack,
    "device_get": jax.device_get,
}


@pytest.mark.slow
@pytest.mark.parametrize("see", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("source", ["task", "server"])
def test_what_somebody_sees_is_never_written_over(see, source):
    server = make_server()
    server.dispatch(1)
    seen = []
    for _ in range(6):
        task = step(server)
        view = see(task.start.params["w"] if source == "task" else server.params["w"])
        seen.append((view, np.array(task.start.params["w"]).tobytes()))
        del task
    for _ in range(6):
        step(server)
    gc.collect()
    for view, copy in seen:
        got = np.asarray(view).tobytes() if not isinstance(view, memoryview) else view.tobytes()
        assert got == copy[len(copy) - len(got) :]


def test_threads_that_let_go_at_any_time():
    server = make_server()
    server.dispatch(1)
    seen, wrong, done = [], [], threading.Event()

    def reader():
        while not done.is_set():
            params = server.params["w"]
            alias = jax.device_put(params, params.device)
            before = np.array(alias)
            del params
            seen.append(1)
            if not np.array_equal(np.asarray(alias), before):
                wrong.append(before)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    [thread.start() for thread in threads]
    while len(seen) < 60:
        step(server)
    done.set()
    [thread.join() for thread in threads]
    assert not wrong


def test_whose_memory_it_was_may_donate_what_it_was_lent():
    """A worker that donates its task's parameters gets a copy, and the server keeps its own."""
    server = make_server()
    task = step(server)
    before = np.array(task.start.params["w"])
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(task.start.params["w"])
    np.testing.assert_array_equal(doubled, 2 * before)
    np.testing.assert_array_equal(server.view().params["w"], before)


def test_values_are_those_of_a_server_that_allocates(monkeypatch):
    params = {"w": jnp.arange(SIZE, dtype=jnp.float32), "b": jnp.ones(3), "h": jnp.ones(SIZE)}
    recycling, plain = make_server(params), make_server(params)
    monkeypatch.setattr(plain._buffers, "acquire", list)
    for server in (recycling, plain):
        for worker in (0, 1, 0, 0, 1, 0, 0, 0, 1, 1):
            step(server, worker)
    for left, right in zip(*map(jax.tree.leaves, (recycling.params, plain.params)), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_lent_arrays_are_like_the_owners(dtype):
    device = jax.devices()[1]
    for mine in (jnp.ones((2, LARGE), dtype), jax.device_put(jnp.ones((2, LARGE), dtype), device)):
        lent = BufferPool(mine).share(mine)
        assert lent is not mine
        assert address(lent) == address(mine)
        assert (lent.aval, lent.sharding, lent.committed) == (
            mine.aval,
            mine.sharding,
            mine.committed,
        )


def test_small_and_sharded_leaves_are_lent_as_they_are():
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = [jnp.ones(3), jax.device_put(jnp.ones(2 * SIZE), sharding)]
    buffers = BufferPool(tree)
    lent = buffers.share(tree)
    assert [a is b for a, b in zip(lent, tree, strict=True)] == [True, True]
    buffers.retire(tree)
    del lent
    assert buffers.acquire() == []


@pytest.mark.parametrize("leaves", [1, 4])
def test_scratch_needs_no_other_memory(leaves):
    """Its buffers become the new parameters; nothing of their size is allocated beside them."""
    tree = [jnp.ones(SIZE // leaves) for _ in range(leaves)]
    run = server_step(METHOD, False, True)
    state = METHOD.rule.init(tree)
    rest = ServerState(None, None, None, None, jnp.float32(0.1))
    report = Report(TaskId(*np.zeros(3, np.int32)), LocalUpdate(tree, tree))
    start = RoundInput(None, None, None, jnp.float32(0.1))
    args = (tree, tree, state, rest, report, start, np.int32(3), None)
    memory = run.lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 4 * SIZE
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000
    assert memory.temp_size_in_bytes < SIZE


def test_a_server_put_back_keeps_what_is_held():
    """Loans of before are no loans of the restored arrays."""
    server = make_server()
    step(server)
    snapshot = server.snapshot()
    step(server)
    server.restore(*snapshot)
    held = server.dispatch(1)
    before = np.array(held.start.params["w"])
    for _ in range(3):
        step(server)
    np.testing.assert_array_equal(held.start.params["w"], before)
