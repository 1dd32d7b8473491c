"""Data sets: read, packed, shuffled."""
