"""Pretrained models: open a folder or hub id, check it, and generate text with it."""
