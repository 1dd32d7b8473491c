"""Trains a byte-level GPT with asynchronous workers."""
