"""Recipes: read, merge, override, check and write them, without loading torch."""
