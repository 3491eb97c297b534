"""Several processes as one trainer: meshes, strategies, the start of a model, clipping, and gathering it again."""
