"""Orthogonal subspace fine-tuning: learn the new in directions that the old does not use."""
