"""Compiles for GPUs that need not be present."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies


class GPU(NamedTuple):
    """The figures of a GPU that a prediction needs, and XLA's description of it.

    Attributes:
        name: Its full name.
        bandwidth: Bytes per second between the GPU and its memory.
        memory: Size of its memory in bytes.
        flops: Float32 operations per second with TF32 products. NVIDIA's data sheet says 494e12;
            thin products like those of ResNet20 stay far below.
    """

    name: str
    bandwidth: float
    memory: float
    flops: float = 100e12

    @property
    def description(self) -> str:
        """The target_config of a topology."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: {self.bandwidth:.0f}  device_memory_size: {self.memory:.0f}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.name}"
"""


GPUS = {
    "h100": GPU("NVIDIA H100 80GB HBM3", 3.35e12, 80e9),
    "h200": GPU("NVIDIA H200", 4.8e12, 150e9),
}


def target(name: str) -> jax.sharding.SingleDeviceSharding:
    """Return the sharding of arrays on a GPU of ``GPUS``, which need not be present.

    Raises:
        NotImplementedError: If JAX's CUDA plugin is not installed.
    """
    # The plugin asks CUDA libraries for their versions, which fails without a GPU driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    topology = topologies.get_topology_desc(
        "one", "cuda", target_config=GPUS[name].description, topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def abstract(tree: Any, sharding: Any = None, leading: tuple[int, ...] = ()) -> Any:
    """Return the tree with abstract arrays (shape and dtype only), with leading axes added."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (*leading, *jnp.shape(x)), jnp.result_type(x), sharding=sharding
        ),
        tree,
    )


def compile_for(sharding: Any, function: Any, args: Sequence[Any]) -> tuple[Any, str]:
    """Compile a jitted function for a target; return it and XLA's list of thunks.

    The list says which kernels each graph contains; it is "" if XLA wrote none.
    """
    lowered = function.lower(*abstract(args, sharding))
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        found = list(Path(folder).glob("*thunk_sequence_after_thunk_passes.txt"))
        return compiled, found[0].read_text(encoding="utf-8") if found else ""
