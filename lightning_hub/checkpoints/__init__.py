"""Checkpoints that are complete or do not exist, exact resume, and export to Hugging Face folders."""
