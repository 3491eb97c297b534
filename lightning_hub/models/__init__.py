"""Pretrained models: opening a folder or hub id, checking it, and letting it speak."""
