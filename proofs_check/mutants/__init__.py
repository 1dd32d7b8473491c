"""Mutants: faulty rules, rounds and servers, and which check must catch which."""
