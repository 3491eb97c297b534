"""Packed rows, attention within each document, the loss, and proofs that a model computes them correctly."""
