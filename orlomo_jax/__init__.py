"""OrLoMo: ordered local momentum for asynchronous distributed training, in JAX."""
