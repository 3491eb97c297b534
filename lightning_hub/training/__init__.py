"""What runs inside one rank: the recipe becomes a Trainer, the Trainer runs, the run folder records it."""
