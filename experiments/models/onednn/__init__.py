"""Computes layers on a CPU with oneDNN and own loops, through JAX's foreign function interface.

It needs a C++ compiler and ``pip install -e '.[onednn]'``. The sources are compiled at the first
use and kept in a folder of compiled libraries. The results are those of ``jax.lax`` and
``flax.nnx`` up to rounding.
"""

from experiments.models.onednn.batch_norm import batch_norm_relu
from experiments.models.onednn.convolution import convolve

__all__ = ["batch_norm_relu", "convolve"]
