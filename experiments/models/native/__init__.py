"""Computes layers on a CPU with C++ loops, through JAX's foreign function interface.

It needs a C++ compiler. The sources are compiled at the first use, for the processor at hand, and
kept in a folder of compiled libraries. The results are those of ``jax.lax`` and ``flax.nnx`` up to
rounding. They do not depend on the number of threads.
"""

from experiments.models.native.batch_norm import batch_norm_relu
from experiments.models.native.convolution import convolve

__all__ = ["batch_norm_relu", "convolve"]
