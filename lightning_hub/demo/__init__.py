"""The demo: a small model and small tasks that are part of the project, so it needs no download and no GPU."""
