"""What XLA makes of a training run for a GPU, read in its program: no GPU is needed."""
