"""Orthogonal subspace fine-tuning: learn the new in directions that the old does not use."""

from lightning_hub.methods.osft.module import OSFT

__all__ = ["OSFT"]
