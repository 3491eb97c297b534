"""One training process: the recipe becomes a Trainer, the Trainer runs, the run folder tells what happened."""
