"""Checkpoints that are whole or do not exist, exact resume, and export to plain Hugging Face folders."""
