"""Computes layers on a CPU with C++ loops, through JAX's foreign function interface.

It needs GCC or Clang. The sources are compiled at the first use, for this processor, by the command
``$CXX`` (g++). The library is kept in ``orlomo_jax/native`` under XDG_CACHE_HOME or ``~/.cache``.
The results are those of ``jax.lax`` and ``flax.nnx`` up to rounding. They do not depend on the
number of threads.
"""

from experiments.models.native.batch_norm import Normalized, batch_norm_relu
from experiments.models.native.convolution import convolve
from experiments.models.native.library import load

__all__ = ["Normalized", "batch_norm_relu", "convolve", "load"]
