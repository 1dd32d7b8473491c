"""What XLA makes of a run for a GPU, read from the compiled program.

No GPU is needed, but JAX's CUDA plugin: ``pip install 'jax[cuda13]'``. Without it these tests are
not collected.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from experiments.gpu_programs import targets, training
from experiments.gpu_programs.inspection import inspect
from orlomo_jax import LocalUpdate, Report, make_method
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.server import ServerState, TaskId
from orlomo_jax.server.step import server_step
from orlomo_jax.worker import RoundInput

pytestmark = pytest.mark.slow
SIZE = 1_000_000


@pytest.fixture(scope="module")
def on_gpu():
    """Return trees as abstract arrays on a GPU."""
    return partial(targets.abstract, sharding=targets.target("h200"))


@pytest.mark.parametrize("donate_params", [True, False], ids=["donated", "scratch"])
@pytest.mark.parametrize("leaves", [1, 50])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_step_is_one_pass_in_place_without_waiting(name, leaves, donate_params, on_gpu):
    method = make_method(name, 8, num_local_steps=1)
    params = [jnp.ones(SIZE // leaves) for _ in range(leaves)]
    model_state, state = {"mean": jnp.ones(64)}, method.rule.init(params)
    pending = model_state if method.synchronous else None
    rest = ServerState(None, None, model_state, pending, jnp.float32(0.1))
    update = LocalUpdate(params, None if method.worker_momentum is None else params)
    start = RoundInput(None, None, None, jnp.float32(0.1))
    schedule = jax.tree_util.Partial(lambda step: 0.1 / (1 + step))
    compiled = (
        server_step(method, donate_params, True)
        .lower(
            *on_gpu(([] if donate_params else params, params, state, rest)),
            *on_gpu((Report(TaskId(0, 0, 0), update, model_state), start, 3, schedule)),
        )
        .compile()
    )
    large = f"f32[{SIZE // leaves}]"
    computations = compiled.as_text().split("\n\n")
    (entry,) = (text for text in computations if text.startswith("ENTRY"))
    # At a branch or a loop the host waits for what the device has to do.
    assert not re.search(r" (conditional|while)\(", compiled.as_text())
    # No copy of a large array, and each is read once: w and u together, or Δw and Δu apart.
    readers = [line for line in entry.splitlines() if large in line and " fusion(" in line]
    assert f"{large}{{0}} copy(" not in entry
    operands = [
        name for line in readers for name in re.findall(r"%[\w.]+", line.split("fusion(")[1])
    ]
    arrays = re.findall(rf"(%[\w.]+) = {re.escape(large)}\S* parameter", entry)
    assert arrays
    assert all(operands.count(array) <= 1 for array in arrays)
    # In place.
    memory = compiled.memory_analysis()
    donated = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes >= donated
    assert memory.temp_size_in_bytes < SIZE
    # Scalars are made once, not for every element.
    loops = [text for text in computations if large in text.partition("{")[0] and text != entry]
    assert not any(costly in loop for loop in loops for costly in ("power(", "divide("))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("convolution", "launches"), [("matmul", 1), ("xla", 130)], ids=["matmul", "xla"]
)
def test_a_local_step_neither_waits_nor_copies(convolution, launches):
    """ResNet20 as in the paper; cuDNN's convolutions stand between the graphs of the other form."""
    function, args = training.training(convolution)
    compiled = targets.compile_for(targets.target("h100"), function, args)
    program = inspect(*compiled)
    assert program.local_steps == training.LOCAL_STEPS
    assert program.step.waits == 0
    assert program.step.large_copies == 0
    assert len(program.step.kernels) <= 330
    assert program.step.launches <= launches
    # The condition of the loop over rounds, and two of the loop that shuffles the data.
    assert program.round.waits == 3
    # Three products a layer, of one and the same size, as many as the network has.
    forward = 40_551_040 * training.BATCH_SIZE
    assert 0.9 < program.step.flops / (2 * 3 * forward) <= 1
    assert program.peak < 1e9
