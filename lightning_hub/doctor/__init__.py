"""Checks of a machine, and proofs that training on it gives right numbers."""
