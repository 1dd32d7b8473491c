"""What XLA makes of a server step for a GPU: looked at in its program, so that none is needed.

JAX's CUDA plugin is, which compiles for a GPU that it is told of: ``pip install 'jax[cuda13]'``.
"""

import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from orlomo_jax import METHOD_NAMES, LocalUpdate, make_method
from orlomo_jax.server_step import server_step

if find_spec("jax_plugins") is None or not any(
    find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
):
    pytest.skip("needs JAX's CUDA plugin", allow_module_level=True)

SIZE = 1_000_000
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@pytest.fixture(scope="module")
def on_gpu():
    """Return trees as abstract arrays on a GPU."""
    topology = topologies.get_topology_desc("one", "cuda", target_config=H200, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    return lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding), tree
    )


@pytest.mark.parametrize("donate_params", [True, False], ids=["donated", "scratch"])
@pytest.mark.parametrize("leaves", [1, 50])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_step_is_one_pass_in_place_without_waiting(name, leaves, donate_params, on_gpu):
    method = make_method(name, 8)
    params = [jnp.ones(SIZE // leaves) for _ in range(leaves)]
    model_state, state = {"mean": jnp.ones(64)}, method.rule.init(params)
    update = LocalUpdate(params, None if method.worker_momentum is None else params)
    schedule = jax.tree_util.Partial(lambda step: 0.1 / (1 + step))
    compiled = (
        server_step(method, donate_params, True)
        .lower(
            *on_gpu(([] if donate_params else params, params, state, model_state)),
            *on_gpu((update, model_state, 3, 0, 0, schedule)),
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
