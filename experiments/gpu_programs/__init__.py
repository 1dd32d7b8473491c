"""Inspects the program that XLA compiles for a training run on a GPU; no GPU is needed."""
