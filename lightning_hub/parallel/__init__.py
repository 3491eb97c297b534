"""Training on several ranks: process group, meshes, strategies, sharding of a model, clipping, and gathering."""
