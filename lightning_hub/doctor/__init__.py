"""Checks of a machine, and proofs that its numbers are right."""
